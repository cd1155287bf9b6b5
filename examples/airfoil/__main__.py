"""Trains a surrogate of the flow around airfoils, judges it on sections it has not seen, and draws one of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Both are read when the libraries are loaded. Threads that wait by spinning keep the cores from those they wait for as
# soon as anything else runs on the machine; and the linear systems of the panel method are too small for two threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

try:
    import numpy as np
    import torch
    from tqdm import tqdm

    from examples.airfoil.data import Flows, random_flows
    from examples.airfoil.evaluate import TrainingMean, held_out_cases, predict
    from examples.airfoil.picture import draw
    from examples.airfoil.ranks import Ranks
    from examples.airfoil.report import Report
    from examples.airfoil.settings import Settings
    from examples.airfoil.train import Training
except ModuleNotFoundError as error:
    if error.name not in ("numpy", "tqdm", "matplotlib"):
        raise
    sys.exit(f"this example needs {error.name}, which is not installed: pip install 'mixed_attention[examples]'")


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    settings = Settings()
    parser = argparse.ArgumentParser("python -m examples.airfoil", description=__doc__)
    parser.add_argument("--epochs", type=positive, default=settings.epochs)
    parser.add_argument("--sections", type=positive, default=settings.sections, help="sections to train on")
    parser.add_argument("--seed", type=int, default=settings.seed)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--ranks", type=positive, default=1, help="processes of torchrun that share the tokens")
    parser.add_argument("--cases", type=positive, default=6, help="held-out sections to judge by")
    parser.add_argument("--queries", type=positive, default=100_000, help="points around each of them, at least")
    parser.add_argument("--chunk", type=positive, default=8192, help="queries at a time")
    parser.add_argument("--output", type=Path, default=Path("outputs/airfoil"), help="folder of checkpoint and picture")
    parser.add_argument("--restart", action="store_true", help="train anew even if there is a checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: The command line, without the program.

    Returns:
        The exit status: 130 when interrupted, after which the same command goes on.
    """
    options = parse(arguments)
    checkpoint = options.output / "checkpoint.pt"
    try:
        settings = Settings(epochs=options.epochs, sections=options.sections, seed=options.seed)
        ranks = Ranks(options.ranks, options.device)
        training = Training(settings, ranks.device, ranks)
        if checkpoint.exists() and not options.restart:
            training.load(checkpoint)
            say(ranks, f"{checkpoint}: {training.epoch} of {settings.epochs} epochs are done")
    except ValueError as error:
        sys.exit(str(error))
    try:
        rng = np.random.default_rng(settings.seed)
        flows = random_flows(settings.sections, settings.surface_points, settings.volume_points, rng).to(ranks.device)
        training.run(flows, checkpoint)
        report = judge(training, flows, options)
    except KeyboardInterrupt:
        say(
            ranks,
            f"\ninterrupted after epoch {training.epoch} of {settings.epochs}; the same command goes on from there",
        )
        return 130
    say(ranks, report)
    ranks.stop()
    return 0


def say(ranks: Ranks, what: object) -> None:
    """Prints, once for all processes."""
    if ranks.is_first:
        print(what)


def judge(training: Training, flows: Flows, options: argparse.Namespace) -> Report:
    """Predicts the held-out cases and draws the first."""
    model, mean, report = training.model.eval(), TrainingMean(flows), Report()
    picture = options.output / "airfoil.png"
    ranks = training.ranks
    cases = held_out_cases(options.cases, options.queries, training.settings)
    bar = tqdm(cases, total=options.cases, unit="section", desc="evaluating", disable=not ranks.is_first)
    for index, case in enumerate(bar):
        predicted = predict(model, case, options.chunk, ranks)
        report.add(case, predicted, mean.predict(case))
        if index == 0 and ranks.is_first:
            draw(case, predicted, picture)
    say(ranks, f"drew {picture}")
    return report


if __name__ == "__main__":
    sys.exit(main())
