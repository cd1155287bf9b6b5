"""A plan in words: its rows, and the kernels that compute it on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixed_attention import ops
from mixed_attention.plan import AttentionPlan


def explain(
    plan: AttentionPlan,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
    num_heads: int = 1,
    head_dim: int = 64,
    head_dim_v: int | None = None,
) -> str:
    """The plan in words: which rows attend to which, and who reads which keys.

    For a GPU (``device="cuda"``) also which kernels compute a call of these shapes, in which tiles, and how often
    their number fills the device. ``head_dim_v`` is the width of values, if that is not the one of queries and keys.
    """
    lines = list(_rows(plan))
    if torch.device(device).type == "cuda":
        width_v = head_dim if head_dim_v is None else head_dim_v
        shape = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim, "head_dim_v": width_v}
        lines += _kernels(plan, device=torch.device(device), dtype=dtype, **shape)
    return "\n".join(lines)


def _rows(plan: AttentionPlan) -> Iterator[str]:
    made_of = f"{len(plan.groups)} token groups, {len(plan.patterns)} patterns"
    if not plan.groups and plan.query_segments:
        made_of = f"{len(plan.query_segments)} segments"
    yield f"{made_of}: {plan.num_queries} queries, {plan.num_keys} keys, {plan.num_pairs()} attended pairs"
    names: dict[int | None, list[str]] = {}
    for group in plan.groups:
        if group.query_start is not None:
            names.setdefault(group.pattern, []).append(group.name)
    for segment in plan.query_segments:
        keys = " + ".join(f"[{start}, {end})" for start, end in segment.key_ranges)
        rows = f"queries [{segment.start}, {segment.end}) -> keys {keys}"
        who = f"   pattern {segment.pattern}: {', '.join(names[segment.pattern])}" if plan.groups else ""
        yield f"  {rows}{who}"
    unread = [group.name for group in plan.groups if not group.readers]
    if not plan.groups:
        unread = [f"[{start}, {end})" for start, end in _unread_rows(plan)]
    if unread:
        yield f"  keys that nobody attends to: {', '.join(unread)}"


def _unread_rows(plan: AttentionPlan) -> Iterator[tuple[int, int]]:
    """Maximal ranges of keys that lie in no segment's ranges."""
    reached = 0
    for start, end in sorted(keys for s in plan.query_segments for keys in s.key_ranges if keys[0] < keys[1]):
        if start > reached:
            yield reached, start
        reached = max(reached, end)
    if reached < plan.num_keys:
        yield reached, plan.num_keys


def _kernels(
    plan: AttentionPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> Iterator[str]:
    """One line for the forward, one for the backward; before them one for derivatives beyond.

    Args:
        plan: The plan.
        device: A GPU.
        dtype: That of the tensors; fp64 is the reference's.
        batch_size, num_heads, head_dim, head_dim_v: Those of the call.
    """
    served = ops.has_kernels("cuda", dtype)
    shape = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
    why = ops.why_no_tangent_kernels(dtype, head_dim, head_dim_v, device) if served else ""
    by = f"the reference, for {why}" if why else "the reference"
    if served and not why:
        launches = [
            ops.cuda_launch(plan, **shape, dtype=dtype, device=device, backward=backward, tangents=True)
            for backward in (False, True)
        ]
        families = sorted({launch.family for launch in launches})
        by = "no kernel" if "none" in families else f"{' and '.join(families)} kernels"
        if why := next((launch.why for launch in launches if launch.why), ""):
            by += f"{'' if 'none' in families else '; no faster ones'}, for {why}"
    yield f"  tangents and gradients of them: {by}"
    for backward in (False, True):
        direction = "backward" if backward else "forward"
        if not ops.has_kernels("cuda", dtype):
            yield f"  {direction}: the reference"
            continue
        launch = ops.cuda_launch(plan, **shape, dtype=dtype, device=device, backward=backward, tangents=False)
        if launch.family == "none":
            yield f"  {direction}: no kernel, for {launch.why}"
            continue
        why = f"; no faster one, for {launch.why}" if launch.why else ""
        yield f"  {direction}: {launch.family} kernel, {_words(launch, backward)}{why}"


def _words(launch: ops.CudaLaunch, backward: bool) -> str:
    owned, taken_up = ("keys", "queries") if backward else ("queries", "keys")
    tiles = f"tiles of {launch.tile_rows} {owned} that take up {launch.block_rows} {taken_up} at a time"
    waves = launch.num_tiles / launch.num_slots
    return f"{tiles}{_parts(launch)}: {launch.num_tiles} in {waves:.2f} waves of {launch.num_slots}"


def _parts(launch: ops.CudaLaunch) -> str:
    if launch.num_splits == 1:
        return ""
    are_all = launch.num_tiles == launch.num_splits * launch.num_split_tiles
    return f", {'' if are_all else f'{launch.num_split_tiles} of them '}cut into {launch.num_splits} parts each"
