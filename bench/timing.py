"""Fair timing on a machine that is not ours alone: everything takes turns, and medians are compared."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of all rounds and the quartiles beside it."""

    median: float
    lower: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Calls:
    """What one sample times: some calls in a row.

    Attributes:
        run: Makes all the calls.
        count: How many these are.
        within: Entered around a sample, outside the time: settings that a user would make once, not in every call.
    """

    run: Callable[[], object]
    count: int = 1
    within: Callable[[], AbstractContextManager[object]] = nullcontext


class Clock:
    """Times on a device: CUDA events there, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def milliseconds(self, calls: Calls) -> float:
        """The time of one call, on average over a sample. On a GPU that is of host and device, whichever is slower."""
        with calls.within():
            return (self._of_gpu if self.is_cuda else self.of_host)(calls.run) / calls.count

    @staticmethod
    def of_host(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    @staticmethod
    def _of_gpu(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # what came before has left the device at a clock of its own: cooler and faster, or held by power
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def take_turns(calls: Mapping[Key, Calls], device: torch.device, rounds: int) -> dict[Key, Timing]:
    """Times every entry once a round, in turns, so that a slow moment of the machine strikes all alike.

    Args:
        calls: What to time, by name. Each runs twice before, so that compilation and first allocations stay out.
        device: Where it runs.
        rounds: Number of rounds.
    """
    clock = Clock(device)
    for each in calls.values():
        with each.within():
            each.run(), each.run()
    return _rounds(calls, rounds, clock.milliseconds)


def host_turns(calls: Mapping[Key, Calls], device: torch.device, rounds: int) -> dict[Key, Timing]:
    """The same of how long the host is busy with a call; on a GPU the work itself runs on meanwhile.

    Args:
        calls: What to time, by name; so few calls in a sample that the queue of launches never fills.
        device: Where it runs. It is idle when a sample begins.
        rounds: Number of rounds.
    """

    def milliseconds(each: Calls) -> float:
        synchronize(device)
        return Clock.of_host(each.run) / each.count

    for each in calls.values():
        each.run(), each.run()
    timings = _rounds(calls, rounds, milliseconds)
    synchronize(device)
    return timings


def _rounds(calls: Mapping[Key, Calls], rounds: int, milliseconds: Callable[[Calls], float]) -> dict[Key, Timing]:
    """Takes a sample of every entry once a round, while Python collects no garbage."""
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, each in calls.items():
                samples[name].append(milliseconds(each))
    finally:
        gc.enable()
    return {name: summary(values) for name, values in samples.items()}


def summary(values: list[float]) -> Timing:
    """Median and quartiles of some samples."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def host_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """How long the host is busy with one call; on a GPU the work itself runs on meanwhile."""
    calls, samples = 8, []  # few enough that the queue of launches never fills and holds up the host
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append(1e6 * (time.perf_counter() - start) / calls)
    synchronize(device)
    return statistics.median(samples)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to be done; a CPU always is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphed(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Some calls as the replay of a CUDA graph: the GPU's time without the host's.

    Args:
        make: Returns what is to be captured. Runs on the stream of the capture, because a backward runs where its
            forward did.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        run(), run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        run()

    def replay(run: Callable[[], object] = run) -> None:  # which holds the tensors that the graph reads
        captured.replay()

    return replay
