"""Tables out of result files: ``python -m bench.report`` rewrites docs/performance.md from bench/results/*.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
Column = tuple[str, Callable[[Sequence[Row]], str]]
"""A title, and what compares the rows of a case."""
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
        return f"{what}{_unequal(row)}"
    if row["kind"] == "timeline":
        return what + "  ".join(f"{name} {time:.3f}" for name, time in row["buckets"].items())
    rate = f"{row['gflops_per_second']:12.1f} GFLOP/s" if "gflops_per_second" in row else ""
    host = f"{row['host_microseconds']:8.0f} us of host" if "host_microseconds" in row else ""
    return f"{what}{row['milliseconds']['median']:10.4f} ms{rate}{host}"


def tables(result: dict[str, Any]) -> str:
    """All tables of a result file, as Markdown."""
    return "\n".join([_head(result), *_sections(result["rows"])])


def _head(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    clocks = f"; clocks and power at the end: {result['clocks']}" if result.get("clocks") else ""
    return (
        f"{result['device']}, {result['threads']} threads, CPU kernels for {result['cpu_instruction_set']}; "
        f"{versions}; {result['date']}, commit {result['commit'][:12]}{dirty}{clocks}\n\n    {result['command']}\n"
    )


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    for kind, title, columns in (
        ("operator", "The operator", [("ours / best peer", _ahead)]),
        ("layer", "The layer", [("ours is faster", _faster), ("beside attention", _beside_attention)]),
    ):
        for (dtype, passed, mode), group in _grouped(_of(rows, kind), "dtype", "pass", "mode"):
            yield f"### {title}, {TITLES[dtype]}, {passed}{TITLES[mode]}\n\n{_rates(group, columns)}"
    for dtype, group in _grouped(_of(rows, "operator", has="host_microseconds"), "dtype"):
        yield f"### Host time of one call, {TITLES[dtype[0]]}, microseconds\n\n{_table(group, _host)}"
    for key, group in _grouped(_of(rows, "error"), "dtype", "data"):
        yield f"### Relative error against fp64, {TITLES[key[0]]}, {key[1]} data\n\n{_errors(group)}"
    for kind, title, cell, columns in (
        ("layer", "Peak memory of the layer over weights, inputs and gradients, MiB", _peak, [("ours", _smaller)]),
        ("memory", "Memory of the operator beyond inputs, outputs and gradients, MiB", _extra, []),
        ("overhead", "Host time of one call of eight tokens, milliseconds", _milliseconds, []),
    ):
        for key, group in _grouped(_of(rows, kind, has=_FIELDS[kind]), "dtype", "pass"):
            yield f"### {title}, {TITLES[key[0]]}, {key[1]}\n\n{_table(group, cell, *columns)}"
    yield from _kernel_sections(rows)
    yield from _model_sections(rows)
    absent = {f"- {row['who']}, {row['dtype']} {row.get('pass', '')}: {row['reason']}" for row in _of(rows, "absent")}
    if absent:
        yield "### Not measured\n\n" + "\n".join(sorted(absent)) + "\n"


def _kernel_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Of kernels: whether they repeat their bits, and how they share the time of a training step."""
    for (dtype,), group in _grouped(_of(rows, "repeats"), "dtype"):
        table = _table([{**row, "who": row["who"].replace("ours", row["pass"])} for row in group], _unequal)
        yield f"### Repetitions with other bits than the first, {TITLES[dtype]}, and how far off\n\n{table}"
    for (dtype,), group in _grouped(_of(rows, "timeline"), "dtype"):
        table = _table([*_shares(group)], _text)
        yield f"### The GPU's time of a training step, {TITLES[dtype]}, milliseconds\n\n{table}"


def _shares(rows: Sequence[Row]) -> Iterator[Row]:
    """One line for everybody, one column for what the time goes to."""
    for row in rows:
        for name, time in {**row["buckets"], "in all": _median(row)}.items():
            yield {"case": f"{row['case']}, {row['who']}", "who": name, "text": f"{time:.3f}"}


