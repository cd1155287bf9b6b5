"""A whole layer that queries stream past: inference, beside the same with tangents by positions in three directions.

Anchors are encoded once, into a KV cache. Positions come through a linear map and through RoPE's frequencies, so that
both move with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mixed_attention as ma
from bench.rows import Row, dtype_of, in_precision, timing_row
from bench.timing import Calls, take_turns
from mixed_attention import func

INFERENCE, TANGENTS = "streamed inference", "streamed, 3 tangents"
# Numbers of anchors, of queries, and of queries of a chunk.
SIZES = {"cuda": (8192, 10**6, 65536), "cpu": (1024, 8192, 2048)}
DIM, NUM_HEADS = 192, 3


def measure(device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Times both in turns; a row says how many of the plain inferences it takes."""
    num_anchors, num_queries, chunk_size = SIZES[device.type]
    case = f"layer, {num_queries} past {num_anchors}"
    positions = torch.rand(1, num_queries, 3, device=device)
    dtype = dtype_of(precision)
    with torch.no_grad(), in_precision(precision), torch.autocast(device.type, dtype, dtype != torch.float32):
        predict = make_layer(num_anchors, device)
        passes: dict[str, Callable[[Tensor], Tensor]] = {
            INFERENCE: predict,
            TANGENTS: lambda x: func.value_and_jacobian(predict, x, check=False)[1],
        }
        calls = {
            name: Calls(lambda run=run: ma.stream(run, positions, chunk_size=chunk_size))  # type: ignore[misc]
            for name, run in passes.items()
        }
        timings = take_turns(calls, device, rounds)
    for name, timing in timings.items():
        ratio = timing.median / timings[INFERENCE].median
        yield timing_row("derivatives", case, "ours", timing, **{"pass": name, "dtype": precision, "ratio": ratio})


def make_layer(num_anchors: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a layer predicts at positions ``(1, N, 3)``: numbers ``(1, N, 3)``, of random weights and anchors."""
    rope = ma.RopeFrequency(DIM // NUM_HEADS, 3).to(device)
    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=DIM, num_heads=NUM_HEADS, use_rope=True)).to(device)
    encode, head = nn.Linear(3, DIM).to(device), nn.Linear(DIM, 3).to(device)
    pattern = ma.AttentionPattern(["all_anchors", "queries"], ["all_anchors"])
    anchors = torch.rand(1, num_anchors, 3, device=device)
    _, cache = layer(
        encode(anchors),
        [ma.TokenSpec("all_anchors", num_anchors)],
        [ma.AttentionPattern(["all_anchors"], ["all_anchors"])],
        freqs=rope(1000 * anchors),
        return_kv_cache=True,
    )

    def predict(x: Tensor) -> Tensor:
        specs = [ma.TokenSpec("all_anchors", None), ma.TokenSpec("queries", x.shape[1])]
        return head(layer(encode(x), specs, [pattern], freqs=rope(1000 * x), kv_cache=cache))

    return predict
