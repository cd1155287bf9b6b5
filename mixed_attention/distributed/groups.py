"""The token groups of a layer over ranks, by what becomes of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mixed_attention import cache
from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.specs import check_sizes
from mixed_attention.eager.at_once import keep
from mixed_attention.eager.projection import Runs
from mixed_attention.plan import read_patterns, read_specs
from mixed_attention.spec import AttentionPattern, ShardedTokenSpec, TokenSpec


class Sharding(Protocol):
    """What attention has to know of how the tokens of a layer are spread; see ``TokenSharding``."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that the tokens are spread over."""
        ...

    @property
    def replicated(self) -> frozenset[str]:
        """Names of the groups that every rank holds whole."""
        ...

    @property
    def even(self) -> bool:
        """Whether every rank is promised to hold as many tokens of every group."""
        ...

    @property
    def kept(self) -> dict[Any, Any]:
        """What was derived from the arguments of calls, to look it up again."""
        ...


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a call.

    Attributes:
        specs: All groups.
        patterns: Who attends to whom.
        gathered: Names of those whose keys come from all ranks.
        read: Names of those here that somebody attends to, the gathered ones and those that every rank holds whole.
        recorded: Names of those that go into a cache.
    """

    specs: list[TokenSpec]
    patterns: list[AttentionPattern]
    gathered: list[str]
    read: list[str]
    recorded: list[str]

    @property
    def cached(self) -> list[str]:
        """Names of those that are not in the sequence."""
        return [spec.name for spec in self.specs if spec.size is None]

    @property
    def present(self) -> list[TokenSpec]:
        """Those that are in the sequence."""
        return [spec for spec in self.specs if spec.size is not None]

    @property
    def counted(self) -> list[ShardedTokenSpec | TokenSpec]:
        """Those whose sizes on all ranks matter."""
        return [spec for spec in self.present if spec.name in self.gathered or spec.name in self.recorded]

    @property
    def num_tokens(self) -> int:
        """Tokens here."""
        return sum([spec.size for spec in self.specs if spec.size is not None])

    def check_sizes(self, sharding: Sharding) -> None:
        """Checks that the sizes that groups know are those of the ranks.

        Raises:
            ValueError: If they are not.
        """
        for spec in self.counted:
            if isinstance(spec, ShardedTokenSpec):
                check_sizes(spec, sharding.ranks)

    def as_read(self, sizes: Mapping[str, tuple[int, ...]]) -> list[TokenSpec]:
        """All groups with as many keys as there are in this call, those of all ranks where they are gathered."""
        gathered = set(self.gathered)
        return [
            ShardedTokenSpec(spec.name, spec.size, sizes[spec.name])
            if spec.name in gathered
            else TokenSpec(spec.name, spec.size)
            for spec in self.specs
        ]

    def runs(self, names: Collection[str]) -> Runs:
        """The tokens here, by whether they are of these groups."""
        return tuple((spec.size, spec.name in names) for spec in self.specs if spec.size is not None)


def read_groups(
    sharding: Sharding, token_specs: Any, attention_patterns: Any, *, record: bool, cached_groups: frozenset[str]
) -> Groups:
    """What becomes of the groups: the same on all ranks if they have the same names.

    Raises:
        TypeError: If groups or patterns are of the wrong kind.
        ValueError: If they do not fit.
    """
    specs, patterns = read_specs(token_specs), read_patterns(attention_patterns)
    if torch.compiler.is_compiling():  # sizes may be symbolic: they must not be hashed
        return _sort(specs, patterns, sharding.replicated, record, cached_groups)
    key = *specs, *patterns, record, cached_groups
    found = sharding.kept.get(key)
    if found is None:
        found = _sort(specs, patterns, sharding.replicated, record, cached_groups)
        keep(sharding.kept, key, found)
    return found


def _sort(
    specs: list[TokenSpec],
    patterns: list[AttentionPattern],
    replicated: frozenset[str],
    record: bool,
    cached_groups: frozenset[str],
) -> Groups:
    names = {name for pattern in patterns for name in pattern.key_value_tokens}
    present = [spec for spec in specs if spec.size is not None]
    for spec in present:
        if isinstance(spec, ShardedTokenSpec) and spec.name in replicated:
            raise ValueError(
                f"token group {spec.name!r} is replicated, but has sizes of every rank, {spec.sizes}; pass a "
                "TokenSpec of all its tokens"
            )
    read = [spec.name for spec in present if spec.name in names]
    is_recorded = record and len(present) == len(specs)
    return Groups(
        specs,
        patterns,
        gathered=[name for name in read if name not in replicated],
        read=read,
        recorded=[spec.name for spec in present if is_recorded and cache.is_recorded(spec.name, cached_groups)],
    )
