"""Tables out of the rows of result files, as Markdown, and lines for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Sequence[Row]], str]]
"""A title, and what compares the rows of a case."""
SHORT = {"float32": "fp32", "tf32": "TF32", "bfloat16": "bf16", "float16": "fp16"}
TITLES = {
    "float32": "fp32",
    "tf32": "fp32, products in TF32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "eager": "",
    "graph": ", replayed from a CUDA graph",
}


def line(row: Row) -> str:
    """One row for the terminal, while the measurement runs."""
    who = row["who"] + (", graph" if row.get("mode") == "graph" else "")
    what = f"{row['kind']:11}{row['case']:24}{row['dtype']:9}{row.get('pass', ''):19}{who:23}"
    if row["kind"] == "absent":
        return f"{what}{row['reason']}"
    if "errors" in row:
        found = "  ".join(f"{name} {error['relative']:.2e}" for name, error in row["errors"].items())
        return f"{what}{row['data']}: {found}" if "data" in row else f"{what}{found}"
    if row["kind"] == "losses":
        return f"{what}{row['losses'][0]:.5f} to {row['losses'][-1]:.5f}, {row['distance']:.2e} from fp32"
    if row["kind"] == "memory":
        return f"{what}{row['extra_bytes'] / 2**20:10.1f} MiB"
    if row["kind"] == "repeats":
        return f"{what}{unequal(row)}"
    if row["kind"] == "timeline":
        return what + "  ".join(f"{name} {time:.3f}" for name, time in row["buckets"].items())
    if row["kind"] == "derivatives":
        unit = "trainings" if row["pass"].startswith(("training", "double")) else "forwards"
        more = f", {row['backwards']:.2f} backwards" if "backwards" in row else ""
        peak = f"{row['peak_bytes'] / 2**20:10.1f} MiB" if "peak_bytes" in row else ""
        return f"{what}{row['milliseconds']['median']:10.4f} ms{row['ratio']:8.2f} of our {unit}{more}{peak}"
    if row["kind"] == "bias":
        return f"{what}{row['milliseconds']['median']:10.4f} ms{row['ratio']:8.3f} of the same without"
    rate = f"{row['gflops_per_second']:12.1f} GFLOP/s" if "gflops_per_second" in row else ""
    host = f"{row['host_microseconds']:8.0f} us of host" if "host_microseconds" in row else ""
    return f"{what}{row['milliseconds']['median']:10.4f} ms{rate}{host}"


def tables(result: dict[str, Any]) -> str:
    """All tables of a result file, as Markdown."""
    return "\n".join([head(result), *_sections(result["rows"])])


def head(result: dict[str, Any]) -> str:
    """The machine, the versions, the commit and the command of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    clocks = f"; clocks and power at the end: {result['clocks']}" if result.get("clocks") else ""
    return (
        f"{result['device']}, {result['threads']} threads, CPU kernels for {result['cpu_instruction_set']}; "
        f"{versions}; {result['date']}, commit {result['commit'][:12]}{dirty}{clocks}\n\n    {result['command']}\n"
    )


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    for kind, title, columns in (
        ("operator", "The operator", [("ours / best peer", ahead)]),
        ("layer", "The layer", [("ours is faster", faster), ("beside attention", _beside_attention)]),
        ("ragged", "The layer, samples of different sizes", [("ours is faster", faster)]),
    ):
        for (dtype, passed, mode), group in grouped(rows_of(rows, kind), "dtype", "pass", "mode"):
            yield f"### {title}, {TITLES[dtype]}, {passed}{TITLES[mode]}\n\n{_rates(group, columns)}"
    for dtype, group in grouped(rows_of(rows, "operator", has="host_microseconds"), "dtype"):
        yield f"### Host time of one call, {TITLES[dtype[0]]}, microseconds\n\n{markdown(group, _host)}"
    for key, group in grouped(rows_of(rows, "error"), "dtype", "data"):
        yield f"### Relative error against fp64, {TITLES[key[0]]}, {key[1]} data\n\n{_errors(group)}"
    for kind, title, cell, columns in (
        ("layer", "Peak memory of the layer over weights, inputs and gradients, MiB", _peak, [("ours", smaller)]),
        ("ragged", "Peak memory, samples of different sizes, MiB", _peak, [("ours", smaller)]),
        ("memory", "Memory of the operator beyond inputs, outputs and gradients, MiB", _extra, []),
        ("overhead", "Host time of one call of eight tokens, milliseconds", _milliseconds, []),
        ("host", "Host time of one call, microseconds", _microseconds, []),
    ):
        for key, group in grouped(rows_of(rows, kind, has=_FIELDS[kind]), "dtype", "pass"):
            yield f"### {title}, {TITLES[key[0]]}, {key[1]}\n\n{markdown(group, cell, *columns)}"
    yield from _extra_sections(rows)
    yield from _derivative_sections(rows)
    yield from _kernel_sections(rows)
    yield from _model_sections(rows)
    absent = {
        f"- {row['who']}, {row['dtype']} {row.get('pass', '')}: {row['reason']}" for row in rows_of(rows, "absent")
    }
    if absent:
        yield "### Not measured\n\n" + "\n".join(sorted(absent)) + "\n"


