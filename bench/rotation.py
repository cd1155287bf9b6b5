"""RoPE with its tangents, and its gradient by rows and frequencies: one pass, beside a call for each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.rows import Row, dtype_of, timing_row
from bench.timing import Calls, take_turns

operators = torch.ops.mixed_attention
# Batch size, tokens, heads and their columns: q and k of the largest layers of either suite.
SHAPES = {"cuda": (1, 32768, 6, 64), "cpu": (1, 4096, 6, 64)}
ONE_PASS, CALLS = "ours", "a call for each part"


def measure(device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Times all in turns; a row says how many plain rotations it takes."""
    batch_size, seqlen, num_heads, head_dim = SHAPES[device.type]
    x, x_dot, dout = torch.randn(
        3, batch_size, seqlen, num_heads, head_dim, device=device, dtype=dtype_of(precision)
    ).unbind(0)
    freqs, freqs_dot = torch.randn(2, batch_size, seqlen, head_dim // 2, 2, device=device).unbind(0)
    moved = x_dot[None], freqs_dot[None]
    three = torch.stack([x_dot] * 3), torch.stack([freqs_dot] * 3)
    by_freqs = [True, True, False, False]

    def rope(x: Tensor, freqs: Tensor) -> Tensor:
        return operators.rope(x, freqs, False)

    def gradient_in_parts() -> object:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        by_even, by_odd = dout.float().unflatten(-1, (-1, 2)).unbind(-1)
        dfreqs = torch.stack((even * by_even + odd * by_odd, even * by_odd - odd * by_even), -1).sum(2)
        return operators.rope(dout, freqs, True), dfreqs

    calls: dict[tuple[str, str], Callable[[], object]] = {
        (ONE_PASS, "rotation"): lambda: rope(x, freqs),
        (ONE_PASS, "with a tangent"): lambda: operators.rope_jvp(x, freqs, *moved, False),
        (CALLS, "with a tangent"): lambda: (rope(x, freqs), rope(x_dot, freqs) + rope(x, freqs_dot)),
        (ONE_PASS, "with 3 tangents"): lambda: operators.rope_jvp(x, freqs, *three, False),
        (CALLS, "with 3 tangents"): lambda: (
            rope(x, freqs),
            [rope(a, freqs) + rope(x, b) for a, b in zip(*three)],
        ),
        (ONE_PASS, "gradient"): lambda: operators.rope_backward(dout, None, x, freqs, None, None, False, by_freqs),
        (CALLS, "gradient"): gradient_in_parts,
    }
    timings = take_turns({key: Calls(call) for key, call in calls.items()}, device, rounds)
    unit = timings[ONE_PASS, "rotation"].median
    for (who, passed), timing in timings.items():
        facts = {"pass": passed, "dtype": precision, "ratio": timing.median / unit}
        yield timing_row("derivatives", "RoPE", who, timing, **facts)
