"""Fair timing on a machine that is not ours alone: everything takes turns, and medians are compared."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of all rounds and the quartiles beside it."""

    median: float
    lower: float
    upper: float
    rounds: int


class Clock:
    """Times one call at a time on a device: CUDA events with the L2 cache flushed before, or the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def milliseconds(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def take_turns(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times every call once a round, in turns, so that a slow moment of the machine strikes all alike.

    Args:
        calls: What to time, by name. Each is called twice before, so that compilation and first allocations stay out.
        device: Where it runs.
        rounds: Number of rounds.
    """
    clock = Clock(device)
    for call in calls.values():
        call(), call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(clock.milliseconds(call))
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Median and quartiles of some samples."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def graph(call: Callable[[], object]) -> Callable[[], object]:
    """The same call as the replay of a CUDA graph: the GPU's time without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(), call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        call()
    return captured.replay
