"""Token groups and patterns compiled into row ranges: the only form in which kernels see a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mixed_attention.spec import AttentionPattern, TokenSpec

if TYPE_CHECKING:
    from torch import Tensor


class TokenSpecLike(Protocol):
    """Anything with the two attributes of a token group; upstream's own classes qualify."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...


class AttentionPatternLike(Protocol):
    """Anything with the two attributes of a pattern; upstream's own classes qualify."""

    @property
    def query_tokens(self) -> Sequence[str]: ...
    @property
    def key_value_tokens(self) -> Sequence[str]: ...


def read_specs(specs: Any, argument: str = "token_specs") -> list[TokenSpec]:
    """Token groups of any class as ours, whose names are strings and whose sizes are integers and nothing else.

    So equal arguments are the same ones: 5.0 and True, which a cache takes for 5 and 1, get no further.

    Args:
        specs: The groups.
        argument: What they are called in messages.

    Raises:
        TypeError: If they are no sequence, or one lacks a name or a size.
        ValueError: If a name is not a string, or a size neither an integer nor None.
    """
    return [spec if type(spec) is TokenSpec else _as_spec(spec, argument) for spec in _entries(specs, argument)]


def read_patterns(patterns: Any) -> list[AttentionPattern]:
    """Patterns of any class as ours.

    Args:
        patterns: The patterns.

    Raises:
        TypeError: If they are no sequence, or one lacks its queries or its keys.
        ValueError: If a pattern names its groups by anything but lists or tuples of strings.
    """
    entries = _entries(patterns, "attention_patterns")
    return [entry if type(entry) is AttentionPattern else _as_pattern(entry) for entry in entries]


def _entries(entries: Any, argument: str) -> Iterable[Any]:
    if type(entries) in (list, tuple):  # at once, because asking abstract classes takes longer than all else here
        return entries
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
        raise TypeError(f"{argument}: expected a list or a tuple, got {type(entries).__name__}")
    return entries


def _as_spec(spec: Any, argument: str) -> TokenSpec:
    try:
        name, size = spec.name, spec.size
    except AttributeError:
        raise TypeError(
            f"{argument}: expected groups with a name and a size, TokenSpec(name, size), got {spec!r}"
        ) from None
    if size is not None and type(size) is not int and (isinstance(size, bool) or not hasattr(size, "__index__")):
        raise ValueError(f"{argument}: the size of {name!r} must be an integer or None, got {size!r}")
    return TokenSpec(name, size)


def _as_pattern(pattern: Any) -> AttentionPattern:
    try:
        return AttentionPattern(pattern.query_tokens, pattern.key_value_tokens)
    except AttributeError:
        raise TypeError(
            "attention_patterns: expected patterns with query_tokens and key_value_tokens, "
            f"AttentionPattern(query_tokens, key_value_tokens), got {pattern!r}"
        ) from None


@dataclass(frozen=True, slots=True)
class Group:
    """One token group: where its rows lie among the queries and among the keys, and which pattern it follows."""

    name: str
    size: int
    query_start: int | None  # None: a cached group, it asks nothing
    key_start: int | None  # None: nobody attends to it and the plan leaves such keys out
    pattern: int | None
    readers: tuple[int, ...]  # patterns that list the group as key, once per listing


@dataclass(frozen=True, slots=True)
class QuerySegment:
    """A maximal run of neighbouring query groups of one pattern, with the key ranges it attends to.

    Ranges are half open, ``[start, end)``, in rows. A range that stands twice counts twice.
    """

    start: int
    end: int
    key_ranges: tuple[tuple[int, int], ...]
    pattern: int


