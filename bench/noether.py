"""The whole published model, AB-UPT, before and after `ma.noether.swap`: the same function, and what it takes.

Run as `python -m bench.noether`, beside the package `emmiai-noether` (Python 3.12 or later). Without it there is
nothing to measure, and it says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixed_attention as ma
from bench import facts, files, tables, timeline
from bench.check import relative_error
from bench.layer import peak_bytes
from bench.rows import PRECISIONS, Row, dtype_of, timing_row
from bench.timing import Calls, take_turns

DOMAINS = {"surface": {"pressure": 1}, "volume": {"velocity": 3}}
PHYSICS_BLOCKS = ["perceiver", "self", "cross", "self", "cross", "self"]
DECODER_BLOCKS = 6
NEIGHBOURS = 32  # of a supernode, on average
SMALL = 1024  # tokens of the model in which results are compared
LOSS_SCALES = (1024.0, 32.0, 1.0)  # in fp16: the first with which no gradient is lost above its range

Errors = dict[str, dict[str, float]]
"""As in all rows: of every result, by name, some errors, by name."""


@dataclass(frozen=True)
class Sizes:
    """How large the model is, and what it sees."""

    dim: int
    num_heads: int
    supernodes: int
    anchors: int  # of each domain


@dataclass(frozen=True)
class Step:
    """A training step: inputs, targets, and the dtype that autocast computes in (fp32 is not cast to)."""

    inputs: dict[str, Any]
    targets: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.inputs["geometry_position"].device

    @property
    def loss_scales(self) -> tuple[float, ...]:
        return LOSS_SCALES if self.dtype == torch.float16 else (1.0,)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize == 2)

    def forward(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, mean squared errors added over what is predicted, and the predictions."""
        with self.autocast():
            predictions, _ = model(**self.inputs)
            errors = [(predictions[name] - target).square().mean() for name, target in self.targets.items()]
        return torch.stack(errors).sum(), predictions

    def training(self, model: nn.Module, loss_scale: float | None = None) -> dict[str, Tensor]:
        """Forward and backward, down to the gradients of the weights, which are those of the scaled loss."""
        model.zero_grad()
        loss, predictions = self.forward(model)
        ((loss_scale or self.loss_scales[0]) * loss).backward()
        return predictions


def make_model(sizes: Sizes) -> nn.Module:
    """AB-UPT in the published order of blocks, as upstream builds it."""
    from noether.core.schemas.models.ab_upt import AnchorBranchedUPTConfig
    from noether.modeling.models.ab_upt import AnchoredBranchedUPT

    radius = (NEIGHBOURS / (2 * sizes.supernodes) / 4.19) ** (1 / 3)  # in a unit cube of twice as many points
    config = AnchorBranchedUPTConfig(
        name="ab_upt",
        hidden_dim=sizes.dim,
        geometry_depth=1,
        physics_blocks=PHYSICS_BLOCKS,
        num_domain_decoder_blocks=dict.fromkeys(DOMAINS, DECODER_BLOCKS),
        supernode_pooling_config={"hidden_dim": sizes.dim, "input_dim": 3, "radius": radius},
        transformer_block_config={
            "hidden_dim": sizes.dim,
            "num_heads": sizes.num_heads,
            "mlp_expansion_factor": 4,
            "use_rope": True,
        },
        data_specs={"position_dim": 3, "domains": {name: {"output_dims": out} for name, out in DOMAINS.items()}},
    )
    return AnchoredBranchedUPT(config)


def with_large_weights(model: nn.Module) -> nn.Module:
    """The same with matrices of the size that trained ones have: initial ones make softmax flat and outputs vanish."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def make_step(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Step:
    """Random points of a unit cube, and smooth fields over them."""
    num_points = 2 * sizes.supernodes
    anchors = {name: torch.rand(1, sizes.anchors, 3, device=device) for name in DOMAINS}
    waves = torch.tensor([3.0, 5.0, 7.0], device=device)
    fields = {name: (waves * points).sin() for name, points in anchors.items()}
    inputs = {
        "geometry_position": torch.rand(num_points, 3, device=device),
        "geometry_supernode_idx": torch.arange(0, num_points, 2, device=device),
        "geometry_batch_idx": torch.zeros(num_points, dtype=torch.long, device=device),
        "domain_anchor_positions": anchors,
    }
    targets = {
        f"{domain}_{field}": fields[domain][..., :width]
        for domain, out in DOMAINS.items()
        for field, width in out.items()
    }
    return Step(inputs, targets, dtype)


def swapped(model: nn.Module) -> nn.Module:
    """A copy of the model with our attention."""
    copied = copy.deepcopy(model)
    if not ma.noether.swap(copied):
        raise RuntimeError("ma.noether.swap found no attention to replace")
    return copied


def differences(model: nn.Module, step: Step, points: Tensor, chunk_size: int) -> dict[str, Errors]:
    """How far upstream's model and ours are, in the dtype of the step, from upstream's in fp32.

    Upstream's model does not run in fp64. So in fp32 noether itself differs by nothing, and ours by both roundings.

    Returns:
        For each, by name, errors of the predictions, of the gradients and of chunked inference, as Frobenius norms
        relative to the expected.
    """
    exact = _results(model, replace(step, dtype=torch.float32), points, chunk_size)
    found = {}
    for name, each in (("noether", model), ("ours", swapped(model))):
        got = _results(each, step, points, chunk_size)
        found[name] = {what: {"relative": relative_error(got[what], exact[what])} for what in exact}
    return found


def _results(model: nn.Module, step: Step, points: Tensor, chunk_size: int) -> dict[str, Tensor]:
    for scale in step.loss_scales:
        predictions = step.training(model, scale)
        grads = torch.cat([p.grad.double().flatten() / scale for p in model.parameters() if p.grad is not None])
        if grads.isfinite().all():
            break
    return {
        "predictions": torch.cat([t.detach().double().flatten() for t in predictions.values()]),
        "gradients": grads,
        "chunked inference": inference(model, step, points, chunk_size).double(),
    }


def loss_curve(model: nn.Module, step: Step, num_steps: int) -> list[float]:
    """Losses of some steps of AdamW on a copy of the model, under a gradient scaler in fp16."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(step.device.type, init_scale=LOSS_SCALES[0], enabled=step.dtype == torch.float16)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss, _ = step.forward(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def loss_curves(models: dict[str, nn.Module], step: Step, num_steps: int) -> Iterator[Row]:
    """The curves of all models, and how far each is from that of upstream's in fp32.

    The distance is the root mean square of the relative differences. What 16 bits do to upstream's own curve is the
    yardstick for ours.
    """
    exact = loss_curve(models["noether"], replace(step, dtype=torch.float32), num_steps)
    for name, model in models.items():
        losses = loss_curve(model, step, num_steps)
        squares = [(loss / expected - 1) ** 2 for loss, expected in zip(losses, exact)]
        yield {"kind": "losses", "who": name, "losses": losses, "distance": statistics.mean(squares) ** 0.5}
    yield {"kind": "losses", "who": "noether, fp32", "losses": exact, "distance": 0.0}


