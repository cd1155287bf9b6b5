"""Scenes spread over ranks: how groups are cut, and what a rank holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from layers import Scene
from torch import Tensor

import mixed_attention as ma

CUTS = ("chunks", "random", "one rank", "few rows")


def cuts(size: int, among: Sequence[str] = CUTS) -> Sequence[str]:
    """Ways to cut for so many ranks; for one rank they are all the same."""
    return among if size > 1 else among[:1]


@dataclass(frozen=True)
class Share:
    """What a rank holds of a scene.

    Attributes:
        scene: The whole.
        sizes: The tokens of each group on each rank; groups that all ranks hold whole are missing.
        rank: Which rank.
    """

    scene: Scene
    sizes: Mapping[str, tuple[int, ...]]
    rank: int

    @property
    def specs(self) -> list[ma.TokenSpec]:
        """The groups with their sizes here, from which nobody can tell those elsewhere."""
        return [ma.TokenSpec(spec.name, spec.size) for spec in self.sharded]

    @property
    def sharded(self) -> list[ma.TokenSpec]:
        """The groups, knowing their sizes everywhere."""
        return [
            ma.distributed.ShardedTokenSpec(name, self.sizes[name][self.rank], self.sizes[name])
            if name in self.sizes
            else ma.TokenSpec(name, size)
            for name, size in self.scene.sizes.items()
        ]

    @property
    def rows(self) -> list[int]:
        """Where the tokens here lie in the sequence of the scene."""
        rows, start = [], 0
        for name, size in self.scene.sizes.items():
            sizes = self.sizes.get(name)
            before = 0 if sizes is None else sum(sizes[: self.rank])
            here = size if sizes is None else sizes[self.rank]
            rows += range(start + before, start + before + here)
            start += size
        return rows

    def of(self, *tensors: Tensor) -> list[Tensor]:
        """The rows here, out of dim 1, as leaves of their own."""
        return [tensor.detach()[:, self.rows].clone().requires_grad_(tensor.requires_grad) for tensor in tensors]


def cut(scene: Scene, mesh: object, how: str, seed: int = 0, whole: Sequence[str] = ()) -> Share:
    """Spreads a scene over the ranks of a mesh: in a way of ``CUTS``; ``whole`` groups are held by all."""
    size, rank = mesh.size(), mesh.get_local_rank()
    sizes = {}
    for index, (name, count) in enumerate(scene.sizes.items()):
        if name in whole:
            continue
        if how == "chunks":
            share = -(-count // size)
            sizes[name] = tuple(max(0, min(share, count - place * share)) for place in range(size))
        elif how == "random":
            generator = torch.Generator().manual_seed(100 * seed + index)
            bounds = [0, *sorted(torch.randint(0, count + 1, (size - 1,), generator=generator).tolist()), count]
            sizes[name] = tuple(end - start for start, end in zip(bounds, bounds[1:]))
        elif how == "one rank":  # all of a group on one, the next group on another
            sizes[name] = tuple(count if place == index % size else 0 for place in range(size))
        else:  # one row on each of the first ranks but one, the rest on the last
            few = max(0, min(count, size - 2))
            sizes[name] = (count,) if size == 1 else (*[1] * few, *[0] * (size - 1 - few), count - few)
    return Share(scene, sizes, rank)
