"""A double backward runs the kernels that its formulas name, and none on zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mixed_attention as ma

SPECS = [ma.TokenSpec("a", 5), ma.TokenSpec("b", 7)]
PATTERNS = [ma.AttentionPattern(["a"], ["a"]), ma.AttentionPattern(["b"], ["a", "b"])]
KERNELS = ("forward", "backward", "backward_out", "forward_jvp", "jvp", "backward_jvp")


def calls(run: Callable[[], object]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = Counter(event.name.removeprefix("mixed_attention::") for event in profiler.events())
    return {name: names[name] for name in KERNELS if names[name]}


def weigh(grads: Sequence[Tensor], seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    terms = [(g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in grads]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("moves", ["q", "k", "all"])
def test_of_the_operator(moves):
    plan = ma.AttentionPlan.compile(SPECS, PATTERNS)
    q, k, v, dout = (torch.randn(2, 12, 3, 8, dtype=torch.double, requires_grad=True) for _ in range(4))
    grads = torch.autograd.grad(ma.attention(q, k, v, plan), (q, k, v), dout, create_graph=True)
    chosen = {"q": grads[:1], "k": grads[1:2], "all": grads}[moves]
    loss = weigh(chosen)
    found = calls(lambda: torch.autograd.grad(loss, (q, k, v, dout), retain_graph=True))
    assert found == {"jvp": 1, "backward_jvp": 1}


LAYERS = {"packed": ma.MixedAttention, "separate": ma.noether.MixedAttention}


def run_layer(cls: type[nn.Module], qk_norm: bool, use_rope: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, tokens and their output."""
    layer = cls({"dim": 24, "num_heads": 3, "use_rope": use_rope, "qk_norm": qk_norm}).double()
    x = torch.randn(2, 12, 24, dtype=torch.double, requires_grad=True)
    freqs = torch.polar(torch.ones(1, 12, 4).double(), torch.randn(1, 12, 4).double()) if use_rope else None
    result = layer(x, SPECS, PATTERNS, freqs=freqs)
    return layer, x, result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
def test_of_a_layer(cls, qk_norm, use_rope):
    layer, x, out = run_layer(cls, qk_norm, use_rope)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    loss = grad.square().sum()
    parameters = [x, *layer.parameters()]
    # The output weighs its own gradient: it has one itself, of first order.
    found = calls(lambda: torch.autograd.grad(loss, parameters, retain_graph=True))
    assert found == {"jvp": 1, "backward_jvp": 1, "backward_out": 1}


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
def test_of_a_layer_whose_output_is_not_asked(cls, qk_norm, use_rope):
    layer, x, out = run_layer(cls, qk_norm, use_rope)
    dout = torch.randn(2, 12, 24, dtype=torch.double)
    wanted = [x, *(parameter for name, parameter in layer.named_parameters() if not name.startswith("proj"))]
    (grad,) = torch.autograd.grad(out, x, dout, create_graph=True)
    loss = weigh((grad,))
    assert calls(lambda: torch.autograd.grad(loss, wanted, retain_graph=True)) == {"jvp": 1, "backward_jvp": 1}
