"""The picture: a slice of a held-out flow, and its divergence, by either model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from examples.solenoidal.flow import PERIOD

STYLE = {"font.size": 9, "axes.titlelocation": "left", "xtick.bottom": False, "ytick.left": False}


def slice_points(resolution: int) -> Tensor:
    """Points of a plane across the middle of a period, ``(1, resolution ** 2, 3)``."""
    places = torch.linspace(0, PERIOD, resolution)
    x, y = torch.meshgrid(places, places, indexing="xy")
    return torch.stack([x, y, torch.full_like(x, PERIOD / 2)], -1).reshape(1, -1, 3)


def draw(
    true_velocity: Tensor, velocities: Mapping[str, Tensor], divergences: Mapping[str, Tensor], path: Path
) -> None:
    """Draws speeds above, and what divergence there is below; all on the points of :func:`slice_points`."""
    side = int(true_velocity.shape[1] ** 0.5)
    as_image = lambda x: x[0].detach().reshape(side, side).numpy()  # noqa: E731
    names = list(velocities)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * (1 + len(names)), 6.6), layout="constrained")
        axes = figure.subplots(2, 1 + len(names))
        speeds = {"true speed": true_velocity, **{f"speed, {name}": velocities[name] for name in names}}
        for axis, (title, velocity) in zip(axes[0], speeds.items()):
            image = axis.imshow(as_image(velocity.norm(dim=-1)), origin="lower", cmap="Spectral_r", vmin=0, vmax=3)
            axis.set(title=title, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[0], pad=0.01)
        axes[1, 0].axis("off")
        for axis, name in zip(axes[1, 1:], names):
            shown = as_image(divergences[name].abs().clamp(min=1e-8))
            image = axis.imshow(shown, origin="lower", cmap="magma_r", norm=LogNorm(1e-8, 1))
            axis.set(title=f"|divergence|, {name}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[1], pad=0.01)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
