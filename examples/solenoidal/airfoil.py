"""The flow around airfoils, learned directly and as the curl of a stream function.

The sections, their exact flows and the surrogate are those of `examples/airfoil`. Its head for the volume has two
numbers at a point, a velocity, or one, a stream function psi: (dpsi/dy, -dpsi/dx) is a velocity without divergence.
What is learned is the velocity less the free stream, which has none itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from examples.airfoil.data import Batch, Flows, draw_batch, random_flows
from examples.airfoil.evaluate import make_case
from examples.airfoil.model import AirfoilSurrogate
from examples.airfoil.settings import Settings
from examples.solenoidal.problem import Problem, Velocity, fit
from mixed_attention import func

SETTINGS = Settings(sections=96, batch_size=4, surface_queries=0, volume_queries=192)
SECTION, ANGLE = "2412", 4.0  # held out
NUM_TESTS = 2000
STREAM_SCALE = 0.05  # of what the model says, whose waves are as short as an eighth of a chord: slopes are far larger

Prediction = Callable[[AirfoilSurrogate, Mapping[str, Tensor], Tensor], Velocity]


def predicted_directly(model: AirfoilSurrogate, anchors: Mapping[str, Tensor], stream: Tensor) -> Velocity:
    """Velocities at points ``(B, N, 2)`` in free streams ``(B, 2)``, as the model says them."""
    _, caches = model(anchors, stream, return_kv_caches=True)
    return lambda points: model({"volume_queries": points}, stream, kv_caches=caches)["volume"]


def predicted_by_stream_function(model: AirfoilSurrogate, anchors: Mapping[str, Tensor], stream: Tensor) -> Velocity:
    """Velocities at points: the curl of what the model says. Whatever it says, they have no divergence."""
    stream_function = predicted_directly(model, anchors, stream)

    def velocity(points: Tensor) -> Tensor:
        _, jacobian = func.value_and_jacobian(stream_function, points, check=False)
        return func.curl(STREAM_SCALE * jacobian)

    return velocity


MODELS: dict[str, tuple[Prediction, int]] = {
    "velocity": (predicted_directly, 2),
    "curl of a stream function": (predicted_by_stream_function, 1),
}


def make_problem(steps: int, points: int, resolution: int, seed: int) -> Problem:
    """A section that was held out; arguments as those of :func:`examples.solenoidal.periodic.make_problem`."""
    rng = np.random.default_rng([seed, 2])
    # The box is wider than high.
    case = make_case(SECTION, ANGLE, 2 * resolution**2, SETTINGS, np.random.default_rng([seed, 1]))
    outside = torch.from_numpy(case.outside).flatten()
    grid = torch.from_numpy(np.stack([case.grid.real, case.grid.imag], -1)).float().reshape(1, -1, 2)
    on_grid = torch.full_like(grid, torch.nan)
    on_grid[:, outside] = case.truth["volume"]
    chosen = torch.from_numpy(rng.permutation(int(outside.sum()))[:NUM_TESTS])
    queries = case.queries["volume"]
    flows = random_flows(min(SETTINGS.sections, max(steps, SETTINGS.batch_size)), 320, 1024, rng)

    def learn(name: str) -> Velocity:
        predict, _ = MODELS[name]
        model = train(name, flows, max(steps // 2, 1), seed)
        with torch.no_grad():
            return predict(model, case.anchors, case.stream)

    return Problem(
        name="airfoil",
        learners={name: partial(learn, name) for name in MODELS},
        tests=queries[:, chosen],
        truth=case.truth["volume"][:, chosen],
        many=queries[:, torch.from_numpy(rng.integers(queries.shape[1], size=points))],
        grid=grid,
        on_grid=on_grid,
        shape=case.grid.shape,
        background=case.stream[0],
    )


def make_model(num_values: int) -> AirfoilSurrogate:
    """The surrogate with so many numbers at a point of the volume."""
    model = AirfoilSurrogate()
    norm, linear = model.heads["volume"]
    model.heads["volume"] = nn.Sequential(norm, nn.Linear(linear.in_features, num_values))
    return model


def train(name: str, flows: Flows, steps: int, seed: int) -> AirfoilSurrogate:
    """Trains a model of its own on random sections and angles, by the squared error of the velocity at queries."""
    torch.manual_seed(seed)
    predict, num_values = MODELS[name]
    model = make_model(num_values)
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step() -> Tensor:
        sections = torch.randperm(len(flows), generator=generator)[: SETTINGS.batch_size]
        batch: Batch = draw_batch(flows, sections, SETTINGS, generator)
        anchors = {group: tokens for group, tokens in batch.groups.items() if group.endswith("anchors")}
        velocity = predict(model, anchors, batch.stream)(batch.groups["volume_queries"])
        return (velocity - batch.targets["volume"][:, SETTINGS.volume_anchors :]).square().mean()

    fit(model, loss_of_step, steps, name)
    return model