def _model_sections(rows: Sequence[Row]) -> Iterator[str]:
    """Of AB-UPT: whether both compute the same, and what it takes."""
    for (dtype,), group in _grouped(_of(rows, "difference"), "dtype"):
        parts = ({**row, "case": name, "relative": e["relative"]} for row in group for name, e in row["errors"].items())
        yield f"### AB-UPT, {TITLES[dtype]}, relative difference from noether in fp32\n\n{_table([*parts], _relative)}"
    for (dtype,), group in _grouped(_of(rows, "losses"), "dtype"):
        yield f"### AB-UPT, {TITLES[dtype]}, losses of a training\n\n{_table([*_points(group)], _text)}"
    for (dtype,), group in _grouped(_of(rows, "model"), "dtype"):
        table = _table(group, _milliseconds, ("ours is faster", _faster))
        yield f"### AB-UPT, {TITLES[dtype]}, milliseconds\n\n{table}"
        if peaks := _of(group, "model", has="peak_bytes"):
            table = _table(peaks, _peak, ("ours", _smaller))
            yield f"### AB-UPT, {TITLES[dtype]}, peak memory over weights, inputs and gradients, MiB\n\n{table}"


def _points(rows: Sequence[Row]) -> Iterator[Row]:
    """Some points of each curve, and its distance from that of fp32."""
    for row in rows:
        losses = row["losses"]
        for i in sorted({0, *range(9, len(losses), 10), len(losses) - 1}):
            yield {"case": f"step {i + 1}", "who": row["who"], "text": f"{losses[i]:.5f}"}
        yield {"case": "distance from fp32", "who": row["who"], "text": f"{row['distance']:.1e}"}


_FIELDS = {"layer": "peak_bytes", "memory": "extra_bytes", "overhead": "milliseconds"}


def _of(rows: Iterable[Row], kind: str, has: str = "kind") -> list[Row]:
    return [row for row in rows if row["kind"] == kind and has in row]


