"""What belongs to tokens, cut for the ranks and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixed_attention import ops
from mixed_attention.autocast import cat
from mixed_attention.distributed import rows
from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.shards import Shards
from mixed_attention.distributed.specs import shards_of
from mixed_attention.eager.at_once import keep
from mixed_attention.eager.projection import taken_ranges
from mixed_attention.plan import AttentionPlan, TokenSpecLike, read_specs
from mixed_attention.spec import ShardedTokenSpec, TokenSpec


def shard(tensor: Tensor, token_specs: Sequence[TokenSpecLike], dim: int = 1, *, mesh: Any = None) -> Tensor:
    """The rows of this rank out of those of all ranks: of tokens, positions, frequencies, masks.

    Args:
        tensor: The rows of all groups, whole, along ``dim``.
        token_specs: The groups, with their sizes on every rank. Rows of those without are taken as they are.
        dim: Along which the rows lie.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.

    Returns:
        The rows of the groups on this rank, groups in order. Differentiable.

    Raises:
        TypeError: If ``tensor`` is none.
        ValueError: If the rows are not as many as the groups have on all ranks, or sizes are not those of the mesh.
    """
    ranks = Ranks.of(mesh)
    specs = _present(token_specs)
    shards_of(specs, ranks)
    whole = [spec.num_keys if isinstance(spec, ShardedTokenSpec) else spec.size for spec in specs]
    _check_rows(tensor, dim, whole, "on all ranks")
    pieces, end = [], 0
    for spec, count in zip(specs, whole):
        before = sum(spec.sizes[: ranks.rank]) if isinstance(spec, ShardedTokenSpec) else 0
        pieces.append(tensor.narrow(dim, end + before, spec.size))
        end = end + count
    return cat(pieces, dim) if pieces else tensor


def gather(tensor: Tensor, token_specs: Sequence[TokenSpecLike], dim: int = 1, *, mesh: Any = None) -> Tensor:
    """The inverse of :func:`shard`: the rows of all ranks on every rank, groups in order.

    Differentiable any number of times, in both modes: the gradient of a rank's rows is the sum of those that all ranks
    have for them.

    Args:
        tensor: The rows of all groups on this rank, along ``dim``; any dtype.
        token_specs: The groups, with their sizes on every rank. Rows of those without stay as they are.
        dim: Along which the rows lie.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.

    Returns:
        The rows of the groups on all ranks.

    Raises:
        TypeError: If ``tensor`` is none.
        ValueError: If the rows are not as many as the groups have here, or sizes are not those of the mesh.
    """
    ranks = Ranks.of(mesh)
    specs = _present(token_specs)
    _check_rows(tensor, dim, [spec.size for spec in specs], "here")
    return gather_groups(tensor.movedim(dim, 0), specs, ranks).movedim(0, dim)


def gather_groups(tensor: Tensor, specs: Sequence[TokenSpec], ranks: Ranks) -> Tensor:
    """:func:`gather` along the first dim, unchecked but for the sizes of the mesh."""
    shards = shards_of(specs, ranks)
    is_sharded = [isinstance(spec, ShardedTokenSpec) for spec in specs]
    if all(is_sharded):
        return rows.gather(tensor, shards) if specs else tensor
    pieces = tensor.split([spec.size for spec in specs])
    sharded = [piece for piece, is_cut in zip(pieces, is_sharded) if is_cut]
    if not sharded:
        return tensor
    gathered = iter(rows.gather(cat(sharded), shards).split(list(shards.splits())))
    return cat([next(gathered) if is_cut else piece for piece, is_cut in zip(pieces, is_sharded)])


def gather_keys(
    k: Tensor, v: Tensor, token_specs: Sequence[TokenSpecLike], mesh: Any = None, *, plan: AttentionPlan | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks, for :func:`mixed_attention.attention` with the queries of this rank.

    Differentiable as :func:`gather` is.

    Args:
        k: Keys of this rank's tokens ``(B or 1, N, H, D)``.
        v: Values ``(B or 1, N, H, Dv)``.
        token_specs: The groups of the N tokens, with their sizes on every rank. Those without stay as they are.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.
        plan: The plan of these groups, if it skips keys that nobody reads: such groups are not brought together.

    Returns:
        k and v of all ranks, as many rows as a plan compiled of the groups has keys.

    Raises:
        TypeError: If k or v is no tensor.
        ValueError: If shapes, sizes or the plan do not fit.

    Example:
        >>> specs = [ma.distributed.ShardedTokenSpec("a", 50, (50,))]  # of one rank alone
        >>> plan = ma.AttentionPlan.compile(specs, [ma.AttentionPattern(["a"], ["a"])])
        >>> plan.num_queries, plan.num_keys
        (50, 50)
    """
    ranks = Ranks.of(mesh)
    given = read_specs(token_specs)
    if not torch.compiler.is_compiling():
        found = _keys_at_once(k, v, given, ranks, plan)
        if found is not None:
            return found
    specs = _present(given)
    ops.check_tensors(k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name}: expected shape (batch_size, seqlen, num_heads, head_dim), got {tuple(tensor.shape)}"
            )
        _check_rows(tensor, 1, [spec.size for spec in specs], "here", name)
    if plan is not None:
        specs, k, v = _read_by(plan, specs, k, v)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if k.shape[:3] == v.shape[:3] and k.dtype == v.dtype:
        whole = gather_groups(torch.cat([k, v], -1), specs, ranks)
        k, v = whole.split([k.shape[-1], v.shape[-1]], -1)
    else:
        k, v = gather_groups(k, specs, ranks), gather_groups(v, specs, ranks)
    return k.transpose(0, 1), v.transpose(0, 1)


