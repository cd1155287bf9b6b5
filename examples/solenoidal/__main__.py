"""Learns flows without divergence twice, directly and as a curl, in space and around airfoils; compares and draws."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

try:
    import torch

    from examples.solenoidal import airfoil, periodic
    from examples.solenoidal.picture import draw
    from examples.solenoidal.problem import Problem, judge
    from mixed_attention import func
except ModuleNotFoundError as error:
    if error.name not in ("tqdm", "matplotlib", "numpy"):
        raise
    sys.exit(f"this example needs {error.name}, which is not installed: pip install 'mixed_attention[examples]'")

PROBLEMS = {"periodic": periodic.make_problem, "airfoil": airfoil.make_problem}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m examples.solenoidal", description=__doc__)
    parser.add_argument("--flows", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="default: both")
    parser.add_argument(
        "--steps", type=int, default=600, help="of training, for each model; half as many around airfoils"
    )
    parser.add_argument("--points", type=int, default=50_000, help="that are streamed to take the time")
    parser.add_argument("--resolution", type=int, default=64, help="of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/solenoidal"), help="folder of the pictures")
    return parser.parse_args(arguments)


def compare(problem: Problem, picture: Path) -> list[str]:
    """Lets everybody learn, draws what they predict, and returns a line of the table for each."""
    velocities, divergences, lines = {}, {}, []
    for name, learn in problem.learners.items():
        velocity = learn()
        judgement = judge(problem, velocity)
        with torch.no_grad():
            velocities[name], jacobian = func.value_and_jacobian(velocity, problem.grid, check=False)
            divergences[name] = func.divergence(jacobian)
        who = f"{problem.name}, {name}"
        lines.append(f"{who:<36}{judgement.error:>12.4f}{judgement.divergence:>14.1e}{judgement.seconds:>18.1f}")
    draw(problem, velocities, divergences, picture)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    options = parse(arguments)
    lines = [f"{'a model of the':<36}{'error':>12}{'divergence':>14}{'s / 10^6 points':>18}"]
    for name in options.flows:
        problem = PROBLEMS[name](options.steps, options.points, options.resolution, options.seed)
        picture = options.output / f"{name}.png"
        lines += compare(problem, picture)
        print(f"drew {picture}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
