"""The whole layer beside upstream's algorithm, and upstream itself: time, error, peak memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixed_attention as ma
from bench import check
from bench.cases import Case
from bench.operator import Inputs, make_inputs
from bench.rows import Row, absent_row, dtype_of, in_precision, timing_row
from bench.timing import Calls, graphed, take_turns
from mixed_attention.eager import packed
from mixed_attention.eager.projection import linear

FORWARD, TRAINING = "forward", "forward + backward"
QK_NORM = "ours, qk_norm"  # another function than the others, measured for what the norm costs
CALLS_A_SAMPLE = 16  # in a model a layer follows another: a GPU waits for the host before the first alone


class OurLayer(nn.Module):
    """Our layer, as a user calls it."""

    def __init__(self, layer: ma.MixedAttention, case: Case) -> None:
        super().__init__()
        self.layer, self.specs, self.patterns = layer, case.specs, case.attention_patterns

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        return self.layer(x, self.specs, self.patterns, freqs=freqs)


class WithoutSkip(nn.Module):
    """Our layer, but that keys and values of groups that nobody attends to are made, rotated and differentiated too."""

    def __init__(self, layer: ma.MixedAttention, case: Case) -> None:
        super().__init__()
        self.layer, self.plan = layer, case.plan

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        out, _ = packed.attend(self.layer._project(x, ("qkv", None, freqs)), self.plan)
        return linear(out, self.layer.proj)


class BaselineLayer(nn.Module):
    """Upstream's algorithm.

    One projection, rotation as fp32 complex numbers, rows gathered by cat for every pattern, patterns of equal lengths
    stacked into one call of the framework's attention, outputs joined by cat, projection. Takes the weights of our
    layer, so that both compute the same function.
    """

    def __init__(self, layer: ma.MixedAttention, case: Case) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = layer.num_heads, layer.qkv, layer.proj
        self.groups, self.patterns = case.groups, case.patterns

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self._rotate(q, freqs), self._rotate(k, freqs)
        sizes = list(self.groups.values())
        qs, ks, vs = (dict(zip(self.groups, t.split(sizes, 2))) for t in (q, k, v))
        stacks: dict[tuple[int, int], list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]] = {}
        for queries, keys in self.patterns:
            entry = (
                torch.cat([qs[n] for n in queries], 2),
                torch.cat([ks[n] for n in keys], 2),
                torch.cat([vs[n] for n in keys], 2),
            )
            stacks.setdefault((entry[0].shape[2], entry[1].shape[2]), []).append((queries, *entry))
        outs: dict[str, Tensor] = {}
        for entries in stacks.values():
            joined = (torch.cat([entry[i] for entry in entries], 0) for i in (1, 2, 3))
            out = F.scaled_dot_product_attention(*joined)
            for (queries, *_), part in zip(entries, out.chunk(len(entries), 0)):
                outs.update(zip(queries, part.split([self.groups[n] for n in queries], 2)))
        merged = torch.cat([outs[name] for name in self.groups], 2).transpose(1, 2).flatten(2)
        return self.proj(merged)

    @staticmethod
    def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * freqs[:, None]).flatten(-2).to(x.dtype)


class NoetherLayer(nn.Module):
    """Upstream itself, the package `emmiai-noether`, with the weights of our layer; as a client calls it."""

    def __init__(self, layer: ma.MixedAttention, case: Case) -> None:
        from noether.core.schemas.modules.attention import AttentionPattern, MixedAttentionConfig, TokenSpec
        from noether.modeling.modules.attention.anchor_attention.mixed import MixedAttention

        super().__init__()
        config = MixedAttentionConfig(hidden_dim=case.dim, num_heads=case.num_heads, use_rope=True)
        self.layer = MixedAttention(config).to(layer.proj.weight.device)
        self.layer.load_state_dict(ma.checkpoint.convert_state_dict(layer.state_dict(), "separate"))
        self.specs = [TokenSpec(name=name, size=size) for name, size in case.groups.items()]
        self.patterns = [AttentionPattern(query_tokens=list(q), key_value_tokens=list(k)) for q, k in case.patterns]

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        return self.layer(x, self.specs, self.patterns, freqs=freqs)[0]


def make_layers(
    case: Case, device: torch.device, wanted: Sequence[str] | None, *, compiled: bool
) -> dict[str, nn.Module]:
    """Our layer, upstream's algorithm, and upstream itself where it is installed, with the same weights."""
    config = ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True)
    layer = ma.MixedAttention(config).to(device)
    for parameter in layer.parameters():  # of the size that trained weights have, so that softmax is not flat
        nn.init.normal_(parameter, std=case.dim**-0.5)
    found: dict[str, nn.Module] = {"ours": OurLayer(layer, case), "baseline": BaselineLayer(layer, case)}
    if find_spec("noether"):
        found["noether"] = NoetherLayer(layer, case)
    found = {name: module for name, module in found.items() if not wanted or name in ("ours", *wanted)}
    if compiled:
        torch._dynamo.reset()  # the compiler gives up on a function of too many shapes
        found |= {f"{name}, compiled": torch.compile(module) for name, module in found.items()}
    if not all(group.readers for group in case.plan.groups):
        found["ours, without the skip"] = WithoutSkip(layer, case)
    return found