def _keys_at_once(
    k: Tensor, v: Tensor, specs: list[TokenSpec], ranks: Ranks, plan: AttentionPlan | None
) -> tuple[Tensor, Tensor] | None:
    """:func:`gather_keys` by one call of C++, in plain eager mode; None elsewhere, and where something is wrong.

    NOTE: what is kept follows from the arguments alone, so that ranks which find it make the same collectives as those
    that do not.
    """
    if not ops.is_compiled() or not isinstance(k, Tensor) or not isinstance(v, Tensor):
        return None
    if not ops.is_plain(k, v) or ops.needs_composite(k, v) or k.dtype != v.dtype or not k.ndim == v.ndim == 4:
        return None
    try:
        key = *specs, plan
        found = ranks.kept.get(key)
        if found is None:
            found = _layout(_present(specs), ranks, plan)
            keep(ranks.kept, key, found)
    except (TypeError, ValueError, RuntimeError):  # which is raised in its turn
        return None
    if found.where is None or not k.shape[1] == v.shape[1] == found.num_tokens or k.shape[0] != v.shape[0]:
        return None
    whole = ops.gather_tokens([k, v], found.tokens, found.where)
    return whole[0], whole[1]


class _Layout(NamedTuple):
    """Tokens here, those that are brought together, None for all, and where these lie, None if C++ has no say."""

    num_tokens: int
    tokens: list[tuple[int, int]] | None
    where: Any


def _layout(specs: list[Any], ranks: Ranks, plan: AttentionPlan | None) -> _Layout:
    is_read = [True] * len(specs)
    if plan is not None:
        if [group.name for group in plan.groups] != [spec.name for spec in specs]:
            return _Layout(0, None, None)
        is_read = [group.key_start is not None for group in plan.groups]
    num_tokens = sum(spec.size for spec in specs)
    read = [spec for spec, used in zip(specs, is_read) if used]
    if not read or not all(type(spec) is ShardedTokenSpec for spec in read):
        return _Layout(num_tokens, None, None)
    shards_of(read, ranks)  # checks
    runs = tuple((spec.size, used) for spec, used in zip(specs, is_read))
    where = ranks.native([spec.sizes for spec in read])
    return _Layout(num_tokens, None if all(is_read) else taken_ranges(runs), where)