def _extra_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of what a call does beside: its time over that of the same without."""
    for (dtype, passed), group in grouped(rows_of(rows, "bias"), "dtype", "pass"):
        table = markdown(group, lambda row: f"{row['ratio']:.3f}")
        yield f"### A bias of squared distances, {TITLES[dtype]}, {passed}, over the same call without\n\n{table}"
    for (dtype,), group in grouped(rows_of(rows, "layer"), "dtype"):
        lines = []
        for (case, passed, mode), same in grouped(group, "case", "pass", "mode"):
            plain, normalised = named(same, "ours"), named(same, "ours, qk_norm")
            if plain and normalised:
                ratio = median_of(normalised) / median_of(plain)
                lines.append({"case": case, "who": passed + TITLES[mode], "text": f"{ratio:.3f}"})
        if lines:
            yield f"### The layer with qk_norm, {TITLES[dtype]}, over ours without\n\n{markdown(lines, text)}"


def _derivative_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of derivatives: what a pass takes in our own passes, and its memory."""
    for (dtype,), group in grouped(rows_of(rows, "derivatives"), "dtype"):
        for title, field, cell in (
            ("in our own forwards, or training steps", "ratio", "{:.2f}"),
            ("double backward beyond the training step, in our own backwards", "backwards", "{:.2f}"),
            ("peak memory over inputs, MiB", "peak_bytes", "{:.1f}"),
        ):
            divisor = 2**20 if field == "peak_bytes" else 1
            lines = [
                {**row, "case": f"{row['case']}, {row['pass']}", "text": cell.format(row[field] / divisor)}
                for row in rows_of(group, "derivatives", has=field)
            ]
            if lines:
                yield f"### Derivatives, {TITLES[dtype]}, {title}\n\n{markdown(lines, text)}"


def _kernel_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of kernels: whether they repeat their bits, and how they share the time of a training step."""
    for (dtype,), group in grouped(rows_of(rows, "repeats"), "dtype"):
        table = markdown([{**row, "who": row["who"].replace("ours", row["pass"])} for row in group], unequal)
        yield f"### Repetitions with other bits than the first, {TITLES[dtype]}, and how far off\n\n{table}"
    for (dtype,), group in grouped(rows_of(rows, "timeline"), "dtype"):
        table = markdown([*shares(group)], text)
        yield f"### The GPU's time of a training step, {TITLES[dtype]}, milliseconds\n\n{table}"


def shares(rows: Sequence[Row]) -> Iterator[Row]:
    """One line for everybody, one column for what the time goes to."""
    for row in rows:
        for name, time in {**row["buckets"], "in all": median_of(row)}.items():
            yield {"case": f"{row['case']}, {row['who']}", "who": name, "text": f"{time:.3f}"}


def _model_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of AB-UPT: whether both compute the same, and what it takes."""
    for (dtype,), group in grouped(rows_of(rows, "difference"), "dtype"):
        parts = [{**row, "case": name, "relative": e["relative"]} for row in group for name, e in row["errors"].items()]
        table = markdown(parts, _relative)
        yield f"### AB-UPT, {TITLES[dtype]}, relative difference from noether in fp32\n\n{table}"
    for (dtype,), group in grouped(rows_of(rows, "losses"), "dtype"):
        yield f"### AB-UPT, {TITLES[dtype]}, losses of a training\n\n{markdown([*_points(group)], text)}"
    for (dtype,), group in grouped(rows_of(rows, "model"), "dtype"):
        table = markdown(group, _milliseconds, ("ours is faster", faster))
        yield f"### AB-UPT, {TITLES[dtype]}, milliseconds\n\n{table}"
        if peaks := rows_of(group, "model", has="peak_bytes"):
            table = markdown(peaks, _peak, ("ours", smaller))
            yield f"### AB-UPT, {TITLES[dtype]}, peak memory over weights, inputs and gradients, MiB\n\n{table}"


def _points(rows: Sequence[Row]) -> Iterator[Row]:
    """Some points of each curve, and its distance from that of fp32."""
    for row in rows:
        losses = row["losses"]
        for i in sorted({0, *range(9, len(losses), 10), len(losses) - 1}):
            yield {"case": f"step {i + 1}", "who": row["who"], "text": f"{losses[i]:.5f}"}
        yield {"case": "distance from fp32", "who": row["who"], "text": f"{row['distance']:.1e}"}


_FIELDS = {
    "layer": "peak_bytes",
    "ragged": "peak_bytes",
    "memory": "extra_bytes",
    "overhead": "milliseconds",
    "host": "milliseconds",
}


def rows_of(rows: Iterable[Row], kind: str, has: str = "kind") -> list[Row]:
    """Rows of one kind that have a field."""
    return [row for row in rows if row["kind"] == kind and has in row]


