"""The airfoil example over ranks learns what one process learns."""

from __future__ import annotations

import numpy as np
import torch

from examples.airfoil.data import epoch_of_batches, random_flows
from examples.airfoil.ranks import Ranks
from examples.airfoil.settings import Settings
from examples.airfoil.train import Training

# Groups whose sizes four ranks do not divide.
SETTINGS = Settings(
    epochs=1,
    sections=6,
    batch_size=2,
    learning_rate=5e-4,
    surface_points=40,
    volume_points=80,
    surface_anchors=10,
    surface_queries=7,
    volume_anchors=13,
    volume_queries=9,
)


def losses_over_ranks(mesh) -> tuple[list[float], list[float]]:
    """Of some steps, by one process and by all."""
    rng = np.random.default_rng(0)
    flows = random_flows(SETTINGS.sections, SETTINGS.surface_points, SETTINGS.volume_points, rng)
    ranks = Ranks()
    ranks.mesh = mesh
    curves = []
    for training in (
        Training(SETTINGS, torch.device("cpu")),
        Training(SETTINGS, torch.device("cpu"), ranks),
    ):
        batches = epoch_of_batches(flows, SETTINGS, training.generator)
        curves.append([training.step(batch, index / 3) for index, batch in enumerate(batches)])
    return curves[0], curves[1]


def test_the_curve_is_that_of_one_process(ranks):
    for alone, shared in ranks.run(4, losses_over_ranks):
        assert len(alone) == 3 and len(set(alone)) == 3
        np.testing.assert_allclose(shared, alone, rtol=2e-5)
