"""The picture: pressure along the surface of a held-out section, and the velocity around it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from examples.airfoil.data import BOX
from examples.airfoil.evaluate import Case, Values

TRUE, PREDICTED, PAPER = "#1f2937", "#e11d48", "#f3f4f6"
NUM_STREAMLINES = 27
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def draw(case: Case, predicted: Values, path: Path) -> None:
    """Draws truth and prediction of a case.

    Args:
        case: A held-out case.
        predicted: What :func:`examples.airfoil.evaluate.predict` made of it.
        path: File of the picture, whose suffix says the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.4), layout="constrained")
        axes = figure.subplot_mosaic([["pressure", "speed"], ["anchors", "error"]])
        draw_pressure(axes["pressure"], case, predicted["surface"])
        draw_anchors(axes["anchors"], case)
        stream = case.stream[0]
        velocity = on_grid(case, predicted["volume"] + stream)
        wrong = on_grid(case, predicted["volume"] - case.truth["volume"])
        draw_speed(axes["speed"], case, velocity)
        draw_error(axes["error"], case, wrong)
        figure.suptitle(f"{case.name} at {case.angle:.1f}°, a section that was held out from training", fontsize=13)
        figure.savefig(path, dpi=150)


def on_grid(case: Case, values: Tensor) -> NDArray[np.complex128]:
    """Vectors at the volume queries ``(1, n, 2)`` as complex numbers on the grid, NaN inside the section."""
    field = np.full(case.grid.shape, complex(np.nan, np.nan))
    field[case.outside] = values[0, :, 0].numpy() + 1j * values[0, :, 1].numpy()
    return field


def draw_pressure(axes: Axes, case: Case, predicted: Tensor) -> None:
    """Pressure coefficients along the chord, suction upwards as is the custom."""
    chord = case.queries["surface"][0, :, 0]
    axes.plot(chord, case.truth["surface"][0, :, 0], color=TRUE, linewidth=2.5, label="panel method")
    axes.plot(chord, predicted[0, :, 0], color=PREDICTED, linewidth=1.3, label="surrogate")
    axes.invert_yaxis()
    axes.set(title="Pressure coefficient on the surface", xlabel="x / chord", xlim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_anchors(axes: Axes, case: Case) -> None:
    """The section, and the anchors by which the model knows it and the space around it."""
    prepare_plane(axes, case, "What the surrogate sees")
    for name, color in (("volume_anchors", "#2563eb"), ("surface_anchors", PREDICTED)):
        points = case.anchors[name][0]
        label = f"{len(points)} {name.replace('_', ' ')}"
        axes.scatter(points[:, 0], points[:, 1], s=7, color=color, linewidth=0, label=label, zorder=3)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, handletextpad=0, columnspacing=1, frameon=False, ncols=2
    )


def draw_speed(axes: Axes, case: Case, velocity: NDArray[np.complex128]) -> None:
    """Predicted speed, and streamlines through points above and below the middle of the chord."""
    prepare_plane(axes, case, f"Predicted speed / free stream, at {case.outside.sum():,} queries")
    x, y = case.grid[0].real, case.grid[:, 0].imag
    image = axes.pcolormesh(x, y, np.abs(velocity), cmap="Spectral_r", vmin=0.4, vmax=1.6, rasterized=True)
    seeds = np.column_stack([np.full(NUM_STREAMLINES, x.mean()), np.linspace(y[0], y[-1], NUM_STREAMLINES)])
    look = {"color": "#00000070", "linewidth": 0.6, "arrowsize": 0.6}
    axes.streamplot(x, y, velocity.real, velocity.imag, start_points=seeds, broken_streamlines=False, **look)
    axes.figure.colorbar(image, ax=axes, extend="both", pad=0.01)


def draw_error(axes: Axes, case: Case, wrong: NDArray[np.complex128]) -> None:
    """Length of the error of the velocity."""
    prepare_plane(axes, case, "Error of the predicted velocity / free stream")
    x, y = case.grid[0].real, case.grid[:, 0].imag
    image = axes.pcolormesh(x, y, np.abs(wrong), cmap="magma_r", norm=LogNorm(1e-3, 1e-1), rasterized=True)
    axes.figure.colorbar(image, ax=axes, extend="both", pad=0.01)


def prepare_plane(axes: Axes, case: Case, title: str) -> None:
    """Axes of the box, with the section in it."""
    axes.set(title=title, aspect="equal", xlim=BOX[0], ylim=BOX[1])
    axes.fill(case.contour.real, case.contour.imag, facecolor=PAPER, edgecolor=TRUE, linewidth=0.8, zorder=2)
