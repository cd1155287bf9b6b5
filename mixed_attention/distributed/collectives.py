"""Rows of all ranks brought together, and sums of rows taken apart: by torch's collectives, without derivatives.

Rows are the first dimension. One call of ``torch.distributed`` serves all groups of tokens, because to enqueue a
collective costs more than to rearrange the rows of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixed_attention.distributed.shards import Shards

Finish = Callable[[], Tensor]

# Newer releases of torch warn of the old names.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_gather(rows: Tensor, shards: Shards) -> Finish:
    """Starts to bring the rows of all ranks together.

    Args:
        rows: Rows of this rank ``(shards.here, ...)``.
        shards: Where rows lie.

    Returns:
        What waits, and returns the whole ``(shards.whole, ...)``.
    """
    most, size = shards.most, shards.ranks.size
    if not shards.are_equal:
        rows = torch.cat([rows, rows.new_zeros((most - len(rows), *rows.shape[1:]))])
    sent = rows.contiguous()
    received = sent.new_empty((size * most, *sent.shape[1:]))
    work = all_gather_single(received, sent, group=shards.ranks.group, async_op=True) if received.numel() else None

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        if shards.is_in_order and shards.are_equal:
            return received
        return torch.cat([received[start : start + size] for start, size in shards.by_group(most)])

    return finish


def start_sums(rows: Tensor, shards: Shards) -> Finish:
    """Starts to add up rows of the whole over all ranks, in fp32 at least, each rank its own.

    Args:
        rows: ``(shards.whole, ...)`` on every rank.
        shards: Where rows lie.

    Returns:
        What waits, and returns the sums of the rows of this rank, ``(shards.here, ...)``.
    """
    # On one host the parts travel in their own dtype, to be added in the order of the ranks: half the bytes of fp32,
    # and bits that depend on no algorithm. Between hosts all-to-all would not use all network cards.
    if shards.ranks.share_a_host:
        return _start_parts(rows, shards)
    return _start_wide_sums(rows, shards)


def _start_parts(rows: Tensor, shards: Shards) -> Finish:
    pieces = [rows[start : start + size] for of_rank in shards.by_rank() for start, size in of_rank]
    sent = rows.contiguous() if shards.is_in_order else torch.cat(pieces)
    here, size = shards.here, shards.ranks.size
    received = sent.new_empty((size * here, *sent.shape[1:]))
    group = shards.ranks.group
    work = None
    if shards.whole:
        work = dist.all_to_all_single(received, sent, [here] * size, list(shards.totals), group=group, async_op=True)

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return sum_of_parts(received, size)

    return finish


def sum_of_parts(parts: Tensor, count: int) -> Tensor:
    """The sum of ``count`` parts of rows that lie behind one another; 16 bits are added in fp32."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    stacked = parts.reshape(count, parts.shape[0] // count, *parts.shape[1:])
    return torch.sum(stacked, 0, dtype=wide).to(parts.dtype)


def _start_wide_sums(rows: Tensor, shards: Shards) -> Finish:
    dtype, most = rows.dtype, shards.most
    rows = rows.to(torch.promote_types(dtype, torch.float32))
    if not (shards.is_in_order and shards.are_equal):
        pieces = []
        for total, of_rank in zip(shards.totals, shards.by_rank()):
            pieces += [rows[start : start + size] for start, size in of_rank]
            pieces.append(rows.new_zeros((most - total, *rows.shape[1:])))
        rows = torch.cat(pieces)
    sums = rows.new_empty((most, *rows.shape[1:]))
    work = None
    if sums.numel():
        work = _reduce_scatter(sums, rows.contiguous(), group=shards.ranks.group, async_op=True)

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return sums[: shards.here].to(dtype)

    return finish
