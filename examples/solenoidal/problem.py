"""A flow that was held out and those who learn to predict it: how they are trained, and how well they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mixed_attention as ma
from mixed_attention import func

Velocity = Callable[[Tensor], Tensor]
"""What predicts velocities ``(1, N, d)`` at points ``(1, N, d)``."""


@dataclass(frozen=True)
class Problem:
    """A held-out flow in d dimensions.

    Attributes:
        name: The flow's, and that of its picture's file.
        learners: By name, what trains a model and returns its prediction of this flow.
        tests: Points ``(1, n, d)``.
        truth: Velocities there, ``(1, n, d)``, less the background.
        many: Points ``(1, m, d)`` that are streamed to take the time.
        grid: Points of the picture, ``(1, rows * columns, d)``.
        on_grid: Velocities there, less the background; NaN where there is no flow.
        shape: Rows and columns of the picture.
        background: A velocity ``(d,)`` that all points share and nobody has to learn.
    """

    name: str
    learners: Mapping[str, Callable[[], Velocity]]
    tests: Tensor
    truth: Tensor
    many: Tensor
    grid: Tensor
    on_grid: Tensor
    shape: tuple[int, int]
    background: Tensor


@dataclass(frozen=True)
class Judgement:
    """How a prediction does.

    Attributes:
        error: Relative L2 error.
        divergence: Over the size of all derivatives.
        seconds: That a million points take.
    """

    error: float
    divergence: float
    seconds: float


@torch.no_grad()
def judge(problem: Problem, velocity: Velocity) -> Judgement:
    """Holds a prediction against the truth, and takes its time."""
    error = (velocity(problem.tests) - problem.truth).double().norm() / problem.truth.double().norm()
    start = time.perf_counter()
    ma.stream(velocity, problem.many, chunk_size=8192, progress="streaming")
    seconds = (time.perf_counter() - start) * 1e6 / problem.many.shape[1]
    _, jacobian = func.value_and_jacobian(velocity, problem.tests, check=False)
    size = jacobian.square().sum((-1, -2)).mean().sqrt()  # of all derivatives of the velocity
    divergence = func.divergence(jacobian).square().mean().sqrt() / size
    return Judgement(float(error), float(divergence), seconds)


def fit(model: nn.Module, loss_of_step: Callable[[], Tensor], steps: int, name: str) -> None:
    """Trains a model by losses of fresh samples."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    with tqdm(range(steps), unit="step", desc=name) as bar:
        for _ in bar:
            loss = loss_of_step()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
