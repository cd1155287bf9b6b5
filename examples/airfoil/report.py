"""The table: relative errors of the surrogate on held-out sections, beside those of predicting the training mean."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from examples.airfoil.evaluate import Case, Values

QUANTITIES = {"surface": "pressure coefficient", "volume": "velocity"}


def squared(values: Tensor) -> float:
    """Sum of squares, in double precision."""
    return values.double().square().sum().item()


@dataclass
class Errors:
    """Sums of squares, over as many cases as are added: of the truth, and of what two predictors miss of it."""

    truth: float = 0.0
    model: float = 0.0
    mean: float = 0.0

    def add(self, truth: Tensor, model: Tensor, mean: Tensor) -> None:
        """Adds values and their predictions, all of one shape."""
        self.truth += squared(truth)
        self.model += squared(model - truth)
        self.mean += squared(mean - truth)

    @property
    def relative(self) -> tuple[float, float]:
        """Relative L2 errors of the model and of the mean."""
        return (self.model / self.truth) ** 0.5, (self.mean / self.truth) ** 0.5

    @property
    def factor(self) -> float:
        """How many times smaller the error of the model is."""
        return (self.mean / self.model) ** 0.5


@dataclass
class Report:
    """Errors by case and quantity, and of all cases together."""

    rows: dict[str, dict[str, Errors]] = field(default_factory=dict)
    total: dict[str, Errors] = field(default_factory=lambda: {branch: Errors() for branch in QUANTITIES})

    def add(self, case: Case, model: Values, mean: Values) -> None:
        """Adds a case and both predictions of it."""
        row = self.rows[f"{case.name} at {case.angle:.1f}°"] = {branch: Errors() for branch in QUANTITIES}
        for branch, truth in case.truth.items():
            for errors in (row[branch], self.total[branch]):
                errors.add(truth, model[branch], mean[branch])

    def __str__(self) -> str:
        columns = "".join(f"{name:>30}" for name in QUANTITIES.values())
        lines = [f"{'relative L2 error of':<20}{columns}", f"{'':<20}" + f"{'model':>14}{'mean':>8}{'factor':>8}" * 2]
        for name, row in {**self.rows, "all": self.total}.items():
            cells = (f"{e.relative[0]:>14.4f}{e.relative[1]:>8.4f}{e.factor:>8.1f}" for e in row.values())
            lines.append(f"{name:<20}" + "".join(cells))
        return "\n".join(lines)
