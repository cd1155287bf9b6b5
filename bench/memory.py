"""Prints the bytes that forward and backward of dense self attention need beyond inputs, outputs and gradients.

Run as ``python -m bench.memory TOKENS DTYPE``, on Linux with glibc: the kernel's record of the largest resident set is
reset when all inputs lie in memory, and read when all is done. The kernel keeps that record to within half a MiB.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

import mixed_attention as ma
from bench.rows import Row

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt
PAGE = 4096


def _return_freed_memory_at_once() -> None:
    """Lets the resident set be what is allocated.

    Otherwise malloc keeps what was freed before the measurement, tens of megabytes, hands it out again during it, and
    the set does not grow: the difference measures nothing.
    """
    libc = ctypes.CDLL(None)
    for option, value in ((MMAP_THRESHOLD, PAGE), (TRIM_THRESHOLD, 0)):
        if not libc.mallopt(option, value):
            raise RuntimeError(f"mallopt({option}, {value}) failed")
    libc.malloc_trim(0)


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


def measure(num_tokens: int, dtype: torch.dtype) -> Row:
    """Runs this module in a process of its own."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "bench.memory", str(num_tokens), name]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    facts = {"pass": "forward + backward", "dtype": name, "extra_bytes": extra}
    return {"kind": "memory", "case": f"{num_tokens} tokens", "who": "ours", **facts}


def main() -> None:
    """Prints how many bytes a process of its own took for one call, of the size and dtype in the command line."""
    num_tokens, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    _self_attention(512, dtype, 3, 64)  # threads and code lie in memory before we count
    _return_freed_memory_at_once()
    print(_self_attention(num_tokens, dtype, 3, 64))


if __name__ == "__main__":
    main()
