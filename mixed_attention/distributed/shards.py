"""Where rows lie: those of some groups on every rank, and in the whole, the order of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixed_attention.distributed.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Shards:
    """Rows of groups that are spread over ranks.

    On a rank its rows of all groups lie behind one another. In the whole, groups do, and in each the rows of the
    ranks in order.

    Attributes:
        ranks: The ranks.
        sizes: Of every group, its rows on each rank. Symbolic under the compiler, so they are never compared there.
        even: Whether every rank is promised to hold as many rows of every group.
    """

    ranks: Ranks
    sizes: tuple[tuple[int, ...], ...]
    even: bool = False

    @property
    def totals(self) -> list[int]:
        """Rows of all groups on each rank."""
        return [sum(sizes[rank] for sizes in self.sizes) for rank in range(self.ranks.size)]

    @property
    def here(self) -> int:
        """Rows on this rank."""
        return self.totals[self.ranks.rank]

    @property
    def whole(self) -> int:
        """Rows on all ranks."""
        return sum(self.totals)

    @property
    def most(self) -> int:
        """The rows of a rank that has most of them."""
        return self.totals[0] if self.even else max(self.totals)

    @property
    def are_equal(self) -> bool:
        """Whether every rank has as many rows."""
        return self.even or len(set(self.totals)) == 1

    @property
    def is_in_order(self) -> bool:
        """Whether the rows of the ranks behind one another are the whole."""
        return len(self.sizes) <= 1

    def by_group(self, stride: int | None = None) -> Iterator[tuple[int, int]]:
        """In the order of the whole, start and size of each piece where the ranks' rows lie behind one another.

        Args:
            stride: From the start of one rank's rows to that of the next; by default as many as the rank has.
        """
        starts = [0] * self.ranks.size
        for rank in range(1, self.ranks.size):
            starts[rank] = starts[rank - 1] + (self.totals[rank - 1] if stride is None else stride)
        for sizes in self.sizes:
            for rank, size in enumerate(sizes):
                yield starts[rank], size
                starts[rank] = starts[rank] + size

    def by_rank(self) -> Iterator[list[tuple[int, int]]]:
        """For each rank, start and size of its pieces in the whole, group by group."""
        pieces: list[list[tuple[int, int]]] = [[] for _ in self.totals]
        start = 0
        for sizes in self.sizes:
            for rank, size in enumerate(sizes):
                pieces[rank].append((start, size))
                start = start + size
        yield from pieces

    def splits(self) -> Sequence[int]:
        """Of every group, its rows in the whole."""
        return [sum(sizes) for sizes in self.sizes]
