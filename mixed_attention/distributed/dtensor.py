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


def as_seed(seed: Tensor, q: Tensor) -> Tensor:
    """The seed of the first rank on all ranks of q's mesh."""
    if not isinstance(q, DTensor):
        return seed
    return DTensor.from_local(seed, q.device_mesh, [_WHOLE] * q.device_mesh.ndim, run_check=True)
