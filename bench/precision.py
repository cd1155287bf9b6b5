"""Prints the errors of the operator and of torch's attention for every dtype: `python -m bench.precision`.

Both get inputs of the dtype, and the truth is what fp64 makes of those inputs: the table shows what the arithmetic
adds, not what rounding the inputs does. Random normal q, k, v and output gradient, 3 heads of 64 channels.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

import mixed_attention as ma
from bench.check import RESULTS, exact_attention, relative_error
from bench.rows import dtype_of, in_precision

PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
NUM_TOKENS = 4096


def errors(precision: str, device: torch.device) -> dict[str, list[float]]:
    """Frobenius norms of the errors of output and gradients, over those of the exact results."""
    plan = ma.AttentionPlan.compile([ma.TokenSpec("all", NUM_TOKENS)], [ma.AttentionPattern(["all"], ["all"])])
    dtype = dtype_of(precision)
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, NUM_TOKENS, 3, 64, dtype=torch.float64, device=device).to(dtype).unbind()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out = exact_attention(*doubles, plan)
    exact = [out, *torch.autograd.grad(out, doubles, dout.double())]
    found = {}
    with in_precision(precision):
        for name, call in (("ours", lambda: ma.attention(*inputs, plan)), ("sdpa", lambda: _dense(*inputs))):
            out = call()
            results = (out, *torch.autograd.grad(out, inputs, dout))
            found[name] = [relative_error(*pair) for pair in zip(results, exact)]
    return found


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("python -m bench.precision", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    print("| dtype | who |", " | ".join(RESULTS), "|\n|---|---|" + "---|" * len(RESULTS))
    for precision in PRECISIONS:
        if precision == "tf32" and device.type == "cpu":
            continue
        for who, each in errors(precision, device).items():
            print(f"| {precision} | {who} |", " | ".join(f"{error:.1e}" for error in each), "|", flush=True)


if __name__ == "__main__":
    main()
