"""How the operators act on distributed tensors: which placements are computed where they are.

Sequences and heads do not see each other. So q, k and v that are sharded by batch or by heads, in equal numbers or not,
are computed shard by shard, without communication. All other placements are replicated first. Importing this registers
the rules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_WHOLE, _BATCH, _HEADS = Replicate(), Shard(0), Shard(2)
_LEAST_BATCH = 2  # one sequence of keys serves a whole batch: it is no batch to shard


def _given(tensor: Any, placement: Any) -> Any:
    return None if tensor is None else placement


def _ways(q: Any, dropout_p: float) -> list[Any]:
    """What a call may be cut by: nothing, sequences, heads; as a placement of q."""
    ways: list[Any] = [_WHOLE]
    if dropout_p == 0:  # which weights are dropped depends on the number of the sequence and of the head
        ways += [_BATCH, _HEADS] if q.shape[0] >= _LEAST_BATCH else [_HEADS]
    return ways


def _placed(way: Any, q: Any, tensor: Any, *, heads: int, directions: int = 0) -> Any:
    """Where a tensor lies. heads: the dim that has them, behind so many dims of directions; -1 if it has none."""
    if tensor is None:
        return None
    if way == _HEADS and heads >= 0:
        return Shard(heads + directions)
    has_batch = tensor.shape[directions] == q.shape[0]
    return Shard(directions) if way == _BATCH and has_batch else _WHOLE


def _gradients(way: Any, q: Any, k: Any, v: Any) -> list[Any]:
    """Where those of q, k and v lie. Keys that serve sequences on several ranks get a part of theirs on each."""
    of_q, *of_keys = (_placed(way, q, x, heads=2) for x in (q, k, v))
    return [of_q, *(Partial() if way == _BATCH and placement == _WHOLE else placement for placement in of_keys)]


@register_sharding(torch.ops.mixed_attention.forward.default)
def _forward(
    q: Any, k: Any, v: Any, segments: Any, scale: Any, mask: Any = None, dropout_p: float = 0.0, seed: Any = None
) -> list[tuple[list[Any], list[Any]]]:
    def rule(way: Any) -> tuple[list[Any], list[Any]]:
        inputs = [_placed(way, q, x, heads=2) for x in (q, k, v)]
        more = [None, None, _placed(way, q, mask, heads=-1), None, _given(seed, _WHOLE)]
        of_lse = Shard(1) if way == _HEADS else way
        return [way, of_lse], [*inputs, *more]

    return [rule(way) for way in _ways(q, dropout_p)]


@register_sharding(torch.ops.mixed_attention.backward.default)
def _backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    segments: Any,
    scale: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
) -> list[tuple[list[Any], list[Any]]]:
    def rule(way: Any) -> tuple[list[Any], list[Any]]:
        inputs = [_placed(way, q, dout, heads=2), _placed(way, q, dlse, heads=1)]
        inputs += [*(_placed(way, q, x, heads=2) for x in (q, k, v, out)), _placed(way, q, lse, heads=1)]
        more = [None, None, _placed(way, q, mask, heads=-1), None, _given(seed, _WHOLE)]
        return _gradients(way, q, k, v), [*inputs, *more]

    return [rule(way) for way in _ways(q, dropout_p)]


@register_sharding(torch.ops.mixed_attention.jvp.default)
def _jvp(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    q_dot: Any,
    k_dot: Any,
    v_dot: Any,
    segments: Any,
    scale: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
) -> list[tuple[list[Any], list[Any]]]:
    def rule(way: Any) -> tuple[list[Any], list[Any]]:
        primals = [*(_placed(way, q, x, heads=2) for x in (q, k, v, out)), _placed(way, q, lse, heads=1)]
        tangents = [_placed(way, q, x, heads=2, directions=1) for x in (q_dot, k_dot, v_dot)]
        more = [None, None, _placed(way, q, mask, heads=-1), None, _given(seed, _WHOLE)]
        moved: dict[Any, list[Any]] = {_WHOLE: [_WHOLE] * 2, _BATCH: [Shard(1)] * 2, _HEADS: [Shard(3), Shard(2)]}
        return moved[way], [*primals, *tangents, *more]

    return [rule(way) for way in _ways(q, dropout_p)]


@register_sharding(torch.ops.mixed_attention.backward_jvp.default)
def _backward_jvp(
    dout_dot: Any,
    dlse_dot: Any,
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    q_dot: Any,
    k_dot: Any,
    v_dot: Any,
    out_dot: Any,
    lse_dot: Any,
    segments: Any,
    scale: Any,
    mask: Any = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    wants_dq_dot: bool = False,
) -> list[tuple[list[Any], list[Any]]]:
    def rule(way: Any) -> tuple[list[Any], list[Any]]:
        def rows(x: Any) -> Any:
            return _placed(way, q, x, heads=2)

        def numbers(x: Any) -> Any:
            return _placed(way, q, x, heads=1)

        def moved_rows(x: Any) -> Any:
            return _placed(way, q, x, heads=2, directions=1)

        def moved_numbers(x: Any) -> Any:
            return _placed(way, q, x, heads=1, directions=1)

        inputs: list[Any] = [
            moved_rows(dout_dot),
            moved_numbers(dlse_dot),
            rows(dout),
            numbers(dlse),
            rows(q),
            rows(k),
            rows(v),
        ]
        inputs += [rows(out), numbers(lse), *map(moved_rows, (q_dot, k_dot, v_dot, out_dot)), moved_numbers(lse_dot)]
        inputs += [None, None, _placed(way, q, mask, heads=-1), None, _given(seed, _WHOLE), None]
        return [*_gradients(way, q, k, v), moved_rows(dout_dot)], inputs

    return [rule(way) for way in _ways(q, dropout_p)]


def as_seed(seed: Tensor, q: Tensor) -> Tensor:
    """The seed of the first rank on all ranks of q's mesh."""
    if not isinstance(q, DTensor):
        return seed
    mesh = q.device_mesh
    # NOTE: not by from_local(run_check=True), which waits for all processes, also those that are not in the mesh.
    for dim in range(mesh.ndim):
        dist.broadcast(seed, group=mesh.get_group(dim), group_src=0)
    return DTensor.from_local(seed, mesh, [_WHOLE] * mesh.ndim, run_check=False)
