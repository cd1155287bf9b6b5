"""What the host and each stream of a GPU do in a step over ranks, under torchrun.

    torchrun --nproc-per-node 2 -m bench.streams --out DIRECTORY

For each call: how long the host is busy with it, how long it takes, and how long as the replay of a CUDA graph, which
has no host. Then rank 0 lists its kernels, stream by stream, with the gap before each and when the host launched it,
and the operators that its host takes longest for.
"""

from __future__ import annotations

import argparse
import bisect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.profiler import ProfilerActivity, profile

import mixed_attention as ma
from bench.cases import Case
from bench.distributed import Call, Ranks, _cases, _layer_step, _make_layer, _operator, _operator_over
from bench.timing import graphed, host_microseconds

LEAST_GAP = 10.0
"""Microseconds without a kernel that are worth a line."""


@dataclass(frozen=True)
class Launched:
    """A kernel, copy or fill on the GPU; microseconds, of the host's call as well."""

    name: str
    stream: int
    start: float
    end: float
    launched: float


def calls_of(ranks: Ranks, case: Case) -> dict[str, Call]:
    """The operator and the layer, of one process and over ranks."""
    specs = ma.distributed.shard_specs(case.specs, ranks.mesh)
    plain, marked = _make_layer(case, ranks.device), _make_layer(case, ranks.device)
    parallelize_module(marked, ranks.mesh, ma.distributed.ContextParallel())
    half = [ma.TokenSpec(spec.name, spec.size) for spec in specs]
    return {
        "operator, one": _operator(case, ranks.device),
        "operator, ranks": _operator_over(ranks, case),
        "layer, one": _layer_step(plain, case, case.specs, ranks.device),
        "layer, one, tokens of a rank alone": _layer_step(plain, case, half, ranks.device),
        "layer, one, tokens of a rank alone, forward": _forward(plain, case, half, ranks.device),
        "layer, ranks": _layer_step(marked, case, specs, ranks.device),
        "layer, ranks, forward": _forward(marked, case, specs, ranks.device),
    }


def _forward(layer: nn.Module, case: Case, specs: Any, device: torch.device) -> Call:
    count = sum(spec.size for spec in specs)
    x = torch.randn(case.batch_size, count, case.dim, device=device, dtype=torch.bfloat16).requires_grad_()
    freqs = ma.RopeFrequency(case.head_dim, 3).to(device)(100 * torch.rand(1, count, 3, device=device))
    return lambda: layer(x, specs, case.attention_patterns, freqs=freqs)


def trace_of(run: Call, count: int) -> tuple[list[dict[str, Any]], Any]:
    """The events of some calls in a row, as the profiler writes them, and its averages."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        for _ in range(count):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"], found.key_averages()


def kernels_of(events: Sequence[Mapping[str, Any]]) -> list[Launched]:
    """What ran on the GPU, in the order in which it began."""
    calls = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = [
        Launched(
            event["name"],
            event["args"].get("stream", 0),
            event["ts"],
            event["ts"] + event["dur"],
            calls.get(event["args"].get("correlation"), float("nan")),
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def lines_of(kernels: Sequence[Launched], begin: float, end: float) -> Iterator[str]:
    """The kernels that begin within a time, stream by stream; times are since it began."""
    within = [kernel for kernel in kernels if begin <= kernel.start < end]
    for stream in sorted({kernel.stream for kernel in within}):
        own = [kernel for kernel in within if kernel.stream == stream]
        busy = sum(kernel.end - kernel.start for kernel in own)
        yield f"  stream {stream}: {len(own)} kernels, {busy:.0f} us of them"
        yield f"  {'begins':>8}{'takes':>8}{'gap':>8}{'launched':>10}  name"
        before = begin
        for kernel in own:
            gap = kernel.start - before
            shown = f"{gap:8.0f}" if gap > LEAST_GAP else " " * 8
            times = f"{kernel.start - begin:8.0f}{kernel.end - kernel.start:8.1f}{shown}{kernel.launched - begin:10.0f}"
            yield f"  {times}  {_short(kernel.name)}{_overlap(kernel, within)}"
            before = max(before, kernel.end)


def _overlap(kernel: Launched, others: Sequence[Launched]) -> str:
    """With what of the other streams a collective shares its time."""
    if "nccl" not in kernel.name.lower():
        return ""
    shared: dict[str, float] = {}
    for other in others:
        time = min(kernel.end, other.end) - max(kernel.start, other.start)
        if other.stream != kernel.stream and time > 1:
            shared[_short(other.name)[:40]] = shared.get(_short(other.name)[:40], 0.0) + time
    return "  beside " + ("; ".join(f"{name} {time:.0f} us" for name, time in shared.items()) or "nothing")


def _short(name: str) -> str:
    for word in ("void ", "at::native::", "(anonymous namespace)::", "mixed_attention::", "c10::"):
        name = name.replace(word, "")
    return name[:110]


def host_lines(averages: Any, count: int, most: int = 40) -> Iterator[str]:
    """The operators that the host takes longest for, per call."""
    for event in sorted(averages, key=lambda event: -event.self_cpu_time_total)[:most]:
        yield f"  {event.self_cpu_time_total / count:9.1f} us {event.count / count:6.1f} x  {event.key[:90]}"


def show(ranks: Ranks, name: str, call: Call, count: int = 4) -> Iterator[str]:
    """All that is known of one call; every rank takes part."""
    for _ in range(5):
        call()
    host = ranks.slowest(host_microseconds(call, ranks.device))
    took = ranks.milliseconds({name: call}, 9, count=8)[name]
    replayed = float("nan")
    if ranks.device.type == "cuda":
        try:
            replayed = ranks.milliseconds({name: graphed(lambda: call)}, 9, count=8)[name]
        except RuntimeError as error:  # of capture, the same on all ranks
            yield f"\nno graph of {name}: {error}"
    yield f"\n== {name}: host {host:.0f} us, takes {1e3 * took:.0f} us, as a graph {1e3 * replayed:.0f} us"
    dist.barrier()
    events, averages = trace_of(call, count)
    kernels = kernels_of(events)
    # One call in the middle: its kernels are those launched between two of the host's marks, which are equal parts.
    if kernels:
        share = len(kernels) // count
        launched = sorted(kernels, key=lambda kernel: kernel.launched)
        own = launched[share * (count - 2) : share * (count - 1)]
        starts = sorted(kernel.start for kernel in own)
        last = kernels[bisect.bisect_left([kernel.start for kernel in kernels], starts[-1])]
        yield f"  {len(kernels) / count:.1f} kernels a call; the last but one call:"
        yield from lines_of(own, starts[0], last.start + 1)
    yield "  host, under the profiler, self time a call:"
    yield from host_lines(averages, count)


def main() -> None:
    """Prints what rank 0 sees, and writes it to a file."""
    parser = argparse.ArgumentParser("torchrun --nproc-per-node N -m bench.streams", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the text")
    parser.add_argument("--case", default="abupt-self")
    parser.add_argument("--what", nargs="+", help="names of calls; all without")
    parser.add_argument("--scale", type=int, default=1, help="divides numbers of tokens, to try this out")
    options = parser.parse_args()
    ranks = Ranks()
    lines: list[str] = []
    calls = calls_of(ranks, _cases(options)[options.case])
    for name in options.what or calls:
        for line in show(ranks, name, calls[name]):
            lines.append(line)
            if ranks.rank == 0:
                print(line, flush=True)
    if options.out and ranks.rank == 0:
        (options.out / f"streams-{options.case}.txt").write_text("\n".join(lines) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