def grouped(rows: Iterable[Row], *fields: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Rows that agree in some fields, in the order in which they first appear. Calls are eager unless a row says so."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field, "eager") for field in fields), []).append(row)
    yield from groups.items()


def _rates(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Rates of all, and how ours compares."""
    unit, divisor = ("TFLOP/s", 1000) if max(r["gflops_per_second"] for r in rows) > 9999 else ("GFLOP/s", 1)

    def rate(row: Row) -> str:
        time, median = row["milliseconds"], row["gflops_per_second"] / divisor
        slowest, fastest = median * time["median"] / time["upper"], median * time["median"] / time["lower"]
        return f"{median:.0f} ({slowest:.0f} – {fastest:.0f})"

    return f"{unit}, median (quartiles)\n\n{markdown(rows, rate, *columns)}"


def ahead(group: Sequence[Row]) -> str:
    """Ours over the best peer."""
    best = min((r for r in group if not is_ours(r) and r["who"] != "matmul"), key=median_of, default=None)
    ours = named(group, "ours")
    return f"{median_of(best) / median_of(ours):.2f} × {best['who']}" if best and ours else ""


def faster(group: Sequence[Row]) -> str:
    """Ours over everybody else, and over ours without the skip."""
    ours = named(group, "ours")
    others = [r for r in group if not is_ours(r) or r["who"] == "ours, without the skip"]
    return ", ".join(f"{median_of(row) / median_of(ours):.2f} × {row['who']}" for row in others) if ours else ""


def _beside_attention(group: Sequence[Row]) -> str:
    """What of our layer is not attention, in per cent of its attention."""
    ours, alone = named(group, "ours"), named(group, "ours, attention alone")
    return f"{100 * (median_of(ours) / median_of(alone) - 1):.0f} %" if ours and alone else ""


def smaller(group: Sequence[Row]) -> str:
    """Our memory over that of everybody else."""
    ours = named(group, "ours")
    others = [row for row in group if not is_ours(row)]
    return ", ".join(f"{ours['peak_bytes'] / row['peak_bytes']:.2f} × {row['who']}" for row in others) if ours else ""


def named(group: Sequence[Row], who: str) -> Row | None:
    """The first row of somebody."""
    return next((row for row in group if row["who"] == who), None)


def _errors(rows: Sequence[Row]) -> str:
    """Errors of the output, and the worst of the gradients; ours over that of torch's best."""

    def cell(row: Row) -> str:
        return " / ".join(f"{error:.1e}" for error in out_and_gradients(row))

    def ratio(group: Sequence[Row]) -> str:
        ours = next((out_and_gradients(r) for r in group if r["who"] == "ours"), ())
        torch = [out_and_gradients(r) for r in group if r["who"] in ("cudnn", "fa2", "efficient", "sdpa")]
        return " / ".join(f"{mine / min(theirs):.2f}" for mine, *theirs in zip(ours, *torch)) if torch else ""

    return f"output / worst gradient\n\n{markdown(rows, cell, ('ours / best of torch', ratio))}"


def out_and_gradients(row: Row) -> list[float]:
    """The error of the output, and of the worst gradient where there are gradients."""
    found = {name: error["relative"] for name, error in row["errors"].items()}
    out = found.pop("out")
    return [out, max(found.values())] if found else [out]


def is_ours(row: Row) -> bool:
    """Whether this package made the row, in any of its forms."""
    return row["who"].startswith("ours")


def median_of(row: Row) -> float:
    """The median time in milliseconds."""
    return row["milliseconds"]["median"]


def _host(row: Row) -> str:
    return f"{row['host_microseconds']:.0f}"


def _relative(row: Row) -> str:
    return f"{row['relative']:.1e}"


def text(row: Row) -> str:
    """A cell that was made before."""
    return row["text"]


def unequal(row: Row) -> str:
    """How many repetitions differ, and by how much of the largest entry."""
    return f"{row['unequal']} of {row['repeats']}" + (f", {row['largest_difference']:.1e}" if row["unequal"] else "")


def _peak(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f}"


def _extra(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:.1f}"


def _milliseconds(row: Row) -> str:
    time = row["milliseconds"]
    return f"{time['median']:.4g} ({time['lower']:.4g} – {time['upper']:.4g})"


def _microseconds(row: Row) -> str:
    time = row["milliseconds"]
    return f"{1000 * time['median']:.1f} ({1000 * time['lower']:.1f} – {1000 * time['upper']:.1f})"


def markdown(rows: Sequence[Row], cell: Callable[[Row], str], *columns: Column) -> str:
    """One line a case, one column for everybody who was measured, and those that compare them, but empty ones."""
    names = list(dict.fromkeys(row["who"] for row in rows))
    cases = list(grouped(rows, "case"))
    compared = [(title, [compare(group) for _, group in cases]) for title, compare in columns]
    compared = [(title, cells) for title, cells in compared if any(cells)]
    head = ["case", *names, *(title for title, _ in compared)]
    lines = [head, ["---"] * len(head)]
    for i, ((case,), group) in enumerate(cases):
        found = {row["who"]: cell(row) for row in group}
        lines.append([case, *(found.get(name, "") for name in names), *(cells[i] for _, cells in compared)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
