"""Whether the same call gives the same bits every time, and how far its results lie apart where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import mixed_attention as ma
from bench.cases import Case
from bench.operator import Inputs, make_inputs
from bench.peers import BACKWARD, FORWARD, PEERS
from bench.rows import Row

# What has kernels of its own, each so small a case that thousands of calls take a second.
KERNELS = (
    (64, torch.bfloat16),
    (128, torch.bfloat16),
    (64, torch.float16),
    (64, torch.float32),
    (128, torch.float32),
)
GROUPS = {"a": 777, "b": 530, "c": 693}
PATTERNS = ((("a", "b"), ("a",)), (("c",), ("b", "c")))

Call = Callable[[], Sequence[Tensor]]


def measure(device: torch.device, repeats: int) -> Iterator[Row]:
    """The forward, the backward, and the backward where torch is asked for deterministic algorithms."""
    for head_dim, dtype in KERNELS:
        case = Case(f"3 groups, head_dim {head_dim}", 1, 3, head_dim, GROUPS, PATTERNS)
        inputs = make_inputs(case, device, dtype)
        for who, passed in (("ours", FORWARD), ("ours", BACKWARD), ("ours, deterministic", BACKWARD)):
            with PEERS[who]().within():
                call = _PASSES[passed](inputs, case.plan)
                unequal, difference = compare(call, repeats)
            facts = {"pass": passed, "dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim}
            found = {"repeats": repeats, "unequal": unequal, "largest_difference": difference}
            promised = passed == FORWARD or who == "ours, deterministic"
            yield {"kind": "repeats", "case": case.name, "who": who, **facts, **found, "promised": promised}


def compare(call: Call, repeats: int) -> tuple[int, float]:
    """Compares a call's results with those of its first time, where they lie: the host reads once, in the end.

    Returns:
        How many repetitions have other bits, and the largest difference of all, relative to the largest entry of the
        same result.
    """
    firsts = [result.clone() for result in call()]
    bits, values = [_bits(first) for first in firsts], [first.float() for first in firsts]
    sizes = torch.stack([value.abs().max() for value in values])
    unequal, difference = torch.zeros_like(sizes[0], dtype=torch.int64), torch.zeros_like(sizes)
    for _ in range(repeats):
        results = call()
        unequal += torch.stack([(_bits(result) != expected).any() for result, expected in zip(results, bits)]).any()
        off = [(result.float() - value).abs().max() for result, value in zip(results, values)]
        difference = torch.maximum(difference, torch.stack(off))
    return int(unequal), float((difference / sizes).max())


def _bits(tensor: Tensor) -> Tensor:
    """Numbers as integers, so that NaN equals itself and 0 does not equal -0."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def _forward(inputs: Inputs, plan: ma.AttentionPlan) -> Call:
    return lambda: ma.attention(*inputs.values, plan, return_lse=True)


def _backward(inputs: Inputs, plan: ma.AttentionPlan) -> Call:
    out = ma.attention(*inputs.leaves, plan)
    return lambda: torch.autograd.grad(out, inputs.leaves, inputs.dout, retain_graph=True)


_PASSES = {FORWARD: _forward, BACKWARD: _backward}
