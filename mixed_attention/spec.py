"""What the user says of a call: token groups and attention patterns. No tensors here."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt


def _as_size(name: str, size: Any) -> int | SymInt | None:
    """Accepts what upstream's lax validation accepts: 3, 3.0, "3", True, a 0-d integer tensor, None; symbolic sizes."""
    if size is None or type(size) is int or isinstance(size, SymInt):
        return size
    if isinstance(size, float) and not size.is_integer():
        raise ValueError(f"TokenSpec {name!r}: size must be a whole number, got {size}")
    try:
        return int(size) if isinstance(size, (str, float)) else operator.index(size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"TokenSpec {name!r}: size must be a whole number or None, got {size!r}") from error


def _as_plain(name: str) -> str:
    """The same letters without the class of a subclass (an enum, a string of numpy), which may compare otherwise."""
    return name if type(name) is str else str.__str__(name)


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """A named, contiguous group of tokens in a sequence.

    Args:
        name: Name of the group, e.g. ``"surface_anchors"``; any string.
        size: Number of tokens, at least 0. ``None``: the group is not in the sequence, its keys and values come
            from a KV cache.

    Raises:
        ValueError: If ``name`` is not a string, or ``size`` is negative or not a whole number.

    Example:
        >>> TokenSpec("surface_anchors", 100)
        TokenSpec(name='surface_anchors', size=100)
    """

    name: str
    size: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"TokenSpec: name must be a string, got {type(self.name).__name__}")
        object.__setattr__(self, "name", _as_plain(self.name))
        size = _as_size(self.name, self.size)
        if size is not None and size < 0:
            raise ValueError(f"TokenSpec {self.name!r}: size must be at least 0, got {size}")
        object.__setattr__(self, "size", size)

    @classmethod
    def from_dict(cls, entry: Mapping[str, int | None]) -> TokenSpec:
        """Builds a spec from ``{name: size}``.

        Raises:
            TypeError: If ``entry`` is no mapping.
            ValueError: If the mapping does not hold exactly one entry.
        """
        if not isinstance(entry, Mapping):
            raise TypeError(f"TokenSpec.from_dict: expected a mapping {{name: size}}, got {type(entry).__name__}")
        if len(entry) != 1:
            raise ValueError(f"TokenSpec.from_dict expects exactly one key-value pair, got {len(entry)}")
        ((name, size),) = entry.items()
        return cls(name, size)

    def to_dict(self) -> dict[str, int | None]:
        """Returns ``{name: size}``."""
        return {self.name: self.size}

    @property
    def domain(self) -> str:
        """The name up to its first underscore (the whole name if there is none)."""
        return self.name.split("_", 1)[0]

    @property
    def attn_type(self) -> str:
        """The name after its last underscore (the whole name if there is none)."""
        return self.name.rsplit("_", 1)[-1]


@dataclass(frozen=True, slots=True)
class ShardedTokenSpec(TokenSpec):
    """A group of tokens that is spread over the ranks of a mesh, each of which holds some neighbouring rows of it.

    Args:
        name: Name of the group.
        size: Number of its tokens on this rank, at least 0.
        sizes: Numbers of its tokens on every rank, in the order of the ranks.

    Raises:
        ValueError: If ``name`` is not a string, ``size`` is None, or a number is negative or not whole.

    Example:
        >>> ShardedTokenSpec("surface_anchors", 50, (50, 49)).num_keys
        99
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        # NOTE: by name, as a class with slots is made twice and super() would look for the first.
        TokenSpec.__post_init__(self)
        if self.size is None:
            raise ValueError(
                f"ShardedTokenSpec {self.name!r}: size must be a whole number, got None; keys of a cache are whole on "
                "every rank: ma.distributed.gather_cache makes them so, then TokenSpec(name, None) reads them"
            )
        if not isinstance(self.sizes, Sequence) or isinstance(self.sizes, (str, bytes)) or not self.sizes:
            raise ValueError(f"ShardedTokenSpec {self.name!r}: sizes must list every rank's size, got {self.sizes!r}")
        sizes = tuple([_as_size(self.name, size) for size in self.sizes])
        for size in sizes:
            if size is None or size < 0:
                raise ValueError(f"ShardedTokenSpec {self.name!r}: sizes must be at least 0, got {self.sizes!r}")
        object.__setattr__(self, "sizes", sizes)

    @property
    def num_keys(self) -> int:
        """The tokens of all ranks."""
        return sum(self.sizes)


def _as_names(field: str, names: Any) -> tuple[str, ...]:
    # A bare string would be read as its letters, a set has no order, a generator can be read only once.
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise ValueError(f"AttentionPattern: {field} must be a list or tuple of group names, got {names!r}")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"AttentionPattern: {field} must hold group names, got {name!r}")
    return tuple(map(_as_plain, names))


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """States that the tokens of some groups attend to the tokens of some groups, and to nothing else.

    Args:
        query_tokens: Names of the groups that attend. The order does not matter.
        key_value_tokens: Names of the groups attended to, under one softmax. A name listed twice counts twice.

    Raises:
        ValueError: If either is a bare string, a set, a generator, or holds something other than strings.
    """

    query_tokens: tuple[str, ...]
    key_value_tokens: tuple[str, ...]

    def __init__(self, query_tokens: Sequence[str], key_value_tokens: Sequence[str]) -> None:
        object.__setattr__(self, "query_tokens", _as_names("query_tokens", query_tokens))
        object.__setattr__(self, "key_value_tokens", _as_names("key_value_tokens", key_value_tokens))
