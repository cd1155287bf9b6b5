"""Where the GPU's time of a training step goes: its kernels by what they are for, and the time without any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench import layer
from bench.cases import Case
from bench.operator import CALLS_A_SAMPLE
from bench.rows import Row, absent_row, dtype_of, in_precision, timing_row
from bench.timing import Calls, take_turns

CASES = ("abupt-self", "shapenet-self", "anchor+query")
"""The cases of the suite whose layer is looked into unless others are asked for."""

FORWARD, BACKWARD = "attention forward", "attention backward"
# The first pattern that is found in a kernel's name decides: attention kernels of others have cutlass in theirs.
BUCKETS = (
    (BACKWARD, r"_bwd_|dk_dv|_dq_|portable_sum|flash_?\w*bwd|bprop|fmha_cutlassB|dot_do_o|convert_dq|flex_\w*backward"),
    (FORWARD, r"attention_(fwd|jvp)|portable_(fwd|jvp)|attention_combine|flash_?\w*fwd|fprop|fmha|sdpa|flex_attention"),
    ("rotation", r"rope_\w*kernel|complex|conj_|polar_|rotary"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk"),
    (
        "casts, copies, elementwise",
        r"elementwise|cast_kernel|column_sums|reduce|copy|fill|catarray|memset|memcpy|index|gather|scatter|norm|gamma_?beta|softmax|triton_",
    ),
)
OTHER = "other"
# Kernels of both passes that make ready what the next kernel of attention reads.
BEFORE_ATTENTION = re.compile(r"mixed_attention.*(upload|half_limbs|mask)_kernel")
NAMES = (*(name for name, _ in BUCKETS), OTHER)


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the GPU; times in microseconds."""

    name: str
    start: float
    end: float


def measure(
    case: Case, device: torch.device, precision: str, wanted: Sequence[str] | None, rounds: int
) -> Iterator[Row]:
    """A training step of our layer, and of upstream's where that is installed."""
    with in_precision(precision):
        step = layer.make_step(case, device, dtype_of(precision))
        modules = layer.make_layers(case, device, wanted or ["noether"], compiled=False)
        calls = {
            name: partial(step.training, module)
            for name, module in modules.items()
            if not isinstance(module, layer.WithoutSkip)
        }
        yield from rows(case.name, calls, device, precision, rounds)


def rows(
    case: str, calls: Mapping[str, Callable[[], object]], device: torch.device, precision: str, rounds: int
) -> Iterator[Row]:
    """What the GPU's time of a training step goes to, by name of a call: milliseconds of every bucket, and idle ones.

    The whole time is measured without the profiler, which takes time of the host for every launch.
    """
    samples = {name: Calls(partial(_repeat, call), CALLS_A_SAMPLE) for name, call in calls.items()}
    for name, timing in take_turns(samples, device, rounds).items():
        facts = {"pass": layer.TRAINING}
        try:
            found = kernels(samples[name].run)
        except Exception as error:  # whatever a profiler raises
            yield absent_row(case, name, precision, error, **facts)
        else:
            buckets = {bucket: _milliseconds(time) for bucket, time in by_bucket(found).items()}
            buckets["idle"] = max(0.0, timing.median - _milliseconds(busy(found)))
            yield timing_row("timeline", case, name, timing, dtype=precision, **facts, buckets=buckets)


def _milliseconds(microseconds: float) -> float:
    """The time of one call of a sample."""
    return microseconds / CALLS_A_SAMPLE / 1e3


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS_A_SAMPLE):
        call()


def kernels(run: Callable[[], object]) -> list[Kernel]:
    """What a call does on the GPU, in the order in which it begins."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_gpu = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    found = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in on_gpu]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(found, key=lambda kernel: kernel.start)


def by_bucket(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Microseconds of each bucket.

    What two kernels share counts for the one that began first: a kernel may be there already, and wait, while the one
    before it ends.
    """
    times = dict.fromkeys(NAMES, 0.0)
    attention = FORWARD
    for kernel, time in reversed(list(zip(kernels, _own_times(kernels)))):
        bucket = attention if BEFORE_ATTENTION.search(kernel.name) else bucket_of(kernel.name)
        if bucket in (FORWARD, BACKWARD):
            attention = bucket
        times[bucket] += time
    return times


def bucket_of(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((bucket for bucket, pattern in BUCKETS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel runs; these are given in the order in which they begin."""
    return sum(_own_times(kernels))


def _own_times(kernels: Iterable[Kernel]) -> Iterator[float]:
    """The microseconds of each kernel in which no earlier one runs, in the order in which they begin."""
    until = float("-inf")
    for kernel in kernels:
        yield max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
