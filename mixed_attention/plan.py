"""Token groups and patterns compiled into row ranges: the only form in which kernels see a pattern."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from mixed_attention.spec import AttentionPattern, ShardedTokenSpec, TokenSpec

if TYPE_CHECKING:
    from torch import Tensor


class TokenSpecLike(Protocol):
    """Anything with the two attributes of a token group; upstream's own classes qualify."""

    @property
    def name(self) -> str:
        """Name of the group."""

    @property
    def size(self) -> int | None:
        """Number of tokens, None for a group whose keys and values come from a cache."""


class AttentionPatternLike(Protocol):
    """Anything with the two attributes of a pattern; upstream's own classes qualify."""

    @property
    def query_tokens(self) -> Sequence[str]:
        """Names of the groups that attend."""

    @property
    def key_value_tokens(self) -> Sequence[str]:
        """Names of the groups attended to."""


def read_specs(specs: Any, argument: str = "token_specs") -> list[TokenSpec]:
    """Token groups of any class as ours, whose names are strings and whose sizes are integers and nothing else.

    So equal arguments are the same ones: 5.0 and True, which a cache takes for 5 and 1, get no further. Groups that
    know their ``sizes`` on every rank become :class:`ShardedTokenSpec`.

    Args:
        specs: The groups.
        argument: What they are called in messages.

    Raises:
        TypeError: If they are no sequence, or one lacks a name or a size.
        ValueError: If a name is not a string, or a size neither an integer nor None.
    """
    return [spec if type(spec) in _SPECS else _as_spec(spec, argument) for spec in _entries(specs, argument)]


_SPECS = (TokenSpec, ShardedTokenSpec)


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
    if size is not None and not is_integer(size):
        raise ValueError(f"{argument}: the size of {name!r} must be an integer or None, got {size!r}")
    sizes = getattr(spec, "sizes", None)
    return TokenSpec(name, size) if sizes is None else ShardedTokenSpec(name, size, sizes)


def _as_pattern(pattern: Any) -> AttentionPattern:
    try:
        return AttentionPattern(pattern.query_tokens, pattern.key_value_tokens)
    except AttributeError:
        raise TypeError(
            "attention_patterns: expected patterns with query_tokens and key_value_tokens, "
            f"AttentionPattern(query_tokens, key_value_tokens), got {pattern!r}"
        ) from None


# Groups and segments are tuples, which take a fifth of the time to make of what frozen dataclasses take: a plan of
# thousands of groups has thousands of both.


class Group(NamedTuple):
    """One token group: where its rows lie among the queries and among the keys, and which pattern it follows."""

    name: str
    size: int
    num_keys: int  # as many as tokens, or those of all ranks where these share the group
    query_start: int | None  # None: a cached group, it asks nothing
    key_start: int | None  # None: nobody attends to it and the plan leaves such keys out
    pattern: int | None
    readers: tuple[int, ...]  # patterns that list the group as key, once per listing


class QuerySegment(NamedTuple):
    """A maximal run of neighbouring query groups of one pattern, with the key ranges it attends to.

    Ranges are half open, ``[start, end)``, in rows. A range that stands twice counts twice.
    """

    start: int
    end: int
    key_ranges: tuple[tuple[int, int], ...]
    pattern: int


class KeySegment(NamedTuple):
    """A maximal run of neighbouring key groups with the same readers; the inverse view, as the backward walks it."""

    start: int
    end: int
    query_ranges: tuple[tuple[int, int], ...]  # one per reading segment, repeated if the segment lists the keys twice


@dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom, in rows. Immutable and hashable.

    Make one with :meth:`compile`, of named groups, or with :meth:`from_segments`, of row ranges.

    Attributes:
        groups: The token groups in sequence order; none in a plan of row ranges.
        patterns: ``(query names, key names)`` of every pattern, as given; none in a plan of row ranges.
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
                keys is taken from ``cached``. Those that know their ``sizes`` on every rank (see
                :class:`mixed_attention.distributed.ShardedTokenSpec`) ask with the tokens of this rank, and have the
                keys of all ranks.
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
        if torch.compiler.is_compiling():  # sizes may be symbolic: they must not be hashed or compared
            return _compile(*_arguments(*_read(token_specs, attention_patterns, cached)), skip_unread_keys)
        return _RECENT.compile(token_specs, attention_patterns, cached, skip_unread_keys)

    @classmethod
    def from_segments(
        cls, segments: Sequence[tuple[int, int, Sequence[tuple[int, int]]]], num_keys: int | None = None
    ) -> AttentionPlan:
        """Makes a plan of row ranges, for those who have numbers instead of names.

        The plan has no groups and no patterns: every segment counts as a pattern, and is taken as it is.

        Args:
            segments: ``(q_start, q_end, [(k_start, k_end), ...])`` each: the queries of these rows attend to the keys
                of these ranges, under one softmax. All ranges are half open. The segments cover the queries once and
                in order. Ranges of keys may come in any order; what lies in several counts as often. A segment without
                ranges attends to nothing: its output is 0.
            num_keys: Rows that ``k`` and ``v`` have. By default as many as the ranges reach.

        Returns:
            The plan.

        Raises:
            TypeError: If the segments are no sequence of such triples.
            ValueError: If a number is not an integer, the queries are not covered once and in order, or a range ends
                before it begins or is not within the keys.

        Example:
            Two documents of 100 and 150 tokens in one sequence, of which the second also sees the first ten of the
            first:

            >>> plan = AttentionPlan.from_segments([(0, 100, [(0, 100)]), (100, 250, [(100, 250), (0, 10)])])
            >>> plan.num_queries, plan.num_keys, plan.num_pairs()
            (250, 250, 34000)
        """
        rows = tuple(_read_segments(segments))
        reach = max([0, *(end for segment in rows for _, end in segment.key_ranges)])
        num_keys = reach if num_keys is None else _as_row("num_keys", num_keys)
        if reach > num_keys:
            index, keys = next((s.pattern, k) for s in rows for k in s.key_ranges if k[1] > num_keys)
            raise ValueError(f"segments[{index}]: key range [{keys[0]}, {keys[1]}) is not within the {num_keys} keys")
        return cls((), (), rows[-1].end if rows else 0, num_keys, rows)

    @property
    def key_segments(self) -> tuple[KeySegment, ...]:
        """The inverse of ``query_segments``: who reads which keys, by runs of neighbouring groups read alike.

        In a plan of row ranges the keys are cut wherever a range begins or ends.
        """
        return tuple(self._key_segments() if self.groups else _invert(self.query_segments, self.num_keys))

    def _key_segments(self) -> Iterator[KeySegment]:
        queries: dict[int, list[tuple[int, int]]] = {}
        for s in self.query_segments:
            queries.setdefault(s.pattern, []).append((s.start, s.end))
        placed = [group for group in self.groups if group.key_start is not None]
        for run in _runs(placed, lambda group: group.readers):
            reading = tuple(rows for pattern in run[0].readers for rows in queries.get(pattern, ()))
            yield KeySegment(*_key_rows(run[0], run[-1]), query_ranges=reading)

    def flat(self) -> list[int]:
        """The plan as the operator takes it: per segment ``start, end, number of ranges, start, end, start, end…``."""
        # NOTE: a traced call may have symbolic sizes, which are not to be kept beyond it.
        return list(_flatten(self.query_segments) if torch.compiler.is_compiling() else self._flat)

    @cached_property
    def _flat(self) -> tuple[int, ...]:
        return tuple(_flatten(self.query_segments))

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What others have derived from the plan and look up again; neither part of its value nor pickled."""
        return {}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.groups, self.patterns, self.num_queries, self.num_keys, self.query_segments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._fields  # without the kept hash, as those of strings differ between processes

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

    if TYPE_CHECKING:  # explain.py and plot.py, which know the kernels and plans, give these to the class

        def explain(
            self,
            *,
            device: torch.device | str = "cpu",
            dtype: torch.dtype = torch.bfloat16,
            batch_size: int = 1,
            num_heads: int = 1,
            head_dim: int = 64,
            head_dim_v: int | None = None,
        ) -> str:
            """See :func:`mixed_attention.explain.explain`."""

        def plot(self, path: str | Path) -> None:
            """See :func:`mixed_attention.plot.plot`."""


def _runs(groups: Iterable[Group], key: Callable[[Group], object]) -> Iterator[list[Group]]:
    """Splits neighbours into maximal runs of groups with equal keys."""
    run: list[Group] = []
    value: object = None
    for group in groups:
        before, value = value, key(group)
        if run and value != before:
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _key_rows(first: Group, last: Group) -> tuple[int, int]:
    """The rows of k and v that neighbouring groups take."""
    assert first.key_start is not None and last.key_start is not None, "only groups with a place among the keys"
    return first.key_start, last.key_start + last.num_keys


def _query_segment(run: list[Group], key_ranges: list[tuple[tuple[int, int], ...]]) -> QuerySegment:
    """Neighbouring groups of one pattern, with what the pattern reads."""
    start, last_start, pattern = run[0].query_start, run[-1].query_start, run[0].pattern
    assert start is not None and last_start is not None and pattern is not None, "only groups that ask make runs"
    return QuerySegment(start, last_start + run[-1].size, key_ranges[pattern], pattern)


def _flatten(segments: Iterable[QuerySegment]) -> list[int]:
    flat: list[int] = []
    for segment in segments:
        flat += [segment.start, segment.end, len(segment.key_ranges)]
        for key_range in segment.key_ranges:
            flat += key_range
    return flat


def _read_segments(segments: Any) -> Iterator[QuerySegment]:
    """Row ranges of queries and keys, checked but for the number of keys."""
    covered = 0
    for index, entry in enumerate(_entries(segments, "segments")):
        where = f"segments[{index}]"
        pairs = [(_as_row(where, begin), _as_row(where, stop)) for begin, stop in _ranges_of(where, entry)]
        (start, end), *keys = pairs
        for begin, stop in pairs:
            if stop < begin:
                raise ValueError(f"{where}: the range [{begin}, {stop}) ends before it begins")
        if start != covered:
            raise ValueError(
                f"{where}: queries [{start}, {end}) do not begin at row {covered}; segments must cover the queries "
                "once and in order"
            )
        covered = end
        # NOTE: an empty range is what an empty group makes, too, so that kernels see nothing new.
        yield QuerySegment(start, end, tuple(keys) or ((0, 0),), index)


def _ranges_of(where: str, entry: Any) -> list[tuple[Any, Any]]:
    """The range of the queries, then those of the keys."""
    try:
        start, end, key_ranges = entry
        return [(start, end), *((begin, stop) for begin, stop in key_ranges)]
    except (TypeError, ValueError):
        raise TypeError(f"{where}: expected (q_start, q_end, [(k_start, k_end), ...]), got {entry!r}") from None


def _as_row(where: str, number: Any) -> int:
    """An integer of any class, at least 0."""
    if not is_integer(number):
        raise ValueError(f"{where}: expected integers, got {number!r}")
    if number < 0:
        raise ValueError(f"{where}: expected row numbers of at least 0, got {number}")
    return as_integer(number)


def is_integer(number: Any) -> bool:
    """Whether it is an integer of any class, numpy's and symbolic ones among them, but none that says yes or no."""
    if type(number) is int:
        return True
    # Truth of numpy (before 2.3) and of torch has __index__ as well.
    says_yes_or_no = isinstance(number, bool) or "bool" in str(getattr(number, "dtype", ""))
    return hasattr(number, "__index__") and not says_yes_or_no


