"""The layers over ranks: queries stay where they are, keys and values of the groups that are read come from all ranks.

In this order, so that the exchange overlaps: k and v of this rank's tokens; their gather is started; q; the gather is
waited for; attention. What a layer cannot do is found out before the first collective, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mixed_attention import cache
from mixed_attention.autocast import cat
from mixed_attention.cache import KVCache, KVEntry
from mixed_attention.distributed import agreement, at_once, rows
from mixed_attention.distributed.agreement import Facts
from mixed_attention.distributed.groups import Groups, Sharding, read_groups
from mixed_attention.distributed.shards import Shards
from mixed_attention.eager import packed
from mixed_attention.eager.packed import Freqs, Packed
from mixed_attention.eager.projection import Runs, linear
from mixed_attention.layers.checks import check_batch, check_rank, check_tokens
from mixed_attention.plan import AttentionPlan
from mixed_attention.spec import ShardedTokenSpec, TokenSpec

_WHO = "ContextParallel"
Made = TypeVar("Made", Tensor, "Tensor | None")
Project = Callable[[str, "Runs | None"], Packed]
"""Makes slots out of "qkv" of the tokens that some runs take."""
Projections = Callable[[Tensor, Sequence[TokenSpec], "Freqs | None"], tuple[Project, Callable[[Tensor], Tensor]]]
"""Makes that for tokens of some groups, and what the output goes through."""


def attend_groups(
    sharding: Sharding,
    layer: Any,
    x: Tensor,
    token_specs: Any,
    attention_patterns: Any,
    key_padding_mask: Tensor | None,
    freqs: Freqs | None,
    kv_cache: Mapping[str, Mapping[str, Tensor]] | None,
    *,
    record: bool,
    projections: Projections | None = None,
) -> tuple[Tensor, KVCache | None]:
    """Attention between groups. Arguments as the layer takes them, of the tokens of this rank.

    Args:
        projections: Makes the projections for the tokens of the groups that are present; by default they are the
            same for all groups.
    """
    groups = _read(sharding, layer, token_specs, attention_patterns, kv_cache, record)
    if projections is None and not torch.compiler.is_compiling():
        found = _at_once(sharding, layer, x, groups, key_padding_mask, freqs, kv_cache)
        if found is not None:
            return found if record else (found[0], None)
    kept = {*groups.read, *groups.recorded}

    def make_projections() -> tuple[Project, Callable[[Tensor], Tensor]]:
        if projections is not None:
            return projections(x, groups.present, freqs)
        return lambda slots, runs: layer._project(x, (slots, runs, freqs))[0], lambda out: linear(out, layer.proj)

    def prepare() -> Tensor | None:
        layer._check_rope(freqs)
        check_tokens(x, groups.specs, key_padding_mask)
        layer._check_freqs(freqs, (x.shape[0], x.shape[1]))
        cache.check_names(kv_cache, groups.cached)
        project, _ = make_projections()
        return _together(project("kv", groups.runs(kept)), layer) if kept else None

    fresh, sizes = _agree_on_groups(sharding, layer, groups, prepare, key_padding_mask)
    plan = AttentionPlan.compile(
        groups.as_read(sizes),
        groups.patterns,
        cached=[TokenSpec(name, cache.cached_length(kv_cache, name)) for name in groups.cached],
        skip_unread_keys=True,
    )
    shards = Shards(sharding.ranks, tuple(sizes[name] for name in groups.gathered))
    pieces = {} if fresh is None else _pieces(fresh, [spec for spec in groups.present if spec.name in kept])
    finish = _start(pieces, groups, shards)
    mask = _gather_mask(key_padding_mask, groups, shards)
    project, project_out = make_projections()
    q = project("q", None)
    keys = _join(pieces, groups, finish(), shards)
    parts = [q] if keys is None else [q, _packed(keys)]
    if groups.cached:
        assert kv_cache is not None
        whole = [] if keys is None else keys.unbind(2)
        joined = cache.join_keys(plan, whole, kv_cache, q.buffer.view(q.shape).squeeze(2))
        parts = [q, *map(Packed.of, joined)]
        mask = cache.join_masks(plan, mask, kv_cache, x)
    out, _ = packed.attend(parts, plan, key_padding_mask=mask, dropout_p=layer._dropout_p, parallel=layer.parallel)
    recorded = None
    if record and not groups.cached:
        masks = {} if key_padding_mask is None else _mask_pieces(key_padding_mask, groups)
        recorded = {name: _record(layer, pieces[name], masks.get(name), sizes.get(name)) for name in groups.recorded}
    return project_out(out), recorded


def _at_once(
    sharding: Sharding,
    layer: Any,
    x: Tensor,
    groups: Groups,
    mask: Tensor | None,
    freqs: Freqs | None,
    kv_cache: Any,
) -> tuple[Tensor, KVCache] | None:
    """The layer by one call of C++, in plain eager mode; None elsewhere, and where there is an error to raise."""
    maps = at_once.maps_of(layer, x, groups, mask, freqs, kv_cache)
    if maps is None:
        return None
    sizes = _told_sizes(sharding, groups)
    if sizes is None:
        if not agreement.can_exchange() or not at_once.fits(layer, x, maps, freqs, groups):
            return None
        here: dict[str, Any] = {spec.name: spec.size for spec in groups.counted}
        facts = _facts(groups, None, at_once.facts_of(layer, x, maps))
        sizes = dict(zip(here, agreement.agree(_WHO, sharding.ranks, facts, list(here.values()))))
    return at_once.run(sharding, layer, x, maps, freqs, groups, tuple([sizes[name] for name in groups.gathered]))


def attend_to_all(
    sharding: Sharding,
    layer: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs: Freqs | None,
    sizes: tuple[int, ...] | None,
) -> Tensor:
    """Dense attention of the tokens of this rank to those of all ranks, output projection included.

    Args:
        attn_mask: ``(B, H, N, tokens of all ranks)``, or what broadcasts to it.
        sizes: Tokens on every rank, if they are known.
    """

    def make_kv() -> Packed:
        check_rank("x", x)
        return layer._project(x, ("kv", None, freqs))[0]

    _, finish = _start_dense(sharding, layer, "x", make_kv, x, sizes, attn_mask)
    (q,) = layer._project(x, ("q", None, freqs))
    return linear(layer._attend_dense([q, finish()], attn_mask)[0], layer.proj)


def attend_across(
    sharding: Sharding,
    layer: Any,
    q: Tensor,
    kv: Tensor | None,
    attn_mask: Tensor | None,
    q_freqs: Freqs | None,
    k_freqs: Freqs | None,
    kv_cache: Mapping[str, Tensor] | None,
    *,
    sizes: tuple[int, ...] | None,
    record: bool,
) -> tuple[Tensor, KVEntry | None]:
    """Dense attention of the queries of this rank to the tokens of all ranks, output projection included.

    Args:
        attn_mask: ``(B, H, Nq, tokens of all ranks)``, or what broadcasts to it.
        sizes: Tokens of ``kv`` on every rank, if they are known.
    """
    if kv_cache is not None:  # whole on every rank
        check_rank("q", q)
        (queries,) = layer._project(q, ("q", None, q_freqs))
        cached = cache.read_entry("kv_cache", kv_cache, queries.buffer.view(queries.shape).squeeze(2))
        out, _ = layer._attend_dense([queries, *map(Packed.of, cached)], attn_mask)
        return linear(out, layer.proj), None
    assert kv is not None

    def make_kv() -> Packed:
        check_rank("q", q)
        check_rank("kv", kv)
        check_batch(q, kv)
        return layer._project(kv, ("kv", None, k_freqs))[0]

    fresh, finish = _start_dense(sharding, layer, "kv", make_kv, kv, sizes, attn_mask)
    (queries,) = layer._project(q, ("q", None, q_freqs))
    out, _ = layer._attend_dense([queries, finish()], attn_mask)
    recorded = None
    if record:
        k, v = fresh.rows.unbind(2)
        recorded = cache.record_entry(k, v, compact=layer._records_copies)
        if fresh.sizes is not None:
            recorded["sizes"] = torch.tensor(fresh.sizes)
    return linear(out, layer.proj), recorded


class _Fresh(NamedTuple):
    """Keys and values of this rank's tokens ``(B, N, 2, H, D)``, and how many every rank has, or None."""

    rows: Tensor
    sizes: tuple[int, ...] | None


