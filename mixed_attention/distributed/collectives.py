"""Rows of all ranks brought together, and sums of rows taken apart: by torch's collectives, without derivatives.

Rows are the first dimension. One collective serves all groups of tokens, because to enqueue one costs more than to
rearrange the rows of a layer; csrc/torch/ranks.cpp does both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixed_attention import ops
from mixed_attention.distributed.shards import Shards

Finish = Callable[[], Tensor]


def start_gather(rows: Tensor, shards: Shards) -> Finish:
    """Starts to bring the rows of all ranks together.

    Args:
        rows: Rows of this rank ``(shards.here, ...)``.
        shards: Where rows lie.

    Returns:
        What waits, and returns the whole ``(N, ...)``.
    """
    return ops.start_gather(rows, shards.native()) if shards.sizes else lambda: rows


def start_sums(rows: Tensor, shards: Shards) -> Finish:
    """Starts to add up rows of the whole over all ranks, in fp32 at least, each rank its own.

    Args:
        rows: ``(N, ...)`` on every rank.
        shards: Where rows lie.

    Returns:
        What waits, and returns the sums of the rows of this rank, ``(shards.here, ...)``.
    """
    return ops.start_sums(rows, shards.native()) if shards.sizes else lambda: rows


def sum_of_parts(parts: Tensor, count: int) -> Tensor:
    """The sum of ``count`` parts of rows that lie behind one another; 16 bits are added in fp32."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    stacked = parts.reshape(count, parts.shape[0] // count, *parts.shape[1:])
    return torch.sum(stacked, 0, dtype=wide).to(parts.dtype)
