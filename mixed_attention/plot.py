"""The picture of a plan: who attends to whom, token groups along both axes."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixed_attention.plan import AttentionPlan, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_SMALLEST_SHARE = 0.6  # of what a group would have if all had the same size, so that its label has room


def plot(plan: AttentionPlan, path: str | Path) -> None:
    """Draws who attends to whom, groups along both axes, to an image file. Needs the ``plot`` extra.

    The format follows from the name of the file.

    Args:
        plan: The plan.
        path: Where to write, e.g. ``mask.png``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the plan is one of row ranges, which has no groups.
    """
    if plan.query_segments and not plan.groups:
        raise ValueError("plot: a plan made by from_segments has no token groups to draw; plan.mask() shows its rows")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting a plan needs matplotlib, which the `plot` extra brings: pip install 'mixed_attention[plot]'"
        ) from error
    rows = _extents([(group, group.size) for group in plan.groups if group.query_start is not None])
    columns = _extents([(group, group.num_keys) for group in plan.groups if group.key_start is not None])
    figure = Figure(figsize=(3.6 + 1.0 * max(len(columns), 3), 2.6 + 0.7 * max(len(rows), 3)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_blocks(axes, plan, rows, columns)
    _draw_axes(axes, rows, columns)
    _draw_legend(figure, plan)
    share = plan.num_pairs() / max(plan.num_queries * plan.num_keys, 1)
    title = f"{plan.num_queries:,} queries × {plan.num_keys:,} keys, {plan.num_pairs():,} attended pairs ({share:.0%})"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def _extents(groups: list[tuple[Group, int]]) -> list[tuple[Group, int, float, float]]:
    """Where each group lies on an axis from 0 to 1: by its number of rows there, but small groups are widened."""
    total = sum(rows for _, rows in groups)
    smallest = _SMALLEST_SHARE / max(len(groups), 1)
    widths = [max(rows / total if total else 0.0, smallest) for _, rows in groups]
    ends = [sum(widths[: index + 1]) / sum(widths) for index in range(len(widths))]
    return [(*group, start, end) for group, start, end in zip(groups, [0.0, *ends], ends)]


def _draw_blocks(axes: Axes, plan: AttentionPlan, rows: list[Any], columns: list[Any]) -> None:
    from matplotlib.patches import Rectangle

    for query_group, _, top, bottom in rows:
        for key_group, _, left, right in columns:
            times = key_group.readers.count(query_group.pattern)
            if not times:
                continue
            color = _COLORS[query_group.pattern % len(_COLORS)]
            axes.add_patch(
                Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="white", lw=1.2)
            )
            if times > 1:
                center = (left + right) / 2, (top + bottom) / 2
                axes.text(*center, f"counted {times}×", ha="center", va="center", color="white", fontsize=8)


def _draw_axes(axes: Axes, rows: list[Any], columns: list[Any]) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_facecolor("#f3f3f3")
    axes.set_xticks([(left + right) / 2 for *_, left, right in columns])
    axes.set_xticklabels([_label(group, count) for group, count, _, _ in columns], rotation=35, ha="left", fontsize=8)
    axes.set_yticks([(top + bottom) / 2 for *_, top, bottom in rows])
    axes.set_yticklabels([_label(group, count) for group, count, _, _ in rows], fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("keys and values", fontsize=9, labelpad=8)
    axes.set_ylabel("queries", fontsize=9, labelpad=8)
    axes.tick_params(length=0)
    for *_, end in rows[:-1]:
        axes.axhline(end, color="#c8c8c8", lw=0.6, zorder=0)
    for *_, end in columns[:-1]:
        axes.axvline(end, color="#c8c8c8", lw=0.6, zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: Figure, plan: AttentionPlan) -> None:
    from matplotlib.patches import Patch

    patterns = sorted({segment.pattern for segment in plan.query_segments})
    handles = [Patch(color=_COLORS[i % len(_COLORS)], label=f"pattern {i}: {_sides(plan, i)}") for i in patterns]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8)


def _sides(plan: AttentionPlan, pattern: int) -> str:
    queries, keys = plan.patterns[pattern]
    return textwrap.fill(f"{' + '.join(queries)} → {' + '.join(keys)}", 60)


def _label(group: Group, count: int) -> str:
    source = " (cached)" if group.query_start is None else ""
    return f"{group.name}{source}\n{count:,}"
