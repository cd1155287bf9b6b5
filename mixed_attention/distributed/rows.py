"""Rows of all ranks, differentiable in any mode and order.

Bringing rows together and adding them up are linear and each other's derivative. In plain eager mode a gather is two
nodes of the graph, one that starts the collective and one that waits for it; in the backward their roles are exchanged,
so that what was made between them is differentiated while the sums are in flight. Layers that go at once have one node
in C++ for gather and attention, csrc/torch/attend_over_ranks.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixed_attention import ops, torch_internals
from mixed_attention.distributed import collectives
from mixed_attention.distributed.collectives import Finish
from mixed_attention.distributed.shards import Shards


def gather(rows: Tensor, shards: Shards) -> Tensor:
    """The rows of all ranks ``(N, ...)``, of those of this rank ``(shards.here, ...)``."""
    if torch.compiler.is_compiling():
        return _traced_gather(rows, shards)
    return _Move.apply(rows, shards, True)


def sums(whole: Tensor, shards: Shards) -> Tensor:
    """The derivative of :func:`gather`: sums over the ranks, each its own rows. Differentiable itself."""
    return _Move.apply(whole, shards, False)


def start_gather(rows: Tensor, shards: Shards) -> Finish:
    """:func:`gather` in two steps. What is computed between them overlaps with it, forward and backward."""
    if torch.compiler.is_compiling() or not ops.is_plain(rows) or ops.needs_composite(rows):
        whole = gather(rows, shards)
        return lambda: whole
    transfer = _Transfer(shards)
    token = _Start.apply(rows, transfer)
    return lambda: _Wait.apply(token, transfer)


class _Move(torch.autograd.Function):
    """Brings rows together, or adds them up: each is the derivative of the other."""

    @staticmethod
    def forward(rows: Tensor, shards: Shards, gathers: bool) -> Tensor:
        if torch_internals.is_legacy_batched(rows):
            return (_traced_gather if gathers else _traced_sums)(rows, shards)
        return (collectives.start_gather if gathers else collectives.start_sums)(rows, shards)()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.shards, ctx.gathers = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Move.apply(grad, ctx.shards, not ctx.gathers), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Move.apply(tangent, ctx.shards, ctx.gathers)

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, shards: Shards, gathers: bool) -> tuple[Tensor, int]:
        return _Move.apply(rows.movedim(in_dims[0], -1), shards, gathers), -1


class _Transfer:
    """What is in flight between two nodes."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.finish: Finish | None = None

    def take(self) -> Finish | None:
        finish, self.finish = self.finish, None
        return finish


class _Start(torch.autograd.Function):
    """Starts the gather; in the backward, waits for the sums. Its output stands for the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish = collectives.start_gather(rows, transfer.shards)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        finish = ctx.transfer.take()
        return (grad if finish is None else finish()), None


class _Wait(torch.autograd.Function):
    """Waits for the gather; in the backward, starts the sums."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        finish = transfer.take()
        assert finish is not None, "a gather is waited for once"
        return finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.finish = None  # of a backward that failed half way
        if torch.is_grad_enabled() or ops.needs_composite(grad):
            return sums(grad, transfer.shards), None
        transfer.finish = collectives.start_sums(grad, transfer.shards)
        # The sums are not there yet: this has their shape and no memory.
        return grad.new_zeros(()).expand(transfer.shards.here, *grad.shape[1:]), None


def _traced_gather(rows: Tensor, shards: Shards) -> Tensor:
    """The same of functional collectives, which the compiler traces with symbolic sizes, and which have derivatives.

    NOTE: all-to-all of copies instead of an all-gather: it takes any sizes, and its derivative are the parts of sums in
    their own dtype, which are then added in fp32.
    """
    here, size = rows.shape[0], shards.ranks.size
    copies = rows.unsqueeze(0).expand(size, *rows.shape).reshape(size * here, *rows.shape[1:])
    received = _all_to_all(copies, list(shards.totals), [here] * size, shards)
    if shards.is_in_order:
        return received
    return torch.cat([received.narrow(0, start, size) for start, size in shards.by_group()])


def _traced_sums(rows: Tensor, shards: Shards) -> Tensor:
    """The derivative of :func:`_traced_gather`."""
    pieces = [rows.narrow(0, start, size) for of_rank in shards.by_rank() for start, size in of_rank]
    sent = rows if shards.is_in_order else torch.cat(pieces)
    here, size = shards.here, shards.ranks.size
    return collectives.sum_of_parts(_all_to_all(sent, [here] * size, list(shards.totals), shards), size)


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], shards: Shards) -> Tensor:
    if not torch.compiler.is_compiling() and torch_internals.is_legacy_batched(rows):
        return _exchange_rows(rows, received, sent, shards.ranks.name)
    collective = torch_internals.functional_collectives
    return collective.wait_tensor(collective.all_to_all_single(rows.contiguous(), received, sent, shards.ranks.name))


@torch.library.custom_op("mixed_attention::exchange_rows", mutates_args=())
def _exchange_rows(rows: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """An all-to-all that is waited for.

    NOTE: ``is_grads_batched`` calls an operator for one gradient after the other, and puts what it returns together at
    once. What a functional collective returns is not there yet.
    """
    collective = torch_internals.functional_collectives
    return collective.wait_tensor(collective.all_to_all_single(rows.contiguous(), received, sent, group))
