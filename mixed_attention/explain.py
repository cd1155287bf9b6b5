"""The kernels that compute a plan on a GPU, in words."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixed_attention import ops
from mixed_attention.plan import AttentionPlan


def explain_kernels(
    plan: AttentionPlan, *, device: torch.device, dtype: torch.dtype, batch_size: int, num_heads: int, head_dim: int
) -> Iterator[str]:
    """One line for the forward, one for the backward.

    Args:
        plan: The plan.
        device: A GPU.
        dtype: Of the tensors; fp64 is the reference's.
        batch_size, num_heads, head_dim: Of the call.
    """
    for backward in (False, True):
        direction = "backward" if backward else "forward"
        if not ops.has_kernels("cuda", dtype):
            yield f"  {direction}: the reference"
            continue
        family, why = ops.cuda_kernel(dtype, head_dim, device, backward=backward)
        if family == "none":
            yield f"  {direction}: no kernel, for {why}"
            continue
        shape = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim}
        layout = ops.cuda_layout(plan, **shape, dtype=dtype, device=device, backward=backward)
        yield f"  {direction}: {family} kernel, {_words(layout, backward)}"


def _words(layout: ops.CudaLayout, backward: bool) -> str:
    owned, taken_up = ("keys", "queries") if backward else ("queries", "keys")
    tiles = f"tiles of {layout.tile_rows} {owned} that take up {layout.block_rows} {taken_up} at a time"
    waves = layout.num_tiles / layout.num_slots
    return f"{tiles}{_parts(layout)}: {layout.num_tiles} in {waves:.2f} waves of {layout.num_slots}"


def _parts(layout: ops.CudaLayout) -> str:
    if layout.num_splits == 1:
        return ""
    are_all = layout.num_tiles == layout.num_splits * layout.num_split_tiles
    return f", {'' if are_all else f'{layout.num_split_tiles} of them '}cut into {layout.num_splits} parts each"
