"""Projections that are no longer what the layer was built with: each of them here works on twice its input."""

import copy

import pytest
import torch
from layers import (
    CROSS,
    DENSE,
    GROUPS,
    SELF,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
    tensor_of,
)
from torch import nn
from torch.nn.utils import parametrize

import mixed_attention as ma

FREQS = make_freqs(SELF.num_tokens)


class Doubled(nn.Module):
    """A module around a layer, whose ``weight`` is that of the layer alone, as that of adapters is."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(2 * x)


class DoubledWeight(nn.Module):
    def forward(self, weight):
        return 2 * weight


def in_another_module(parent, name):
    setattr(parent, name, Doubled(getattr(parent, name)))


def by_a_hook_before(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))


def by_a_hook_after(parent, name):
    getattr(parent, name).register_forward_hook(lambda layer, inputs, out: out + inputs[0] @ layer.weight.T)


def by_another_forward(parent, name):
    layer = getattr(parent, name)
    forward = layer.forward
    layer.forward = lambda x: forward(2 * x)


def by_a_parametrization(parent, name):
    parametrize.register_parametrization(getattr(parent, name), "weight", DoubledWeight())


CHANGES = [in_another_module, by_a_hook_before, by_a_hook_after, by_another_forward, by_a_parametrization]


def changed_and_expected(cls, change, **config):
    """A layer with changed projections, and an unchanged one of twice their weights."""
    layer = make_layer(cls, use_rope=True, **config)
    expected = copy.deepcopy(layer)
    for name in layer.projections:
        change(layer, name)
        expected.get_submodule(name).weight.data.mul_(2)
    return layer, expected


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_they_are_called(cls, scene, change):
    layer, expected = changed_and_expected(cls, change)
    x = make_x(scene)
    out, wanted = (tensor_of(f(x, scene.specs, scene.patterns, freqs=FREQS)) for f in (layer, expected))
    assert_equal_in_fp64(out, wanted)
    assert_equal_in_fp64(gradients(out, [x]), gradients(wanted, [x]))


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_called_beside_a_cache(change):
    layer, expected = changed_and_expected(ma.MixedAttention, change)
    x = make_x(CROSS)
    wanted = expected(x, CROSS.specs, CROSS.patterns, freqs=FREQS)
    _, cache = layer(x, CROSS.specs, CROSS.patterns, freqs=FREQS, return_kv_cache=True)
    specs = [ma.TokenSpec(GROUPS[0], None), *CROSS.specs[1:]]
    rows = CROSS.rows(*GROUPS[1:])
    assert_equal_in_fp64(
        layer(x[:, rows], specs, CROSS.patterns, freqs=FREQS[:, rows], kv_cache=cache), wanted[:, rows]
    )


@pytest.mark.parametrize("cls", [ma.PerceiverAttention, ma.noether.PerceiverAttention], ids=["fused", "separate"])
@pytest.mark.parametrize("change", CHANGES)
def test_those_of_a_perceiver_are_called(cls, change):
    layer, expected = changed_and_expected(cls, change, kv_dim=24)
    q, kv = make_x(SELF), make_x(SELF, seed=2)
    out, wanted = (tensor_of(f(q, kv, q_freqs=FREQS, k_freqs=FREQS)) for f in (layer, expected))
    assert_equal_in_fp64(out, wanted)


@pytest.mark.parametrize("change", [in_another_module, by_a_hook_after, by_a_parametrization])
def test_they_are_compiled(change):
    torch._dynamo.reset()
    layer, expected = changed_and_expected(ma.MixedAttention, change)
    x = make_x(SELF)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, wanted = (f(x, SELF.specs, SELF.patterns, freqs=FREQS) for f in (compiled, expected))
    assert_equal_in_fp64(out, wanted)
    assert_equal_in_fp64(gradients(out, [x]), gradients(wanted, [x]))


@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
@pytest.mark.parametrize("records", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_projection_without_a_bias(name, records, scene):
    """The others keep theirs, each its own."""
    layer, x = make_layer(ma.noether.MixedAttention, use_rope=True), make_x(scene)
    projection = layer.get_submodule(name)
    with torch.no_grad():
        projection.bias.zero_()
    expected = layer(x, scene.specs, scene.patterns, freqs=FREQS)[0]
    projection.bias = None
    with torch.set_grad_enabled(records):
        assert_equal_in_fp64(layer(x, scene.specs, scene.patterns, freqs=FREQS)[0], expected)


@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_what_a_hook_has_seen_is_not_overwritten(cls, scene):
    """Plain projections are rotated where they lie."""
    layer, x, seen = make_layer(cls, use_rope=True), make_x(scene), []
    projection = layer.get_submodule(layer.projections[0])
    projection.register_forward_hook(lambda layer, inputs, out: seen.append(out))
    layer(x, scene.specs, scene.patterns, freqs=FREQS)
    assert_equal_in_fp64(seen[0], torch.nn.functional.linear(x, projection.weight, projection.bias))


def test_hooks_of_the_backward_are_called():
    layer, x, seen = make_layer(use_rope=True), make_x(DENSE), []
    layer.qkv.register_full_backward_hook(lambda layer, grad_in, grad_out: seen.append(grad_in[0]))
    grads = gradients(layer(x, DENSE.specs, DENSE.patterns, freqs=FREQS), [x])
    assert_equal_in_fp64(seen[0], grads[0])