def as_integer(number: Any) -> int:
    """The same as a plain one; symbolic ones stay what they are."""
    plain: Any = number
    return plain if type(number) is int or isinstance(number, torch.SymInt) else operator.index(number)


def _invert(segments: Sequence[QuerySegment], num_keys: int) -> Iterator[KeySegment]:
    """Who reads which keys; between two cuts everybody reads all keys or none."""
    ranges = [(s, start, end) for s in segments for start, end in s.key_ranges if start < end]
    cuts = sorted({0, num_keys, *(start for _, start, _ in ranges), *(end for _, _, end in ranges)})
    readers: list[list[tuple[int, int]]] = [[] for _ in cuts[1:]]
    for segment, start, end in ranges:
        for reading in readers[bisect_left(cuts, start) : bisect_left(cuts, end)]:
            reading.append((segment.start, segment.end))
    for start, end, reading in zip(cuts, cuts[1:], readers):
        yield KeySegment(start, end, tuple(reading))


def check_structure(names: tuple[str, ...], patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]) -> None:
    """Checks what upstream checks of names and patterns, in its order and with its words; then what it forgets.

    Raises:
        ValueError: If they do not fit each other.
    """
    queries = [name for query_names, _ in patterns for name in query_names]
    twice = _first_repeated(queries)
    if twice is not None:
        raise ValueError(f"token group {twice!r} cannot be a query in multiple patterns, or twice in one")
    known, asking = set(names), set(queries)
    if asking != known:
        missing, unknown = sorted(known - asking), sorted(asking - known)
        raise ValueError(
            "the set of query tokens must exactly match the set of names in token_specs; "
            f"in no pattern: {missing}, not in token_specs: {unknown}"
        )
    for _, key_names in patterns:
        for name in key_names:
            if name not in known:
                raise ValueError(f"key/value token group {name!r} is not defined in `token_specs` {list(names)}")
    for index, (query_names, key_names) in enumerate(patterns):
        if not query_names or not key_names:
            side = "query_tokens" if not query_names else "key_value_tokens"
            raise ValueError(f"attention pattern {index} has no {side}; name at least one token group")
    twice = _first_repeated(names)
    if twice is not None:
        raise ValueError(f"token_specs: the name {twice!r} stands more than once; group names must be unique")


