"""Batches of samples whose token groups differ in size: one sequence, without padding and without masks.

:func:`batch` takes the groups and patterns of one sample, and the sizes of every sample. What it returns has groups and
patterns of all samples, as every layer and :meth:`mixed_attention.AttentionPlan.compile` take them, and brings tensors
into the sequence and back. The samples lie one after the other, and no sample sees another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mixed_attention.autocast import cat
from mixed_attention.plan import (
    AttentionPatternLike,
    TokenSpecLike,
    as_integer,
    check_structure,
    is_integer,
    read_patterns,
    read_specs,
)
from mixed_attention.spec import AttentionPattern, TokenSpec

# NOTE: The compiler takes the integers 0 and 1 for constants, and compiles again for others. Bounds that begin at 2 are
# neither, and a size is a difference of two of them, so that empty groups and single tokens are sizes like all others.
_FIRST_BOUND = 2


@dataclass(frozen=True)
class Batch:
    """The samples of a batch as one sequence. Made by :func:`batch`; immutable.

    Attributes:
        num_samples: How many samples there are.
        shared: Names of the groups that all samples have in common. Those that are in the sequence come first in it.
        attention_patterns: The patterns of all samples.
    """

    num_samples: int
    shared: tuple[str, ...]
    attention_patterns: tuple[AttentionPattern, ...]
    _names: tuple[str, ...]  # of one sample
    _cached: tuple[str, ...]  # those among all names, shared or not, that come from a cache
    _bounds: tuple[int, ...]  # where the groups of the sequence begin, and its end, counted from `_FIRST_BOUND`

    @property
    def token_specs(self) -> tuple[TokenSpec, ...]:
        """The groups of all samples: those that are shared, then ``name[0]`` of the first sample, and so on."""
        if torch.compiler.is_compiling():  # sizes may be symbolic and are not to be kept beyond the call
            return tuple(self._specs())
        return self._kept_specs

    @cached_property
    def _kept_specs(self) -> tuple[TokenSpec, ...]:  # the same objects at every call, by which plans are found at once
        return tuple(self._specs())

    def _specs(self) -> Iterator[TokenSpec]:
        place = 0
        for name in self.shared:
            yield TokenSpec(name, None if name in self._cached else self._bounds[place + 1] - self._bounds[place])
            place += name not in self._cached
        for sample in range(self.num_samples):
            for name in self._names:
                size = None if name in self._cached else self._bounds[place + 1] - self._bounds[place]
                yield TokenSpec(name_in(sample, name), size)
                place += name not in self._cached

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self._bounds[-1] - _FIRST_BOUND

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each sample begins in the sequence, and behind them its end: ``cu_seqlens`` of the samples."""
        first, step = self._num_shared, self._num_present
        return tuple([self._bounds[first + step * sample] - _FIRST_BOUND for sample in range(self.num_samples + 1)])

    @property
    def _num_shared(self) -> int:
        return sum([name not in self._cached for name in self.shared])

    @property
    def _num_present(self) -> int:
        """Groups of a sample that are in the sequence."""
        return sum([name not in self._cached for name in self._names])

    def rows(self, sample: int, name: str) -> slice:
        """Where a group of a sample lies in the sequence.

        Args:
            sample: Number of the sample.
            name: Name of the group, as in one sample.

        Raises:
            ValueError: If there is no such sample, or no such group in the sequence.
        """
        present = [each for each in self._names if each not in self._cached]
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"sample: expected a number from 0 to {self.num_samples - 1}, got {sample}")
        if name not in present:
            raise ValueError(f"name: expected a group of a sample that is in the sequence, {present}, got {name!r}")
        place = self._num_shared + self._num_present * sample + present.index(name)
        return slice(self._bounds[place] - _FIRST_BOUND, self._bounds[place + 1] - _FIRST_BOUND)

    def pack(self, samples: Sequence[Tensor], shared: Tensor | None = None) -> Tensor:
        """Joins what the samples have per token: tokens, coordinates, frequencies, padding masks, targets.

        Args:
            samples: The tokens ``(n, ...)`` of each sample, groups in the order of its specs; any dtype, the same for
                all, as what stands behind the first axis.
            shared: Tokens of the groups that are shared and in the sequence, ``(n, ...)``.

        Returns:
            ``(1, N, ...)``. Differentiable; the numbers are those given, under autocast, too.

        Raises:
            TypeError: If something is not a tensor.
            ValueError: If their number, a size, dtype or device does not fit.
        """
        offsets = self.offsets
        if not isinstance(samples, (list, tuple)):
            raise TypeError(f"samples: expected a list or a tuple of tensors, got {type(samples).__name__}")
        if len(samples) != self.num_samples:
            raise ValueError(f"samples: expected {self.num_samples} tensors, one a sample, got {len(samples)}")
        if shared is None and self._num_shared:
            present = [name for name in self.shared if name not in self._cached]
            raise ValueError(f"shared: expected the tokens of the groups {present}, got None")
        if shared is not None and not self._num_shared:
            raise ValueError("shared: no shared group of this batch is in the sequence, leave it out")
        wanted = [(f"samples[{i}]", each, offsets[i + 1] - offsets[i]) for i, each in enumerate(samples)]
        if shared is not None:
            wanted.insert(0, ("shared", shared, offsets[0]))
        for name, tensor, _ in wanted:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        for name, tensor, size in wanted:
            _check_tokens(name, tensor, size, samples[0])
        return cat([tensor for _, tensor, _ in wanted]).unsqueeze(0)

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The samples of what :meth:`pack` made, or of what a layer made of it.

        Args:
            packed: ``(1, N, ...)``.

        Returns:
            A view ``(n, ...)`` of each sample.

        Raises:
            TypeError: If it is not a tensor.
            ValueError: If its shape does not fit.
        """
        return self._pieces(packed)[1:]

    def unpack_shared(self, packed: Tensor) -> Tensor:
        """The tokens of shared groups in what :meth:`pack` made. Arguments and errors: :meth:`unpack`."""
        return self._pieces(packed)[0]

    def _pieces(self, packed: Tensor) -> list[Tensor]:
        if not isinstance(packed, Tensor):
            raise TypeError(f"packed: expected a tensor, got {type(packed).__name__}")
        if packed.ndim < 2 or packed.shape[0] != 1 or packed.shape[1] != self.num_tokens:
            raise ValueError(f"packed: expected shape (1, {self.num_tokens}, ...), got {tuple(packed.shape)}")
        offsets = self.offsets
        sizes = [offsets[0], *(end - start for start, end in zip(offsets, offsets[1:]))]
        return list(packed[0].split(sizes))

    def pack_cache(
        self, caches: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Joins caches that were recorded sample by sample, for a batch whose groups of size ``None`` they hold.

        Args:
            caches: What a layer returned for each sample alone.
            shared: A cache of the shared groups.

        Returns:
            The cache of the sequence. Its tensors are those given.

        Raises:
            TypeError: If one is not a mapping.
            ValueError: If their number does not fit.
        """
        if len(caches) != self.num_samples:
            raise ValueError(f"caches: expected {self.num_samples}, one a sample, got {len(caches)}")
        joined = dict(_entries("shared", shared or {}))
        for sample, each in enumerate(caches):
            entries = _entries(f"caches[{sample}]", each)
            joined.update({name_in(sample, name): entry for name, entry in entries if name not in self.shared})
        return joined

    def unpack_cache(self, kv_cache: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The cache of each sample, as a layer would have returned it for the sample alone, with the shared groups.

        Args:
            kv_cache: What a layer returned for the sequence.

        Raises:
            TypeError: If it is not a mapping.
        """
        given = dict(_entries("kv_cache", kv_cache))
        found: list[dict[str, Any]] = []
        for sample in range(self.num_samples):
            names = {**{name: name for name in self.shared}, **{n: name_in(sample, n) for n in self._names}}
            found.append({name: given[full] for name, full in names.items() if full in given})
        return found


def name_in(sample: int, name: str) -> str:
    """What a group of a sample is called in the sequence: ``"surface_anchors[3]"``."""
    return f"{name}[{sample}]"


def batch(
    token_specs: Sequence[TokenSpecLike],
    attention_patterns: Sequence[AttentionPatternLike],
    sizes: Sequence[Mapping[str, int] | Sequence[int]],
    *,
    shared: Collection[str] = (),
) -> Batch:
    """Groups and patterns of a batch whose samples are alike in their groups but for the sizes.

    Args:
        token_specs: The groups of one sample, in order. Groups of size ``None`` come from a cache in every sample.
        attention_patterns: Who attends to whom in one sample.
        sizes: For each sample the sizes of its groups: by name, where a group that is left out has that of its spec;
            or in the order of ``token_specs``, without shared and cached ones. Any may be 0.
        shared: Names of groups that are not of one sample but there once for all, with the size of their spec. All
            samples may attend to them; they themselves only to each other.

    Returns:
        The batch: its ``token_specs`` and ``attention_patterns`` go with tokens that its ``pack`` makes.

    Raises:
        TypeError: If an argument is not of the kind that stands above.
        ValueError: If groups and patterns do not fit each other, see :meth:`mixed_attention.AttentionPlan.compile`;
            there is no sample; a size is no integer of at least 0, names no group, or is of one that is shared or
            cached; or a shared group attends to groups of samples.

    Example:
        Two geometries of different sizes through one layer:

        >>> import mixed_attention as ma
        >>> specs = [ma.TokenSpec("anchors", 4), ma.TokenSpec("queries", 0)]
        >>> patterns = [ma.AttentionPattern(["anchors", "queries"], ["anchors"])]
        >>> batch = ma.ragged.batch(specs, patterns, [{"queries": 3}, {"anchors": 2, "queries": 5}])
        >>> [spec.name for spec in batch.token_specs], batch.offsets
        (['anchors[0]', 'queries[0]', 'anchors[1]', 'queries[1]'], (0, 7, 14))
        >>> layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=192, num_heads=3))
        >>> x = batch.pack([torch.randn(7, 192), torch.randn(7, 192)])
        >>> y = layer(x, batch.token_specs, batch.attention_patterns)
        >>> [tuple(sample.shape) for sample in batch.unpack(y)]
        [(7, 192), (7, 192)]
    """
    specs, patterns = read_specs(token_specs), read_patterns(attention_patterns)
    check_structure(
        tuple([spec.name for spec in specs]),
        tuple([(pattern.query_tokens, pattern.key_value_tokens) for pattern in patterns]),
    )
    common = _read_shared(specs, patterns, shared)
    own = [spec for spec in specs if spec.name not in common]
    if isinstance(sizes, (str, Mapping)) or not isinstance(sizes, Sequence):
        raise TypeError(f"sizes: expected a list with the sizes of every sample, got {type(sizes).__name__}")
    if not sizes:
        raise ValueError("sizes: expected those of at least one sample, got none")
    present = [spec.size for spec in specs if spec.name in common and spec.size is not None]
    for sample, given in enumerate(sizes):
        present += _read_sizes(f"sizes[{sample}]", own, given, common)
    bounds = [_FIRST_BOUND]
    for size in present:
        bounds.append(bounds[-1] + size)
    names = [spec.name for spec in own]
    _check_distinct(common, names, len(sizes))
    cached = [spec.name for spec in specs if spec.size is None]
    return Batch(
        len(sizes),
        tuple(common),
        tuple(_patterns(patterns, common, cached, len(sizes))),
        tuple(names),
        tuple(cached),
        tuple(bounds),
    )


def _read_shared(specs: list[TokenSpec], patterns: list[AttentionPattern], shared: Any) -> list[str]:
    """Names of the shared groups in the order of the specs."""
    if isinstance(shared, str) or not isinstance(shared, Collection):
        raise TypeError(f"shared: expected a list of group names, got {shared!r}")
    sizes = {spec.name: spec.size for spec in specs}
    for name in shared:
        if name not in sizes:
            raise ValueError(f"shared: no group of token_specs is called {name!r}, they are {list(sizes)}")
    for pattern in patterns:
        asking = [name for name in pattern.query_tokens if name in shared and sizes[name] is not None]
        seen = [name for name in pattern.key_value_tokens if name not in shared]
        if asking and seen:
            raise ValueError(
                f"shared: {asking[0]!r} is there once for all samples, but attends to {seen[0]!r}, which every sample "
                "has of its own; share both or none, or give it a pattern of its own"
            )
    return [spec.name for spec in specs if spec.name in shared]


def _read_sizes(where: str, specs: list[TokenSpec], given: Any, shared: list[str]) -> list[int]:
    """Sizes of the groups of a sample that are in the sequence."""
    present = [spec for spec in specs if spec.size is not None]
    names = [spec.name for spec in present]
    if isinstance(given, Mapping):
        for name in given:
            if name in shared:
                raise ValueError(f"{where}: {name!r} is shared, its size is that of its spec")
            if name not in names:
                what = "comes from a cache" if name in [spec.name for spec in specs] else "is no group of token_specs"
                raise ValueError(f"{where}: {name!r} {what}, expected sizes of {names}")
        return [_as_size(where, spec.name, given.get(spec.name, spec.size)) for spec in present]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{where}: expected sizes by name, or a list of them, got {given!r}")
    if len(given) != len(names):
        raise ValueError(f"{where}: expected {len(names)} sizes, of {names}, got {len(given)}")
    return [_as_size(where, name, size) for name, size in zip(names, given)]


def _as_size(where: str, name: str, size: Any) -> int:
    if not is_integer(size):
        raise ValueError(f"{where}: the size of {name!r} must be an integer, got {size!r}")
    if size < 0:
        raise ValueError(f"{where}: the size of {name!r} must be at least 0, got {size}")
    return as_integer(size)


def _check_distinct(shared: list[str], names: list[str], num_samples: int) -> None:
    """Only a shared group can be called as the group of a sample is in the sequence."""
    full = {name_in(sample, name) for sample in range(num_samples) for name in names} if shared else set()
    for name in shared:
        if name in full:
            raise ValueError(f"shared: {name!r} is what a group of a sample is called in the sequence; rename it")


def _patterns(
    patterns: list[AttentionPattern], shared: list[str], cached: list[str], num_samples: int
) -> Iterator[AttentionPattern]:
    """The patterns of shared queries, once, then those of the others, once a sample."""
    for pattern in patterns:
        asking = [name for name in pattern.query_tokens if name in shared]
        seen = [name for name in pattern.key_value_tokens if name in shared]
        if asking:  # what comes from a cache asks nothing, whatever its pattern says
            yield AttentionPattern(asking, seen or asking)
    for sample in range(num_samples):
        for pattern in patterns:
            queries, keys = (
                [name if name in shared else name_in(sample, name) for name in names]
                for names in (
                    [name for name in pattern.query_tokens if name not in shared],
                    pattern.key_value_tokens,
                )
            )
            if queries:
                yield AttentionPattern(queries, keys)


def _check_tokens(name: str, tensor: Tensor, size: int, like: Tensor) -> None:
    """Checks the tokens of one sample, which others are to be joined with."""
    if tensor.ndim < 1 or tensor.shape[0] != size or tensor.shape[1:] != like.shape[1:]:
        expected = ", ".join(map(str, (size, *like.shape[1:])))
        raise ValueError(f"{name}: expected shape ({expected}), tokens first, got {tuple(tensor.shape)}")
    for what in ("dtype", "device"):
        if getattr(tensor, what) != getattr(like, what):
            raise ValueError(
                f"{name}: expected {what} {getattr(like, what)} like samples[0], got {getattr(tensor, what)}"
            )


def _entries(name: str, kv_cache: Any) -> Collection[tuple[str, Any]]:
    if not isinstance(kv_cache, Mapping):
        raise TypeError(f"{name}: expected the cache that a layer returned, got {type(kv_cache).__name__}")
    return kv_cache.items()