def _start_dense(
    sharding: Sharding,
    layer: Any,
    name: str,
    make_kv: Callable[[], Packed],
    tokens: Tensor,
    sizes: tuple[int, ...] | None,
    attn_mask: Any,
) -> tuple[_Fresh, Callable[[], Packed]]:
    """Makes keys and values of the tokens of this rank, and starts to bring those of all ranks together."""

    def prepare() -> Tensor:
        return _together(make_kv(), layer)

    if name in sharding.replicated:
        whole = prepare()
        return _Fresh(whole, None), lambda: _packed(whole)
    if sizes is not None:
        fresh = prepare()
    else:

        def facts(made: Tensor | None) -> Facts:
            return Facts({"layer": type(layer).__name__, "attn_mask": attn_mask is not None, **_facts_of(made)})

        here = {name: tokens.shape[1] if tokens.ndim == 3 else 0}
        fresh, found = _agree(sharding, prepare, facts, here)
        sizes = found[name]
    finish = rows.start_gather(fresh.transpose(0, 1), Shards(sharding.ranks, (sizes,)))

    def wait() -> Packed:
        return _packed(finish().transpose(0, 1))

    return _Fresh(fresh, sizes), wait


def _read(
    sharding: Sharding, layer: Any, token_specs: Any, attention_patterns: Any, kv_cache: Any, record: bool
) -> Groups:
    """What becomes of the groups: the same on all ranks if they have the same names."""
    try:
        return read_groups(sharding, token_specs, attention_patterns, record=record, cached_groups=layer.cached_groups)
    except agreement.FAILURES as error:
        # Calls that read a cache need not ask other ranks, and who knows its sizes never does.
        if sharding.even or kv_cache is not None or _know_sizes(token_specs) or not agreement.can_exchange():
            raise
        agreement.fail(_WHO, sharding.ranks, error)


