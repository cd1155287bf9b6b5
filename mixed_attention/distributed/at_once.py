"""A layer over ranks in plain eager mode: one call of C++, and what is known before there are tensors is kept.

What is kept follows from a call's own arguments and from what the ranks have told each other in this very call. So a
rank that finds it and one that makes it anew still take part in the same collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixed_attention import cache, ops, torch_internals
from mixed_attention.autocast import autocast_dtype
from mixed_attention.cache import KVCache
from mixed_attention.distributed import rows
from mixed_attention.distributed.agreement import facts_of_keys
from mixed_attention.distributed.groups import Groups, Sharding
from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.shards import Shards
from mixed_attention.eager import packed
from mixed_attention.eager.at_once import keep
from mixed_attention.eager.projection import taken_ranges
from mixed_attention.plan import AttentionPlan
from mixed_attention.spec import ShardedTokenSpec

Maps = Sequence[tuple[Tensor, Tensor | None]]


def maps_of(layer: Any, x: Any, groups: Groups, mask: Any, freqs: Any, kv_cache: Any) -> Maps | None:
    """Weights and biases of a layer, None if it does not go at once."""
    if mask is not None or kv_cache is not None or groups.cached or not ops.is_compiled():
        return None
    # Keys of all tokens that have some go to all ranks, and no others.
    if not groups.gathered or groups.read != groups.gathered or not set(groups.recorded) <= set(groups.gathered):
        return None
    return None if layer.qk_norm else layer._plain_maps(x, freqs)


def fits(layer: Any, x: Tensor, maps: Maps, freqs: Any, groups: Groups) -> bool:
    """Whether :func:`run` has a say, so that nothing is done twice where ranks are asked for sizes before.

    It has none where some groups know their sizes: what they know might be wrong, on one rank alone.
    """
    if any(isinstance(spec, ShardedTokenSpec) for spec in groups.counted):
        return False
    heads = (layer.num_heads, layer.head_dim)
    return x.dim() == 3 and x.shape[1] == groups.num_tokens and ops.fits_layer(x, maps, freqs, heads)


def facts_of(layer: Any, x: Tensor, maps: Maps) -> dict[str, Any]:
    """What must be the same on all ranks of the keys that :func:`run` makes."""
    of_keys = maps[1:-1] if len(maps) > 2 else maps[:-1]  # not that of queries alone
    given = [x, *(tensor for pair in of_keys for tensor in pair if tensor is not None)]
    are_recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    dtype = autocast_dtype(x.device.type) or x.dtype
    return facts_of_keys(dtype, x.shape[0], (layer.num_heads, layer.head_dim), are_recorded)


class _Call(NamedTuple):
    """What a layer computes, and the caches that it leaves: names, rows of the keys here, and sizes on every rank."""

    of_layer: Any
    key_shape: tuple[int, int, int, int, int]  # of the buffer that ends with keys and values
    recorded: list[tuple[str, slice, tuple[int, ...]]]


def run(
    sharding: Sharding,
    layer: Any,
    x: Tensor,
    maps: Maps,
    freqs: Any,
    groups: Groups,
    sizes: tuple[tuple[int, ...], ...],
) -> tuple[Tensor, KVCache] | None:
    """The tokens that a layer makes, and the cache of its recorded groups; None, and nothing done, where it has no say.

    Args:
        sharding: How the tokens are spread.
        layer: The layer.
        x: Tokens of this rank ``(B, N, C)``.
        maps: What :func:`maps_of` returns.
        freqs: Their complex frequencies.
        groups: What becomes of them.
        sizes: The tokens on every rank, for each gathered group.
    """
    shape = x.shape
    dropout_p = layer._dropout_p
    key = groups, sizes, shape, layer.num_heads, layer.head_dim, freqs is None, dropout_p
    found = sharding.kept.get(key)
    if found is None:
        if len(shape) != 3 or shape[1] != groups.num_tokens:
            return None
        groups.check_sizes(sharding)
        heads = (layer.num_heads, layer.head_dim)
        found = _call(sharding.ranks, groups, sizes, shape[0], heads, freqs is not None, dropout_p)
        keep(sharding.kept, key, found)
    result = ops.run_layer_over_ranks(x, maps, freqs, found.of_layer)
    if result is None:
        return None
    out, *buffers = result
    if not found.recorded:
        return out, {}
    *_, k, v = buffers[-1].view(found.key_shape).unbind(2)
    how = {"detach": layer.detach_kv_cache, "compact": layer._records_copies}
    return out, {
        name: {**cache.record_entry(k[:, part], v[:, part], None, **how), "sizes": torch.tensor(everywhere)}
        for name, part, everywhere in found.recorded
    }


def _call(
    ranks: Ranks,
    groups: Groups,
    sizes: Sequence[tuple[int, ...]],
    batch_size: int,
    heads: tuple[int, int],
    is_rotated: bool,
    dropout_p: float,
) -> _Call:
    plan = AttentionPlan.compile(
        groups.as_read(dict(zip(groups.gathered, sizes))), groups.patterns, skip_unread_keys=True
    )
    runs = groups.runs(groups.gathered)
    num_tokens, channels, scale = plan.num_queries, heads[0] * heads[1], heads[1] ** -0.5
    if all(is_taken for _, is_taken in runs):
        parts: list[tuple[int, int, Any]] = [(0, 3 * channels, None)]
        shapes, rotated = [(batch_size, num_tokens, 3, *heads)], [2]
    else:
        num_keys = sum(size for size, is_taken in runs if is_taken)
        parts = [(0, channels, None), (channels, 3 * channels, taken_ranges(runs))]
        shapes, rotated = [(batch_size, num_tokens, 1, *heads), (batch_size, num_keys, 2, *heads)], [1, 1]
    tokens = [ranges for *_, ranges in parts]
    here = ops.packed_call(shapes, rotated if is_rotated else [0] * len(parts), tokens, plan, scale, dropout_p)
    whole = [(batch_size, num_tokens, 1, *heads), (batch_size, plan.num_keys, 2, *heads)]
    attention = ops.packed_call(whole, [0, 0], [None, None], plan, scale, dropout_p)
    recorded, start = [], 0
    for name, everywhere in zip(groups.gathered, sizes):
        end = start + everywhere[ranks.rank]
        if name in groups.recorded:
            recorded.append((name, slice(start, end), everywhere))
        start = end
    return _Call(ops.spread_layer_call(parts, here, attention, ranks.native(sizes)), shapes[-1], recorded)


def _of(shards: Any) -> Shards:
    return Shards(Ranks.of(torch_internals.process_group(shards.group)), tuple(map(tuple, shards.sizes)))


def _sums(wholes: Sequence[Tensor], shards: Any) -> list[Tensor]:
    """The derivative of a gather where it is to be differentiated itself."""
    return [rows.sums(whole, _of(shards)) for whole in wholes]


def _attention_back(
    buffers: Sequence[Tensor],
    pairs: Sequence[Tensor | None],
    seed: Tensor | None,
    call: Any,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    drotated: Sequence[Tensor | None],
) -> list[Tensor]:
    """The same of an attention over ranks: through the attention, the gather, and the rotation of the buffers."""
    shards, here = _of(call.shards), call.here
    with torch.enable_grad():
        buffers = [ops.unhooked(buffer) for buffer in buffers]
        first = buffers[0].view(here.shapes[0])
        q, kv = first.split([1, 2], 2) if len(buffers) == 1 else (first, buffers[1].view(here.shapes[1]))
        whole = rows.gather(kv.transpose(0, 1), shards).transpose(0, 1)
        dq, dwhole = packed.backward_composite(
            [q, whole], [None, None], None, seed, call.attention, out, lse, dout, [None, None], [None, None]
        )
        dkv = rows.sums(dwhole.transpose(0, 1), shards).transpose(0, 1)
        grads = [torch.cat([dq, dkv], 2)] if len(buffers) == 1 else [dq, dkv]
        of_parts = zip(grads, drotated, pairs, buffers, here.tokens, here.shapes, here.rotated, here.normalised)
        return [packed.gradient_of_buffer(*part).reshape(buffer.shape) for part, buffer in zip(of_parts, buffers)]


ops.set_spread_composites(_sums, _attention_back)
