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


def losses(mesh=None) -> list[float]:
    """The losses of some steps, by the ranks of a mesh or by one process."""
    rng = np.random.default_rng(0)
    flows = random_flows(SETTINGS.sections, SETTINGS.surface_points, SETTINGS.volume_points, rng)
    ranks = None
    if mesh is not None:
        ranks = Ranks()
        ranks.mesh = mesh
    training = Training(SETTINGS, torch.device("cpu"), ranks)
    batches = epoch_of_batches(flows, SETTINGS, training.generator)
    return [training.step(batch, index / 3) for index, batch in enumerate(batches)]


def test_the_curve_is_that_of_one_process(ranks):
    alone = losses()
    assert len(alone) == 3 and len(set(alone)) == 3
    for shared in ranks.run(4, losses):
        np.testing.assert_allclose(shared, alone, rtol=2e-5)