def _first_repeated(names: Sequence[str]) -> str | None:
    """The first name that comes again later, if there is one."""
    if len(set(names)) == len(names):
        return None
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return next(name for name, count in counts.items() if count > 1)


Given = tuple[Sequence[TokenSpec], Sequence[AttentionPattern], Sequence[TokenSpec]]
"""Groups, patterns, and the sizes of cached groups."""


def _read(specs: Any, patterns: Any, cached: Any) -> Given:
    specs, cached = read_specs(specs), read_specs(cached, "cached")
    return specs, read_patterns(patterns), cached


def _arguments(
    specs: Sequence[TokenSpec], patterns: Sequence[AttentionPattern], cached: Sequence[TokenSpec]
) -> tuple[
    tuple[str, ...],
    tuple[bool, ...],
    tuple[int | None, ...],
    tuple[int | None, ...],
    tuple[tuple[tuple[str, ...], tuple[str, ...]], ...],
]:
    """What :func:`_compile` takes, but for the flag."""
    cached_sizes = {spec.name: spec.size for spec in cached}
    sizes = tuple([cached_sizes.get(spec.name) if spec.size is None else spec.size for spec in specs])
    return (
        tuple([spec.name for spec in specs]),
        tuple([spec.size is not None for spec in specs]),
        sizes,
        tuple([spec.num_keys if type(spec) is ShardedTokenSpec else size for spec, size in zip(specs, sizes)]),
        tuple([(pattern.query_tokens, pattern.key_value_tokens) for pattern in patterns]),
    )