def _grouped(rows: Iterable[Row], *fields: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
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

    return f"{unit}, median (quartiles)\n\n{_table(rows, rate, *columns)}"


def _ahead(group: Sequence[Row]) -> str:
    """Ours over the best peer."""
    best = min((r for r in group if not _is_ours(r) and r["who"] != "matmul"), key=_median, default=None)
    ours = _named(group, "ours")
    return f"{_median(best) / _median(ours):.2f} × {best['who']}" if best and ours else ""


def _faster(group: Sequence[Row]) -> str:
    """Ours over everybody else, and over ours without the skip."""
    ours = _named(group, "ours")
    others = [r for r in group if not _is_ours(r) or r["who"] == "ours, without the skip"]
    return ", ".join(f"{_median(row) / _median(ours):.2f} × {row['who']}" for row in others) if ours else ""


def _beside_attention(group: Sequence[Row]) -> str:
    """What of our layer is not attention, in per cent of its attention."""
    ours, alone = _named(group, "ours"), _named(group, "ours, attention alone")
    return f"{100 * (_median(ours) / _median(alone) - 1):.0f} %" if ours and alone else ""


def _smaller(group: Sequence[Row]) -> str:
    """Our memory over that of everybody else."""
    ours = _named(group, "ours")
    others = [row for row in group if not _is_ours(row)]
    return ", ".join(f"{ours['peak_bytes'] / row['peak_bytes']:.2f} × {row['who']}" for row in others) if ours else ""


def _named(group: Sequence[Row], who: str) -> Row | None:
    return next((row for row in group if row["who"] == who), None)


def _errors(rows: Sequence[Row]) -> str:
    """Errors of the output, and the worst of the gradients; ours over that of torch's best."""

    def cell(row: Row) -> str:
        return " / ".join(f"{error:.1e}" for error in _out_and_gradients(row))

    def ratio(group: Sequence[Row]) -> str:
        ours = next((_out_and_gradients(r) for r in group if r["who"] == "ours"), ())
        torch = [_out_and_gradients(r) for r in group if r["who"] in ("cudnn", "fa2", "efficient", "sdpa")]
        return " / ".join(f"{mine / min(theirs):.2f}" for mine, *theirs in zip(ours, *torch)) if torch else ""

    return f"output / worst gradient\n\n{_table(rows, cell, ('ours / best of torch', ratio))}"


def _out_and_gradients(row: Row) -> list[float]:
    found = {name: error["relative"] for name, error in row["errors"].items()}
    out = found.pop("out")
    return [out, max(found.values())] if found else [out]


def _is_ours(row: Row) -> bool:
    return row["who"].startswith("ours")


def _median(row: Row) -> float:
    return row["milliseconds"]["median"]


def _host(row: Row) -> str:
    return f"{row['host_microseconds']:.0f}"


def _relative(row: Row) -> str:
    return f"{row['relative']:.1e}"


def _text(row: Row) -> str:
    return row["text"]


def _unequal(row: Row) -> str:
    """How many repetitions differ, and by how much of the largest entry."""
    return f"{row['unequal']} of {row['repeats']}" + (f", {row['largest_difference']:.1e}" if row["unequal"] else "")


def _peak(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f}"


def _extra(row: Row) -> str:
    return f"{row['extra_bytes'] / 2**20:.1f}"


def _milliseconds(row: Row) -> str:
    time = row["milliseconds"]
    return f"{time['median']:.4g} ({time['lower']:.4g} – {time['upper']:.4g})"


def _table(rows: Sequence[Row], cell: Callable[[Row], str], *columns: Column) -> str:
    """One line a case, one column for everybody who was measured, and those that compare them, but empty ones."""
    names = list(dict.fromkeys(row["who"] for row in rows))
    cases = list(_grouped(rows, "case"))
    compared = [(title, [compare(group) for _, group in cases]) for title, compare in columns]
    compared = [(title, cells) for title, cells in compared if any(cells)]
    head = ["case", *names, *(title for title, _ in compared)]
    lines = [head, ["---"] * len(head)]
    for i, ((case,), group) in enumerate(cases):
        found = {row["who"]: cell(row) for row in group}
        lines.append([case, *(found.get(name, "") for name in names), *(cells[i] for _, cells in compared)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws how many times faster ours is than each peer. Needs matplotlib."""
    import matplotlib.pyplot as plt

    labels, ratios = [], []
    timed = [row for row in result["rows"] if "milliseconds" in row]
    for (*what, mode), group in _grouped(timed, "kind", "case", "dtype", "pass", "mode"):
        ours = next((_median(row) for row in group if row["who"] == "ours"), None)
        for row in group:
            if ours and not _is_ours(row) and row["who"] != "matmul":
                labels.append(f"{' '.join(what)}{TITLES[mode]} vs {row['who']}")
                ratios.append(_median(row) / ours)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(labels)), layout="constrained")
    axes.barh(labels, ratios, color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than the peer, {result['device']}")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Rewrites docs/performance.md."""
    parts = [
        "# Performance\n",
        "Made by `python -m bench.report` from the files in bench/results; every file is one run, in which ours and",
        "the peers took turns. Rates count attended pairs only: 4·B·H·D per pair forward, 2.5 times that backward; of",
        "a layer, those of its attention alone. Peers are called once per pattern, through their public interface.",
        "On a GPU, calls follow each other without a pause over inputs in rotation, so that neither an idle device nor",
        "its L2 cache helps anybody; from commit 86931a5 on each sample is run once before it is timed. Where a GPU",
        "is faster than its host, the eager rate is the host's. Beside attention is what our layer takes longer than",
        "its attention alone. The skip is that of keys and values which nobody reads.\n",
    ]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        parts.append(f"## {path.stem}\n\n{tables(json.loads(path.read_text()))}")
    (ROOT / "docs" / "performance.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
