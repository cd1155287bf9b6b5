"""Derivatives beyond the first, beside our own forward and backward, and those of torch's own attention, in one run.

On GPUs rows have the peak of memory, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma
from bench.cases import Case
from bench.layer import peak_bytes
from bench.operator import make_inputs
from bench.rows import Row, absent_row, dtype_of, in_precision, timing_row
from bench.timing import Calls, take_turns

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# What each pass is measured by: our forward, or our forward and backward together.
UNITS = {
    "forward": "forward",
    "jvp of queries": "forward",
    "jvp of all": "forward",
    "3 tangents of queries": "forward",
    "training": "training",
    "training, create_graph": "training",
    "double backward of queries": "training",
    "double backward of all": "training",
}
# A peer in Triton, and its passes: its gradients of gradients are not offered.
FLASH = "jvp-flash-attention"
FLASH_BLOCK = 128
OF_FLASH = ("forward", "jvp of all", "training")
# Torch's own attention in framework operators holds all scores, several times: a GPU of 80 GiB has room for those of
# dense-16k, and what does not fit is absent.
LARGEST_OF_TORCH = {"cpu": 2**27, "cuda": 2**30}


def cases(device_type: str) -> tuple[Case, ...]:
    """Those beside the suite, as the peers' attention is dense."""
    sizes = (16384, 65536) if device_type == "cuda" else (4096,)
    return tuple(Case(f"dense-{n // 1024}k", 1, 3, 64, {"a": n}, ((("a",), ("a",)),)) for n in sizes)


def measure(case: Case, device: torch.device, precision: str, rounds: int) -> Iterator[Row]:
    """Times every pass in turns; a row says how many of our own forwards, or training steps, it takes.

    A double backward's also says how many of our backwards that takes beyond the training step that it stands on.
    """
    inputs = make_inputs(case, device, dtype_of(precision))
    q, k, v = (leaf.detach() for leaf in inputs.leaves)
    who: dict[str, Attention] = {"ours": lambda q, k, v: ma.attention(q, k, v, case.plan)}
    if case.batch_size * case.num_heads * case.plan.num_pairs() <= LARGEST_OF_TORCH[device.type]:
        who["torch, math"] = partial(_by_torch, case)
    if device.type == "cuda" and _fits_flash(case):
        try:
            who[FLASH] = partial(_by_segment, case, _flash())
        except ImportError as error:
            yield absent_row(case.name, FLASH, precision, error)
    calls: dict[tuple[str, str], Calls] = {}
    with in_precision(precision):
        for name, attention in who.items():
            for passed, call in _passes(attention, (q, k, v)).items():
                if name == FLASH and passed not in OF_FLASH:
                    continue
                try:
                    call()
                except Exception as error:  # out of memory, not offered, or whatever foreign code raises
                    if name == "ours":
                        raise
                    yield absent_row(case.name, name, precision, error, **{"pass": passed})
                else:
                    calls[name, passed] = Calls(call)
        peaks = {key: peak_bytes(each.run, device) for key, each in calls.items()}
        timings = take_turns(calls, device, rounds)
    ours = {passed: timing.median for (name, passed), timing in timings.items() if name == "ours"}
    for (name, passed), timing in timings.items():
        facts = {"pass": passed, "dtype": precision, "ratio": timing.median / ours[UNITS[passed]]}
        step = timings.get((name, "training, create_graph"))
        if passed.startswith("double backward") and step is not None:
            facts["backwards"] = (timing.median - step.median) / (ours["training"] - ours["forward"])
        yield timing_row("derivatives", case.name, name, timing, **facts, **peaks[name, passed])


def _passes(attention: Attention, qkv: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    moved = [torch.randn_like(x) for x in qkv]
    seeds = torch.stack([torch.randn_like(qkv[0]) for _ in range(3)])
    leaves = [x.clone().requires_grad_() for x in qkv]

    def of_queries(q: Tensor) -> Tensor:
        return attention(q, *qkv[1:])

    def train(create_graph: bool, wanted: int) -> None:
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=create_graph)
        if wanted:
            torch.autograd.grad(grads[:wanted], leaves, moved[:wanted])

    def plain() -> Tensor:
        with torch.no_grad():
            return attention(*qkv)

    return {
        "forward": plain,
        "jvp of queries": lambda: jvp(of_queries, (qkv[0],), (moved[0],)),
        "jvp of all": lambda: jvp(attention, tuple(qkv), tuple(moved)),
        "3 tangents of queries": lambda: vmap(lambda seed: jvp(of_queries, (qkv[0],), (seed,))[1])(seeds),
        "training": partial(train, False, 0),
        "training, create_graph": partial(train, True, 0),
        "double backward of queries": partial(train, True, 1),
        "double backward of all": partial(train, True, 3),
    }


def _by_torch(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention, by the one of its backends that has these derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        return _by_segment(case, F.scaled_dot_product_attention, q, k, v)


def _flash() -> Attention:
    """The attention of jvp-flash-attention, which computes tangents beside outputs."""
    return importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual


def _fits_flash(case: Case) -> bool:
    """Whether lengths fill that peer's blocks: it reads beyond others."""
    lengths = [end - begin for segment in case.plan.query_segments for begin, end in segment.key_ranges]
    lengths += [segment.end - segment.start for segment in case.plan.query_segments]
    return all(length % FLASH_BLOCK == 0 for length in lengths)


def _by_segment(case: Case, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Calls an attention of heads before rows once for each pattern."""
    outs = []
    for segment in case.plan.query_segments:
        rows = q[:, segment.start : segment.end]
        keys, values = (torch.cat([x[:, a:b] for a, b in segment.key_ranges], 1) for x in (k, v))
        outs.append(attention(*(x.transpose(1, 2) for x in (rows, keys, values))).transpose(1, 2))
    return torch.cat(outs, 1)
