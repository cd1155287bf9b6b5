"""``python -m bench.report`` rewrites docs/performance.md, its picture, and a page of details for every result file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from bench import files, picture, tables
from bench.files import Result
from bench.tables import Column, Row, grouped, named, rows_of

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURE, DETAILS = "performance.md", "performance.svg", "performance"
NAMES = {
    "ours": "ours",
    "cudnn": "cuDNN",
    "fa2": "FA2",
    "fa3": "FA3",
    "fa4": "FA4",
    "torch varlen": "varlen_attn",
    "fa3 varlen": "FA3 varlen",
    "fa4 varlen": "FA4 varlen",
    "flex": "FlexAttention",
    "cudnn, one batch": "cuDNN, one batch",
    "efficient": "memory-efficient",
    "sdpa": "torch SDPA",
    "noether": "noether",
    "noether, compiled": "noether, compiled",
    "ours, compiled": "ours, compiled",
    "baseline": "torch modules",
    "padded": "padded",
}
"""Those whom a table of this page shows, in this order, as it calls them."""

METHOD = """# Performance

This page answers one question a section. `python -m bench.report` writes it from the files in `bench/results`.

![How much faster the operator and the layer are than others](performance.svg)

- One file is one run on one machine. In a run, ours and the others take turns, so that a ratio within a table is fair.
- Numbers are medians. Quartiles, all columns and all cases stand on the page that each section links to.
- A rate counts attended pairs only: 4·B·H·D operations a pair forward, 2.5 times that backward. The rate of a layer
  counts the operations of its attention alone.
- The others are called through their public interface. `varlen_attn` of torch, FA3 varlen and FA4 varlen get all
  patterns in one call, each as a sequence: keys are read in place where they lie in front of one another, and are
  gathered before where they do not. All others are called once per pattern.
- On a GPU, calls follow each other without a pause over inputs in rotation. Neither an idle device nor a warm L2 cache
  helps anybody. Since commit 86931a5 each sample is run once before it is timed.
- Where the GPU is faster than its host, the eager rate is the host's rate. "Graph" is the same call, replayed from a
  CUDA graph.
- FA2, cuDNN and the memory-efficient kernel are those of torch. FA3 and FA4 are packages of their own, of which that of
  FA3, `fa3_fwd`, has a forward only.
