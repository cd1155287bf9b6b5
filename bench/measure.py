"""The measurements. Each yields rows: dictionaries that go to JSON as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mixed_attention as ma
from bench import check, peers
from bench.cases import Case
from bench.timing import Timing, graph, take_turns

Row = dict[str, Any]


def _row(kind: str, what: str, who: str, timing: Timing, **facts: Any) -> Row:
    return {"kind": kind, "case": what, "who": who, **facts, "milliseconds": asdict(timing)}


def _qkv(case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    shape = (case.batch_size, case.num_tokens, 3, case.num_heads, case.head_dim)
    return torch.randn(shape, device=device).to(dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Callable[[], Tensor], int]:
    """A square matrix product of random data, and its floating-point operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return (lambda: a @ b), 2 * size**3


def operator(case: Case, device: torch.device, dtype: torch.dtype, rounds: int, *, graphs: bool) -> Iterator[Row]:
    """Forward, and backward alone, of the attention and its peers, beside a matrix product in the same rounds."""
    qkv = _qkv(case, device, dtype).requires_grad_()
    dout = torch.randn(case.batch_size, case.num_tokens, case.num_heads, case.head_dim, device=device).to(dtype)
    product, product_flops = matmul_rate(device, dtype, 2048 if device.type == "cpu" else 8192)
    forwards: dict[str, Callable[[], object]] = {"matmul": product}
    backwards: dict[str, Callable[[], object]] = {"matmul": product}
    errors: dict[str, float] = {}
    for name, attend in peers.attentions(device.type).items():
        try:
            errors[name] = check.attention_error(attend, qkv, case)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            print(f"{case.name}: {name} does not run here: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        # One packed projection, as a layer has it; the gradient of its parts is timed, not its assembly.
        parts = [t.detach().requires_grad_() for t in qkv.unbind(2)]
        out = attend(*parts, case)
        forwards[name] = partial(_without_grad, attend, *parts, case)
        backwards[name] = partial(torch.autograd.grad, out, parts, dout, retain_graph=True)
        if graphs and device.type == "cuda":
            errors[f"{name}, graph"] = errors[name]
            forwards[f"{name}, graph"] = graph(forwards[name])
    forward_flops = case.flops(backward=False)
    for passed, calls, flops in (("forward", forwards, forward_flops), ("backward", backwards, forward_flops * 5 // 2)):
        for name, timing in take_turns(calls, device, rounds).items():
            is_product = name == "matmul"
            rate = (product_flops if is_product else flops) / timing.median / 1e6
            facts = {"pass": passed, "dtype": _name(dtype), "gflops_per_second": rate, "error": errors.get(name)}
            yield _row("operator", case.name, name, timing, **facts)


def _without_grad(attend: peers.Attention, *arguments: Any) -> Tensor:
    with torch.no_grad():
        return attend(*arguments)


def layer(case: Case, device: torch.device, dtype: torch.dtype, rounds: int, *, compiled: bool) -> Iterator[Row]:
    """Forward, and forward with backward, of the layer and of upstream's algorithm; 16-bit types by autocast."""
    x = torch.randn(case.batch_size, case.num_tokens, case.dim, device=device, requires_grad=True)
    coords = torch.rand(case.batch_size, case.num_tokens, 3, device=device) * 1000
    rope_config = ma.RopeFrequencyConfig(hidden_dim=case.head_dim, input_dim=3, implementation="complex")
    freqs = ma.RopeFrequency(rope_config).to(device)(coords)
    dout = torch.randn(x.shape, device=device)
    modules = peers.layers(case, device, compiled=compiled)
    expected = check.layer_reference(modules["ours"].layer, x, case, freqs, dout)

    def forward(module: torch.nn.Module) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return module(x, case, freqs)

    def forward_without_grad(module: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return forward(module)

    def both(module: torch.nn.Module) -> Tensor:
        module.zero_grad()
        x.grad = None
        out = forward(module)
        out.backward(dout.to(out.dtype))
        return out

    errors = {}
    for name, module in modules.items():
        out = both(module)
        errors[name] = max(check.relative_error(out, expected[0]), check.relative_error(x.grad, expected[1]))
    for passed, call, backward in (("forward", forward_without_grad, False), ("forward + backward", both, True)):
        calls = {name: partial(call, module) for name, module in modules.items()}
        for name, timing in take_turns(calls, device, rounds).items():
            rate = case.flops(backward=backward) / timing.median / 1e6
            facts = {"pass": passed, "dtype": _name(dtype), "gflops_per_second": rate, "error": errors[name]}
            yield _row("layer", case.name, name, timing, **facts)


def overhead(device: torch.device, rounds: int) -> Iterator[Row]:
    """Host time of one eager call with eight tokens: Python, dispatcher and a problem too small to matter."""
    plan = ma.AttentionPlan.compile([ma.TokenSpec("all", 8)], [ma.AttentionPattern(["all"], ["all"])])
    q, k, v = torch.randn(1, 8, 3, 3, 64, device=device).unbind(2)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with torch.no_grad():
        inner = 100  # calls a sample: one alone is of the order of the clock's own jitter
        calls = {
            "ours": lambda: [ma.attention(q, k, v, plan) for _ in range(inner)],
            "sdpa": lambda: [F.scaled_dot_product_attention(*heads_first) for _ in range(inner)],
        }
        for name, timing in take_turns(calls, device, rounds * 10).items():
            per_call = Timing(timing.median / inner, timing.lower / inner, timing.upper / inner, timing.rounds)
            yield _row("overhead", "8 tokens", name, per_call, **{"pass": "forward", "dtype": "float32"})


def memory(num_tokens: int, dtype: torch.dtype) -> Row:
    """Peak memory of the CPU operator beyond inputs, outputs and gradients, in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", str(num_tokens), _name(dtype)]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    facts = {"pass": "forward + backward", "dtype": _name(dtype), "extra_bytes": extra}
    return {"kind": "memory", "case": f"{num_tokens} tokens", "who": "ours", **facts}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
