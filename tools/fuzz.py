"""Random problems against the fp64 oracle of the tests, until one fails; then the smallest that still does.

A seed is a problem: plans of 1 to 60 groups, every dtype and head_dim, strides, masks, dropout, gradients of the
log-sum-exp, deterministic runs twice, layers that rotate in place; NaN wherever nobody may look. Sizes stand around the
edges of tiles, and on a GPU often where few tiles of unequal length are cut into parts, or share their work.

Usage: fuzz.py [--device cuda] [-n CASES] [-j PROCESSES] [--families hopper,portable] ...
       fuzz.py [--device cuda] --replay SEED
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

BEGIN = time.time()  # before torch is loaded, which takes seconds
# ruff: noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
# NOTE: read when torch is loaded. Processes share the cores; large blocks of memory that return to the system each time
# would cost more than what is computed in them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

import torch
import torch.nn.functional as F
from cases import DTYPES, NAMES, Case, make_inputs, make_mask
from compare import Results, deterministic, judge, largest_of, oracle, run
from torch import Tensor, nn

import mixed_attention as ma
from mixed_attention import ops, reference
from mixed_attention.layers.mixed import LEAST_SKIPPED

VARIABLE_OF = {"cpu": "MIXED_ATTENTION_CPU", "cuda": "MIXED_ATTENTION_GPU"}  # forces a family
STOPS = signal.SIGINT, signal.SIGTERM
GRACE = 5  # seconds that processes have to finish in
BY_ITSELF = {"native", "hopper"}  # families that are chosen without being forced
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81, 95, 96, 97]
LARGE_EDGES = [111, 112, 113, 127, 128, 129, 159, 160, 161, 191, 192, 193, 255, 256, 257, 319, 320, 321, 383, 384, 385]
HEAD_DIMS = [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 104, 112, 128, 136, 160, 192, 200, 224, 256]


@dataclass(frozen=True)
class Trial:
    """A problem, and how it is run.

    Attributes:
        case: The problem; for a layer its groups, shapes, dtype, mask and dropout.
        style: What kind of sizes it was drawn with; for the summary.
        is_layer: Whether a layer that rotates is run, instead of the operator.
        is_deterministic: Whether it runs twice and has to give equal bits.
        is_tf32: Whether products of fp32 may be made in TF32.
    """

    case: Case
    style: str = ""
    is_layer: bool = False
    is_deterministic: bool = False
    is_tf32: bool = False

    def __str__(self) -> str:
        return spell(self)


def spell(value: Any) -> str:
    """A dataclass as Python that makes it, without what is as by default."""
    if not hasattr(value, "__dataclass_fields__"):
        return repr(value)
    pairs = [(f, getattr(value, f.name)) for f in fields(value)]
    return f"{type(value).__name__}({', '.join(f'{f.name}={spell(v)}' for f, v in pairs if v != f.default)})"


# --- Drawing -----------------------------------------------------------------------------------------------------


def draw(seed: int, device_type: str) -> Trial:
    """The trial of a seed."""
    rng = random.Random(seed)
    is_gpu = device_type == "cuda"
    styles = {"few": 50, "many": 10, "long": 6} | ({"parts": 33, "shares": 0.5} if is_gpu else {})
    style = _weighted(rng, styles)
    trial = {"parts": _draw_parts, "shares": _draw_shares}.get(style, _draw_any)(rng, style, is_gpu)
    return replace(trial, case=_fit(trial.case.with_(seed=seed % 2**32), *_budget(rng, style, is_gpu)))


def _weighted(rng: random.Random, weights: dict[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _budget(rng: random.Random, style: str, is_gpu: bool) -> tuple[int, int]:
    """How many scores, and numbers in q, a case may have: what the oracle computes in some milliseconds."""
    if style == "shares":
        return 2**25, 2**25
    if is_gpu:
        return _weighted(rng, {2**19: 30, 2**21: 60, 2**23: 10}), 2**21
    return _weighted(rng, {5_000: 30, 30_000: 60, 120_000: 8, 500_000: 2}), 2**17


def _fit(case: Case, max_scores: int, max_numbers: int) -> Case:
    """A case made smaller until it is within a budget."""
    while True:
        num_queries, num_keys = (sum(size for _, size in groups) for groups in (case.asking, case.placed))
        copies = case.batch_size * case.num_heads
        width = max(case.head_dim, case.head_dim_v or 0)
        if copies * num_queries * num_keys <= max_scores and copies * (num_queries + num_keys) * width <= max_numbers:
            return case
        if case.batch_size > 1:
            case = case.with_(batch_size=case.batch_size - 1)
        elif case.num_heads > 2:
            case = case.with_(num_heads=case.num_heads // 2)
        else:
            largest = max(range(len(case.sizes)), key=lambda i: case.sizes[i])
            case = case.with_(sizes=_replaced(case.sizes, largest, case.sizes[largest] * 3 // 4))


def _replaced(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _draw_any(rng: random.Random, style: str, is_gpu: bool) -> Trial:
    """Whatever is allowed, every feature independently of the others."""
    sizes = _draw_sizes(rng, style, is_gpu)
    dtype = rng.choice(list(DTYPES.values()))
    if is_gpu:
        dtype = _weighted(rng, {torch.bfloat16: 35, torch.float16: 30, torch.float32: 33, torch.float64: 2})
    is_tf32 = is_gpu and dtype == torch.float32 and rng.random() < 0.5
    is_layer = rng.random() < 0.08
    head_dim = _draw_head_dim(rng, is_gpu)
    magnitude = _weighted(rng, {1.0: 70, 0.01: 5, 0.0: 1, 30.0: 12, 2500.0: 12})
    heavy_tails = magnitude <= 30 and rng.random() < 0.2
    spread = _weighted(rng, {0.0: 85, 0.5: 8, 1.5: 7}) if magnitude == 1 else 0.0
    # The scale is what it is by default where the magnitude alone makes logits of ten thousand.
    scales = {None: 78, 1.0: 6, -0.2: 5, 0.0: 3, 1e-4: 3, rng.uniform(-1, 1): 5}
    softmax_scale = _weighted(rng, scales) if magnitude <= 30 and spread <= 0.5 else None
    if dtype == torch.float64:
        # Rows of equal weights err alike, which no bound in quadrature holds; in fp64 there is no yardstick beside it.
        magnitude, softmax_scale = magnitude or 0.01, 1e-4 if softmax_scale == 0 else softmax_scale
    if is_tf32:  # logits that are off by more than a little are off beyond what a first-order bound says
        magnitude, spread, heavy_tails = min(magnitude, 1.0), 0.0, False
        softmax_scale = None if softmax_scale is None else softmax_scale / head_dim
    case = Case(
        sizes=sizes,
        attends=_draw_attends(rng, len(sizes)),
        batch_size=_weighted(rng, {0: 1, 1: 45, 2: 34, 3: 20}),
        num_heads=_weighted(rng, {0: 0.5, 1: 40, 2: 20, 3: 15, 4: 8, 5: 4, 6: 4, 8: 4, 12: 4.5}),
        head_dim=head_dim,
        head_dim_v=_draw_head_dim(rng, is_gpu) if rng.random() < 0.12 else None,
        dtype=dtype,
        layout=_weighted(
            rng, {"contiguous": 35, "packed": 20, "strided": 12, "spaced": 13, "offset": 8, "transposed": 12}
        ),
        shared=_weighted(rng, {"": 85, "k": 4, "v": 4, "kv": 7}),
        mask=_weighted(rng, {None: 62, "random": 20, "blocked": 5, "front": 4, "back": 4, "shared": 5}),
        heavy_tails=heavy_tails,
        magnitude=magnitude,
        softmax_scale=softmax_scale,
        spread=spread,
        dropout_p=_weighted(rng, {0.0: 86, 0.1: 5, 0.5: 4, 0.999: 1, 1.0: 1, rng.random(): 3}),
        dlse=rng.random() < 0.6,
        skip_unread_keys=rng.random() < 0.4,
        cached="".join(rng.sample(NAMES[: len(sizes)], rng.randint(0, len(sizes)))) if rng.random() < 0.12 else "",
    )
    if is_gpu and rng.random() < 0.6:
        case = _for_hopper(case)
    trial = Trial(case, style, is_layer, rng.random() < 0.2, is_tf32)
    return as_layer(trial) if is_layer else trial


def _for_hopper(case: Case) -> Case:
    """The same without what the Hopper kernels leave to the portable ones."""
    is_fp32 = case.dtype == torch.float32
    least, most = (40, 128) if is_fp32 else (8, 256)
    return case.with_(
        head_dim=min(max(case.head_dim // 8 * 8, least), most),
        head_dim_v=None if case.head_dim_v is None else min(max(case.head_dim_v // 8 * 8, 8), most),
        layout="spaced" if case.layout in ("strided", "offset") else case.layout,
        mask=None if is_fp32 else case.mask,
        softmax_scale=None if case.scale <= 0 else case.softmax_scale,
        dropout_p=0.0,
    )


def as_layer(trial: Trial) -> Trial:
    """The same of a layer, which has less to choose."""
    case = trial.case.with_(
        num_heads=max(1, trial.case.num_heads),
        head_dim=trial.case.head_dim + trial.case.head_dim % 2,
        head_dim_v=None,
        layout="contiguous",
        shared="",
        heavy_tails=False,
        magnitude=1.0,
        softmax_scale=None,
        spread=0.0,
        dlse=False,
        skip_unread_keys=False,
        cached="",
    )
    return replace(trial, case=case, is_layer=True)


def _draw_sizes(rng: random.Random, style: str, is_gpu: bool) -> tuple[int, ...]:
    edges = EDGES + LARGE_EDGES if is_gpu else EDGES + LARGE_EDGES[:6]
    if style == "many":
        sizes = [rng.choice([0, 1, 2, 3, rng.randint(0, 12), rng.randint(0, 12)]) for _ in range(rng.randint(7, 60))]
        sizes[rng.randrange(len(sizes))] = rng.choice(edges)
    elif style == "long":
        sizes = [rng.randint(0, 20) for _ in range(rng.randint(1, 4))]
        sizes.insert(rng.randint(0, len(sizes)), rng.randint(1000, 9000) if is_gpu else rng.randint(300, 2500))
    else:
        num_groups = _weighted(rng, {1: 10, 2: 25, 3: 25, 4: 15, 5: 15, 6: 10})
        sizes = [rng.choice([0, 1, *2 * [rng.randint(1, 40)], *4 * [rng.choice(edges)]]) for _ in range(num_groups)]
    return tuple(sizes)


def _draw_attends(rng: random.Random, num_groups: int) -> str:
    """Patterns: a random partition of the groups asks, each part for a random list of groups, with repeats."""
    num_parts = rng.randint(1, min(num_groups, rng.choice([2, 4, 60])))
    parts = [""] * num_parts
    for name in NAMES[:num_groups]:
        parts[rng.randrange(num_parts)] += name
    return " ".join(f"{part}>{_draw_keys(rng, NAMES[:num_groups])}" for part in parts if part)


def _draw_keys(rng: random.Random, names: str) -> str:
    if rng.random() < 0.6:
        return "".join(rng.sample(names, rng.randint(1, min(len(names), 8))))
    return "".join(rng.choices(names, k=rng.randint(1, min(len(names), 6) + 1)))


def _draw_head_dim(rng: random.Random, is_gpu: bool) -> int:
    # The Hopper kernels serve multiples of eight.
    if is_gpu and rng.random() < 0.7:
        return rng.choice([32, 64, 64, 96, 128, 128, 192, 256, *HEAD_DIMS])
    return rng.choice([rng.randint(1, 256), rng.randint(1, 40), rng.choice(HEAD_DIMS)])


def _draw_parts(rng: random.Random, style: str, is_gpu: bool) -> Trial:
    """Few tiles on a large device, each with another number of key tiles: their walks are cut into parts.

    Parts are limited by what the tile that comes last can be cut into, and what comes last depends on how many rows a
    tile has. So of the groups that ask, some end in a tile that is nearly empty and some in one that is nearly full,
    and what they read is alike in length, but not equal.
    """
    num_groups = rng.randint(2, 6)
    steps = rng.choice([4, 8, 16])  # of 128 keys, about, for each group
    sizes = [
        rng.choice([rng.randint(1, 128), rng.randint(129, 192), 192, rng.randint(1, steps) * 128 + rng.randint(-3, 40)])
        for _ in range(num_groups)
    ]
    names = NAMES[:num_groups]
    # Groups that ask for all, or for all but one or one more, differ by few key tiles.
    parts = [names] if rng.random() < 0.15 else list(names)
    patterns = []
    for part in rng.sample(parts, len(parts)):
        keys = rng.sample(names, max(1, num_groups - rng.randint(0, 2)))
        patterns.append(f"{part}>{''.join(keys + rng.choices(names, k=rng.choice([0, 0, 1, 2])))}")
    dtype = _weighted(rng, {torch.bfloat16: 40, torch.float16: 35, torch.float32: 25})
    case = Case(
        sizes=tuple(sizes),
        attends=" ".join(patterns),
        batch_size=_weighted(rng, {1: 80, 2: 20}),
        num_heads=_weighted(rng, {1: 50, 2: 30, 3: 20}),
        head_dim=rng.choice([64, 64, 128, 32, *HEAD_DIMS]),
        dtype=dtype,
        layout=_weighted(rng, {"contiguous": 60, "packed": 20, "spaced": 20}),
        mask=_weighted(rng, {None: 75, "random": 15, "front": 5, "back": 5}),
        magnitude=_weighted(rng, {1.0: 80, 30.0: 20}) if dtype != torch.float32 else 1.0,
        dlse=rng.random() < 0.6,
        skip_unread_keys=rng.random() < 0.4,
        cached="".join(rng.sample(names, num_groups // 2)) if rng.random() < 0.4 else "",
    )
    is_tf32 = dtype == torch.float32 and rng.random() < 0.6
    trial = Trial(case, style, rng.random() < 0.1, rng.random() < 0.3, is_tf32)
    return as_layer(trial) if trial.is_layer else trial


def _draw_shares(rng: random.Random, style: str, is_gpu: bool) -> Trial:
    """So many queries of few keys that the backward of a layer goes through its heads in two shares.

    It does where a block takes 800 steps or more, of 64 queries each, halves of the queries being taken by two blocks.
    """
    sizes = rng.randint(103_000, 115_000), rng.randint(1, 30), rng.randint(0, 20)
    case = Case(
        sizes,
        rng.choice(["abc>b", "ab>bc c>b", "a>bbc bc>c"]),
        batch_size=rng.choice([1, 1, 2]),
        num_heads=rng.choice([2, 3]),
        head_dim=rng.choice([32, 64]),
        dtype=rng.choice([torch.bfloat16, torch.float16]),
    )
    return as_layer(Trial(case, style, is_deterministic=rng.random() < 0.3))


# --- Checking ----------------------------------------------------------------------------------------------------


class BeyondRange(Exception):
    """What is right has no place in the dtype of the case: there is nothing to compare with."""


def check(trial: Trial, device: torch.device) -> None:
    """Runs a trial.

    Raises:
        AssertionError: If a result is wrong.
        BeyondRange: If no result could be right.
    """
    torch.set_float32_matmul_precision("high" if trial.is_tf32 else "highest")
    (_check_layer if trial.is_layer else _check_operator)(trial, device)


def _check_operator(trial: Trial, device: torch.device) -> None:
    inputs = make_inputs(trial.case, device)
    results = _run(lambda: run(inputs), trial, device)
    try:
        judge(Results(*results.values()), inputs)
    except AssertionError:
        # Products of numbers that fp16 holds may be larger than it holds, as may the gradients of scores in between.
        exact, _ = oracle(inputs)
        largest = float(_largest_magnitudes([exact.out, exact.dq, exact.dk, exact.dv]).max())
        if trial.case.dtype == torch.float16 and largest > torch.finfo(torch.float16).max / 8:
            raise BeyondRange from None
        raise


def _largest_magnitudes(tensors: Iterable[Tensor]) -> Tensor:
    return largest_of(torch.where(t.isfinite(), t, 0.0).abs() for t in tensors)


def _run(compute: Callable[[], Results], trial: Trial, device: torch.device) -> dict[str, Tensor]:
    """Results by name, of one run, or of two that have to be equal bit by bit."""
    _poison_memory(device)
    with deterministic() if trial.is_deterministic else nullcontext():
        results = compute()
        again = compute() if trial.is_deterministic else results
    named = {f.name: getattr(results, f.name) for f in fields(results)}
    if trial.is_deterministic:
        differ = torch.stack([(_bits(t) != _bits(getattr(again, name))).any() for name, t in named.items()])
        names = ", ".join(name for name, differs in zip(named, differ.tolist()) if differs)
        assert not names, f"{names} differ between two deterministic runs"
    return named


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGER_OF_SIZE[tensor.dtype.itemsize])


def _poison_memory(device: torch.device) -> None:
    """Leaves NaN in what the allocator hands out next; on CPUs the tests' own means do."""
    if device.type == "cuda":
        blocks = [torch.full((size // 4,), torch.nan, device=device) for size in (*16 * [2**18], 2**25, 2**26)]
        del blocks


def _check_layer(trial: Trial, device: torch.device) -> None:
    """A layer that rotates and attends in place, against the same of torch's operators in fp64.

    The yardstick is the same composition in the dtype of the layer, over the operator: its roundings are as many, but
    of few numbers the largest error is a matter of luck. So errors may be four times its own, and a few units in the
    last place of the largest number; many in fp64, where what is right is rounded as often itself.
    """
    case = trial.case
    generator = torch.Generator().manual_seed(case.seed)
    dim, num_tokens = case.num_heads * case.head_dim, sum(case.sizes)
    config = {"dim": dim, "num_heads": case.num_heads, "use_rope": True, "dropout": case.dropout_p}
    layer = ma.MixedAttention({**config, "init_weights": "torch"})
    layer.proj_dropout.p = 0.0
    with torch.no_grad():
        for parameter in layer.parameters():  # tokens of variance one become queries of variance one
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * (3 / dim) ** 0.5)
    layer = layer.to(device, case.dtype)
    x, dout = (torch.randn(case.batch_size, num_tokens, dim, generator=generator) for _ in range(2))
    x, dout = (t.to(device, case.dtype) for t in (x, dout))
    freqs = torch.polar(*(torch.rand(1, num_tokens, case.head_dim // 2, generator=generator) * c for c in (2, 7)))
    freqs = freqs.to(device)
    mask = make_mask(case, num_tokens, generator)
    mask = None if mask is None else mask.to(device)

    def gradients(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Layered:
        if case.dropout_p > 0:
            torch.manual_seed(case.seed)
        tokens = x.to(dtype).requires_grad_()
        out = call(tokens)
        grads = torch.autograd.grad(out, (tokens, *layer.parameters()), dout.to(dtype), materialize_grads=True)
        return Layered(out.detach(), *grads)

    def call(tokens: Tensor) -> Tensor:
        return layer(tokens, case.specs, case.patterns, freqs=freqs, key_padding_mask=mask)

    results = _run(lambda: gradients(call, case.dtype), trial, device)
    dropout = {"dropout_p": case.dropout_p}
    composed = gradients(lambda t: _compose(layer, t, freqs, mask, case, ma.attention, **dropout), case.dtype)
    if case.dropout_p > 0:
        torch.manual_seed(case.seed)
        dropout["dropout_seed"] = ops.draw_seed(device)
    layer.double()
    exact = gradients(lambda t: _compose(layer, t, freqs, mask, case, reference.attention, **dropout), torch.float64)
    all_expected, all_composed = ([getattr(t, name) for name in results] for t in (exact, composed))
    of_all = [  # which come from the device at once
        _largest_differences(results.values(), all_expected),
        _largest_differences(all_composed, all_expected),
        _largest_magnitudes(all_expected),
    ]
    units = 1000 if case.dtype == torch.float64 else 4
    for name, (largest, allowed, size) in zip(results, torch.stack(of_all, 1).tolist()):
        bound = 4 * allowed + units * torch.finfo(case.dtype).eps * size
        assert largest <= bound, f"{name} of the layer is off by {largest:.3g}, allowed {bound:.3g}; {case}"


@dataclass
class Layered:
    """What a forward and a backward of a layer give."""

    out: Tensor
    dx: Tensor
    dqkv_weight: Tensor
    dqkv_bias: Tensor
    dproj_weight: Tensor
    dproj_bias: Tensor


def _compose(
    layer: nn.Module,
    x: Tensor,
    freqs: Tensor,
    mask: Tensor | None,
    case: Case,
    attend: Callable[..., Tensor],
    **dropout: Any,
) -> Tensor:
    """The layer's definition."""
    packed = F.linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, case.num_heads, case.head_dim))
    q, k, v = packed.unbind(2)
    pairs = ops.real_freqs(freqs, x.dtype)
    q, k = (ops.rotate_composite(t, pairs, False) for t in (q, k))
    # Without the keys that nobody reads, where the layer leaves them out: how keys lie in ranges decides which ones are
    # dropped.
    num_unread = sum(size for name, size in case.groups if name not in dict(case.with_(skip_unread_keys=True).placed))
    skips = num_unread * x.shape[0] * x.shape[2] >= LEAST_SKIPPED.get(x.device.type, 0)
    short = case.with_(skip_unread_keys=skips)
    placed = dict(short.placed)
    is_read = torch.tensor([name in placed for name, _ in case.groups]).repeat_interleave(torch.tensor(case.sizes))
    rows = is_read.nonzero()[:, 0].to(x.device)
    k, v = k[:, rows], v[:, rows]
    if mask is not None:
        mask = mask[:, rows]
    out = attend(q, k, v, short.plan, key_padding_mask=mask, **dropout)
    return F.linear(out.flatten(2), layer.proj.weight, layer.proj.bias)


def _largest_differences(got: Iterable[Tensor], expected: Iterable[Tensor]) -> Tensor:
    """Infinite where only one of them is finite."""
    differences = (torch.where(a == b, 0.0, (a.double() - b).abs()) for a, b in zip(got, expected))
    return largest_of(difference.nan_to_num(torch.inf, torch.inf) for difference in differences)


# --- Shrinking ---------------------------------------------------------------------------------------------------


def shrink(trial: Trial, fails: Callable[[Trial], bool], is_over: Callable[[], bool] = lambda: False) -> Trial:
    """The smallest trial that greedy steps lead to in a minute, each of which still fails."""
    end = time.monotonic() + 60
    found = True
    while found:
        found = False
        for smaller in _smaller(trial):
            if time.monotonic() > end or is_over():
                return trial
            if fails(smaller):
                trial, found = smaller, True
                break
    return trial


PLAIN = {
    "mask": None,
    "dropout_p": 0.0,
    "shared": "",
    "cached": "",
    "skip_unread_keys": False,
    "layout": "contiguous",
    "heavy_tails": False,
    "magnitude": 1.0,
    "spread": 0.0,
    "softmax_scale": None,
    "dlse": False,
    "head_dim_v": None,
}


def _smaller(trial: Trial) -> Iterator[Trial]:
    """What is a step simpler, the largest steps first."""
    case = trial.case
    for name in ("is_layer", "is_deterministic", "is_tf32"):
        if getattr(trial, name):
            yield replace(trial, **{name: False})
    changes: list[dict[str, Any]] = [{name: plain} for name, plain in PLAIN.items() if getattr(case, name) != plain]
    for name in ("batch_size", "num_heads", "head_dim"):
        least, value = 8 if name == "head_dim" else 1, getattr(case, name)
        steps = sorted({least, value // 2 // least * least, value - least if name != "head_dim" else least})
        changes += [{name: step} for step in steps if least <= step < value]
    for change in changes:
        yield replace(trial, case=case.with_(**change))
    patterns = [pattern.split(">") for pattern in case.attends.split()]
    yield from (replace(trial, case=smaller) for smaller in _without_a_group(case, patterns))
    for index, (queries, keys) in enumerate(patterns):
        for position in range(len(keys) if len(keys) > 1 else 0):
            shorter = [*patterns[:index], [queries, keys[:position] + keys[position + 1 :]], *patterns[index + 1 :]]
            yield replace(trial, case=case.with_(attends=" ".join(map(">".join, shorter))))
    for index, size in enumerate(case.sizes):
        steps = {0, 1, size // 2, size - 128, size - 16, size - 1}
        for step in sorted(step for step in steps if 0 <= step < size):
            yield replace(trial, case=case.with_(sizes=_replaced(case.sizes, index, step)))


def _without_a_group(case: Case, patterns: list[list[str]]) -> Iterator[Case]:
    """Cases with a group less: nobody reads it any more, or who did reads its neighbour. The others are named anew."""
    for index in reversed(range(len(case.sizes))):
        names = NAMES[:index] + NAMES[index + 1 : len(case.sizes)]
        renamed = str.maketrans(names, NAMES[: len(names)], NAMES[index])
        asking = [(queries.translate(renamed), keys) for queries, keys in patterns]
        for instead in ("", *(NAMES[i] for i in (index - 1, index + 1) if 0 <= i < len(case.sizes))):
            rest = [(queries, keys.replace(NAMES[index], instead).translate(renamed)) for queries, keys in asking]
            rest = [(queries, keys) for queries, keys in rest if queries]
            if rest and all(keys for _, keys in rest):
                yield case.with_(
                    sizes=case.sizes[:index] + case.sizes[index + 1 :],
                    attends=" ".join(map(">".join, rest)),
                    cached=case.cached.translate(renamed),
                )


# --- Searching ---------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    """A trial that fails, and a smaller one."""

    seed: int
    family: str
    error: str
    trial: str = ""
    smaller: str = ""
    smaller_error: str = ""

    def __str__(self) -> str:
        lines = [f"FAILED: seed {self.seed}, {self.family}: {self.error}", f"  {self.trial}"]
        if self.smaller:
            lines += [f"  smaller: {self.smaller_error}", f"  check({self.smaller}, device)"]
        return "\n".join(lines)


def search(
    seeds: Iterable[int],
    device: torch.device,
    counts: Counter[str],
    *,
    family: str = "",
    shrinks: bool = True,
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Failure | None]:
    """Tries one seed after the other: a failure, or None where there is none.

    Args:
        seeds: Those of the trials.
        device: Where they run.
        counts: Takes up what ran, by kind.
        family: Which kernels; for failures.
        shrinks: Whether failures are made smaller.
        is_over: Asked before each smaller trial of a failure.
    """
    for seed in seeds:
        trial = draw(seed, device.type)
        counts.update(_kinds(trial, device))
        error = error_of(trial, device)
        if isinstance(error, BeyondRange):
            counts["beyond the range of fp16"] += 1
            error = None
        failure = None
        if error is not None:
            failure = Failure(seed, family, _words(error), spell(trial))
            if shrinks and not is_over() and not _is_lost(device):
                _make_smaller(failure, trial, type(error), device, is_over)
        yield failure


def error_of(trial: Trial, device: torch.device) -> Exception | None:
    """What a trial raises, None if all is right."""
    try:
        check(trial, device)
    except Exception as error:
        return error
    return None


def _make_smaller(
    failure: Failure, trial: Trial, kind: type[Exception], device: torch.device, is_over: Callable[[], bool]
) -> None:
    smaller = shrink(trial, lambda t: type(error_of(t, device)) is kind, is_over)
    smaller_error = error_of(smaller, device)
    failure.smaller = spell(smaller)
    failure.smaller_error = "did not fail again" if smaller_error is None else _words(smaller_error)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).split('; Case(')[0]}"


def _is_lost(device: torch.device) -> bool:
    """Whether the device answers this process no more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _kinds(trial: Trial, device: torch.device) -> Iterator[str]:
    """What a trial has to be counted as."""
    case = trial.case
    yield "cases"
    yield f"style: {trial.style}"
    yield f"dtype: {'tf32' if trial.is_tf32 else str(case.dtype).removeprefix('torch.')}"
    yield f"layout: {case.layout}"
    yield f"mask: {case.mask}"
    yield f"kind: {'layer' if trial.is_layer else 'operator'}"
    yield from (name for name in ("dropout_p", "dlse", "cached", "shared", "heavy_tails") if getattr(case, name))
    if trial.is_deterministic:
        yield "deterministic"
    if device.type == "cuda":
        yield from _kinds_of_kernels(trial, device)


def _kinds_of_kernels(trial: Trial, device: torch.device) -> Iterator[str]:
    """Which family serves the passes on a GPU, and whether it cuts their work."""
    case = trial.case
    # What the shapes allow, these still rule out: see hopper::refusal_of_fwd.
    is_refused = (
        case.scale <= 0
        or case.dropout_p > 0
        or case.layout in ("strided", "offset")
        or (case.dtype == torch.float32 and case.mask is not None)
    )
    widths = {"head_dim": case.head_dim, "head_dim_v": case.head_dim_v}
    for backward in (False, True):
        family, _ = ops.cuda_kernel(case.dtype, device=device, backward=backward, **widths)
        name = "backward" if backward else "forward"
        if family == "hopper" and is_refused:
            yield f"{name}: portable"
            continue
        if family == "none" or 0 in (case.batch_size, case.num_heads, case.plan.num_queries, case.plan.num_keys):
            yield f"{name}: {family}"
            continue
        shape = {"batch_size": case.batch_size, "num_heads": case.num_heads, **widths}
        launch = ops.cuda_launch(case.plan, **shape, dtype=case.dtype, device=device, backward=backward)
        yield f"{name}: {launch.family}"
        if launch.num_splits > 1:
            yield f"{name}: {launch.family}, in parts"


# --- Processes ---------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """The seeds that one process tries."""

    family: str
    seeds: range
    process: Any = None
    at: Any = None  # how many it has begun
    seen: tuple[int, float] = (0, 0.0)  # how many it had begun, and since when


def _work(share: tuple[str, range], at: Any, results: Any, device_name: str, end: Any, shrinks: bool) -> None:
    family, seeds = share
    device = torch.device(device_name)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    parent = os.getppid()
    said = time.time()

    def is_over() -> bool:
        return os.getppid() != parent or time.time() > end.value

    def begun() -> Iterator[int]:
        for seed in seeds:
            if is_over():
                return
            at.value += 1
            yield seed

    for failure in search(begun(), device, counts, family=family, shrinks=shrinks, is_over=is_over):
        if failure is not None or time.time() > said + 1:
            results.put((dict(counts), failure))
            counts.clear()
            said = time.time()
        if failure is not None and _is_lost(device):
            results.close()
            results.join_thread()
            os._exit(0)  # the rest is another process's
    results.put((dict(counts), None))


def main() -> int:
    """Runs what the command line asks for; returns the exit status."""
    arguments = _parse()
    device = torch.device(arguments.device)
    if arguments.replay is not None:
        return _replay(arguments.replay, device)
    counts, failures, unfinished = _run_processes(arguments)
    seconds = time.time() - BEGIN
    summary = ", ".join(f"{kind} {counts[kind]}" for kind in sorted(counts) if kind != "cases")
    print(f"{counts['cases']} cases in {seconds:.0f} s, {len(failures)} failures; {summary}", flush=True)
    if arguments.out:
        report = {
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "build": ops.describe_build().rpartition(", ")[0],
            "seconds": round(seconds, 1),
            "counts": dict(sorted(counts.items())),
            "failures": [asdict(failure) for failure in failures],
            "unfinished": unfinished,
        }
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failures else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("-n", type=int, default=1000, help="cases")
    parser.add_argument("--seconds", type=float, help="stop then, start included; what runs longer by 5 s is ended")
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow one by one")
    parser.add_argument("-j", type=int, default=1, help="processes")
    parser.add_argument("--families", help="of kernels, by turns: hopper,portable or native,AVX2,portable ...")
    parser.add_argument("--replay", type=int, metavar="SEED", help="print, run and shrink this one")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--max-failures", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a case is said to hang")
    parser.add_argument("--out", help="a JSON file for what ran and failed")
    return parser.parse_args()


def _replay(seed: int, device: torch.device) -> int:
    trial = draw(seed, device.type)
    print(spell(trial), flush=True)
    (failure,) = search([seed], device, Counter())
    print(failure or "passed")
    return failure is not None


def _run_processes(arguments: argparse.Namespace) -> tuple[Counter[str], list[Failure], list[int]]:
    """Tries all seeds in processes, begins anew behind those that end them, and stops those that hang.

    Over it is when the time is, when failures are enough, or at a signal. Then processes may finish what they compute.

    Returns:
        What ran, by kind; failures; and seeds that were not done when it was over.
    """
    context = multiprocessing.get_context("spawn")
    families = (arguments.families or ("hopper" if arguments.device == "cuda" else "native")).split(",")
    num_shares = max(arguments.j // len(families), 1) * len(families)
    end = context.Value("d", math.inf if arguments.seconds is None else BEGIN + arguments.seconds)
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    waiting = [Share(families[i % len(families)], seeds[i::num_shares]) for i in range(num_shares)]
    running: list[Share] = []
    results = context.Queue()
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    said = time.time()

    def collect(seconds: float) -> None:
        until = time.time() + seconds
        try:
            while (left := until - time.time()) > 0:
                more, failure = results.get(timeout=left)
                counts.update(more)
                if failure is not None:
                    failures.append(failure)
                    print(failure, flush=True)
        except queue.Empty:
            pass

    def stop(*_: Any) -> None:
        end.value = min(end.value, time.time())

    before = [(number, signal.signal(number, stop)) for number in STOPS]
    try:
        while (running or (waiting and time.time() < end.value)) and time.time() < end.value + GRACE:
            while waiting and len(running) < arguments.j and time.time() < end.value:
                share = waiting.pop(0)
                if share.seeds:
                    _start(share, context, results, arguments, end)
                    running.append(share)
            collect(0.5)
            for share in list(running):
                error = end_of(share, arguments.timeout)
                if error is None:
                    continue
                running.remove(share)
                num_begun = share.at.value
                if error:
                    seed = share.seeds[max(num_begun - 1, 0)]
                    trial = spell(draw(seed, arguments.device))
                    failures.append(Failure(seed, share.family, f"the process {error}", trial))
                    print(failures[-1], flush=True)
                if num_begun < len(share.seeds):
                    waiting.append(Share(share.family, share.seeds[max(num_begun, 1) :]))
            if len(failures) >= arguments.max_failures:
                stop()
            if time.time() > said + 60:
                said = time.time()
                print(f"{counts['cases']} cases, {len(failures)} failures", file=sys.stderr, flush=True)
    finally:
        for share in running:
            share.process.kill()
        for number, handler in before:
            signal.signal(number, handler)
    collect(0.5)
    unfinished = [share.seeds[share.at.value - 1] for share in running if share.at.value]
    if unfinished:
        print(f"not done when it was over: seeds {', '.join(map(str, unfinished))}", flush=True)
    return counts, failures, unfinished


def _start(share: Share, context: Any, results: Any, arguments: argparse.Namespace, end: Any) -> None:
    variable = VARIABLE_OF[arguments.device]
    before = os.environ.pop(variable, None)
    if share.family not in BY_ITSELF:
        os.environ[variable] = share.family
    share.at = context.Value("q", 0)
    share.seen = 0, time.time()
    work = (share.family, share.seeds), share.at, results, arguments.device, end, not arguments.no_shrink
    share.process = context.Process(target=_work, args=work, daemon=True)
    # A terminal and `timeout` send these to all processes, which the parent then tells that it is over.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # as a new process inherits it
    share.process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.environ.pop(variable, None)
    if before is not None:
        os.environ[variable] = before


def end_of(share: Share, timeout: float) -> str | None:
    """None while a process works, empty if it is done, or what became of it."""
    if share.process.exitcode is not None:
        return "" if share.process.exitcode == 0 else f"ended with exit code {share.process.exitcode}"
    if share.at.value != share.seen[0]:
        share.seen = share.at.value, time.time()
    elif time.time() > share.seen[1] + timeout:
        share.process.kill()
        return f"hung for {timeout:.0f} s"
    return None


if __name__ == "__main__":
    sys.exit(main())
