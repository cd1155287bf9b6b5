"""Prints the bytes that forward and backward of dense self attention need beyond inputs, outputs and gradients.

Run as ``python -m bench.memory TOKENS DTYPE``, on Linux: the kernel's record of the largest resident set is reset when
all inputs lie in memory, and read when all is done.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mixed_attention as ma


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _self_attention(num_tokens: int, dtype: torch.dtype, num_heads: int, head_dim: int) -> int:
    plan = ma.AttentionPlan.compile([ma.TokenSpec("all", num_tokens)], [ma.AttentionPattern(["all"], ["all"])])
    q, k, v = (torch.randn(1, num_tokens, num_heads, head_dim).to(dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(q.shape).to(dtype)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    out, lse = ma.attention(q, k, v, plan, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = sum(t.numel() * t.element_size() for t in (out, lse, *grads))
    return _resident("VmHWM") - before - results


def main() -> None:
    num_tokens, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    _self_attention(512, dtype, 3, 64)  # threads, code and the allocator's own memory exist before we count
    print(_self_attention(num_tokens, dtype, 3, 64))


if __name__ == "__main__":
    main()
