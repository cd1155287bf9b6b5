"""What ours is measured against: the attention operators of others, called once per pattern or once for all.

A peer gets q, k, v ``(B, N, H, D)`` and a plan, and returns the outputs of the plan's query segments, each
``(B, n, H, D)``. Rows are gathered as a user of that peer has to: slices, and ``torch.cat`` where a union is not
contiguous. The outputs are not joined again; that a user may have to do so is not held against the peer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma
from bench import varlen

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, ma.AttentionPlan], Sequence[Tensor]]

FORWARD, BACKWARD = "forward", "backward"
HALF = (torch.bfloat16, torch.float16)
EVERY = (*HALF, torch.float32)


@dataclass(frozen=True)
class Peer:
    """An attention operator that takes part.

    Attributes:
        attend: The operator.
        within: Settings that its calls need, made outside the time.
        passes: Which passes are measured.
        dtypes: What it takes.
        graphed: Whether it is also replayed from a CUDA graph.
        is_torch: Whether its error is the yardstick for ours.
    """

    attend: Attention
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    dtypes: tuple[torch.dtype, ...] = EVERY
    graphed: bool = False
    is_torch: bool = False


def _ours(q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> Sequence[Tensor]:
    return (ma.attention(q, k, v, plan),)


@contextmanager
def _deterministic() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, not part of the algorithm
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class PerPattern:
    """An attention of plain q, k and v, called once for each pattern.

    NOTE: rows are taken by one ``split`` per tensor, whose derivative is one concatenation; slices would each make a
    gradient of full size and add it.
    """

    def __init__(self, attend: Dense) -> None:
        self._attend = attend
        self._plan: ma.AttentionPlan | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> list[Tensor]:
        if plan is not self._plan:
            self._lay_out(plan)
        q_runs, k_runs, v_runs = q.split(self._q_sizes, 1), k.split(self._k_sizes, 1), v.split(self._k_sizes, 1)
        outs = [q] * len(q_runs)
        for asking, read in self._patterns:
            out = self._attend(
                _join([q_runs[i] for i in asking]), _join([k_runs[i] for i in read]), _join([v_runs[i] for i in read])
            )
            parts = (out,) if len(asking) == 1 else out.split([self._q_sizes[i] for i in asking], 1)
            for index, part in zip(asking, parts):
                outs[index] = part
        return outs

    def _lay_out(self, plan: ma.AttentionPlan) -> None:
        """Finds, for each pattern, the runs of query rows and of key rows; once, not in the time of every call."""
        self._plan = plan
        segments, keys = plan.query_segments, plan.key_segments
        self._q_sizes = [s.end - s.start for s in segments]
        self._k_sizes = [s.end - s.start for s in keys]
        self._patterns = []
        for pattern in range(len(plan.patterns)):
            asking = [i for i, s in enumerate(segments) if s.pattern == pattern]
            ranges = segments[asking[0]].key_ranges
            read = [i for start, end in ranges for i, s in enumerate(keys) if start <= s.start < end]
            self._patterns.append((asking, read))


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors, 1) if len(tensors) > 1 else tensors[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention, rows before heads as ours has them."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _torch_peer(backend: SDPBackend, dtypes: tuple[torch.dtype, ...], *, graphed: bool) -> Peer:
    return Peer(PerPattern(sdpa), partial(sdpa_kernel, [backend]), dtypes=dtypes, graphed=graphed, is_torch=True)


FA3, FA4 = "fa3_fwd_interface", "flash_attn.cute.interface"


def _imported_peer(module: str, passes: tuple[str, ...]) -> Peer:
    function = importlib.import_module(module).flash_attn_func
    return Peer(PerPattern(lambda q, k, v: varlen.first_of(function(q, k, v))), passes=passes, dtypes=HALF)


def _varlen_peer(make: Callable[[], Attention], passes: tuple[str, ...] = (FORWARD, BACKWARD)) -> Peer:
    return Peer(make(), passes=passes, dtypes=HALF, graphed=True)


def _flex_peer(passes: tuple[str, ...] = (FORWARD, BACKWARD)) -> Peer:
    from bench.flex import FlexAttention, for_many_backwards

    return Peer(FlexAttention(), for_many_backwards, passes=passes)


PEERS: dict[str, Callable[[], Peer]] = {
    "ours": lambda: Peer(_ours, graphed=True),
    "ours, deterministic": lambda: Peer(_ours, _deterministic, passes=(BACKWARD,), graphed=True),
    "cudnn": lambda: _torch_peer(SDPBackend.CUDNN_ATTENTION, HALF, graphed=True),
    "fa2": lambda: _torch_peer(SDPBackend.FLASH_ATTENTION, HALF, graphed=True),
    "efficient": lambda: _torch_peer(SDPBackend.EFFICIENT_ATTENTION, (torch.float32,), graphed=False),
    "flex": _flex_peer,
    "fa3": lambda: _imported_peer(FA3, (FORWARD,)),
    "fa4": lambda: _imported_peer(FA4, (FORWARD, BACKWARD)),
    "torch varlen": lambda: _varlen_peer(varlen.of_torch),
    "fa3 varlen": lambda: _varlen_peer(partial(varlen.of_flash_attention, FA3), (FORWARD,)),
    "fa4 varlen": lambda: _varlen_peer(partial(varlen.of_flash_attention, FA4)),
}

CPU_PEERS: dict[str, Callable[[], Peer]] = {
    "ours": PEERS["ours"],
    "sdpa": lambda: Peer(PerPattern(sdpa), is_torch=True),
    "flex": lambda: _flex_peer((FORWARD,)),  # torch has no backward of it for CPUs
}


def peers(device_type: str) -> dict[str, Callable[[], Peer]]:
    """Who may take part on a kind of device, by name. Making a peer raises where it is not installed."""
    return CPU_PEERS if device_type == "cpu" else PEERS