def _read_by(
    plan: AttentionPlan, specs: list[TokenSpec], k: Tensor, v: Tensor
) -> tuple[list[TokenSpec], Tensor, Tensor]:
    """Groups, keys and values without what the plan has no keys of."""
    if [group.name for group in plan.groups] != [spec.name for spec in specs]:
        raise ValueError(
            f"plan: expected one of the groups {[spec.name for spec in specs]}, got one of "
            f"{[group.name for group in plan.groups]}"
        )
    is_read = [group.key_start is not None for group in plan.groups]
    if all(is_read):
        return specs, k, v
    sizes = [spec.size for spec in specs]
    k, v = (cat([t[:, :0], *(p for p, used in zip(t.split(sizes, 1), is_read) if used)], 1) for t in (k, v))
    return [spec for spec, used in zip(specs, is_read) if used], k, v


def gather_cache(kv_cache: Any, token_specs: Sequence[TokenSpecLike] | None = None, *, mesh: Any = None) -> Any:
    """Makes the shards of a KV cache whole on every rank.

    What it returns is read with groups of size ``None``, without collectives: each rank streams queries of its own.

    Args:
        kv_cache: What a layer returned that :class:`ContextParallel` marked; or lists, tuples and mappings of such,
            with None where a block has no cache.
        token_specs: Groups with their sizes on every rank, which must be those that the cache was recorded with; by
            default the cache knows.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.

    Returns:
        The same structure with the keys and values of all ranks. Entries that are no shards are returned as they are.

    Raises:
        TypeError: If something in it is neither of these.
        ValueError: If sizes do not fit.
    """
    ranks = Ranks.of(mesh)
    sizes = {}
    for spec in _present(token_specs or ()):
        if isinstance(spec, ShardedTokenSpec):
            shards_of([spec], ranks)
            sizes[spec.name] = spec.sizes
    return _gather_cache(kv_cache, sizes, ranks, "")


def _gather_cache(kv_cache: Any, sizes: Mapping[str, tuple[int, ...]], ranks: Ranks, name: str) -> Any:
    if kv_cache is None:
        return None
    if isinstance(kv_cache, Mapping) and isinstance(kv_cache.get("k"), Tensor):
        return _gather_entry(name, kv_cache, sizes.get(name), ranks)
    if isinstance(kv_cache, Mapping):
        return {key: _gather_cache(each, sizes, ranks, str(key)) for key, each in kv_cache.items()}
    if isinstance(kv_cache, (list, tuple)):
        return type(kv_cache)(_gather_cache(each, sizes, ranks, name) for each in kv_cache)
    raise TypeError(
        f"kv_cache: expected what a layer returned, in lists, tuples and mappings, got {type(kv_cache).__name__}"
    )


def _gather_entry(
    name: str, entry: Mapping[str, Tensor], sizes: tuple[int, ...] | None, ranks: Ranks
) -> dict[str, Tensor]:
    recorded = entry.get("sizes")
    if recorded is None and sizes is None:
        return dict(entry)
    if sizes is None:
        assert recorded is not None
        sizes = tuple(recorded.tolist())
    here = entry["k"].shape[2]
    if len(sizes) != ranks.size or sizes[ranks.rank] != here:
        raise ValueError(
            f"kv_cache entry {name!r}: it has {here} keys here, but the sizes are {sizes} of {len(sizes)} ranks, seen "
            f"from rank {ranks.rank} of {ranks.size}"
        )
    shards = Shards(ranks, (sizes,))
    whole = {}
    for which, tensor in entry.items():
        if which != "sizes":
            dim = 1 if which == "key_padding_mask" else 2
            whole[which] = rows.gather(tensor.movedim(dim, 0), shards).movedim(0, dim)
    return whole


def _present(token_specs: Sequence[TokenSpecLike]) -> list[Any]:
    """The groups that have tokens here."""
    return [spec for spec in read_specs(token_specs) if spec.size is not None]


def _check_rows(tensor: Any, dim: int, sizes: Sequence[int], where: str, name: str = "tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"{name}: expected a tensor with dim {dim}, got shape {tuple(tensor.shape)}")
    if tensor.shape[dim] != sum(sizes):
        raise ValueError(
            f"{name}: expected {sum(sizes)} rows along dim {dim}, as the groups have {where}, got {tensor.shape[dim]}"
        )