def normalising(ours: OurLayer, case: Case) -> OurLayer:
    """Our layer with the same weights, but that it normalises queries and keys."""
    config = ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True, qk_norm=True)
    layer = ma.MixedAttention(config).to(ours.layer.proj.weight.device)
    layer.load_state_dict(ours.layer.state_dict())
    return OurLayer(layer, case)


@dataclass(frozen=True)
class Step:
    """Inputs of a layer, and the two passes over them; 16-bit types by autocast over fp32 weights and tokens."""

    x: Tensor
    freqs: Tensor
    dout: Tensor
    dtype: torch.dtype

    def forward(self, module: nn.Module) -> Tensor:
        """As in training, without the backward."""
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(self.x, self.freqs)

    @torch.no_grad()
    def inference(self, module: nn.Module) -> Tensor:
        """As in evaluation."""
        return self.forward(module)

    def training(self, module: nn.Module) -> Tensor:
        """Forward and backward, down to the gradients of weights and tokens."""
        module.zero_grad()
        self.x.grad = None
        out = self.forward(module)
        out.backward(self.dout.to(out.dtype))
        return out

    def call(self, passed: str) -> Callable[[nn.Module], Tensor]:
        """What is measured under the name of a pass."""
        return {FORWARD: self.inference, TRAINING: self.training}[passed]


@dataclass(frozen=True)
class AttentionAlone:
    """The attention of our layer, of which the rest of the layer is to cost little."""

    inputs: Inputs
    plan: ma.AttentionPlan

    def forward(self) -> Tensor:
        return ma.attention(*self.inputs.leaves, self.plan)

    @torch.no_grad()
    def inference(self) -> Tensor:
        return self.forward()

    def training(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs.leaves, self.inputs.dout)


def make_step(case: Case, device: torch.device, dtype: torch.dtype) -> Step:
    """Fresh random tokens, with the frequencies of random coordinates."""
    x = torch.randn(case.batch_size, case.num_tokens, case.dim, device=device, requires_grad=True)
    coords = torch.rand(case.batch_size, case.num_tokens, 3, device=device) * 1000
    freqs = ma.RopeFrequency(case.head_dim, 3).to(device)(coords)
    return Step(x, freqs, torch.randn(x.shape, device=device), dtype)


@dataclass(frozen=True)
class What:
    """What is asked for.

    Attributes:
        rounds: How often each takes its turn.
        wanted: Who is measured beside ours, of ``"baseline"`` and ``"noether"``; by default both.
        compiled: Whether all are also measured under the compiler.
        graphs: Whether ours is replayed from a CUDA graph too.
    """

    rounds: int
    wanted: Sequence[str] | None = None
    compiled: bool = False
    graphs: bool = True


def measure(case: Case, device: torch.device, precision: str, what: What) -> Iterator[Row]:
    """Forward, and forward with backward, of all layers, and of the attention that is in ours."""
    dtype, is_gpu = dtype_of(precision), device.type == "cuda"
    step, alone = make_step(case, device, dtype), AttentionAlone(make_inputs(case, device, dtype), case.plan)
    modules = make_layers(case, device, what.wanted, compiled=what.compiled)
    expected = check.layer_reference(modules["ours"].layer, step.x, case.plan, step.freqs, step.dout)
    with in_precision(precision):
        errors = {}
        for name, module in list(modules.items()):
            try:
                pairs = zip((step.training(module), step.x.grad), expected)
                errors[name] = max(check.relative_error(*pair) for pair in pairs)
            except Exception as error:  # whatever a compiler raises
                del modules[name]
                yield absent_row(case.name, name, precision, error)
        if "ours" in modules:
            modules[QK_NORM] = normalising(modules["ours"], case)
        for passed, attend in ((FORWARD, alone.inference), (TRAINING, alone.training)):
            call = step.call(passed)
            calls: dict[tuple[str, str], Callable[[], object]] = {
                (name, "eager"): partial(call, module) for name, module in modules.items()
            }
            peaks = {key: peak_bytes(each, device) for key, each in calls.items()}
            calls["ours, attention alone", "eager"] = attend
            captured = [
                n for n in ("ours", "ours, without the skip", QK_NORM) if n in modules and what.graphs and is_gpu
            ]
            for name in captured:
                try:
                    calls[name, "graph"] = graphed(partial(_on_own_leaves, step, modules[name], passed))
                except Exception as error:  # whatever a capture raises
                    yield absent_row(case.name, name, precision, error, **{"pass": passed, "mode": "graph"})
            count = CALLS_A_SAMPLE if is_gpu else 1
            samples = {key: Calls(partial(_repeat, each, count), count) for key, each in calls.items()}
            flops = case.flops(backward=passed == TRAINING)
            for (name, mode), timing in take_turns(samples, device, what.rounds).items():
                facts = {"pass": passed, "dtype": precision, "mode": mode}
                facts["gflops_per_second"] = flops / timing.median / 1e6
                facts |= {"error": errors[name]} if name in errors else {}
                yield timing_row("layer", case.name, name, timing, **facts, **peaks.get((name, mode), {}))


def _on_own_leaves(step: Step, module: nn.Module, passed: str) -> Callable[[], object]:
    """A call as a graph can capture it: autograd delivers a gradient on the stream that its leaf was first used on."""
    own = replace(step, x=step.x.detach().requires_grad_())
    return partial(own.call(passed), copy.deepcopy(module))


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def peak_bytes(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Peak memory of the device over what lies there between two steps: weights, inputs, their gradients."""
    if device.type != "cuda":
        return {}
    call()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
