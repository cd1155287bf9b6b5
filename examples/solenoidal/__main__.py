"""Learns flows without divergence twice, directly and as the curl of a potential, and compares and draws the two."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

try:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    import mixed_attention as ma
    from examples.solenoidal.flow import Flows, random_points
    from examples.solenoidal.model import FlowModel, KVCaches, predicted_by_potential, predicted_directly
    from examples.solenoidal.picture import draw, slice_points
    from mixed_attention import func
except ModuleNotFoundError as error:
    if error.name not in ("tqdm", "matplotlib"):
        raise
    sys.exit(f"this example needs {error.name}, which is not installed: pip install 'mixed_attention[examples]'")

Prediction = Callable[[FlowModel, KVCaches], Callable[[Tensor], Tensor]]
MODELS: dict[str, Prediction] = {"velocity": predicted_directly, "curl of a potential": predicted_by_potential}
BATCH_SIZE, NUM_ANCHORS, NUM_QUERIES = 4, 128, 256


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m examples.solenoidal", description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of training, for each model")
    parser.add_argument("--points", type=int, default=50_000, help="that are streamed to take the time")
    parser.add_argument("--resolution", type=int, default=64, help="of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/solenoidal"), help="folder of the picture")
    return parser.parse_args(arguments)


def train(predict: Prediction, steps: int, seed: int, name: str) -> FlowModel:
    """Trains a model of its own on random flows, by the squared error of the velocity."""
    torch.manual_seed(seed)
    model = FlowModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    with tqdm(range(steps), unit="step", desc=name) as bar:
        for _ in bar:
            flows = Flows.random(BATCH_SIZE, generator)
            anchors = random_points(BATCH_SIZE, NUM_ANCHORS, generator)
            queries = random_points(BATCH_SIZE, NUM_QUERIES, generator)
            caches = model.encode(anchors, flows.velocity(anchors))
            loss = (predict(model, caches)(queries) - flows.velocity(queries)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model


def relative(error: Tensor, truth: Tensor) -> float:
    """The L2 norm of the error over that of the truth."""
    return float(error.double().norm() / truth.double().norm())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    options = parse(arguments)
    generator = torch.Generator().manual_seed(options.seed + 1)
    flows = Flows.random(1, generator)  # held out
    anchors, tests = (random_points(1, count, generator) for count in (NUM_ANCHORS, 1000))
    many, plane = random_points(1, options.points, generator), slice_points(options.resolution)
    truth = flows.velocity(tests)
    velocities, divergences = {}, {}
    rows = [f"{'a model of the':<24}{'error of velocity':>20}{'divergence':>14}{'s / 10^6 points':>18}"]
    for name, predict in MODELS.items():
        model = train(predict, options.steps, options.seed, name)
        with torch.no_grad():
            velocity = predict(model, model.encode(anchors, flows.velocity(anchors)))
            error = relative(velocity(tests) - truth, truth)
            start = time.perf_counter()
            ma.stream(velocity, many, chunk_size=8192, progress="streaming")
            seconds = (time.perf_counter() - start) * 1e6 / options.points
            _, jacobian = func.value_and_jacobian(velocity, tests, check=False)
            size = jacobian.square().sum((-1, -2)).mean().sqrt()  # of all derivatives of the velocity
            divergence = float(func.divergence(jacobian).square().mean().sqrt() / size)
            velocities[name] = velocity(plane)
            divergences[name] = func.divergence(func.value_and_jacobian(velocity, plane, check=False)[1])
        rows.append(f"{name:<24}{error:>20.4f}{divergence:>14.1e}{seconds:>18.1f}")
    picture = options.output / "solenoidal.png"
    draw(flows.velocity(plane), velocities, divergences, picture)
    print(f"drew {picture}")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