- `bench/cases.py` defines the cases: group sizes and patterns of published models.
- `python -m bench --help` lists what can be measured; `python -m bench --quick` takes a few minutes.
"""


@dataclass(frozen=True)
class Question:
    """One section of the page.

    Attributes:
        title: What a reader asks.
        note: How to read the answer.
        what: The names of the result files that answer it, of any machine.
        answer: Makes tables of the rows of one file.
    """

    title: str
    note: str
    what: tuple[str, ...]
    answer: Callable[[Sequence[Row]], Iterator[str]]


def page(results: dict[Path, Result]) -> str:
    """The whole page, as Markdown."""
    questions = list(_questions())
    sections = (_section(question, results) for question in questions)
    return "\n".join(part for part in (METHOD, *sections, _others(questions, results)) if part)


def _section(question: Question, results: dict[Path, Result]) -> str:
    head = f"## {question.title}\n\n{fill(question.note, 120)}\n"
    parts = []
    for what in question.what:
        newest_first = sorted(results, key=lambda path: results[path]["date"], reverse=True)
        for path in (path for path in newest_first if path.stem == what):
            parts += [*question.answer(results[path]["rows"]), _source(path, results[path])]
    return "\n".join([head, *parts]) if parts else ""


def _others(questions: Sequence[Question], results: dict[Path, Result]) -> str:
    """Links to what no question asks for."""
    asked = {what for question in questions for what in question.what}
    links = [
        f"- [{path.parent.name}, {path.stem}]({DETAILS}/{_details(path)})" for path in results if path.stem not in asked
    ]
    return "\n".join(["## More results\n", *links]) + "\n" if links else ""


def _source(path: Path, result: Result) -> str:
    """Where the numbers above come from."""
    changes = " with uncommitted changes" if result["uncommitted_changes"] else ""
    name = f"{DETAILS}/{_details(path)}"
    kernels = "" if "CUDA" in result["versions"] else f", {result['threads']} threads, {result['cpu_instruction_set']}"
    return (
        f"{result['device']}{kernels}, {result['date']}, commit {result['commit'][:12]}{changes}; "
        f"[all numbers]({name}):\n\n    {result['command']}\n"
    )


def _details(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}.md"


def _questions() -> Iterator[Question]:
    yield Question(
        "How fast is the operator in bf16?",
        "TFLOP/s. The last columns divide the best other's time by ours, eager and by graph.",
        ("operator-bf16",),
        _operator,
    )
    yield Question(
        "How fast is it in fp32?",
        "TFLOP/s. In the columns of TF32, torch may round products to TF32.",
        ("operator-fp32-tf32",),
        _fp32,
    )
    yield Question(
        "Is one compiled FlexAttention call faster?",
        "TFLOP/s, bf16, on another machine and an older commit than the first table: compare within this table.",
        ("operator-bf16-flex",),
        _operator,
    )
    yield Question(
        "And with hundreds of groups?",
        "TFLOP/s, bf16; groups of one size that attend to themselves, heads x head_dim, beside one call of cuDNN for "
        "all of them as a batch, and chunks that attend to themselves and to pooled tokens.",
        ("groups-bf16",),
        _groups,
    )
    yield Question(
        "How fast are the portable kernels?",
        "TFLOP/s, bf16. They serve every GPU from compute capability 8.0 on. They were measured on a Hopper GPU, which "
        "has faster ones.",
        ("operator-bf16-portable",),
        _operator,
    )
    yield Question(
        "How fast is the layer, and how much memory does it take?",
        "Projection, RoPE, attention and output projection, forward and backward, beside the module of "
        "`emmiai-noether`; fp16 by autocast. Rates in TFLOP/s, peak memory in MiB over weights, inputs and gradients.",
        ("layer-fp16", "layer-fp32-tf32"),
        _layer,
    )
    yield Question(
        "And under torch.compile?",
        "The same layer; TFLOP/s and MiB.",
        ("layer-fp16-compiled",),
        _layer,
    )
    yield Question(
        "What does a batch of samples of different sizes gain without padding?",
        "The layer over `ma.ragged`'s one sequence, beside the same layer over the batch that is padded to the largest "
        "sample, with a mask; 60 % of that are tokens. TFLOP/s of what tokens attend to, peak memory in MiB.",
        ("ragged-bf16", "ragged-fp32"),
        _ragged,
    )
    yield Question(
        "What does a whole model gain?",
        "AB-UPT of `emmiai-noether` at the size of DrivAerML, before and after `ma.noether.swap`: a training step, and "
        "inference over a million points. Milliseconds and MiB, then the relative difference from noether in fp32.",
        ("model-fp16",),
        _model,
    )
    yield Question(
        "Where does the time of a training step go?",
        "Milliseconds of the GPU, by what its kernels are for; an older commit than the table of the layer.",
        ("timeline-fp16",),
        _timeline,
    )
    yield Question(
        "How much host time does a call take?",
        "Microseconds of an eager forward of the operator.",
        ("operator-bf16", "overhead", "host"),
        _host_time,
    )
    yield Question(
        "How much memory does the operator take on a CPU?",
        "MiB of a forward and a backward beyond inputs, outputs and gradients. On GPUs the layer's table has the peak.",
        ("memory-fp32-bf16",),
        _extra_memory,
    )
    yield Question(
        "Are results the same in every run?",
        "First, how many of 10000 repetitions have other bits than the first call, and how far off they are relative "
        "to the largest entry. Then what deterministic mode costs: TFLOP/s of the bf16 backward, from a CUDA graph.",
        ("repeats", "operator-bf16"),
        _determinism,
    )
    yield Question(
        "How exact is it?",
        "Relative error against fp64, output / worst gradient: the largest over all cases, ours and torch's best, "
        "which does not round to TF32. "
        "[precision.md](precision.md) says how products are computed.",
        ("operator-bf16", "operator-fp32-tf32"),
        _errors,
    )
    yield Question(
        "How fast is it on a CPU?",
        "GFLOP/s of the operator and of the layer, two threads. The last column divides the best other's time by ours.",
        ("operator-layer-fp32", "operator-layer-bf16"),
        _cpu,
    )


def _by_case(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """One line a case; columns without a word are left out."""
    cases = list(grouped(rows, "case"))
    filled = [(title, [cell(group) for _, group in cases]) for title, cell in columns]
    filled = [(title, cells) for title, cells in filled if any(cells)]
    lines = [["case", *(title for title, _ in filled)], ["---"] * (1 + len(filled))]
    lines += [[case, *(cells[i] for _, cells in filled)] for i, ((case,), _) in enumerate(cases)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _column(who: str, cell: Callable[[Row], str], title: str | None = None, **fields: str) -> Column:
    """What a cell says of the first row of somebody; calls are eager unless the fields ask for a graph."""
    wanted = {"who": who, "mode": "eager"} | fields

    def of_group(group: Sequence[Row]) -> str:
        rows = (row for row in group if all(row.get(key, "eager") == value for key, value in wanted.items()))
        return next((cell(row) for row in rows), "")

    return title or NAMES[who], of_group


def _everybody(cell: Callable[[Row], str]) -> list[Column]:
    return [_column(who, cell) for who in NAMES]


def _rate(row: Row) -> str:
    rate = row["gflops_per_second"] / 1000
    return f"{rate:.0f}" if rate >= 1 else f"{rate:.2g}"  # CPUs reach fractions


def _peak(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""


def _compared(compare: Callable[[Sequence[Row]], str], mode: str = "eager") -> Callable[[Sequence[Row]], str]:
    """Compares calls of everybody who has a column, eager unless said otherwise, by the names of this page."""

    def of_group(group: Sequence[Row]) -> str:
        rows = (row for row in group if row.get("mode", "eager") == mode and row["who"] in NAMES)
        return compare([{**row, "who": NAMES[row["who"]]} for row in rows])

    return of_group


def _operator(rows: Sequence[Row]) -> Iterator[str]:
    ours, *others = _everybody(_rate)
    graphs = [_column(who, _rate, f"{NAMES[who]}, graph", mode="graph") for who in ("ours", "fa4 varlen")]
    ratios = [("ours / best other", _compared(tables.ahead)), ("by graph", _compared(tables.ahead, "graph"))]
    for (passed,), group in grouped(rows_of(rows, "operator"), "pass"):
        yield f"### {passed.capitalize()}\n"
        yield _by_case(group, [ours, *others, *graphs, *ratios])


def _groups(rows: Sequence[Row]) -> Iterator[str]:
    columns = [
        _column(who, _rate, NAMES[who] + (", graph" if mode == "graph" else ""), mode=mode)
        for mode in ("eager", "graph")
        for who in ("ours", "cudnn, one batch")
    ]
    ratios = [("ours / cuDNN", _compared(tables.ahead)), ("by graph", _compared(tables.ahead, "graph"))]
    for (passed,), group in grouped(rows_of(rows, "operator"), "pass"):
        yield f"### {passed.capitalize()}\n"
        yield _by_case(group, [*columns, *ratios])


def _fp32(rows: Sequence[Row]) -> Iterator[str]:
    for (passed,), group in grouped(rows_of(rows, "operator"), "pass"):
        columns = [
            _column(who, _rate, f"{NAMES[who]}, {tables.SHORT[dtype]}", dtype=dtype)
            for dtype in ("float32", "tf32")
            for who in ("ours", "efficient")
        ]
        yield f"### {passed.capitalize()}\n"
        yield _by_case(group, columns)


def _layer(rows: Sequence[Row]) -> Iterator[str]:
    ours, *others = _everybody(_rate)
    columns = [
        ours,
        _column("ours", _rate, "ours, graph", mode="graph"),
        *others,
        ("ours is faster", _compared(tables.faster)),
        *(_column(who, _peak, f"{NAMES[who]}, MiB") for who in ("ours", "noether")),
        ("memory", _compared(_ratio_of_peaks)),
    ]
    for (dtype, passed), group in grouped(rows_of(rows, "layer"), "dtype", "pass"):
        if passed != "forward":
            yield f"### {tables.TITLES[dtype]}, {passed}\n"
            yield _by_case(group, columns)


def _ragged(rows: Sequence[Row]) -> Iterator[str]:
    columns = [
        *_everybody(_rate),
        ("ours is faster", _compared(tables.faster)),
        ("by graph", _compared(tables.faster, "graph")),
        *(_column(who, _peak, f"{NAMES[who]}, MiB") for who in ("ours", "padded")),
    ]
    for (dtype, passed), group in grouped(rows_of(rows, "ragged"), "dtype", "pass"):
        yield f"### {tables.TITLES[dtype]}, {passed}\n"
        yield _by_case(group, columns)


def _ratio_of_peaks(group: Sequence[Row]) -> str:
    ours, theirs = (named(rows_of(group, group[0]["kind"], has="peak_bytes"), who) for who in ("ours", "noether"))
    return f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f} × noether" if ours and theirs else ""


def _model(rows: Sequence[Row]) -> Iterator[str]:
    columns = [
        *(_column(who, lambda row: f"{tables.median_of(row):.1f}", f"{who}, ms") for who in ("ours", "noether")),
        ("ours is faster", tables.faster),
        *(_column(who, _peak, f"{who}, MiB") for who in ("ours", "noether")),
        ("memory", _ratio_of_peaks),
    ]
    yield _by_case(rows_of(rows, "model"), columns)
    parts = [
        {**row, "case": name, "text": f"{error['relative']:.1e}"}
        for row in rows_of(rows, "difference")
        for name, error in row["errors"].items()
    ]
    yield tables.markdown(parts, tables.text)


def _timeline(rows: Sequence[Row]) -> Iterator[str]:
    yield tables.markdown([*tables.shares(rows_of(rows, "timeline"))], tables.text)


def _host_time(rows: Sequence[Row]) -> Iterator[str]:
    if calls := rows_of(rows, "operator", has="host_microseconds"):
        yield _by_case(calls, _everybody(lambda row: f"{row['host_microseconds']:.0f}"))
    if calls := rows_of(rows, "overhead"):
        yield _by_case(calls, _everybody(lambda row: f"{1000 * tables.median_of(row):.0f}"))
    for (dtype, passed), calls in grouped(rows_of(rows, "host"), "dtype", "pass"):
        yield f"{tables.SHORT[dtype]}, {passed}:\n"
        yield _by_case(calls, _everybody(lambda row: f"{1000 * tables.median_of(row):.0f}"))


def _extra_memory(rows: Sequence[Row]) -> Iterator[str]:
    columns = [
        _column("ours", lambda row: f"{row['extra_bytes'] / 2**20:.1f}", tables.SHORT[dtype], dtype=dtype)
        for dtype in ("float32", "bfloat16")
    ]
    yield _by_case(rows_of(rows, "memory"), columns)


def _determinism(rows: Sequence[Row]) -> Iterator[str]:
    if repeats := rows_of(rows, "repeats"):
        cases = [{**row, "case": f"{row['case']}, {tables.SHORT[row['dtype']]}"} for row in repeats]
        titles = [("ours", "forward"), ("ours", "backward"), ("ours, deterministic", "backward")]
        columns = [
            _column(who, tables.unequal, who.replace("ours", passed), **{"pass": passed}) for who, passed in titles
        ]
        yield _by_case(cases, columns)
    modes = ("ours", "ours, deterministic")
    if backward := [r for r in rows_of(rows, "operator") if r["who"] in modes and r["pass"] == "backward"]:
        columns = [_column(who, _rate, who, mode="graph") for who in modes]
        yield _by_case(backward, [*columns, ("share", _share_of_default)])


def _share_of_default(group: Sequence[Row]) -> str:
    graphs = [row for row in group if row.get("mode") == "graph"]
    default, deterministic = named(graphs, "ours"), named(graphs, "ours, deterministic")
    return f"{tables.median_of(default) / tables.median_of(deterministic):.2f}" if default and deterministic else ""


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    found = []
    for (dtype, data), group in grouped(rows_of(rows, "error"), "dtype", "data"):
        best = [_best_of_torch(case) for _, case in grouped(group, "case")]
        ours = [tables.out_and_gradients(row) for row in group if row["who"] == "ours"]
        for who, errors in (("ours", ours), ("best of torch", [row for row in best if row])):
            text = " / ".join(f"{max(column):.1e}" for column in zip(*errors))
            found.append({"case": f"{tables.SHORT[dtype]}, {data}", "who": who, "text": text})
    yield tables.markdown(found, tables.text)


def _best_of_torch(case: Sequence[Row]) -> list[float]:
    """The least errors that any attention of torch makes of a case."""
    errors = [tables.out_and_gradients(row) for row in case if row["who"] in ("cudnn", "fa2", "efficient")]
    return [min(column) for column in zip(*errors)]


def _cpu(rows: Sequence[Row]) -> Iterator[str]:
    columns = [
        *_everybody(lambda row: f"{row['gflops_per_second']:.0f}"),
        ("ours / best other", _compared(tables.ahead)),
    ]
    timed = [row for row in rows if row["kind"] in ("operator", "layer")]
    for (dtype,), group in grouped(timed, "dtype"):
        yield f"### {tables.TITLES[dtype]}\n"
        yield _by_case([{**row, "case": f"{row['kind']}, {row['pass']}: {row['case']}"} for row in group], columns)


def main() -> None:
    """Rewrites the page, the picture and the details."""
    results = {path: files.load(path) for path in sorted(files.RESULTS.glob("*/*.json"))}
    (DOCS / PAGE).write_text(page(results))
    picture.draw(results, DOCS / PICTURE)
    for old in (DOCS / DETAILS).glob("*.md"):
        old.unlink()
    (DOCS / DETAILS).mkdir(exist_ok=True)
    for path, result in results.items():
        head = f"# {path.parent.name}, {path.stem}\n\nBack to [all questions](../{PAGE}).\n"
        (DOCS / DETAILS / _details(path)).write_text(f"{head}\n{tables.tables(result)}")


if __name__ == "__main__":
    main()
