"""The whole published model, AB-UPT, before and after `ma.noether.swap`: the same function, and what it takes.

Run as `python -m bench.noether`, beside the package `emmiai-noether` (Python 3.12 or later). Without it there is
nothing to measure, and it says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixed_attention as ma
from bench.layer import peak_bytes
from bench.rows import PRECISIONS, Row, dtype_of, timing_row
from bench.timing import Calls, take_turns

DOMAINS = {"surface": {"pressure": 1}, "volume": {"velocity": 3}}
PHYSICS_BLOCKS = ["perceiver", "self", "cross", "self", "cross", "self"]
DECODER_BLOCKS = 6
NEIGHBOURS = 32  # of a supernode, on average


@dataclass(frozen=True)
class Sizes:
    """Of the model and of what it sees."""

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

    def forward(self, model: nn.Module) -> Tensor:
        """The loss: mean squared errors, added over what is predicted."""
        device = self.inputs["geometry_position"].device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype.itemsize == 2):
            predictions, _ = model(**self.inputs)
            errors = [(predictions[name] - target).square().mean() for name, target in self.targets.items()]
        return torch.stack(errors).sum()

    def training(self, model: nn.Module, scale: float = 1.0) -> Tensor:
        """Forward and backward, down to the gradients of the weights."""
        model.zero_grad()
        loss = self.forward(model)
        (scale * loss).backward()
        return loss.detach()


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


def differences(model: nn.Module, step: Step) -> dict[str, tuple[float, float]]:
    """Differences of loss and gradients from upstream's model in fp32, relative to their largest value.

    Upstream's model does not run in fp64. So in fp32 noether itself differs by nothing, and ours by both roundings.
    """
    exact = _results(model, replace(step, dtype=torch.float32))
    found = {}
    for name, each in (("noether", model), ("ours", swapped(model))):
        pairs = list(zip(_results(each, step), exact))
        relative = [_relative_error(*pair) for pair in pairs]
        found[name] = (relative[0], max(relative[1:]))
    return found


def _results(model: nn.Module, step: Step) -> list[Tensor]:
    scale = 1024.0 if step.dtype == torch.float16 else 1.0  # so that no gradient is lost below fp16
    loss = step.training(model, scale)
    grads = [p.grad / scale for p in model.parameters() if p.grad is not None]
    return [loss, torch.cat([grad.double().flatten() for grad in grads])]


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


def loss_curve(model: nn.Module, step: Step, num_steps: int) -> list[float]:
    """Losses of some steps of AdamW, under a gradient scaler in fp16."""
    device = step.inputs["geometry_position"].device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, enabled=step.dtype == torch.float16)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = step.forward(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def inference(model: nn.Module, step: Step, points: Tensor, chunk_size: int) -> Tensor:
    """The anchors once, then points of the volume ``(1, n, 3)`` past their cache in chunks."""
    device = step.inputs["geometry_position"].device
    with torch.no_grad(), torch.autocast(device.type, step.dtype, enabled=step.dtype.itemsize == 2):
        _, cache = model(**step.inputs)

        def predict(chunk: Tensor) -> Tensor:
            predictions, _ = model(domain_query_positions={"volume": chunk}, kv_cache=cache)
            return predictions["query_volume_velocity"]

        return ma.stream(predict, points, chunk_size=chunk_size, output_device=None)


def measure(args: argparse.Namespace) -> list[Row]:
    """All of it, printed as it comes."""
    device, dtype = torch.device(args.device), dtype_of(args.dtype)
    sizes = Sizes(args.dim, args.heads, args.supernodes, args.anchors)
    rows: list[Row] = []

    def add(row: Row, text: str) -> None:
        rows.append(row)
        print(text, flush=True)

    torch.manual_seed(0)
    small = Sizes(args.dim, args.heads, *(min(n, 1024) for n in (args.supernodes, args.anchors)))
    for name, (loss, grads) in differences(make_model(small).to(device), make_step(small, device, dtype)).items():
        row = {"kind": "model difference", "case": "1024 tokens", "who": name, "loss": loss, "gradients": grads}
        add(row, f"{name:8} differs from noether in fp32 by {loss:.1e} in the loss, {grads:.1e} in the gradients")

    model, step = make_model(sizes).to(device), make_step(sizes, device, dtype)
    models = {"noether": model, "ours": swapped(model)}
    for name, each in models.items():
        losses = loss_curve(copy.deepcopy(each), step, args.steps)
        text = " ".join(f"{loss:.5f}" for loss in losses[:: max(args.steps // 6, 1)])
        add({"kind": "loss curve", "case": "ab-upt", "who": name, "losses": losses}, f"{name:8} losses {text}")

    points = torch.rand(1, args.queries, 3, device=device)
    work = {
        "training step": step.training,
        "chunked inference": partial(inference, step=step, points=points, chunk_size=args.chunk),
    }
    for case, call in work.items():
        calls = {name: partial(call, each) for name, each in models.items()}
        peaks = {name: peak_bytes(each, device) for name, each in calls.items()}
        timings = take_turns({name: Calls(each) for name, each in calls.items()}, device, args.rounds)
        for name, timing in timings.items():
            ratio = timings["noether"].median / timing.median
            peak = "".join(f", peak {b / 2**20:.0f} MiB" for b in peaks[name].values())
            row = timing_row("model", case, name, timing, dtype=args.dtype, **peaks[name])
            add(row, f"{name:8} {case}: {timing.median:.2f} ms, {ratio:.2f} x noether{peak}")
    return rows


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
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args()


def main() -> int:
    """Runs the command line."""
    args = parse()
    try:
        import noether.modeling.models.ab_upt  # noqa: F401
    except ImportError as error:
        print(f"skipped: emmiai-noether, which this measures, cannot be imported ({error}); pip install emmiai-noether")
        return 0
    rows = measure(args)
    if args.out:
        facts = {"device": args.device, "torch": torch.__version__, "command": sys.argv[1:], "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
