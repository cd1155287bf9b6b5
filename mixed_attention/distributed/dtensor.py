"""How the operators act on distributed tensors: which placements are computed where they are.

Sequences and heads do not see each other. So q, k and v that are sharded by batch or by heads, in equal numbers or not,
are computed shard by shard, without communication. All other placements are replicated first. Importing this registers
the rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_WHOLE, _BATCH, _HEADS, _HEADS_OF_LSE = Replicate(), Shard(0), Shard(2), Shard(1)
_LEAST_BATCH = 2  # one sequence of keys serves a whole batch: it is no batch to shard


def _by_batch(q: Any, tensor: Any) -> Any:
    """The placement of what has a sequence for each of q's, or one for all."""
    return _BATCH if tensor.shape[0] == q.shape[0] and q.shape[0] >= _LEAST_BATCH else _WHOLE


def _given(tensor: Any, placement: Any) -> Any:
    return None if tensor is None else placement


@register_sharding(torch.ops.mixed_attention.forward.default)
def _forward(
    q: Any, k: Any, v: Any, segments: Any, scale: Any, mask: Any = None, dropout_p: float = 0.0, seed: Any = None
) -> list[tuple[list[Any], list[Any]]]:
    def rule(out: Any, lse: Any, of_k: Any, of_v: Any, of_mask: Any) -> tuple[list[Any], list[Any]]:
        inputs = [out, of_k, of_v, None, None, _given(mask, of_mask), None, _given(seed, _WHOLE)]
        return [out, lse], inputs

    rules = [rule(_WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE)]
    if dropout_p == 0:  # which weights are dropped depends on the number of the sequence and of the head
        if q.shape[0] >= _LEAST_BATCH:
            of_mask = _WHOLE if mask is None else _by_batch(q, mask)
            rules.append(rule(_BATCH, _BATCH, _by_batch(q, k), _by_batch(q, v), of_mask))
        rules.append(rule(_HEADS, _HEADS_OF_LSE, _HEADS, _HEADS, _WHOLE))
    return rules


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
    def rule(of_q: Any, of_lse: Any, of_k: Any, of_v: Any, of_mask: Any) -> tuple[list[Any], list[Any]]:
        inputs = [of_q, _given(dlse, of_lse), of_q, of_k, of_v, of_q, of_lse, None, None]
        inputs += [_given(mask, of_mask), None, _given(seed, _WHOLE)]
        # Keys that serve sequences on several ranks get a part of their gradient on each.
        grads = [Partial() if of_q == _BATCH and placement == _WHOLE else placement for placement in (of_k, of_v)]
        return [of_q, *grads], inputs

    rules = [rule(_WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE)]
    if dropout_p == 0:
        if q.shape[0] >= _LEAST_BATCH:
            of_mask = _WHOLE if mask is None else _by_batch(q, mask)
            rules.append(rule(_BATCH, _BATCH, _by_batch(q, k), _by_batch(q, v), of_mask))
        rules.append(rule(_HEADS, _HEADS_OF_LSE, _HEADS, _HEADS, _WHOLE))
    return rules


def _ways(q: Any, dropout_p: float) -> list[Any]:
    """What a call of tangents may be cut by: nothing, sequences, heads; as a placement of q."""
    ways: list[Any] = [_WHOLE]
    if dropout_p == 0:
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
        # As of the backward: keys that serve sequences on several ranks get a part of their gradient on each.
        grads = [Partial() if way == _BATCH and rows(x) == _WHOLE else rows(x) for x in (k, v)]
        return [rows(q), *grads, moved_rows(dout_dot)], inputs

    return [rule(way) for way in _ways(q, dropout_p)]


def as_seed(seed: Tensor, q: Tensor) -> Tensor:
    """The seed of the first rank on all ranks of q's mesh."""
    if not isinstance(q, DTensor):
        return seed
    return DTensor.from_local(seed, q.device_mesh, [_WHOLE] * q.device_mesh.ndim, run_check=True)
