"""Held-out sections: anchors are encoded once, then any number of queries is streamed past their KV cache in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mixed_attention as ma
from examples.airfoil.data import (
    ANGLES,
    BOX,
    NUM_PANELS,
    Flows,
    as_pairs,
    draw_points,
    draw_spread,
    free_streams,
    solve,
)
from examples.airfoil.model import AirfoilSurrogate
from examples.airfoil.panel import Naca4, PanelFlow, Real
from examples.airfoil.ranks import Ranks
from examples.airfoil.settings import Settings

SURFACE_QUERIES = 1000
CELLS = (44, 28)  # of the box, along x and y, in which the mean predictor averages: squares of a twentieth of a chord

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A section under an angle of attack that was not trained on, and the truth at its query points.

    Attributes:
        name: NACA designation.
        angle: Angle of attack in degrees.
        stream: Free stream ``(1, 2)``.
        anchors: Tokens of both anchor groups, by name.
        queries: Tokens by branch, ``(1, n, features)``; in the volume those points of ``grid`` that are outside.
        truth: By branch, pressure coefficients ``(1, n, 1)`` and velocities less the free stream ``(1, n, 2)``.
        position: Where on the contour the surface queries are, as fractional node numbers.
        grid: Points of a regular grid over the box, ``(rows, columns)``.
        outside: Which of them are not inside the section.
        contour: The section, ``(n,)``.
    """

    name: str
    angle: float
    stream: Tensor
    anchors: dict[str, Tensor]
    queries: Values
    truth: Values
    position: Real
    grid: NDArray[np.complex128]
    outside: NDArray[np.bool_]
    contour: NDArray[np.complex128]


def held_out_cases(count: int, num_queries: int, settings: Settings) -> Iterator[Case]:
    """Draws sections with four whole digits, of the family that was trained on, and solves them.

    Args:
        count: How many.
        num_queries: Volume queries of each, at least.
        settings: Those of the training, for the numbers of anchors and the seed.
    """
    rng = np.random.default_rng([settings.seed, 1])
    for _ in range(count):
        camber = rng.integers(7)
        digits = f"{camber}{rng.integers(3, 7) if camber else 0}{rng.integers(8, 19):02d}"
        yield make_case(digits, rng.uniform(*ANGLES), num_queries, settings, rng)


def make_case(digits: str, angle: float, num_queries: int, settings: Settings, rng: np.random.Generator) -> Case:
    """Solves one case; arguments as the attributes of :class:`Case` and those of :func:`held_out_cases`."""
    section = Naca4.of(digits)
    flow = PanelFlow(section.contour(NUM_PANELS))
    position = np.linspace(0, NUM_PANELS, SURFACE_QUERIES)
    points, normals, _ = flow.surface(position)
    grid = box_grid(1.1 * num_queries)  # no section covers a tenth of the box
    velocity = flow.velocity(grid.ravel(), np.radians(angle))
    outside = np.isfinite(velocity)
    stream = free_streams(torch.deg2rad(torch.tensor([angle], dtype=torch.float32)))
    pressure = torch.from_numpy(flow.pressure(position, np.radians(angle))).float()
    return Case(
        name=f"NACA {digits}",
        angle=angle,
        stream=stream,
        anchors=draw_anchors(section, settings, rng),
        queries={
            "surface": torch.cat([as_pairs(points), as_pairs(normals)], -1)[None],
            "volume": as_pairs(grid.ravel()[outside])[None],
        },
        truth={"surface": pressure[None, :, None], "volume": as_pairs(velocity[outside])[None] - stream[:, None]},
        position=position,
        grid=grid,
        outside=outside.reshape(grid.shape),
        contour=flow.nodes,
    )