def _know_sizes(token_specs: Any) -> bool:
    try:
        return any(getattr(spec, "sizes", None) is not None for spec in token_specs)
    except TypeError:
        return False


def _agree_on_groups(
    sharding: Sharding,
    layer: Any,
    groups: Groups,
    prepare: Callable[[], Tensor | None],
    mask: Tensor | None,
) -> tuple[Tensor | None, dict[str, tuple[int, ...]]]:
    """What ``prepare`` makes, and the sizes of the counted groups on every rank that are not replicated."""
    told = _told_sizes(sharding, groups)
    if told is not None:
        fresh = prepare()
        if not torch.compiler.is_compiling():
            groups.check_sizes(sharding)
        return fresh, told

    def facts(fresh: Tensor | None) -> Facts:
        return _facts(groups, mask, _facts_of(fresh))

    here = {spec.name: spec.size for spec in groups.counted if spec.name not in sharding.replicated}
    return _agree(sharding, prepare, facts, here)


def _facts(groups: Groups, mask: Tensor | None, of_keys: Mapping[str, Any]) -> Facts:
    return Facts(
        {
            "token groups": [spec.name for spec in groups.specs],
            "groups of a cache": groups.cached,
            "attention patterns": [(p.query_tokens, p.key_value_tokens) for p in groups.patterns],
            "key_padding_mask": None if mask is None else f"{mask.shape[0]} sequences",
            "caches recorded": groups.recorded,
            **of_keys,
        }
    )


def _told_sizes(sharding: Sharding, groups: Groups) -> dict[str, tuple[int, ...]] | None:
    """Sizes on every rank that the specs know or that are promised; None if the ranks have to be asked."""
    counted: list[Any] = [spec for spec in groups.counted if spec.name not in sharding.replicated]
    known = {spec.name: spec.sizes for spec in counted if isinstance(spec, ShardedTokenSpec)}
    if len(known) == len(counted):
        return known
    if sharding.even:
        return {spec.name: (spec.size,) * sharding.ranks.size for spec in counted}
    return None


