"""Host time of eager calls on so few tokens that nothing else takes time: of the operator, and of a step of a layer.

On a GPU what is timed is how long the host is busy; on a CPU the computation of some tokens lies within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.layer import FORWARD, TRAINING, AttentionAlone, make_layers, make_step
from bench.operator import make_inputs
from bench.rows import Row, timing_row
from bench.timing import Calls, host_turns

CALLS = 8  # in a sample: few enough that the queue of launches never fills and holds up the host
_SELF = ((("sa",), ("sa",)), (("va",), ("va",)))
_ANCHOR_QUERY = ((("sa", "sq"), ("sa",)), (("va", "vq"), ("va",)))
CASES = (
    Case("2 groups of 8", 1, 3, 64, {"sa": 8, "va": 8}, _SELF),
    Case("8 anchors and 8 queries, twice", 1, 3, 64, {"sa": 8, "sq": 8, "va": 8, "vq": 8}, _ANCHOR_QUERY),
)


def _groups(count: int) -> Case:
    """So many groups that attend to themselves."""
    names = [f"g{i}" for i in range(count)]
    patterns = tuple(((name,), (name,)) for name in names)
    return Case(f"{count} groups of 2", 1, 1, 64, dict.fromkeys(names, 2), patterns)


NUMBERS_OF_GROUPS = (1, 16, 256, 1024, 4096)


def measure(device: torch.device, rounds: int) -> Iterator[Row]:
    """Forward, and forward with backward: of layers and the operator, and of the operator with many groups."""
    yield from _measure_few(device, rounds)
    yield from _measure_many(device, rounds)


def _measure_many(device: torch.device, rounds: int) -> Iterator[Row]:
    """The operator alone, whose host time is to be the same whatever the number of groups."""
    cases = [_groups(count) for count in NUMBERS_OF_GROUPS]
    alone = {case.name: AttentionAlone(make_inputs(case, device, torch.bfloat16), case.plan) for case in cases}
    for passed in (FORWARD, TRAINING):
        calls = {name: each.inference if passed == FORWARD else each.training for name, each in alone.items()}
        samples = {name: Calls(partial(_repeat, call), CALLS) for name, call in calls.items()}
        for name, timing in host_turns(samples, device, rounds * 10).items():
            yield timing_row("host", name, "operator, ours", timing, **{"pass": passed, "dtype": "bfloat16"})


def _measure_few(device: torch.device, rounds: int) -> Iterator[Row]:
    """The layers in fp32, and under autocast to bf16."""
    for case in CASES:
        for precision in ("float32", "bfloat16"):
            dtype = getattr(torch, precision)
            step, layers = make_step(case, device, dtype), make_layers(case, device, None, compiled=False)
            alone = AttentionAlone(make_inputs(case, device, dtype), case.plan)
            for passed in (FORWARD, TRAINING):
                calls: dict[str, Callable[[], object]] = {
                    f"layer, {name}": partial(step.call(passed), module) for name, module in layers.items()
                }
                calls["operator, ours"] = alone.inference if passed == FORWARD else alone.training
                calls["one call of sdpa"] = partial(_dense, alone.inputs.leaves, alone.inputs.dout, passed)
                samples = {name: Calls(partial(_repeat, call), CALLS) for name, call in calls.items()}
                for name, timing in host_turns(samples, device, rounds * 10).items():
                    yield timing_row("host", case.name, name, timing, **{"pass": passed, "dtype": precision})


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _dense(leaves: list[Tensor], dout: Tensor, passed: str) -> Tensor | tuple[Tensor, ...]:
    """The framework's own attention over all tokens, which is one call whatever the patterns."""
    with torch.set_grad_enabled(passed == TRAINING):
        out = F.scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves))
    return torch.autograd.grad(out, leaves, dout.transpose(1, 2)) if passed == TRAINING else out
