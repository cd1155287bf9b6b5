"""Flows around random sections, kept in memory, and what is drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.airfoil.model import GROUPS
from examples.airfoil.panel import Complex, Naca4, PanelFlow
from examples.airfoil.settings import Settings

NUM_PANELS = 160
BOX = ((-0.6, 1.6), (-0.7, 0.7))  # x and y of the volume around the chord from 0 to 1
ANGLES = (-4.0, 10.0)  # of attack, in degrees
NEAR, FAR = 0.002, 0.3  # distances from the surface between which half of the volume points lie


def random_section(rng: np.random.Generator) -> Naca4:
    """Draws a section of the family: up to 6 % camber at 30 to 60 % of the chord, 8 to 18 % thick."""
    return Naca4(rng.uniform(0, 0.06), rng.uniform(0.3, 0.6), rng.uniform(0.08, 0.18))


@dataclass(frozen=True)
class Flows:
    """Points around S sections, and the two solutions there of which any angle of attack is made.

    Attributes:
        surface: Positions and outward normals ``(S, Ps, 4)``.
        surface_speed: Velocities along the contour ``(S, Ps, 2)``, the last axis counts the solutions.
        volume: Positions ``(S, Pv, 2)``.
        volume_velocity: Velocities ``(S, Pv, 2, 2)``: component, solution.
    """

    surface: Tensor
    surface_speed: Tensor
    volume: Tensor
    volume_velocity: Tensor

    def __len__(self) -> int:
        return len(self.surface)

    def pressure(self, stream: Tensor) -> Tensor:
        """Pressure coefficients ``(S, Ps, 1)`` in the free streams ``(S, 2)``."""
        return 1 - (self.surface_speed @ stream[:, :, None]) ** 2

    def perturbation(self, stream: Tensor) -> Tensor:
        """Velocities less the free streams ``(S, 2)``, ``(S, Pv, 2)``."""
        return (self.volume_velocity @ stream[:, None, :, None]).squeeze(-1) - stream[:, None]

    def to(self, device: torch.device) -> Flows:
        """The same on another device."""
        return Flows(*(getattr(self, entry.name).to(device) for entry in fields(self)))

    def select(self, sections: Tensor, surface: Tensor, volume: Tensor) -> Flows:
        """Takes some sections ``(B,)`` and some points of each, ``(B, ps)`` and ``(B, pv)``; all of them indices."""
        rows = sections[:, None]
        return Flows(
            self.surface[rows, surface],
            self.surface_speed[rows, surface],
            self.volume[rows, volume],
            self.volume_velocity[rows, volume],
        )


@dataclass(frozen=True)
class Batch:
    """What a model gets and what it should answer.

    Attributes:
        groups: Tokens ``(B, n, features)`` by the name of their group; the first two features are the position.
        stream: Free streams ``(B, 2)``.
        targets: By branch: pressure coefficients ``(B, n, 1)``, velocities less the free stream ``(B, n, 2)``;
            those of the anchors before those of the queries.
    """

    groups: dict[str, Tensor]
    stream: Tensor
    targets: dict[str, Tensor]


def epoch_of_batches(flows: Flows, settings: Settings, generator: torch.Generator) -> Iterator[Batch]:
    """Every section once, with an angle of attack and points drawn anew. Sections left over wait for the next epoch."""
    order = torch.randperm(len(flows), generator=generator)
    for start in range(0, len(flows) - settings.batch_size + 1, settings.batch_size):
        yield draw_batch(flows, order[start : start + settings.batch_size], settings, generator)


def draw_batch(flows: Flows, sections: Tensor, settings: Settings, generator: torch.Generator) -> Batch:
    """Draws angles of attack, anchors and queries for some sections ``(B,)``."""
    batch_size = len(sections)
    num_surface, num_volume = flows.surface.shape[1], flows.volume.shape[1]
    sizes = [settings.surface_anchors, settings.surface_queries], [settings.volume_anchors, settings.volume_queries]
    anchors = draw_spread(batch_size, num_surface, settings.surface_anchors, generator)
    queries = draw_points(batch_size, num_surface, settings.surface_queries, generator)
    volume = draw_points(batch_size, num_volume, sum(sizes[1]), generator)
    chosen = flows.select(sections, torch.cat([anchors, queries], 1), volume)
    angle = torch.deg2rad(torch.empty(batch_size).uniform_(*ANGLES, generator=generator))
    stream = free_streams(angle).to(flows.surface.device)
    groups = dict(zip(GROUPS, (*chosen.surface.split(sizes[0], 1), *chosen.volume.split(sizes[1], 1))))
    return Batch(groups, stream, {"surface": chosen.pressure(stream), "volume": chosen.perturbation(stream)})


def draw_points(batch_size: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """Indices ``(batch_size, chosen)`` out of ``count`` points, without repetition in a row."""
    return torch.rand(batch_size, count, generator=generator).argsort(1)[:, :chosen]


def draw_spread(batch_size: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """Indices ``(batch_size, chosen)``, one out of every ``count / chosen`` points, so that no part is left bare."""
    places = torch.arange(chosen) + torch.rand(batch_size, chosen, generator=generator)
    return (places * (count / chosen)).long().clamp(max=count - 1)


def free_streams(angles: Tensor) -> Tensor:
    """Free streams ``(B, 2)`` under angles of attack ``(B,)`` in radians."""
    return torch.stack([angles.cos(), angles.sin()], -1)


def as_pairs(numbers: Complex) -> Tensor:
    """Complex numbers ``(...)`` as fp32 pairs ``(..., 2)``."""
    return torch.from_numpy(np.stack([numbers.real, numbers.imag], -1)).float()


def random_flows(num_sections: int, num_surface: int, num_volume: int, rng: np.random.Generator) -> Flows:
    """Solves the flow around random sections.

    Args:
        num_sections: How many.
        num_surface: Points on each section, spaced like its panels.
        num_volume: Points around each section, half of them all over the box, the others near the surface.
        rng: Where the randomness comes from.
    """
    bar = tqdm(range(num_sections), unit="section", desc="solving")
    solved = [solve(random_section(rng), num_surface, num_volume, rng) for _ in bar]
    return Flows(*(torch.stack(parts) for parts in zip(*solved)))


def solve(section: Naca4, num_surface: int, num_volume: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """The tensors of :class:`Flows` for one section, without their first axis."""
    flow = PanelFlow(section.contour(NUM_PANELS))
    points, normals, speeds = flow.surface((np.arange(num_surface) + 0.5) * (NUM_PANELS / num_surface))
    half = int(0.6 * num_volume)  # a fifth more than is needed, because some fall inside the section
    candidates = rng.permutation(np.concatenate([points_in_box(half, rng), points_near(flow, half, rng)]))
    velocities = flow.basis_velocity(candidates)
    outside = np.flatnonzero(np.isfinite(velocities[:, 0]))[:num_volume]
    surface = torch.cat([as_pairs(points), as_pairs(normals)], -1)
    volume_velocity = as_pairs(velocities[outside]).transpose(-1, -2)
    return surface, torch.from_numpy(speeds).float(), as_pairs(candidates[outside]), volume_velocity


def points_in_box(count: int, rng: np.random.Generator) -> Complex:
    """Points all over the volume, ``(count,)``."""
    (left, right), (bottom, top) = BOX
    return rng.uniform(left, right, count) + 1j * rng.uniform(bottom, top, count)


def points_near(flow: PanelFlow, count: int, rng: np.random.Generator) -> Complex:
    """Points off the surface, ``(count,)``, as many between 1 and 2 % of a chord as between 2 and 4 %."""
    points, normals, _ = flow.surface(rng.uniform(0, NUM_PANELS, count))
    return points + normals * np.exp(rng.uniform(np.log(NEAR), np.log(FAR), count))
