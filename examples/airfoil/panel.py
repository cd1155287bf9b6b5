"""Inviscid, incompressible flow around a closed section, by panels of linearly varying vortex strength.

Points of the plane are complex numbers x + iy, velocities are u + iv; lengths are in chords, speeds in free streams.
A vortex sheet of strength gamma(s) per length, counter-clockwise positive, adds to the conjugate velocity w = u - iv

    w(z) = 1 / (2 pi i) * integral of gamma(s) / (z - z(s)) ds,

which has a closed form on a straight panel where gamma is linear. The strengths at the nodes follow from no flow
through the midpoint of any panel, and from Kutta's condition: the flow comes to rest at the trailing edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]
Real = NDArray[np.float64]

POINTS_AT_ONCE = 4096
"""Field points of one matrix of influences, which bounds the memory of a call: 10 MB a temporary with 160 panels."""


@dataclass(frozen=True)
class Naca4:
    """A section of the NACA 4-digit family, with a closed trailing edge.

    Args:
        camber: Largest height of the camber line.
        camber_position: Where along the chord that is, in (0, 1).
        thickness: Largest thickness.
    """

    camber: float
    camber_position: float
    thickness: float

    @classmethod
    def of(cls, digits: str) -> Naca4:
        """Reads a designation such as ``"2412"``.

        Raises:
            ValueError: If it is not four digits, or has camber at no position.
        """
        if len(digits) != 4 or not digits.isdecimal() or digits[2:] == "00" or (digits[0] != "0" and digits[1] == "0"):
            raise ValueError(f"digits: expected a NACA 4-digit section such as '2412', got {digits!r}")
        # Without camber its position has no meaning; any that is not at the end will do.
        return cls(int(digits[0]) / 100, int(digits[1]) / 10 or 0.4, int(digits[2:]) / 100)

    def contour(self, num_panels: int) -> Complex:
        """Nodes ``(num_panels + 1,)`` from the trailing edge over the upper side to the nose and back below.

        They are spaced like the cosine of equal angles, densest at the edges. First and last coincide.

        Raises:
            ValueError: If ``num_panels`` is odd, or less than 4.
        """
        if num_panels < 4 or num_panels % 2:
            raise ValueError(f"num_panels: expected an even number of at least 4, got {num_panels}")
        angle = np.linspace(0, 2 * np.pi, num_panels + 1)
        x = (1 + np.cos(angle)) / 2
        height, slope = self._camber_line(x)
        # The last coefficient closes the trailing edge; with the original -0.1015 a gap of 0.25 % stays.
        polynomial = x * (-0.1260 + x * (-0.3516 + x * (0.2843 - x * 0.1036)))
        half_thickness = 5 * self.thickness * (0.2969 * np.sqrt(x) + polynomial)
        normal = 1j * (1 + 1j * slope) / np.abs(1 + 1j * slope)
        nodes = x + 1j * height + np.where(angle <= np.pi, 1, -1) * half_thickness * normal
        nodes[-1] = nodes[0]  # what rounding leaves of the thickness there
        return nodes

    def _camber_line(self, x: Real) -> tuple[Real, Real]:
        m, p = self.camber, self.camber_position
        scale = np.where(x < p, m / p**2, m / (1 - p) ** 2)
        height = scale * np.where(x < p, x * (2 * p - x), 1 - 2 * p + x * (2 * p - x))
        return height, scale * 2 * (p - x)


class PanelFlow:
    """The flow around a closed contour, at all angles of attack at once.

    The flow is linear in the free stream (cos a, sin a), so that two solutions make them all: arrays whose last axis
    has size 2 hold those of angle 0 and of 90 degrees, and :func:`free_stream` combines them.

    Args:
        nodes: Contour ``(n + 1,)``, counter-clockwise from the trailing edge to the trailing edge again.

    Attributes:
        nodes: The same.
        midpoints: Control points of the panels, ``(n,)``.
        tangents: Directions of the panels, ``(n,)``; the outside is to their right.
        strengths: Vortex strengths at the nodes, ``(n + 1, 2)``. As the fluid inside is at rest, they are also the
            velocity along the contour just outside.

    Raises:
        ValueError: If the contour is not closed, or runs clockwise.

    Example:
        >>> flow = PanelFlow(Naca4.of("2412").contour(160))
        >>> round(flow.lift_coefficient(np.radians(4)), 2)
        0.74
    """

    def __init__(self, nodes: Complex) -> None:
        if nodes[0] != nodes[-1]:
            raise ValueError(f"nodes: expected a closed contour, but it runs from {nodes[0]} to {nodes[-1]}")
        if (nodes[:-1].conj() * nodes[1:]).imag.sum() <= 0:
            raise ValueError("nodes: expected a counter-clockwise contour, got a clockwise one")
        self.nodes = nodes
        self.midpoints = (nodes[:-1] + nodes[1:]) / 2
        self.tangents = np.diff(nodes) / np.abs(np.diff(nodes))
        self.strengths = self._solve()

    def _solve(self) -> Real:
        # The velocity through a panel is -Im(w * tangent); w of the free streams is 1 and -i.
        influence, _ = self._influence(self.midpoints, own_panel=True)
        through = (influence * self.tangents[:, None]).imag
        through_by_stream = (np.array([1, -1j]) * self.tangents[:, None]).imag
        # Kutta's condition is no strength at the first and last node, which leaves n - 1 unknowns for n panels. The
        # last unknown is an equal leak through all panels: no vortices make one, so it is only the error of the panels.
        matrix = np.concatenate([through[:, 1:-1], np.ones((len(through), 1))], 1)
        solution = np.linalg.solve(matrix, -through_by_stream)
        return np.pad(solution[:-1], ((1, 1), (0, 0)))

    def _influence(self, points: Complex, own_panel: bool = False) -> tuple[Complex, Real]:
        """Conjugate velocity at points ``(p,)`` by unit strengths at nodes, ``(p, n + 1)``, and winding numbers.

        With ``own_panel``, point i lies on panel i and is approached from outside.
        """
        to_nodes = points[:, None] - self.nodes
        along = to_nodes[:, :-1] / np.diff(self.nodes)  # 0 at the start of a panel, 1 at its end
        # log of to_start / to_end, by real functions because numpy's complex logarithm takes ten times as long.
        log_distance = np.log(to_nodes.real**2 + to_nodes.imag**2) / 2
        turn = to_nodes[:, :-1] * to_nodes[:, 1:].conj()
        log_ratio = log_distance[:, :-1] - log_distance[:, 1:] + 1j * np.arctan2(turn.imag, turn.real)
        if own_panel:
            np.fill_diagonal(log_ratio, 1j * np.pi)  # where the sign of a zero would decide between the sides
        factor = self.tangents.conj() / (2j * np.pi)
        influence = np.zeros(to_nodes.shape, np.complex128)
        influence[:, :-1] = factor * ((1 - along) * log_ratio + 1)
        influence[:, 1:] += factor * (along * log_ratio - 1)
        return influence, -log_ratio.imag.sum(1) / (2 * np.pi)

    def surface(self, position: Real) -> tuple[Complex, Complex, Real]:
        """Interpolates along the contour.

        Args:
            position: Where, as fractional node numbers in [0, n], ``(p,)``.

        Returns:
            Points ``(p,)``, outward unit normals ``(p,)``, and velocities along the contour of the two solutions,
            ``(p, 2)``.
        """
        at_node = np.arange(len(self.nodes))
        at_midpoint = at_node[:-1] + 0.5
        normals = np.interp(position, at_midpoint, -1j * self.tangents)
        speeds = [np.interp(position, at_node, strengths) for strengths in self.strengths.T]
        return np.interp(position, at_node, self.nodes), normals / np.abs(normals), np.stack(speeds, -1)

    def basis_velocity(self, points: Complex) -> Complex:
        """Velocities of the two solutions at points ``(p,)``: ``(p, 2)``, NaN inside the section and on its nodes."""
        velocity = np.empty((len(points), 2), np.complex128)
        with np.errstate(divide="ignore", invalid="ignore"):  # nodes
            for start in range(0, len(points), POINTS_AT_ONCE):
                rows = slice(start, start + POINTS_AT_ONCE)
                influence, winding = self._influence(points[rows])
                velocity[rows] = (np.array([1, -1j]) + influence @ self.strengths).conj()
                velocity[rows][~(winding < 0.5)] = complex(np.nan, np.nan)
        velocity[~np.isfinite(velocity)] = complex(np.nan, np.nan)
        return velocity

    def velocity(self, points: Complex, angle: float) -> Complex:
        """Velocity at points ``(p,)`` under an angle of attack in radians; NaN inside the section and on its nodes."""
        return self.basis_velocity(points) @ free_stream(angle)

    def pressure(self, position: Real, angle: float) -> Real:
        """Pressure coefficient ``(p,)`` along the contour; arguments as those of the others."""
        return 1 - (self.surface(position)[-1] @ free_stream(angle)) ** 2

    def lift_coefficient(self, angle: float) -> float:
        """Lift over dynamic pressure and a chord of one, from the circulation (Kutta and Joukowski)."""
        lengths = np.abs(np.diff(self.nodes))
        strengths = self.strengths @ free_stream(angle)
        return float(-2 * (lengths * (strengths[:-1] + strengths[1:]) / 2).sum())


def free_stream(angle: float) -> Real:
    """How much of the solutions for 0 and 90 degrees makes the flow under an angle of attack in radians, ``(2,)``."""
    return np.array([np.cos(angle), np.sin(angle)])
