"""Periodic flows in space, learned directly and as the curl of a vector potential."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from examples.solenoidal.flow import PERIOD, Flows, random_points
from examples.solenoidal.model import FlowModel, KVCaches, predicted_by_potential, predicted_directly
from examples.solenoidal.problem import Problem, Velocity, fit

Prediction = Callable[[FlowModel, KVCaches], Velocity]
MODELS: dict[str, Prediction] = {"velocity": predicted_directly, "curl of a potential": predicted_by_potential}
BATCH_SIZE, NUM_ANCHORS, NUM_QUERIES, NUM_TESTS = 4, 128, 256, 1000


def make_problem(steps: int, points: int, resolution: int, seed: int) -> Problem:
    """A flow that was held out.

    Args:
        steps: How many each model trains.
        points: That are streamed to take the time.
        resolution: How many points a side of the picture has.
        seed: Fixes flows, points and initial weights.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    flows = Flows.random(1, generator)
    anchors, tests = (random_points(1, count, generator) for count in (NUM_ANCHORS, NUM_TESTS))
    grid = slice_points(resolution)

    def learn(name: str) -> Velocity:
        model = train(MODELS[name], steps, seed, name)
        with torch.no_grad():
            return MODELS[name](model, model.encode(anchors, flows.velocity(anchors)))

    return Problem(
        name="periodic",
        learners={name: partial(learn, name) for name in MODELS},
        tests=tests,
        truth=flows.velocity(tests),
        many=random_points(1, points, generator),
        grid=grid,
        on_grid=flows.velocity(grid),
        shape=(resolution, resolution),
        background=torch.zeros(3),
    )


def train(predict: Prediction, steps: int, seed: int, name: str) -> FlowModel:
    """Trains a model of its own on random flows, by the squared error of the velocity."""
    torch.manual_seed(seed)
    model = FlowModel()
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step() -> Tensor:
        flows = Flows.random(BATCH_SIZE, generator)
        anchors = random_points(BATCH_SIZE, NUM_ANCHORS, generator)
        queries = random_points(BATCH_SIZE, NUM_QUERIES, generator)
        caches = model.encode(anchors, flows.velocity(anchors))
        return (predict(model, caches)(queries) - flows.velocity(queries)).square().mean()

    fit(model, loss_of_step, steps, name)
    return model


def slice_points(resolution: int) -> Tensor:
    """Points of a plane across the middle of a period, ``(1, resolution ** 2, 3)``."""
    places = torch.linspace(0, PERIOD, resolution)
    x, y = torch.meshgrid(places, places, indexing="xy")
    return torch.stack([x, y, torch.full_like(x, PERIOD / 2)], -1).reshape(1, -1, 3)
