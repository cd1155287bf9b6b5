"""Sizes of token groups on every rank: by rule, or asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixed_attention.distributed import agreement
from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.shards import Shards
from mixed_attention.plan import AttentionPatternLike, TokenSpecLike, read_patterns, read_specs
from mixed_attention.spec import ShardedTokenSpec, TokenSpec


def share_of(n: int, mesh: Any = None) -> slice:
    """The part of ``n`` rows that is this rank's, as ``torch.chunk`` cuts them: the last ranks may get fewer, or none.

    Args:
        n: How many rows there are.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.

    Returns:
        The slice of its rows.

    Raises:
        ValueError: If ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n: expected at least 0 rows, got {n}")
    ranks = Ranks.of(mesh)
    bounds = bounds_of(n, ranks.size)
    return slice(bounds[ranks.rank], bounds[ranks.rank + 1])


def bounds_of(n: int, size: int) -> list[int]:
    """Where the shares of ``n`` rows on so many ranks begin, and the end of the last."""
    share = -(-n // size)
    return [min(rank * share, n) for rank in range(size + 1)]


def shares_of(n: int, size: int) -> tuple[int, ...]:
    """How many rows each rank gets of them."""
    bounds = bounds_of(n, size)
    return tuple(end - start for start, end in zip(bounds, bounds[1:]))


def shard_specs(token_specs: Sequence[TokenSpecLike], mesh: Any = None) -> list[ShardedTokenSpec]:
    """Cuts every group as :func:`share_of` does. No communication.

    Args:
        token_specs: The groups with their sizes on all ranks together.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.

    Returns:
        The groups with their sizes on this rank and on every rank.

    Raises:
        TypeError: If the groups are no sequence of such.
        ValueError: If one has no size, or was cut already.
    """
    ranks = Ranks.of(mesh)
    sharded = []
    for spec in read_specs(token_specs):
        if isinstance(spec, ShardedTokenSpec):
            raise ValueError(f"token_specs: expected groups with sizes of all ranks together, got {spec!r}")
        if spec.size is None:
            raise ValueError(f"token_specs: {spec.name!r} has size None; keys of a cache are whole on every rank")
        sizes = shares_of(spec.size, ranks.size)
        sharded.append(ShardedTokenSpec(spec.name, sizes[ranks.rank], sizes))
    return sharded


def exchange_specs(
    token_specs: Sequence[TokenSpecLike], mesh: Any = None, attention_patterns: Sequence[AttentionPatternLike] = ()
) -> list[ShardedTokenSpec | TokenSpec]:
    """Asks all ranks for their sizes, once for all layers of a step.

    Args:
        token_specs: The groups with their sizes on this rank, any ones. Those of size ``None`` stay as they are.
        mesh: A ``DeviceMesh`` of one dimension or a process group; by default all processes.
        attention_patterns: What the groups are for; compared between the ranks.

    Returns:
        The groups with their sizes on this rank and on every rank.

    Raises:
        TypeError: If the groups or patterns are of the wrong kind; ValueError or RuntimeError on the other ranks.
        ValueError: On every rank, if names or patterns are not the same on all.
    """
    ranks = Ranks.of(mesh)
    if not agreement.can_exchange():
        raise ValueError(
            "exchange_specs: sizes cannot be asked for under the compiler or while a CUDA graph is captured; call it "
            "before, and pass what it returns"
        )
    who = "exchange_specs"
    specs, patterns = agreement.attempt(
        who, ranks, lambda: (read_specs(token_specs), read_patterns(attention_patterns))
    )
    present = [spec for spec in specs if spec.size is not None]
    facts = agreement.Facts(
        {
            "token groups": [spec.name for spec in specs],
            "groups of a cache": [spec.name for spec in specs if spec.size is None],
            "attention patterns": [(p.query_tokens, p.key_value_tokens) for p in patterns],
        }
    )
    every = iter(agreement.agree(who, ranks, facts, [spec.size for spec in present if spec.size is not None]))
    return [spec if spec.size is None else ShardedTokenSpec(spec.name, spec.size, next(every)) for spec in specs]


def check_sizes(spec: ShardedTokenSpec, ranks: Ranks) -> None:
    """Checks that sizes are those of some ranks.

    Raises:
        ValueError: If they are not.
    """
    if len(spec.sizes) != ranks.size:
        raise ValueError(
            f"token group {spec.name!r} has sizes of {len(spec.sizes)} ranks, {spec.sizes}, but there are {ranks.size} "
            "in the mesh; pass the mesh that its sizes were made for"
        )
    if spec.size != spec.sizes[ranks.rank]:
        raise ValueError(
            f"token group {spec.name!r} has {spec.size} tokens here, but its sizes {spec.sizes} say "
            f"{spec.sizes[ranks.rank]} of rank {ranks.rank}"
        )


def shards_of(specs: Sequence[TokenSpec], ranks: Ranks) -> Shards:
    """Where the rows of sharded groups lie."""
    sharded = [spec for spec in specs if isinstance(spec, ShardedTokenSpec)]
    for spec in sharded:
        check_sizes(spec, ranks)
    return Shards(ranks, tuple(spec.sizes for spec in sharded))
