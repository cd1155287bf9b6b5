"""Many small groups: ours beside one call of torch's cuDNN attention, which takes groups of one size as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma
from bench import operator
from bench.cases import Case
from bench.peers import HALF, PEERS, Peer, sdpa
from bench.rows import Row


def of_groups(count: int, size: int, num_heads: int, head_dim: int) -> Case:
    """Groups that attend to themselves."""
    names = [f"g{i}" for i in range(count)]
    patterns = tuple(((name,), (name,)) for name in names)
    name = f"{count} x {size}, {num_heads} x {head_dim}"
    return Case(name, 1, num_heads, head_dim, dict.fromkeys(names, size), patterns)


def of_chunks(count: int, size: int, pooled: int, num_heads: int, head_dim: int) -> Case:
    """Chunks that attend to themselves and to tokens that are pooled of all."""
    names = [f"g{i}" for i in range(count)]
    patterns = (*(((name,), (name, "pooled")) for name in names), (("pooled",), ("pooled",)))
    name = f"{count} x {size} + {pooled} pooled, {num_heads} x {head_dim}"
    return Case(name, 1, num_heads, head_dim, {**dict.fromkeys(names, size), "pooled": pooled}, patterns)


GPU_CASES = (
    of_groups(48, 256, 8, 64),
    of_groups(64, 256, 8, 64),
    of_groups(256, 256, 8, 64),
    of_groups(512, 256, 8, 32),
    of_groups(512, 128, 8, 64),
    of_groups(1024, 200, 3, 64),
    of_chunks(128, 512, 2048, 8, 32),
)
CPU_CASES = (of_groups(64, 64, 3, 64), of_chunks(16, 128, 256, 3, 32))


def _as_batch(q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> Sequence[Tensor]:
    segments = plan.query_segments
    sizes = {segment.end - segment.start for segment in segments}
    if len(sizes) > 1 or any(segment.key_ranges != ((segment.start, segment.end),) for segment in segments):
        raise NotImplementedError("the groups are no batch: they differ in size, or attend to others")
    return (sdpa(*(x.unflatten(1, (-1, *sizes)).flatten(0, 1) for x in (q, k, v))).unflatten(0, (1, -1)).flatten(1, 2),)


PEERS_OF_GROUPS: dict[str, Callable[[], Peer]] = {
    "ours": PEERS["ours"],
    "cudnn, one batch": lambda: Peer(
        _as_batch, partial(sdpa_kernel, [SDPBackend.CUDNN_ATTENTION]), dtypes=HALF, graphed=True, is_torch=True
    ),
}
PEERS_ON_CPU: dict[str, Callable[[], Peer]] = {
    "ours": PEERS["ours"],
    "sdpa, one batch": lambda: Peer(_as_batch, is_torch=True),
}


def measure(device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Errors and both passes of every case."""
    is_gpu = device.type == "cuda"
    what = operator.What(rounds=rounds, data=("normal",))
    for case in GPU_CASES if is_gpu else CPU_CASES:
        yield from operator.measure(case, device, precision, PEERS_OF_GROUPS if is_gpu else PEERS_ON_CPU, what)
