"""The attention operator beside its peers: time of both passes, time of the host, error, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import check
from bench.cases import Case
from bench.peers import BACKWARD, FORWARD, Peer
from bench.rows import Row, absent_row, dtype_of, in_precision, timing_row
from bench.timing import Calls, graphed, host_microseconds, synchronize, take_turns

# Inputs are rotated: when their turn comes again, so much else was read that the L2 cache (60 MB) holds none of them.
ROTATED_BYTES = 2**27
CALLS_A_SAMPLE = 4  # at least, so that the first launch of a sample, on an idle GPU, weighs little
DATA = ("normal", "student-t3")


@dataclass(frozen=True)
class What:
    """What is asked for.

    Attributes:
        passes: Some of ``"forward"`` and ``"backward"``.
        rounds: How often each takes its turn.
        graphs: Whether calls are replayed from CUDA graphs too.
        data: The distributions for which errors are measured, see ``DATA``.
    """

    passes: Sequence[str] = (FORWARD, BACKWARD)
    rounds: int = 9
    graphs: bool = True
    data: Sequence[str] = DATA


@dataclass(frozen=True)
class Inputs:
    """One set of inputs: q, k and v are the slots of one packed projection, as a layer has it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The same without a gradient: some that have no backward refuse leaves even where no graph is recorded."""
        return tuple(leaf.detach() for leaf in self.leaves)


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, data: str = "normal") -> Inputs:
    """Fresh random inputs; ``"student-t3"`` has tails so heavy that some weights are nearly one."""
    shape = (case.batch_size, case.num_tokens, 3, case.num_heads, case.head_dim)
    qkv = torch.randn(shape, device=device)
    if data == "student-t3":
        qkv /= sum(torch.randn(shape, device=device).square() for _ in range(3)).div(3).sqrt()
    q, k, v = (t.detach().requires_grad_() for t in qkv.to(dtype).unbind(2))
    return Inputs(q, k, v, torch.randn(q.shape, device=device).to(dtype))


def measure(
    case: Case, device: torch.device, precision: str, peers: Mapping[str, Callable[[], Peer]], what: What
) -> Iterator[Row]:
    """Errors and times of all peers that can take part; a row that says why for those that cannot."""
    with in_precision(precision):
        found, absent = _import(case, precision, peers)
        yield from absent
        at_fault = []
        for data in what.data:
            for row in _errors(case, device, precision, found, data):
                at_fault += [(row["who"], row.get("pass"))] * (row["kind"] == "absent")
                yield row
        for passed in what.passes:
            taking_part = {
                name: peer
                for name, peer in found.items()
                if passed in peer.passes and not {(name, None), (name, passed)} & set(at_fault)
            }
            yield from _times(case, device, precision, taking_part, passed, what)
        gc.collect()  # graphs and autograd's nodes hold memory of the device


def _import(case: Case, precision: str, peers: Mapping[str, Callable[[], Peer]]) -> tuple[dict[str, Peer], list[Row]]:
    found, absent = {}, []
    for name, make in peers.items():
        try:
            peer = make()
        except Exception as error:  # whatever an import of foreign code raises
            absent.append(absent_row(case.name, name, precision, error))
        else:
            if dtype_of(precision) in peer.dtypes:
                found[name] = peer
    return found, absent


def _errors(case: Case, device: torch.device, precision: str, peers: Mapping[str, Peer], data: str) -> Iterator[Row]:
    """Errors of every peer for normal data, of ours and of the yardsticks for data that is harder."""
    inputs = make_inputs(case, device, dtype_of(precision), data)
    doubles = [t.detach().double().requires_grad_() for t in inputs.leaves]
    exact = check.exact_attention(*doubles, case.plan)
    expected = [exact.detach(), *torch.autograd.grad(exact, doubles, inputs.dout.double())]
    for name, peer in peers.items():
        if data != "normal" and not (name.startswith("ours") or peer.is_torch):
            continue
        passed = FORWARD
        try:
            with peer.within():
                outs = peer.attend(*(inputs.leaves if BACKWARD in peer.passes else inputs.values), case.plan)
                got = [torch.cat([out.detach() for out in outs], 1)]
                passed = BACKWARD
                if BACKWARD in peer.passes:
                    got += torch.autograd.grad(outs, inputs.leaves, _parts(inputs.dout, outs))
        except Exception as error:  # whatever foreign code raises
            yield absent_row(case.name, name, precision, error, **({"pass": passed} if passed == BACKWARD else {}))
        if passed == BACKWARD:
            found = check.errors(got, expected)
            yield {"kind": "error", "case": case.name, "who": name, "dtype": precision, "data": data, "errors": found}


def _parts(dout: Tensor, outs: Sequence[Tensor]) -> list[Tensor]:
    return [part.contiguous() for part in dout.split([out.shape[1] for out in outs], 1)]


def _times(
    case: Case, device: torch.device, precision: str, peers: Mapping[str, Peer], passed: str, what: What
) -> Iterator[Row]:
    dtype = dtype_of(precision)
    sets = [make_inputs(case, device, dtype) for _ in range(_num_sets(case, device, dtype))]
    product, product_flops = matmul(device, dtype, 2048 if device.type == "cpu" else 8192)
    calls, modes, hosts = {"matmul": Calls(product)}, {"matmul": ("matmul", "eager")}, {}
    count = max(len(sets), CALLS_A_SAMPLE) if device.type == "cuda" else 1
    for name, peer in peers.items():
        try:
            make = partial(_PASSES[passed], peer, case, sets, count)
            with peer.within():
                run = make()
                if passed == FORWARD and device.type == "cuda":
                    hosts[name] = host_microseconds(partial(run, 1), device)
            calls[name], modes[name] = _tried(Calls(run, count, peer.within), device), (name, "eager")
            if peer.graphed and what.graphs and device.type == "cuda":
                with peer.within():
                    replay = graphed(make)
                calls[f"{name}, graph"] = _tried(Calls(replay, count, peer.within), device)
                modes[f"{name}, graph"] = name, "graph"
        except Exception as error:  # whatever foreign code raises
            yield absent_row(case.name, name, precision, error, **{"pass": passed})
    forward_flops = case.flops(backward=False)
    flops = forward_flops if passed == FORWARD else case.flops(backward=True) - forward_flops
    for key, timing in take_turns(calls, device, what.rounds).items():
        name, mode = modes[key]
        rate = (product_flops if name == "matmul" else flops) / timing.median / 1e6
        facts = {"pass": passed, "dtype": precision, "mode": mode, "gflops_per_second": rate}
        if name in hosts and mode == "eager":
            facts["host_microseconds"] = hosts[name]
        yield timing_row("operator", case.name, name, timing, **facts)


def _tried(calls: Calls, device: torch.device) -> Calls:
    """The same, run once to its end, so that what is wrong is laid at the right door."""
    with calls.within():
        calls.run()
    synchronize(device)
    return calls


def _num_sets(case: Case, device: torch.device, dtype: torch.dtype) -> int:
    num_bytes = 3 * case.batch_size * case.num_tokens * case.dim * dtype.itemsize
    return -(-ROTATED_BYTES // num_bytes) if device.type == "cuda" else 1


def _forwards(peer: Peer, case: Case, sets: Sequence[Inputs], count: int) -> Callable[..., None]:
    """Forward calls without autograd, each on the next set of inputs."""
    values = [inputs.values for inputs in sets]

    @torch.no_grad()
    def run(count: int = count) -> None:
        for i in range(count):
            peer.attend(*values[i % len(sets)], case.plan)

    return run


def _backwards(peer: Peer, case: Case, sets: Sequence[Inputs], count: int) -> Callable[..., None]:
    """Backward calls alone: the gradients of q, k and v, assembled by autograd where a peer has them in parts."""
    # Leaves of its own: autograd delivers a gradient on the stream on which its leaf was first used, which must be the
    # one that a CUDA graph captures.
    leaves = [[t.detach().requires_grad_() for t in inputs.leaves] for inputs in sets]
    outs = [peer.attend(*each, case.plan) for each in leaves]
    douts = [_parts(inputs.dout, parts) for inputs, parts in zip(sets, outs)]

    def run(count: int = count) -> None:
        for i in range(count):
            at = i % len(sets)
            torch.autograd.grad(outs[at], leaves[at], douts[at], retain_graph=True)

    return run


_PASSES = {FORWARD: _forwards, BACKWARD: _backwards}


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Callable[[], Tensor], int]:
    """A square matrix product of random data, the practical ceiling, and its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return (lambda: a @ b), 2 * size**3


def gpu_memory(case: Case, device: torch.device, precision: str, peer: Peer) -> Row:
    """Peak memory of forward and backward beyond inputs, output, log-sum-exp and gradients."""
    dtype = dtype_of(precision)
    inputs = make_inputs(case, device, dtype)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outs = peer.attend(*inputs.leaves, case.plan)
    torch.autograd.grad(outs, inputs.leaves, [inputs.dout])
    results = (4 * case.dim * dtype.itemsize + 4 * case.num_heads) * case.batch_size * case.num_tokens
    extra = torch.cuda.max_memory_allocated(device) - before - results
    facts = {"pass": "forward + backward", "dtype": precision, "extra_bytes": extra}
    return {"kind": "memory", "case": case.name, "who": "ours", **facts}
