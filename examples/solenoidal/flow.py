"""Flows whose curl is known: those of Arnold, Beltrami and Childress, which are their own curl."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PERIOD = 2 * math.pi  # of the flows, in each direction


@dataclass(frozen=True)
class Flows:
    """A batch of flows u with curl u = u, so that u is a vector potential of itself, and div u = 0.

    Attributes:
        amplitudes: ``(B, 1, 3)``.
        phases: ``(B, 1, 3)``, where along each axis a flow begins.
    """

    amplitudes: Tensor
    phases: Tensor

    @classmethod
    def random(cls, count: int, generator: torch.Generator) -> Flows:
        """Draws flows of amplitudes from 0.5 to 1.5 and any phase."""
        amplitudes, phases = torch.rand(2, count, 1, 3, generator=generator)
        return cls(0.5 + amplitudes, PERIOD * phases)

    def velocity(self, points: Tensor) -> Tensor:
        """Velocities ``(B, N, 3)`` at points ``(B, N, 3)``."""
        a, b, c = self.amplitudes.to(points.dtype).unbind(-1)
        x, y, z = (points + self.phases.to(points.dtype)).unbind(-1)
        return torch.stack([a * z.sin() + c * y.cos(), b * x.sin() + a * z.cos(), c * y.sin() + b * x.cos()], -1)


def random_points(count: int, num_points: int, generator: torch.Generator) -> Tensor:
    """Points all over one period, ``(count, num_points, 3)``."""
    return PERIOD * torch.rand(count, num_points, 3, generator=generator)