def inference(model: nn.Module, step: Step, points: Tensor, chunk_size: int) -> Tensor:
    """The anchors once, then points of the volume ``(1, n, 3)`` past their cache in chunks."""
    with torch.no_grad(), step.autocast():
        _, cache = model(**step.inputs)

        def predict(chunk: Tensor) -> Tensor:
            predictions, _ = model(domain_query_positions={"volume": chunk}, kv_cache=cache)
            return predictions["query_volume_velocity"]

        return ma.stream(predict, points, chunk_size=chunk_size, output_device=None)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Whether both compute the same, then what it takes; yields rows as they come."""
    device, precision = torch.device(args.device), args.dtype
    sizes = Sizes(args.dim, args.heads, args.supernodes, args.anchors)
    small = replace(sizes, supernodes=min(sizes.supernodes, SMALL), anchors=min(sizes.anchors, SMALL))
    points = torch.rand(1, args.queries, 3, device=device)

    model = with_large_weights(make_model(small)).to(device)
    step = make_step(small, device, dtype_of(precision))
    few = points[:, : 4 * small.anchors]
    for name, errors in differences(model, step, few, small.anchors).items():
        case = f"{small.anchors} anchors"
        yield {"kind": "difference", "case": case, "who": name, "dtype": precision, "errors": errors}

    model, step = make_model(sizes).to(device), make_step(sizes, device, dtype_of(precision))
    models = {"noether": model, "ours": swapped(model)}
    for row in loss_curves(models, step, args.steps):
        yield row | {"case": f"{sizes.anchors} anchors", "dtype": precision}

    work = {
        "training step": step.training,
        f"{points.shape[1]} points": partial(inference, step=step, points=points, chunk_size=args.chunk),
    }
    for case, call in work.items():
        calls = {name: partial(call, each) for name, each in models.items()}
        peaks = {name: peak_bytes(each, device) for name, each in calls.items()}
        timings = take_turns({name: Calls(each) for name, each in calls.items()}, device, args.rounds)
        for name, timing in timings.items():
            yield timing_row("model", case, name, timing, dtype=precision, **peaks[name])
    if args.timeline:
        steps = {name: partial(step.training, each) for name, each in models.items()}
        yield from timeline.rows("AB-UPT", steps, device, precision, args.rounds)


def parse() -> argparse.Namespace:
    """Reads the command line; the defaults are the published model at the size of DrivAerML."""
    parser = argparse.ArgumentParser("python -m bench.noether", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float16", help="16-bit types by autocast")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--supernodes", type=int, default=16384)
    parser.add_argument("--anchors", type=int, default=16384, help="of each domain")
    parser.add_argument("--steps", type=int, default=50, help="of the loss curve")
    parser.add_argument("--queries", type=int, default=2**20, help="points of the volume to evaluate")
    parser.add_argument("--chunk", type=int, default=2**17, help="of them at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeline", action="store_true", help="also where the GPU's time of a training step goes")
    parser.add_argument("--commit", help="what is measured; default what git says")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/MACHINE/model-DTYPE.json")
    args = parser.parse_args()
    if args.timeline and args.device == "cpu":
        parser.error("--timeline needs a GPU")
    return args


def main() -> int:
    """Runs the command line."""
    args = parse()
    try:
        import noether.modeling.models.ab_upt  # noqa: F401
    except ImportError as error:
        print(f"skipped: emmiai-noether, which this measures, cannot be imported ({error}); pip install emmiai-noether")
        return 0
    torch.manual_seed(0)
    device = torch.device(args.device)
    result = facts.of_run("bench.noether", device, args.commit)
    try:
        for row in measure(args):
            result["rows"].append(row)
            print(tables.line(row), flush=True)
    finally:  # what was measured before an error or an interruption is worth keeping
        facts.save(result, device, files.name("model", args.dtype), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