def draw_anchors(section: Naca4, settings: Settings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Anchors of one section, drawn as in training."""
    surface, _, volume, _ = solve(section, settings.surface_points, settings.volume_points, rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    on_surface = draw_spread(1, len(surface), settings.surface_anchors, generator)
    in_volume = draw_points(1, len(volume), settings.volume_anchors, generator)
    return {"surface_anchors": surface[on_surface], "volume_anchors": volume[in_volume]}


def box_grid(count: float) -> NDArray[np.complex128]:
    """At least ``count`` points of the box, centres of square cells, ``(rows, columns)``."""
    (left, right), (bottom, top) = BOX
    rows = int(np.ceil(np.sqrt(count * (top - bottom) / (right - left))))
    columns = int(np.ceil(count / rows))
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = bottom + (np.arange(rows) + 0.5) * (top - bottom) / rows
    return x + 1j * y[:, None]


@torch.inference_mode()
def predict(model: AirfoilSurrogate, case: Case, chunk_size: int = 8192, ranks: Ranks | None = None) -> Values:
    """Predicts the values at all queries, ``chunk_size`` of them at a time, so that memory stays bounded.

    Several processes encode their shares of the anchors, and each streams its share of the queries.

    Returns:
        By branch, tensors as those of ``case.truth``, on the CPU.
    """
    ranks = Ranks() if ranks is None else ranks
    device = next(model.parameters()).device
    stream = case.stream.to(device)
    anchors = {name: tokens.to(device) for name, tokens in case.anchors.items()}
    _, shares = model(ranks.share(anchors), stream, return_kv_caches=True)
    caches = ranks.whole_caches(shares)

    def predict_branch(branch: str, tokens: Tensor) -> Tensor:
        return model({f"{branch}_queries": tokens}, stream, caches)[branch]

    predicted = {}
    for branch, tokens in case.queries.items():
        queries = {branch: tokens}
        here = ranks.share(queries)[branch]
        values = ma.stream(
            partial(predict_branch, branch), here, chunk_size=chunk_size, device=device, output_device=None
        )
        predicted[branch] = ranks.whole(values, ranks.specs(queries)).cpu()
    return predicted


class TrainingMean:
    """The predictor to beat: what the training flows are on average at the same place.

    On the surface the mean is taken at the same place of the contour, which is the same side and place along the chord;
    in the volume within the same cell of a grid. (The velocity is the one less the free stream, of which a mean over
    everything would know nothing: its error is as large as the truth.)

    Args:
        flows: The training flows; their angles of attack are those between ``ANGLES``, all alike.
    """

    def __init__(self, flows: Flows) -> None:
        streams = free_streams(torch.deg2rad(torch.linspace(*ANGLES, 29))).to(flows.surface.device)
        pressures = [flows.pressure(stream.expand(len(flows), 2)).mean((0, 2)) for stream in streams]
        self.pressure = torch.stack(pressures).mean(0).cpu().numpy()
        perturbation = flows.perturbation(streams.mean(0).expand(len(flows), 2)).flatten(0, 1).cpu()
        cells = cell_of(flows.volume.flatten(0, 1).cpu())
        count = torch.zeros(CELLS[0] * CELLS[1]).index_add_(0, cells, torch.ones(len(cells)))
        total = torch.zeros(CELLS[0] * CELLS[1], 2).index_add_(0, cells, perturbation)
        self.perturbation = total / count.clamp(min=1)[:, None]

    def predict(self, case: Case) -> Values:
        """By branch, tensors as those of ``case.truth``."""
        at = (np.arange(len(self.pressure)) + 0.5) * (NUM_PANELS / len(self.pressure))
        pressure = torch.from_numpy(np.interp(case.position, at, self.pressure)).float()
        volume = self.perturbation[cell_of(case.queries["volume"])]
        return {"surface": pressure[None, :, None], "volume": volume}


def cell_of(points: Tensor) -> Tensor:
    """Numbers of the cells that points ``(..., 2)`` are in; points beyond the box count for the nearest."""
    index = torch.zeros(points.shape[:-1], dtype=torch.int64)
    for axis, ((low, high), cells) in enumerate(zip(BOX, CELLS)):
        along = ((points[..., axis] - low) / (high - low) * cells).long()
        index = index * cells + along.clamp(0, cells - 1)
    return index