def _compile(
    names: tuple[str, ...],
    present: tuple[bool, ...],
    sizes: tuple[int | None, ...],
    keys: tuple[int | None, ...],
    patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...],
    skip_unread_keys: bool,
) -> AttentionPlan:
    # Branches only on names and positions, never on a size: sizes stay symbolic under torch.compile, and a change
    # of sizes needs no new compilation. An empty group is a range of length zero.
    check_structure(names, patterns)
    pattern_of = {name: index for index, (query_names, _) in enumerate(patterns) for name in query_names}
    readers_of: dict[str, list[int]] = {name: [] for name in names}
    for index, (_, key_names) in enumerate(patterns):
        for name in key_names:
            readers_of[name].append(index)
    groups = []
    num_queries, num_keys = 0, 0
    for name, size, count, is_present in zip(names, sizes, keys, present):
        if size is None or count is None:
            raise ValueError(f"token group {name!r} has size None and no entry in `cached` gives its number of keys")
        readers = tuple(readers_of[name])
        has_keys = bool(readers) or not skip_unread_keys
        groups.append(
            Group(
                name=name,
                size=size,
                num_keys=count,
                query_start=num_queries if is_present else None,
                key_start=num_keys if has_keys else None,
                pattern=pattern_of[name] if is_present else None,
                readers=readers,
            )
        )
        num_queries = num_queries + size if is_present else num_queries
        num_keys = num_keys + count if has_keys else num_keys
    placed = [group for group in groups if group.key_start is not None]
    place_of = {group.name: place for place, group in enumerate(placed)}
    key_ranges = [_key_ranges(placed, [place_of[name] for name in key_names]) for _, key_names in patterns]
    asking = [group for group in groups if group.query_start is not None]
    segments = tuple(_query_segment(run, key_ranges) for run in _runs(asking, lambda group: group.pattern))
    return AttentionPlan(tuple(groups), patterns, num_queries, num_keys, segments)


# Many sizes pass through a training run; each plan is small, so a generous bound keeps them all.
_compile_cached = lru_cache(maxsize=4096)(_compile)


class _Recent:
    """Plans by the very objects that they were compiled from.

    To look up a plan by value takes time for every name and size. Whoever keeps the groups and patterns of thousands
    of groups, and hands in the same ones again, gets the plan by a comparison that is over in microseconds.
    """

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._kept: dict[tuple[int, ...], tuple[tuple[Any, ...], AttentionPlan]] = {}

    def compile(self, specs: Any, patterns: Any, cached: Any, skip_unread_keys: bool) -> AttentionPlan:
        are_many = type(specs) in _SEQUENCES and len(specs) >= MANY
        if are_many and type(patterns) in _SEQUENCES and type(cached) in _SEQUENCES:
            found = self._kept.get(ends(specs, patterns))
            # NOTE: the same objects are equal without a look at them. Others are compared by value, and those kept are
            # of our own classes, whose equal values are the same.
            if found is not None and found[0] == (tuple(specs), tuple(patterns), tuple(cached), skip_unread_keys):
                return found[1]
        given = _read(specs, patterns, cached)
        plan = _compile_cached(*_arguments(*given), skip_unread_keys)
        if not are_many:
            return plan
        if len(self._kept) >= self._num_kept:
            self._kept.clear()
        self._kept[ends(*given[:2])] = (*map(tuple, given), skip_unread_keys), plan
        return plan


_SEQUENCES = (list, tuple)
MANY = 32
"""Groups; of fewer a look-up by value costs less than to keep what callers make anew each time."""


def ends(specs: Sequence[Any], patterns: Sequence[Any]) -> tuple[int, ...]:
    """Enough to tell most calls apart. What is kept stays alive, so that nothing else has its id."""
    return len(specs), len(patterns), *(id(each[at]) for each in (specs, patterns) if each for at in (0, -1))


_RECENT = _Recent(num_kept=256)


def _key_ranges(placed: list[Group], places: list[int]) -> tuple[tuple[int, int], ...]:
    """The ranges of groups at some places among the keys, neighbouring ones merged.

    A k-th listing of a group goes to a k-th layer of ranges, so that keys listed twice are visited twice.
    """
    if len(places) == 1:
        return (_key_rows(placed[places[0]], placed[places[0]]),)
    layers: list[list[list[int]]] = []  # of each its runs, first and last place
    previous, times = -1, 0
    for place in sorted(places):
        times = times + 1 if place == previous else 0
        previous = place
        if times == len(layers):
            layers.append([])
        runs = layers[times]
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return tuple([_key_rows(placed[first], placed[last]) for runs in layers for first, last in runs])


def query_segments(flat: Sequence[int]) -> Iterator[QuerySegment]:
    """The inverse of :meth:`AttentionPlan.flat`, but that it knows of no patterns: each segment counts as its own."""
    numbers = iter(flat)
    for index, start in enumerate(numbers):
        end, num_ranges = next(numbers), next(numbers)
        yield QuerySegment(start, end, tuple((next(numbers), next(numbers)) for _ in range(num_ranges)), index)
