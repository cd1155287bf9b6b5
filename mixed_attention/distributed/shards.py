"""Where rows lie: those of some groups on every rank, and in the whole, the order of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixed_attention.distributed.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Shards:
    """Rows of groups that are spread over ranks.

    On a rank its rows of all groups lie behind one another. In the whole, groups do, and in each the rows of the
    ranks in order.

    Attributes:
        ranks: The ranks.
        sizes: How many rows each group has on each rank. Symbolic under the compiler, so they are never compared there.
    """

    ranks: Ranks
    sizes: tuple[tuple[int, ...], ...]

    @property
    def totals(self) -> list[int]:
        """Rows of all groups on each rank."""
        return [sum(sizes[rank] for sizes in self.sizes) for rank in range(self.ranks.size)]

    @property
    def here(self) -> int:
        """Rows on this rank."""
        return self.totals[self.ranks.rank]

    def native(self) -> Any:
        """The same as C++ takes it."""
        return self.ranks.native(self.sizes)

    @property
    def is_in_order(self) -> bool:
        """Whether the rows of the ranks behind one another are the whole."""
        return len(self.sizes) <= 1

    def by_group(self) -> Iterator[tuple[int, int]]:
        """In the order of the whole, start and size of each piece where the ranks' rows lie behind one another."""
        starts = [0] * self.ranks.size
        for rank in range(1, self.ranks.size):
            starts[rank] = starts[rank - 1] + self.totals[rank - 1]
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
        """How many rows each group has in the whole."""
        return [sum(sizes) for sizes in self.sizes]