@dataclass(frozen=True, slots=True)
class KeySegment:
    """A maximal run of neighbouring key groups with the same readers; the inverse view, as the backward walks it."""

    start: int
    end: int
    query_ranges: tuple[tuple[int, int], ...]  # one per reading segment, repeated if the segment lists the keys twice


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Patterns compiled for given group sizes. Make one with :meth:`compile`; immutable and hashable.

    Attributes:
        groups: The token groups in sequence order.
        patterns: ``(query names, key names)`` of every pattern, as given.
        num_queries: Rows that ``q`` must have.
        num_keys: Rows that ``k`` and ``v`` must have.
        query_segments: What each run of query rows attends to, in row order; they cover all queries exactly once.
    """

    groups: tuple[Group, ...]
    patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    num_queries: int
    num_keys: int
    query_segments: tuple[QuerySegment, ...]

    @classmethod
    def compile(
        cls,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        *,
        cached: Sequence[TokenSpecLike] = (),
        skip_unread_keys: bool = False,
    ) -> AttentionPlan:
        """Compiles patterns over token groups into row ranges. Plans of equal arguments are cached.

        Args:
            token_specs: The groups of the sequence, in order. Those of size ``None`` ask nothing and their number of
                keys is taken from ``cached``.
            attention_patterns: Every group of the specs must be a query of exactly one pattern.
            cached: The sizes of the groups whose size is ``None`` in ``token_specs``.
            skip_unread_keys: Whether ``k`` and ``v`` leave out the groups that nobody attends to. By default they
                have one row for every token.

        Returns:
            The plan. Queries lie in the order of ``token_specs`` without the cached groups; keys in the order of
            ``token_specs``.

        Raises:
            TypeError: If a group or a pattern lacks its attributes.
            ValueError: If a name is not a string or a size not an integer, names are not unique, a pattern is empty or
                names an unknown group, a group is a query in none or in several patterns, or a cached size is missing.
        """
        token_specs, cached = read_specs(token_specs), read_specs(cached, "cached")
        attention_patterns = read_patterns(attention_patterns)
        cached_sizes = {spec.name: spec.size for spec in cached}
        names = tuple(spec.name for spec in token_specs)
        present = tuple(spec.size is not None for spec in token_specs)
        sizes = tuple(cached_sizes.get(spec.name) if spec.size is None else spec.size for spec in token_specs)
        patterns = tuple((pattern.query_tokens, pattern.key_value_tokens) for pattern in attention_patterns)
        if torch.compiler.is_compiling():  # sizes may be symbolic: they must not be hashed or compared
            return _compile(names, present, sizes, patterns, skip_unread_keys)
        return _compile_cached(names, present, sizes, patterns, skip_unread_keys)

    @property
    def key_segments(self) -> tuple[KeySegment, ...]:
        """The inverse of ``query_segments``: who reads which keys, by runs of neighbouring groups read alike."""
        return tuple(self._key_segments())

    def _key_segments(self) -> Iterator[KeySegment]:
        placed = [group for group in self.groups if group.key_start is not None]
        for run in _runs(placed, lambda group: sorted(group.readers)):
            readers = sorted(run[0].readers)
            queries = tuple((s.start, s.end) for p in readers for s in self.query_segments if s.pattern == p)
            yield KeySegment(*_key_rows(run), query_ranges=queries)

    def flat(self) -> list[int]:
        """The plan as the operator takes it: per segment ``start, end, number of ranges, start, end, start, end…``."""
        flat: list[int] = []
        for segment in self.query_segments:
            flat += [segment.start, segment.end, len(segment.key_ranges)]
            for key_range in segment.key_ranges:
                flat += key_range
        return flat

    def num_pairs(self) -> int:
        """The number of (query, key) pairs that are attended, a key listed twice counted twice."""
        return sum((s.end - s.start) * sum(end - start for start, end in s.key_ranges) for s in self.query_segments)

    def flops(self, num_heads: int, head_dim: int, *, backward: bool = False) -> int:
        """Floating-point operations of a batch of one: 4·H·D per attended pair, 2.5 times that backward."""
        forward = 4 * num_heads * head_dim * self.num_pairs()
        return forward * 5 // 2 if backward else forward

    def mask(self) -> Tensor:
        """The plan as a dense boolean mask, ``(num_queries, num_keys)``, True where a query attends to a key."""
        mask = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool)
        for segment in self.query_segments:
            for start, end in segment.key_ranges:
                mask[segment.start : segment.end, start:end] = True
        return mask

    def explain(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 1,
        num_heads: int = 1,
        head_dim: int = 64,
    ) -> str:
        """The plan in words: which rows attend to which, and who reads which keys.

        For a GPU (``device="cuda"``) also which kernels compute a call of these shapes, in which tiles, and how often
        their number fills the device.
        """
        lines = list(_explain(self))
        if torch.device(device).type == "cuda":
            from mixed_attention.kernels import explain_kernels

            shape = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim}
            lines += explain_kernels(self, device=torch.device(device), dtype=dtype, **shape)
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draws who attends to whom, groups along both axes, to an image file. Needs the ``plot`` extra.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from mixed_attention.plot import plot_plan

        plot_plan(self, Path(path))


def _runs(groups: Iterable[Group], key: Callable[[Group], object]) -> Iterator[list[Group]]:
    """Splits neighbours into maximal runs of groups with equal keys."""
    run: list[Group] = []
    for group in groups:
        if run and key(run[-1]) != key(group):
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _key_rows(run: list[Group]) -> tuple[int, int]:
    """The rows of k and v that neighbouring groups take."""
    start, last_start = run[0].key_start, run[-1].key_start
    assert start is not None and last_start is not None, "only groups with a place among the keys make runs"
    return start, last_start + run[-1].size


def _query_segment(run: list[Group], key_ranges: list[tuple[tuple[int, int], ...]]) -> QuerySegment:
    """Neighbouring groups of one pattern, with what the pattern reads."""
    start, last_start, pattern = run[0].query_start, run[-1].query_start, run[0].pattern
    assert start is not None and last_start is not None and pattern is not None, "only groups that ask make runs"
    return QuerySegment(start, last_start + run[-1].size, key_ranges[pattern], pattern)


def _check(names: tuple[str, ...], patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]) -> None:
    """Checks what upstream checks, in its order and with its words; then what it forgets."""
    queries = [name for query_names, _ in patterns for name in query_names]
    for name in queries:
        if queries.count(name) > 1:
            raise ValueError(f"token group {name!r} cannot be a query in multiple patterns, or twice in one")
    if set(queries) != set(names):
        missing, unknown = sorted(set(names) - set(queries)), sorted(set(queries) - set(names))
        raise ValueError(
            "the set of query tokens must exactly match the set of names in token_specs; "
            f"in no pattern: {missing}, not in token_specs: {unknown}"
        )
    for _, key_names in patterns:
        for name in key_names:
            if name not in names:
                raise ValueError(f"key/value token group {name!r} is not defined in `token_specs` {list(names)}")
    for index, (query_names, key_names) in enumerate(patterns):
        if not query_names or not key_names:
            side = "query_tokens" if not query_names else "key_value_tokens"
            raise ValueError(f"attention pattern {index} has no {side}; name at least one token group")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"token_specs: the name {name!r} stands more than once; group names must be unique")


def _compile(
    names: tuple[str, ...],
    present: tuple[bool, ...],
    sizes: tuple[int | None, ...],
    patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...],
    skip_unread_keys: bool,
) -> AttentionPlan:
    # Branches only on names and positions, never on a size: sizes stay symbolic under torch.compile, and a change
    # of sizes needs no new compilation. An empty group is a range of length zero.
    _check(names, patterns)
    pattern_of = {name: index for index, (query_names, _) in enumerate(patterns) for name in query_names}
    groups = []
    num_queries, num_keys = 0, 0
    for name, size, is_present in zip(names, sizes, present):
        if size is None:
            raise ValueError(f"token group {name!r} has size None and no entry in `cached` gives its number of keys")
        readers = tuple(i for i, (_, key_names) in enumerate(patterns) for key in key_names if key == name)
        has_keys = bool(readers) or not skip_unread_keys
        groups.append(
            Group(
                name=name,
                size=size,
                query_start=num_queries if is_present else None,
                key_start=num_keys if has_keys else None,
                pattern=pattern_of[name] if is_present else None,
                readers=readers,
            )
        )
        num_queries = num_queries + size if is_present else num_queries
        num_keys = num_keys + size if has_keys else num_keys
    key_ranges = [_key_ranges(groups, index) for index in range(len(patterns))]
    asking = [group for group in groups if group.query_start is not None]
    segments = tuple(_query_segment(run, key_ranges) for run in _runs(asking, lambda group: group.pattern))
    return AttentionPlan(tuple(groups), patterns, num_queries, num_keys, segments)


# Many sizes pass through a training run; each plan is small, so a generous bound keeps them all.
_compile_cached = lru_cache(maxsize=4096)(_compile)


def _key_ranges(groups: list[Group], pattern: int) -> tuple[tuple[int, int], ...]:
    """The ranges that a pattern reads, neighbouring groups merged. A k-th listing of a group goes to a k-th layer
    of ranges, so that keys listed twice are visited twice."""
    ranges: list[tuple[int, int]] = []
    placed = [group for group in groups if group.key_start is not None]
    for layer in range(max(group.readers.count(pattern) for group in placed)):
        is_listed = partial(_is_listed, pattern, layer)
        ranges += [_key_rows(run) for run in _runs(placed, is_listed) if is_listed(run[0])]
    return tuple(ranges)


def _is_listed(pattern: int, layer: int, group: Group) -> bool:
    return group.readers.count(pattern) > layer


def _explain(plan: AttentionPlan) -> Iterator[str]:
    unread = [group.name for group in plan.groups if not group.readers]
    yield (
        f"{len(plan.groups)} token groups, {len(plan.patterns)} patterns: {plan.num_queries} queries, "
        f"{plan.num_keys} keys, {plan.num_pairs()} attended pairs"
    )
    for segment in plan.query_segments:
        names = [g.name for g in plan.groups if g.query_start is not None and g.pattern == segment.pattern]
        keys = " + ".join(f"[{start}, {end})" for start, end in segment.key_ranges)
        rows = f"queries [{segment.start}, {segment.end}) -> keys {keys}"
        yield f"  {rows}   pattern {segment.pattern}: {', '.join(names)}"
    if unread:
        yield f"  keys that nobody attends to: {', '.join(unread)}"
