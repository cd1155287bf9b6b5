"""Several ranks against one, under torchrun.

    torchrun --nproc-per-node 2 -m bench.distributed --out DIRECTORY

Every rank measures; of each sample the slowest rank counts, of all samples the median. What is compared takes turns.
Numbers of one rank are taken on all of them at once, so that the machine is as busy as with many.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma
from bench import facts, files
from bench.cases import GPU_SUITE, Case, _case
from bench.timing import Calls, Clock, host_turns

Row = dict[str, Any]
Call = Callable[[], object]

LARGE = (
    _case("self-128k", 1, 3, 64, {"sa": 131072, "va": 131072}, "sa->sa; va->va"),
    _case("self-2k", 1, 3, 64, {"sa": 2048, "va": 2048}, "sa->sa; va->va"),
)
STRONG = ("abupt-self", "abupt-joint", "anchor+query", "d128-h8", "self-128k")
GOALS = {
    "one marked / plain": 0.99,
    "strong abupt-self": 0.85,
    "strong abupt-joint": 0.90,
    "strong anchor+query": 0.87,
    "strong d128-h8": 0.87,
    "strong self-128k": 0.97,
    "layer abupt-self": 0.82,
    "weak anchor+query": 0.92,
    "weak 1M queries": 0.98,
    "stream": 0.98,
    "ddp": 0.95,
    "ddp deterministic": 0.93,
    "torch context_parallel / ours": 1.7,
}
"""What two GPUs of one host are meant to reach, of the efficiencies below."""


class Ranks:
    """The processes of the run.

    Attributes:
        device: Where this one computes.
        mesh: All of them.
        alone: This one.
    """

    def __init__(self) -> None:
        is_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
        if is_cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            timeout=datetime.timedelta(minutes=5),
            device_id=self.device if is_cuda else None,
        )
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.mesh = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("tokens",))
        grid = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("others", "tokens"))
        self.alone = grid["tokens"]

    def slowest(self, number: float) -> float:
        """The largest of a number of all ranks."""
        found = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=dist.group.WORLD)
        return found.item()

    def milliseconds(self, calls: Mapping[str, Call], rounds: int, count: int = 1) -> dict[str, float]:
        """Medians of what a call of each takes on the slowest rank, ``count`` calls a sample."""
        clock = Clock(self.device)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call(), call()
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for name, call in calls.items():
                    dist.barrier()
                    found = clock.milliseconds(Calls(partial(_repeat, call, count), count))
                    samples[name].append(self.slowest(found))
        finally:
            gc.enable()
        return {name: statistics.median(values) for name, values in samples.items()}


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def main() -> None:
    """Runs what is asked for, writes a file, and prints its table last."""
    kinds = {
        "one": one_rank,
        "strong": strong,
        "layer": layers,
        "weak": weak,
        "stream": streams,
        "ddp": data_parallel,
        "peers": peers,
        "errors": errors,
    }
    parser = argparse.ArgumentParser("torchrun --nproc-per-node N -m bench.distributed", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--what", nargs="+", choices=list(kinds), default=list(kinds))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=int, default=1, help="divides numbers of tokens, to try this out")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args()
    ranks = Ranks()
    result = facts.of_run("bench.distributed", ranks.device, options.commit)
    result["ranks"] = ranks.size
    for kind in options.what:
        for row in kinds[kind](ranks, options):
            result["rows"].append({"kind": kind, **row})
            if ranks.rank == 0:
                print(_line(result["rows"][-1]), flush=True)
                files.save(result, options.out / f"distributed-{ranks.size}.json")
        gc.collect()
    dist.barrier()
    if ranks.rank == 0:
        print(f"\nwritten to {options.out / f'distributed-{ranks.size}.json'}\n\n{table(result)}", flush=True)
    dist.destroy_process_group()


def _line(row: Row) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def table(result: files.Result) -> str:
    """What was reached beside what two GPUs are meant to reach."""
    lines = [f"{'case':<32}{'one, ms':>10}{'ranks, ms':>11}{'reached':>9}{'goal':>7}"]
    for row in result["rows"]:
        one, many = (f"{row[name]:.3f}" if name in row else "" for name in ("one", "many"))
        goal = GOALS.get(row["case"])
        lines.append(f"{row['case']:<32}{one:>10}{many:>11}{row['reached']:>9.3f}{'' if goal is None else goal:>7}")
    return "\n".join(lines)


def _cases(options: argparse.Namespace) -> dict[str, Case]:
    suite = (*GPU_SUITE, *LARGE)
    if options.scale == 1:
        return {case.name: case for case in suite}
    shrunk = {}
    for case in suite:
        groups = {name: max(1, size // options.scale) for name, size in case.groups.items()}
        shrunk[case.name] = Case(case.name, case.batch_size, case.num_heads, case.head_dim, groups, case.patterns)
    return shrunk


# ------------------------------------------------------------------------------------------ steps


def _backward(out: Tensor, leaves: list[Tensor], direction: Tensor) -> None:
    torch.autograd.grad(out, leaves, direction)


def _operator(case: Case, device: torch.device) -> Call:
    """Forward and backward of the operator in one process."""
    shape = (3, case.batch_size, case.num_tokens, case.num_heads, case.head_dim)
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind(0)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    direction = torch.randn_like(q)
    return lambda: _backward(ma.attention(*leaves, case.plan), leaves, direction)


def _operator_over(ranks: Ranks, case: Case) -> Call:
    """The same over ranks: keys are gathered, queries stay."""
    specs = ma.distributed.shard_specs(case.specs, ranks.mesh)
    plan = ma.AttentionPlan.compile(specs, case.attention_patterns, skip_unread_keys=True)
    count = sum(spec.size for spec in specs)
    shape = (3, case.batch_size, count, case.num_heads, case.head_dim)
    leaves = [t.clone().requires_grad_() for t in torch.randn(shape, device=ranks.device, dtype=torch.bfloat16)]
    direction = torch.randn_like(leaves[0])

    def step() -> None:
        keys = ma.distributed.gather_keys(*leaves[1:], specs, ranks.mesh, plan=plan)
        _backward(ma.attention(leaves[0], *keys, plan), leaves, direction)

    return step


def _make_layer(case: Case, device: torch.device) -> ma.MixedAttention:
    torch.manual_seed(0)
    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True))
    return layer.to(device, torch.bfloat16)


def _layer_step(layer: nn.Module, case: Case, specs: Any, device: torch.device) -> Call:
    count = sum(spec.size for spec in specs)
    x = torch.randn(case.batch_size, count, case.dim, device=device, dtype=torch.bfloat16).requires_grad_()
    freqs = ma.RopeFrequency(case.head_dim, 3).to(device)(100 * torch.rand(1, count, 3, device=device))
    direction = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    return lambda: _backward(layer(x, specs, case.attention_patterns, freqs=freqs), leaves, direction)


# ------------------------------------------------------------------------------------------ measurements


def one_rank(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """A layer that was marked for a mesh of one rank against one that was not."""
    for name in ("abupt-self", "self-2k"):
        case = _cases(options)[name]
        plain, marked = _make_layer(case, ranks.device), _make_layer(case, ranks.device)
        parallelize_module(marked, ranks.alone, ma.distributed.ContextParallel())
        calls = {
            "plain": _layer_step(plain, case, case.specs, ranks.device),
            "marked": _layer_step(marked, case, case.specs, ranks.device),
        }
        found = ranks.milliseconds(calls, options.rounds, count=4)
        turns = host_turns(
            {key: Calls(partial(_repeat, call, 8), 8) for key, call in calls.items()}, ranks.device, options.rounds
        )
        host = {key: ranks.slowest(1e3 * timing.median) for key, timing in turns.items()}
        title = "one marked / plain" + ("" if name == "abupt-self" else f" {name}")
        yield {
            "case": title,
            "one": found["plain"],
            "many": found["marked"],
            "reached": found["plain"] / found["marked"],
            "host_us_more": host["marked"] - host["plain"],
        }


def strong(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """One problem on one rank, and shared by all: time of one over that of all times their number."""
    for name in STRONG:
        case = _cases(options)[name]
        calls = {"one": _operator(case, ranks.device), "many": _operator_over(ranks, case)}
        found = ranks.milliseconds(calls, options.rounds, count=1 if name == "self-128k" else 4)
        yield {"case": f"strong {name}", **found, "reached": found["one"] / (ranks.size * found["many"])}


def layers(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """Whole layers with projections and RoPE; sizes known, promised, asked for."""
    case = _cases(options)["abupt-self"]
    specs = ma.distributed.shard_specs(case.specs, ranks.mesh)
    here = [ma.TokenSpec(spec.name, spec.size) for spec in specs]
    calls = {"one": _layer_step(_make_layer(case, ranks.device), case, case.specs, ranks.device)}
    ways = {"": (specs, {}), " promised": (here, {"even": True}), " asked": (here, {})}
    for way, (given, how) in ways.items():
        layer = _make_layer(case, ranks.device)
        parallelize_module(layer, ranks.mesh, ma.distributed.ContextParallel(**how))
        calls[way] = _layer_step(layer, case, given, ranks.device)
    found = ranks.milliseconds(calls, options.rounds, count=4)
    for way in ways:
        yield {
            "case": f"layer abupt-self{way}",
            "one": found["one"],
            "many": found[way],
            "reached": found["one"] / (ranks.size * found[way]),
        }


def weak(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """As many anchors on any number of ranks, queries in proportion to it: time of one over that of all."""
    for name, anchors, queries in (("anchor+query", 8192, 24000), ("1M queries", 8192, 500_000)):
        anchors, queries = anchors // options.scale, queries // options.scale

        def make(times: int, anchors: int = anchors, queries: int = queries, name: str = name) -> Case:
            groups = {"sa": anchors, "sq": times * queries, "va": anchors, "vq": times * queries}
            return _case(name, 1, 3, 64, groups, "sa+sq->sa; va+vq->va")

        calls = {"one": _operator(make(1), ranks.device), "many": _operator_over(ranks, make(ranks.size))}
        found = ranks.milliseconds(calls, options.rounds, count=1)
        # Anchors ask, too, and there are as many of them on any number of ranks: count pairs, not tokens.
        pairs = make(ranks.size).plan.num_pairs() / make(1).plan.num_pairs()
        yield {"case": f"weak {name}", **found, "reached": found["one"] * pairs / (ranks.size * found["many"])}


def streams(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """Ten million queries past a gathered cache, on one rank and shared by all."""
    case = _cases(options)["anchor+query"]
    layer = _make_layer(case, ranks.device).eval()
    marked = _make_layer(case, ranks.device).eval()
    parallelize_module(marked, ranks.mesh, ma.distributed.ContextParallel())
    anchors = [spec for spec in case.specs if spec.name.endswith("a")]
    pattern = [ma.AttentionPattern([spec.name for spec in anchors], [spec.name for spec in anchors])]
    specs = ma.distributed.shard_specs(anchors, ranks.mesh)
    rope = ma.RopeFrequency(case.head_dim, 3).to(ranks.device)
    total = sum(spec.size for spec in anchors)
    x = torch.randn(1, total, case.dim, device=ranks.device, dtype=torch.bfloat16)
    freqs = rope(100 * torch.rand(1, total, 3, device=ranks.device))
    marked.cached_groups = layer.cached_groups = frozenset(spec.name for spec in anchors)
    x_here, freqs_here = (ma.distributed.shard(t, specs, mesh=ranks.mesh) for t in (x, freqs))
    with torch.no_grad():
        _, shards = marked(x_here, specs, pattern, freqs=freqs_here, return_kv_cache=True)
        cache = ma.distributed.gather_cache(shards, mesh=ranks.mesh)
    count = 10_000_000 // options.scale
    queries = torch.randn(1, count, case.dim, device=ranks.device, dtype=torch.bfloat16)
    positions = 100 * torch.rand(1, count, 3, device=ranks.device)
    cached = [ma.TokenSpec(spec.name, None) for spec in anchors]
    reads = [ma.AttentionPattern(["q", *(spec.name for spec in anchors)], [spec.name for spec in anchors])]

    def predict(who: nn.Module, chunk: dict[str, Tensor]) -> Tensor:
        groups = [*cached, ma.TokenSpec("q", chunk["x"].shape[1])]
        return who(chunk["x"], groups, reads, freqs=rope(chunk["at"]), kv_cache=cache)

    def stream(who: nn.Module, rows: slice) -> None:
        tokens = {"x": queries[:, rows], "at": positions[:, rows]}
        ma.stream(partial(predict, who), tokens, chunk_size=2**18, output_device=None)

    calls = {
        "one": partial(stream, layer, slice(None)),
        "many": partial(stream, marked, ma.distributed.share_of(count, ranks.mesh)),
    }
    found = ranks.milliseconds(calls, max(3, options.rounds // 4))
    yield {"case": "stream", **found, "reached": found["one"] / (ranks.size * found["many"])}


class _Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        config = ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True)
        self.norm1, self.norm2 = nn.LayerNorm(case.dim), nn.LayerNorm(case.dim)
        self.attention = ma.MixedAttention(config)
        self.mlp = nn.Sequential(nn.Linear(case.dim, 4 * case.dim), nn.GELU(), nn.Linear(4 * case.dim, case.dim))
        self.case = case

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), self.case.specs, self.case.attention_patterns, freqs=freqs)
        return x + self.mlp(self.norm2(x))


class _Model(nn.Module):
    def __init__(self, case: Case, num_blocks: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(case) for _ in range(num_blocks))

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, freqs)
        return x


def data_parallel(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """A training step of twelve blocks under autocast, samples over ranks: alone over with gradients averaged."""
    case = _cases(options)["abupt-self"]
    x = torch.randn(1, case.num_tokens, case.dim, device=ranks.device)
    freqs = ma.RopeFrequency(case.head_dim, 3).to(ranks.device)(
        100 * torch.rand(1, case.num_tokens, 3, device=ranks.device)
    )

    def make(wrap: Callable[[nn.Module], nn.Module]) -> Call:
        torch.manual_seed(0)
        model = wrap(_Model(case).to(ranks.device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(ranks.device.type, torch.bfloat16):
                loss = model(x, freqs).square().mean()
            loss.backward()
            optimizer.step()

        return step

    calls = {"one": make(lambda model: model), "many": make(nn.parallel.DistributedDataParallel)}
    for name, deterministic in (("ddp", False), ("ddp deterministic", True)):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found = ranks.milliseconds(calls, options.rounds)
        finally:
            torch.use_deterministic_algorithms(False)
        yield {"case": name, **found, "reached": found["one"] / found["many"]}


def peers(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """Dense attention of 32 thousand tokens in torch's own context parallelism, flash kernels and all-gather."""
    if ranks.device.type != "cuda":
        return
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method

    num_tokens = 32768 // options.scale
    case = _case("dense-32k", 1, 3, 64, {"x": num_tokens}, "x->x")
    share = num_tokens // ranks.size
    shape = (1, 3, share, 64)
    leaves = [torch.randn(shape, device=ranks.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    direction = torch.randn(shape, device=ranks.device, dtype=torch.bfloat16)
    set_rotate_method("allgather")
    _cp_options.enable_load_balance = False  # which is of causal masks

    def theirs() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves)
            _backward(out, leaves, direction)

    # It wants a tensor to cut, which nobody reads: the leaves are this rank's already.
    whole = torch.zeros(2 * ranks.size, device=ranks.device)
    with context_parallel(ranks.mesh, buffers=[whole], buffer_seq_dims=[0]):
        found = ranks.milliseconds({"theirs": theirs}, options.rounds)
    found |= ranks.milliseconds({"ours": _operator_over(ranks, case)}, options.rounds)
    row = {"one": found["theirs"], "many": found["ours"]}
    yield {"case": "torch context_parallel / ours", **row, "reached": found["theirs"] / found["ours"]}


def errors(ranks: Ranks, options: argparse.Namespace) -> Iterator[Row]:
    """Relative errors of dk and dv in bf16, over those of one process."""
    scene = _case("errors", 1, 3, 64, {"x": 1024}, "x->x")
    torch.manual_seed(0)
    tensors = torch.randn(4, 1, 1024, 3, 64).bfloat16().to(ranks.device)
    exact_leaves = [t.double().requires_grad_() for t in tensors[:3]]
    exact = torch.autograd.grad(
        ma.reference.attention(*exact_leaves, scene.plan), exact_leaves[1:], tensors[3].double()
    )
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    one = torch.autograd.grad(ma.attention(*leaves, scene.plan), leaves[1:], tensors[3])
    specs = ma.distributed.shard_specs(scene.specs, ranks.mesh)
    rows = ma.distributed.share_of(1024, ranks.mesh)
    here = [t[:, rows].clone().requires_grad_() for t in tensors[:3]]
    keys = ma.distributed.gather_keys(*here[1:], specs, ranks.mesh)
    out = ma.attention(here[0], *keys, ma.AttentionPlan.compile(specs, scene.attention_patterns))
    many = torch.autograd.grad(out, here[1:], tensors[3][:, rows])
    for name, truth, alone, shared in zip(("dk", "dv"), exact, one, many):
        whole = ma.distributed.gather(shared, specs, mesh=ranks.mesh)
        found = [((t.double() - truth).norm() / truth.norm()).item() for t in (alone, whole)]
        yield {"case": f"error of {name}", "one": found[0], "many": found[1], "reached": found[1] / found[0]}


if __name__ == "__main__":
    main()
