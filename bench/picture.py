"""The picture of docs/performance.md and README.md: how many times faster ours is than others. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.files import Result
from bench.tables import Row, grouped, median_of, named, rows_of

PANELS = (
    ("operator-bf16", "operator", "forward", "Operator, bf16, forward", ("cudnn", "fa3", "fa4", "fa4 varlen")),
    ("operator-bf16", "operator", "backward", "Operator, bf16, backward", ("cudnn", "fa4", "fa4 varlen")),
    ("layer-fp16", "layer", "forward + backward", "Layer, fp16, training step", ("noether",)),
)
"""A result file, a kind of rows and a pass, a title, and the others."""
COLORS = {
    "cudnn": "#76b900",
    "fa2": "#9ecae1",
    "fa3": "#4292c6",
    "fa4": "#08519c",
    "fa4 varlen": "#6a51a3",
    "noether": "#e6850e",
}
LABELS = {
    "cudnn": "cuDNN",
    "fa2": "FA2",
    "fa3": "FA3",
    "fa4": "FA4",
    "fa4 varlen": "FA4 varlen",
    "noether": "emmiai-noether",
}


def draw(results: dict[Path, Result], path: Path) -> None:
    """Draws bars of all panels to an SVG file, on a logarithmic axis where 1 is as fast as ours."""
    import matplotlib

    matplotlib.use("Agg")
    # Names of elements are drawn by chance unless they are salted: the same numbers are to give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "mixed_attention", "font.size": 8, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3.9), layout="constrained")
    for axes, (what, kind, passed, title, others) in zip(panels, PANELS):
        result = next((result for found, result in results.items() if found.stem == what), None)
        if result is None:
            axes.set_axis_off()
            continue
        rows = [row for row in rows_of(result["rows"], kind) if row["pass"] == passed]
        bars = list(ratios(rows, others))
        cases = list(dict.fromkeys(case for case, _, _ in bars))
        height = 0.8 / len(others)
        for i, who in enumerate(others):
            mine = {case: ratio for case, name, ratio in bars if name == who}
            places = [cases.index(case) + (i - (len(others) - 1) / 2) * height for case in mine]
            axes.barh(
                places, [ratio - 1 for ratio in mine.values()], height, left=1, color=COLORS[who], label=LABELS[who]
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel(f"times faster than …, {result['device']}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(others), frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def ratios(rows: Sequence[Row], others: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Compares eager calls: the case, who else was measured, and that one's median time over ours."""
    eager = [row for row in rows if row.get("mode", "eager") == "eager"]
    for (case,), group in grouped(eager, "case"):
        ours = named(group, "ours")
        for who in others:
            theirs = named(group, who)
            if ours and theirs:
                yield case, who, median_of(theirs) / median_of(ours)