def _facts_of(fresh: Tensor | None) -> dict[str, Any]:
    if fresh is None:
        return {}
    batch_size, _, _, num_heads, head_dim = fresh.shape
    return agreement.facts_of_keys(fresh.dtype, batch_size, (num_heads, head_dim), fresh.requires_grad)


def _agree(
    sharding: Sharding,
    prepare: Callable[[], Made],
    facts: Callable[[Tensor | None], Facts],
    here: Mapping[str, Any],
) -> tuple[Made, dict[str, tuple[int, ...]]]:
    """What ``prepare`` makes, and sizes on every rank: promised to be even, or asked for."""
    if sharding.even:
        return prepare(), {name: (size,) * sharding.ranks.size for name, size in here.items()}
    if not agreement.can_exchange():
        raise ValueError(
            "ContextParallel: sizes on the other ranks cannot be asked for under the compiler or while a CUDA graph is "
            "captured; pass token_specs that know them (ma.distributed.shard_specs, exchange_specs), or promise "
            "ContextParallel(even=True)"
        )
    fresh = agreement.attempt(_WHO, sharding.ranks, prepare)
    sizes = agreement.agree(_WHO, sharding.ranks, facts(fresh), list(here.values()))
    return fresh, dict(zip(here, sizes))


def _together(part: Packed, layer: Any) -> Tensor:
    """Slots ``(B, N, slots, H, D)`` normalised and rotated, as one tensor."""
    if part.freqs is None and not part.norms:
        return part.buffer.view(part.shape)
    return torch.stack(packed.rotated_slots(part, parallel=getattr(layer, "parallel", True)), 2)


def _packed(slots: Tensor) -> Packed:
    """Slots ``(B, N, slots, H, D)``, to be read as they are."""
    batch_size, seqlen, count, num_heads, head_dim = slots.shape
    return Packed(slots, (batch_size, seqlen, count, num_heads, head_dim))


def _pieces(tokens: Tensor, specs: Sequence[TokenSpec]) -> dict[str, Tensor]:
    """What tokens ``(B, N, ...)`` of some groups are of each."""
    return dict(zip([spec.name for spec in specs], tokens.split([spec.size for spec in specs], 1)))


def _start(pieces: Mapping[str, Tensor], groups: Groups, shards: Shards) -> Callable[[], Tensor | None]:
    """Starts to bring the keys and values of gathered groups together, ``(B, all rows, 2, H, D)``."""
    if not groups.gathered:
        return lambda: None
    here = [pieces[name] for name in groups.gathered]
    together = here[0] if len(here) == 1 else cat(here, 1)
    finish = rows.start_gather(together.transpose(0, 1), shards)
    return lambda: finish().transpose(0, 1)


def _join(pieces: Mapping[str, Tensor], groups: Groups, gathered: Tensor | None, shards: Shards) -> Tensor | None:
    """Rows ``(B, n, ...)`` of all groups that are read and no cache's, in their order."""
    if gathered is not None and groups.read == groups.gathered:
        return gathered
    whole = {} if gathered is None else dict(zip(groups.gathered, gathered.split(list(shards.splits()), 1)))
    held = [whole[name] if name in whole else pieces[name] for name in groups.read]
    return cat(held, 1) if held else None


def _gather_mask(mask: Tensor | None, groups: Groups, shards: Shards) -> Tensor | None:
    """The padding mask of these keys."""
    if mask is None:
        return None
    pieces = _mask_pieces(mask, groups)
    gathered = None
    if groups.gathered:
        here = torch.cat([pieces[name] for name in groups.gathered], 1)
        gathered = rows.gather(here.transpose(0, 1), shards).transpose(0, 1)
    return _join(pieces, groups, gathered, shards)


def _mask_pieces(mask: Tensor, groups: Groups) -> dict[str, Tensor]:
    return _pieces(mask, groups.present)


def _record(layer: Any, kv: Tensor, mask: Tensor | None, sizes: tuple[int, ...] | None) -> KVEntry:
    """An entry of the rows of this rank, which says that it is no more."""
    k, v = kv.unbind(2)
    entry = cache.record_entry(k, v, mask, detach=layer.detach_kv_cache, compact=layer._records_copies)
    return entry if sizes is None else {**entry, "sizes": torch.tensor(sizes)}
