"""Projections that are no longer what the layer was built with: each of them here works on twice its input."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CROSS,
    DENSE,
    DIM,
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
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

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


class Opaque(torch.Tensor):
    """A weight that only products know, as quantised ones: it cannot be split, joined or sliced."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, device=data.device)

    def __init__(self, data):
        self.inner = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.t.default):
            return Opaque(func(args[0].inner))
        if func in (aten.mm.default, aten.addmm.default, aten.linear.default):
            return func(*(2 * a.inner if isinstance(a, Opaque) else a for a in args))
        raise NotImplementedError(f"{func} of an opaque weight")


def by_an_opaque_weight(parent, name):
    layer = getattr(parent, name)
    layer.weight = nn.Parameter(Opaque(layer.weight.detach()), requires_grad=False)


def by_a_subclass(parent, name):
    class DoublingLinear(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    getattr(parent, name).__class__ = DoublingLinear


def by_compile(parent, name):
    layer = getattr(parent, name)
    layer._compiled_call_impl = lambda x: F.linear(2 * x, layer.weight, layer.bias)  # what module.compile() sets


def by_an_own_call(parent, name):
    layer = getattr(parent, name)
    layer._call_impl = lambda x: F.linear(2 * x, layer.weight, layer.bias)


def by_a_weight_of_its_own(parent, name):
    layer = getattr(parent, name)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = 2 * weight


def by_a_function(parent, name):
    layer = getattr(parent, name)
    delattr(parent, name)
    object.__setattr__(parent, name, lambda x: layer(2 * x))


@pytest.mark.parametrize(
    "change",
    [by_an_opaque_weight, by_a_subclass, by_compile, by_an_own_call, by_a_weight_of_its_own, by_a_function],
)
@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_whatever_they_are_they_are_called(cls, scene, change):
    layer, expected = changed_and_expected(cls, change)
    change(layer, "proj")
    expected.proj.weight.data.mul_(2)
    x = make_x(scene)
    out, wanted = (tensor_of(f(x, scene.specs, scene.patterns, freqs=FREQS)) for f in (layer, expected))
    assert_equal_in_fp64(out, wanted)
    assert_equal_in_fp64(gradients(out, [x]), gradients(wanted, [x]))


@contextmanager
def hooked(register, hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def double_inputs(layer, inputs):
    return (2 * inputs[0],) if isinstance(layer, nn.Linear) else None


def double_products(layer, inputs, out):
    return out + F.linear(inputs[0], layer.weight) if isinstance(layer, nn.Linear) else None


def doubling(function):
    """A method of linear layers that doubles the tokens, and leaves other modules alone."""
    return lambda layer, x, *more, **named: function(
        layer, 2 * x if isinstance(layer, nn.Linear) else x, *more, **named
    )


class DoubledProducts(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[1].shape[0] % DIM == 0:
            args = (2 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


FOR_ALL = {
    "forward pre hook": lambda: hooked(modules.register_module_forward_pre_hook, double_inputs),
    "forward hook": lambda: hooked(modules.register_module_forward_hook, double_products),
    "forward": lambda: mock.patch.object(nn.Linear, "forward", doubling(nn.Linear.forward)),
    "call of linear layers": lambda: mock.patch.object(nn.Linear, "__call__", doubling(nn.Linear.__call__)),
    "call of modules": lambda: mock.patch.object(nn.Module, "__call__", doubling(nn.Module.__call__)),
    "call inside": lambda: mock.patch.object(nn.Module, "_call_impl", doubling(nn.Module._call_impl)),
    "F.linear": lambda: mock.patch.object(F, "linear", lambda x, w, b=None: torch._C._nn.linear(2 * x, w, b)),
    "mode": DoubledProducts,
}


@pytest.mark.parametrize("how", FOR_ALL)
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_what_is_changed_for_all_modules_changes_ours(cls, how):
    layer = make_layer(cls, use_rope=True)
    expected = copy.deepcopy(layer)
    for name in (*layer.projections, "proj"):
        expected.get_submodule(name).weight.data.mul_(2)
    x = make_x(SELF)
    wanted = tensor_of(expected(x, SELF.specs, SELF.patterns, freqs=FREQS))
    with FOR_ALL[how]():
        out = tensor_of(layer(x, SELF.specs, SELF.patterns, freqs=FREQS))
    assert_equal_in_fp64(out, wanted)


@pytest.mark.parametrize("register", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
def test_hooks_on_the_backward_of_all_modules_see_ours(register):
    layer, x, seen = make_layer(), make_x(DENSE), []
    with hooked(getattr(modules, register), lambda module, *_: seen.append(module)):
        gradients(layer(x, DENSE.specs, DENSE.patterns), [x])
    assert {layer.qkv, layer.proj} <= set(seen)


@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_each_is_called_once_on_all_tokens(cls):
    layer, x, seen = make_layer(cls), make_x(SELF), []
    for name in layer.projections:
        layer.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append((module, *inputs)))
    layer(x, SELF.specs, SELF.patterns)
    assert [module for module, _ in seen] == [layer.get_submodule(name) for name in layer.projections]
    assert all(tokens is x for _, tokens in seen)


def test_a_default_device_is_no_change(monkeypatch):
    layer, x = make_layer(), make_x(SELF)
    monkeypatch.setattr(ma.layers.ProjectedAttention, "_call", None)
    with torch.device("cpu"):
        layer(x, SELF.specs, SELF.patterns)


def test_tied_weights():
    layer, x = make_layer(ma.noether.MixedAttention), make_x(SELF)
    with torch.no_grad():
        layer.k.weight.copy_(layer.q.weight)
    apart = [layer.q.weight, layer.k.weight]
    wanted = layer(x, SELF.specs, SELF.patterns)[0]
    expected = sum(gradients(wanted, apart))
    layer.k.weight = layer.q.weight
    out = layer(x, SELF.specs, SELF.patterns)[0]
    assert_equal_in_fp64(out, wanted)
    assert_equal_in_fp64(gradients(out, [layer.q.weight])[0], expected)


def test_separate_weights_of_other_dtypes_are_not_promoted():
    layer, x = make_layer(ma.noether.MixedAttention), make_x(SELF)
    layer.k.float()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x, SELF.specs, SELF.patterns)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", [None, by_a_hook_after], ids=["plain", "called"])
@pytest.mark.parametrize("scene", [CROSS, DENSE], ids=["keys of anchors", "keys of all"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_autocast_to_another_dtype_of_16_bits(dtypes, cls, scene, change, compiled):
    """Weights and tokens are cast, as those of linear layers are."""
    stored, computed = dtypes
    layer, x = make_layer(cls, use_rope=True, dtype=stored), make_x(scene, dtype=stored)
    expected = copy.deepcopy(layer).to(computed).float()
    for each in (layer, expected) if change else ():
        for name in each.projections:
            change(each, name)

    def call(layer, x):
        return tensor_of(layer(x, scene.specs, scene.patterns, freqs=FREQS))

    torch._dynamo.reset()
    with torch.autocast("cpu", computed):
        out = (torch.compile(call, backend="eager") if compiled else call)(layer, x)
        wanted = call(expected, x.detach().to(computed).float())
    torch.testing.assert_close(out, wanted, rtol=2**-6, atol=2**-6)
    assert all(grad.isfinite().all() for grad in gradients(out, [x, *layer.parameters()]))


SHARDED = {
    "half of the rows": lambda linear: narrowed(linear, len(linear.weight) // 2),
    "a third of the rows": lambda linear: narrowed(linear, len(linear.weight) // 3),
    "all rows": lambda linear: linear,
}


def narrowed(linear, num_rows):
    narrow = nn.Linear(linear.in_features, num_rows, dtype=linear.weight.dtype)
    narrow.weight.data.copy_(linear.weight[:num_rows])
    return narrow


@pytest.mark.parametrize("is_called", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.DotProductAttention, ma.PerceiverAttention])
@pytest.mark.parametrize("how", SHARDED)
def test_packed_rows_cannot_be_sharded(cls, how, is_called):
    """What tensor parallelism makes of a layer: some rows of its projection, and as many heads."""
    layer, x = make_layer(cls, num_heads=6), make_x(DENSE)
    name = layer.projections[0]
    num_rows = len(layer.get_submodule(name).weight)
    setattr(layer, name, SHARDED[how](layer.get_submodule(name)))
    layer.num_heads = 6 * len(layer.get_submodule(name).weight) // num_rows if how != "all rows" else 3
    if is_called:
        layer.get_submodule(name).register_forward_hook(lambda *_: None)
    arguments = {ma.MixedAttention: [DENSE.specs, DENSE.patterns], ma.PerceiverAttention: [x]}.get(cls, [])
    if cls is ma.PerceiverAttention:
        layer.q = narrowed(layer.q, layer.num_heads * layer.head_dim)
    with pytest.raises(ValueError, match=f"{name}: .* use the layers of ma.noether"):
        layer(x, *arguments)


def test_separate_rows_can_be_sharded():
    """The outputs of two processes, each with half of the heads, add up."""
    whole, x = make_layer(ma.noether.MixedAttention, num_heads=6), make_x(SELF)
    wanted = whole(x, SELF.specs, SELF.patterns)[0]
    outs = []
    for half in (slice(0, DIM // 2), slice(DIM // 2, DIM)):
        layer = copy.deepcopy(whole)
        layer.num_heads //= 2
        for name in layer.projections:
            projection = layer.get_submodule(name)
            projection.weight = nn.Parameter(projection.weight[half])
            projection.bias = nn.Parameter(projection.bias[half])
        layer.proj.weight = nn.Parameter(layer.proj.weight[:, half])
        layer.proj.bias = None
        outs.append(layer(x, SELF.specs, SELF.patterns)[0])
    assert_equal_in_fp64(sum(outs) + whole.proj.bias, wanted)


def test_separate_rows_sharded_without_the_heads():
    layer, x = make_layer(ma.noether.MixedAttention, num_heads=6), make_x(SELF)
    layer.k = narrowed(layer.k, DIM // 2)
    with pytest.raises(
        ValueError, match="k: expected 24 output features for 6 heads of 4 .*, got 12; .* divide num_heads"
    ):
        layer(x, SELF.specs, SELF.patterns)


@pytest.fixture
def mesh():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
def test_parallel_plans_of_the_framework(cls, mesh):
    from torch.distributed.tensor import parallel

    layer, x = make_layer(cls), make_x(SELF)
    wanted = tensor_of(layer(x, SELF.specs, SELF.patterns))
    plan = {**{name: parallel.ColwiseParallel() for name in layer.projections}, "proj": parallel.RowwiseParallel()}
    parallel.parallelize_module(layer, mesh, plan)
    assert_equal_in_fp64(tensor_of(layer(x, SELF.specs, SELF.patterns)), wanted)
    layer.num_heads = 1  # what a plan for more processes would say
    with pytest.raises(ValueError, match="ma.noether" if cls is ma.MixedAttention else "divide num_heads"):
        layer(x, SELF.specs, SELF.patterns)
