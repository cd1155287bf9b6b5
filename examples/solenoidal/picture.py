"""The picture: a slice of a held-out flow, and its divergence, by either model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from examples.solenoidal.problem import Problem

STYLE = {"font.size": 9, "axes.titlelocation": "left", "xtick.bottom": False, "ytick.left": False}


def draw(problem: Problem, velocities: Mapping[str, Tensor], divergences: Mapping[str, Tensor], path: Path) -> None:
    """Draws speeds above, and what divergence there is below; all on the points of the problem's grid."""
    as_image = lambda x: x[0].detach().reshape(problem.shape).numpy()  # noqa: E731
    there_is_flow = ~problem.on_grid[..., 0].isnan()
    names = list(velocities)
    rows, columns = problem.shape
    speeds = {"true speed": problem.on_grid, **{f"speed, {name}": velocities[name] for name in names}}
    speeds = {title: (velocity + problem.background).norm(dim=-1) for title, velocity in speeds.items()}
    fastest = float(speeds["true speed"][there_is_flow].max())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * (1 + len(names)), 6.6 * rows / columns), layout="constrained")
        axes = figure.subplots(2, 1 + len(names))
        for axis, (title, speed) in zip(axes[0], speeds.items()):
            shown = as_image(speed.where(there_is_flow, float("nan")))
            image = axis.imshow(shown, origin="lower", cmap="Spectral_r", vmin=0, vmax=fastest)
            axis.set(title=title, xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[0], pad=0.01)
        axes[1, 0].axis("off")
        for axis, name in zip(axes[1, 1:], names):
            shown = as_image(divergences[name].abs().clamp(min=1e-8).where(there_is_flow, float("nan")))
            image = axis.imshow(shown, origin="lower", cmap="magma_r", norm=LogNorm(1e-8, 1))
            axis.set(title=f"|divergence|, {name}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes[1], pad=0.01)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
