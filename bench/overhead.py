"""Host time of one eager call with eight tokens: Python, dispatcher and a problem too small to matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import mixed_attention as ma
from bench.rows import Row, timing_row
from bench.timing import Calls, Timing, take_turns

CALLS = 100  # in a sample: one alone is of the order of the clock's own jitter


def measure(device: torch.device, rounds: int) -> Iterator[Row]:
    """Ours beside torch's attention."""
    plan = ma.AttentionPlan.compile([ma.TokenSpec("all", 8)], [ma.AttentionPattern(["all"], ["all"])])
    q, k, v = torch.randn(1, 8, 3, 3, 64, device=device).unbind(2)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    calls = {
        "ours": Calls(lambda: [ma.attention(q, k, v, plan) for _ in range(CALLS)], CALLS),
        "sdpa": Calls(lambda: [F.scaled_dot_product_attention(*heads_first) for _ in range(CALLS)], CALLS),
    }
    with torch.no_grad():
        timings: dict[str, Timing] = take_turns(calls, device, rounds * 10)
    for name, timing in timings.items():
        yield timing_row("overhead", "8 tokens", name, timing, **{"pass": "forward", "dtype": "float32"})
