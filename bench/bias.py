"""What a bias of squared distances costs: attention with `coordinate_bias` beside the same call without it, in turns.

A row says how many of our own calls without a bias it takes. Kernels are as wide as the widened queries and keys, in
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mixed_attention as ma
from bench.cases import Case
from bench.operator import CALLS_A_SAMPLE, make_inputs
from bench.peers import BACKWARD, FORWARD
from bench.rows import Row, dtype_of, in_precision, timing_row
from bench.timing import Calls, take_turns

PLAIN = "ours"


@dataclass(frozen=True)
class Call:
    """Attention to some tensors, and both passes of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    plan: ma.AttentionPlan

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ma.attention(q, k, v, self.plan, softmax_scale=self.scale)

    def passes(self) -> dict[str, Callable[[], object]]:
        values = [t.detach() for t in (self.q, self.k, self.v)]
        leaves = [t.clone().requires_grad_() for t in values]
        out = self.attend(*leaves)
        dout = torch.randn_like(out)

        @torch.no_grad()
        def forward() -> Tensor:
            return self.attend(*values)

        return {
            FORWARD: forward,
            BACKWARD: lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
        }


def calls_of(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """The same attention without a bias, with one, and with values that are filled up with zeros to its width."""
    inputs = make_inputs(case, device, dtype)
    coords = torch.rand(1, case.num_tokens, 3, device=device)
    q, k, scale = ma.coordinate_bias(*inputs.values[:2], coords, beta=4.0)
    v = inputs.values[2]
    return {
        PLAIN: Call(*inputs.values, case.head_dim**-0.5, case.plan),
        "ours, bias": Call(q, k, v, scale, case.plan),
        "ours, bias, values as wide": Call(q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])), scale, case.plan),
    }


def measure(case: Case, device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Times both passes of all three in turns."""
    count = CALLS_A_SAMPLE if device.type == "cuda" else 1
    with in_precision(precision):
        passes = {who: call.passes() for who, call in calls_of(case, device, dtype_of(precision)).items()}
        for passed in (FORWARD, BACKWARD):
            samples = {who: Calls(partial(_repeat, found[passed], count), count) for who, found in passes.items()}
            timings = take_turns(samples, device, rounds)
            for who, timing in timings.items():
                facts = {"pass": passed, "dtype": precision, "ratio": timing.median / timings[PLAIN].median}
                yield timing_row("bias", case.name, who, timing, **facts)


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()
