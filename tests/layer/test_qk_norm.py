"""Queries and keys over their root mean square, in every layer, against the framework's own functions."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CROSS,
    DIM,
    GROUPS,
    JOINT,
    NUM_HEADS,
    SCENES,
    SELF,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
    oracle,
    tensor_of,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mixed_attention as ma
from mixed_attention.layers.norm import RMSNorm, rms_norm

HEAD_DIM = DIM // NUM_HEADS
KINDS = [True, "affine"]
FREQS = make_freqs(SELF.num_tokens)


def call(layer, scene=SELF, x=None, **options):
    """The output of any layer that takes groups, or none."""
    core = getattr(layer, "mixed_attention", layer)
    if core.use_rope and "freqs" not in options:
        options["freqs"] = make_freqs(scene.num_tokens)
    x = make_x(scene) if x is None else x
    if isinstance(layer, ma.MixedAttention):
        return tensor_of(layer(x, scene.specs, scene.patterns, **options))
    return tensor_of(layer(x, scene.specs, **options) if core is not layer else layer(x, **options))


@pytest.mark.parametrize("qk_norm", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-4])
def test_definition(dtype, qk_norm, magnitude):
    """As the framework has it, eps included, which of 16-bit numbers is that of fp32."""
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 2, 16) * magnitude).to(dtype)
    weight = torch.randn(16).to(dtype) if qk_norm == "affine" else None
    normed, expected = rms_norm(x, weight), F.rms_norm(x, (16,), weight)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


LAYERS = {
    "mixed": ma.MixedAttention,
    "separate": ma.noether.MixedAttention,
    "dense": ma.DotProductAttention,
    "separate dense": ma.noether.DotProductAttention,
    "self": ma.SelfAnchorAttention,
    "cross": ma.CrossAnchorAttention,
    "separate joint": ma.noether.JointAnchorAttention,
}
SCENE_OF = {"dense": "dense", "separate dense": "dense", "cross": "cross", "separate joint": "joint"}


@pytest.mark.parametrize("use_rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("qk_norm", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, qk_norm, use_rope):
    layer = make_layer(LAYERS[name], qk_norm=qk_norm, use_rope=use_rope)
    scene = SCENES[SCENE_OF.get(name, "self")]
    x, freqs = make_x(scene), make_freqs(scene.num_tokens) if use_rope else None
    out, expected = call(layer, scene, x), oracle(layer, x, scene.counts(), freqs)
    wanted = [x, *layer.parameters()]
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("options", [{"parallel": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("qk_norm", KINDS)
def test_ways_to_compute(qk_norm, options):
    layer = make_layer(ma.MixedAttention, qk_norm=qk_norm, use_rope=True, **options)
    x = make_x(JOINT)
    assert_equal_in_fp64(call(layer, JOINT, x), oracle(layer, x, JOINT.counts(), FREQS))


def test_legacy_frequencies_are_applied_after_the_norm():
    layer = make_layer(ma.MixedAttention, qk_norm=True, use_rope=True)
    x = make_x(SELF)
    angles = (torch.rand(1, SELF.num_tokens, HEAD_DIM, dtype=torch.float64),)
    q, k, v = layer.qkv(x).unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).unbind(2)
    q, k = (ma.apply_rope(F.rms_norm(t, (HEAD_DIM,)), angles) for t in (q, k))
    expected = ma.reference.attention(q, k, v, ma.AttentionPlan.compile(SELF.specs, SELF.patterns)).flatten(2)
    assert_equal_in_fp64(call(layer, SELF, x, freqs=angles), layer.proj(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("qk_norm", KINDS)
def test_precision(qk_norm, dtype, autocast):
    """At most twice as far from fp64 as the framework's own functions in the same dtype."""
    if autocast and dtype == torch.float32:
        pytest.skip("autocast has no fp32")
    made = torch.float32 if autocast else dtype
    layer = make_layer(ma.MixedAttention, dtype=made, qk_norm=qk_norm, use_rope=True)
    exact = copy.deepcopy(layer).double()
    x = make_x(SELF, dtype=made)
    truth_x = x.detach().double().requires_grad_()
    truth = oracle(exact, truth_x, SELF.counts(), FREQS)
    truths = truth, *gradients(truth, [truth_x, *exact.parameters()])
    results = []
    with torch.autocast("cpu", dtype, enabled=autocast):
        outs = call(layer, SELF, x), oracle(layer, x, SELF.counts().to(made), FREQS.to(torch.complex64))
    for out in outs:
        results.append((out, *gradients(out, [x, *layer.parameters()])))
    for name, ours, theirs, right in zip(["out", "x", *dict(layer.named_parameters())], *results, truths):
        errors = [(t.double() - right).norm() / right.norm() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("cls", [ma.PerceiverAttention, ma.noether.PerceiverAttention])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("qk_norm", KINDS)
def test_perceiver(cls, qk_norm, masked):
    layer = make_layer(cls, qk_norm=qk_norm, use_rope=True, kv_dim=5)
    torch.manual_seed(1)
    x, tokens = make_x(SELF), torch.randn(2, 9, 5, dtype=torch.float64)
    q_freqs, k_freqs = FREQS, make_freqs(9)
    mask = torch.rand(2, 1, SELF.num_tokens, 9) > 0.3 if masked else None
    keys = layer.kv(tokens).chunk(2, -1) if hasattr(layer, "kv") else (layer.k(tokens), layer.v(tokens))
    q, k, v = (t.unflatten(-1, (NUM_HEADS, HEAD_DIM)) for t in (layer.q(x), *keys))
    q = ma.apply_rope(F.rms_norm(q, (HEAD_DIM,), layer.q_norm.weight), q_freqs)
    k = ma.apply_rope(F.rms_norm(k, (HEAD_DIM,), layer.k_norm.weight), k_freqs)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    expected = layer.proj(expected.transpose(1, 2).flatten(2))
    options = {} if cls is ma.noether.PerceiverAttention else {"return_kv_cache": True}
    out, cached = layer(x, tokens, mask, q_freqs=q_freqs, k_freqs=k_freqs, **options)
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(cached["k"], k.transpose(1, 2))
    again = tensor_of(layer(x, None, mask, q_freqs=q_freqs, kv_cache=cached))
    assert_equal_in_fp64(again, expected)


@pytest.mark.parametrize("read", ["all", "one"])
@pytest.mark.parametrize("qk_norm", KINDS)
def test_keys_of_a_cache_are_normalised_once(qk_norm, read):
    layer = make_layer(ma.MixedAttention, qk_norm=qk_norm, use_rope=True)
    x = make_x(JOINT)
    out, cache = layer(x, JOINT.specs, JOINT.patterns, freqs=FREQS, return_kv_cache=True)
    k = layer.qkv(x).chunk(3, -1)[1].unflatten(-1, (NUM_HEADS, HEAD_DIM))
    k = ma.apply_rope(F.rms_norm(k, (HEAD_DIM,), layer.k_norm.weight), FREQS).transpose(1, 2)
    assert_equal_in_fp64(cache[GROUPS[0]]["k"], k[:, :, JOINT.rows(GROUPS[0])])
    left_out = [GROUPS[0], GROUPS[2]] if read == "all" else [GROUPS[2]]
    specs = [ma.TokenSpec(spec.name, None if spec.name in left_out else spec.size) for spec in JOINT.specs]
    rows = JOINT.rows(*(name for name in GROUPS if name not in left_out))
    chunk = layer(x[:, rows], specs, JOINT.patterns, freqs=FREQS[:, rows], kv_cache=cache)
    assert_equal_in_fp64(chunk, out[:, rows])


def test_untied_projections_share_the_norms():
    torch.manual_seed(0)
    config = {"dim": DIM, "num_heads": NUM_HEADS, "num_types": 2, "init_weights": "torch", "qk_norm": "affine"}
    untied = ma.noether.UntiedMixedAttention(config).double()
    tied = make_layer(ma.noether.MixedAttention, qk_norm="affine")
    state = {}
    for name, value in tied.state_dict().items():
        state |= {name: value} if "norm" in name else {f"{name}.{domain}": value for domain in range(2)}
    untied.load_state_dict(state, strict=True)
    x = make_x(CROSS)
    assert_equal_in_fp64(untied(x, CROSS.specs, CROSS.patterns), call(tied, CROSS, x))


# One kernel for the norm and the rotation.

FREQS_OF = {
    "rotations": FREQS,
    "of any size": FREQS * torch.linspace(-2, 2, 2 * SELF.num_tokens)[::2, None],
    "some of them zero": FREQS * (torch.arange(HEAD_DIM // 2) % 2),
    "for each sequence": torch.cat((FREQS, FREQS.conj())).resolve_conj(),
    "none": None,
}
THROUGH_MODULES = lambda *_: None  # noqa: E731  a hook that changes nothing, but that the norms are called for


@pytest.fixture(params=["packed", "in parts", "separate", "in steps"])
def fused(request, monkeypatch):
    """A layer whose norms the kernels take, and what it is called with; calling a norm's function is an error."""
    scene = CROSS if request.param == "in parts" else JOINT

    def make(use_rope=True, dtype=torch.float64, **config):
        if request.param == "in parts":
            monkeypatch.setattr("mixed_attention.layers.mixed._pays_to_skip", lambda *_: True)
        if request.param == "in steps":
            monkeypatch.setattr(ma.MixedAttention, "_at_once", lambda *_, **__: None)
        cls = ma.noether.MixedAttention if request.param == "separate" else ma.MixedAttention
        layer = make_layer(cls, dtype=dtype, qk_norm=True, use_rope=use_rope, **config)
        by_modules = copy.deepcopy(layer)
        for norm in (by_modules.q_norm, by_modules.k_norm):
            norm.register_forward_hook(THROUGH_MODULES)
        return layer, by_modules, scene

    return make


def results_of(layer, scene, x, freqs):
    out = call(layer, scene, x, **({} if freqs is None else {"freqs": freqs}))
    return out, *gradients(out, [x, *layer.parameters()])


@pytest.mark.parametrize("freqs", FREQS_OF.values(), ids=FREQS_OF)
def test_kernels_do_what_the_modules_do(fused, freqs, monkeypatch):
    layer, by_modules, scene = fused(freqs is not None)
    x = make_x(scene)
    expected = results_of(by_modules, scene, x, freqs)
    monkeypatch.setattr("mixed_attention.layers.norm.rms_norm", None)
    assert_equal_in_fp64(results_of(layer, scene, x, freqs), expected)
    with torch.no_grad():
        assert_equal_in_fp64(call(layer, scene, x, **({} if freqs is None else {"freqs": freqs})), expected[0])


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_are_as_exact_as_the_modules(fused, dtype, magnitude):
    layer, by_modules, scene = fused(dtype=dtype)
    x = (magnitude * make_x(scene, dtype=torch.float64).detach()).to(dtype).requires_grad_()
    exact = copy.deepcopy(layer).double()
    right = results_of(exact, scene, x.detach().double().requires_grad_(), FREQS)
    freqs = FREQS.to(torch.complex64)
    for ours, theirs, truth in zip(*(results_of(m, scene, x, freqs) for m in (layer, by_modules)), right):
        errors = [(t.double() - truth).norm() / truth.norm() for t in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps


def test_gradients_of_recorded_keys_and_of_a_kept_graph(fused):
    layer, by_modules, scene = fused()
    found = []
    for each in (layer, by_modules):
        x = make_x(scene)
        options = {"return_kv_cache": True} if type(each) is ma.MixedAttention else {}
        out, cache = each(x, scene.specs, scene.patterns, freqs=FREQS, **options)
        keys = [entry[name].square().sum() for entry in cache.values() for name in ("k", "v")]
        loss = out.square().sum() + sum(keys)
        wanted = [x, *each.parameters()]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, create_graph=True)
        squares = sum(g.square().sum() for g in again)
        second = torch.autograd.grad(squares, wanted, materialize_grads=True, retain_graph=True)
        batched = torch.autograd.grad(
            out, x, torch.stack((torch.ones_like(out), out.detach())), is_grads_batched=True, retain_graph=True
        )
        found.append((*first, *again, *second, *batched))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class Passing(TorchDispatchMode):
    """Sees every operation, and calls it as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("watched", [(True, False), (False, True), (True, True)], ids=["forward", "backward", "both"])
def test_modes_that_see_every_operation(fused, watched, checkpointed):
    """Around a part of a step or all of it; what a checkpoint recomputes under one is what it has saved."""
    layer, by_modules, scene = fused()
    x = make_x(scene)
    expected = results_of(by_modules, scene, x, FREQS)
    run = partial(call, layer, scene, freqs=FREQS)
    with Passing() if watched[0] else nullcontext():
        out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    with Passing() if watched[1] else nullcontext():
        grads = gradients(out, [x, *layer.parameters()])
    assert_equal_in_fp64((out, *grads), expected)


def test_a_trace_by_modes_serves_other_tokens(fused):
    layer, _, scene = fused()

    def step(x):
        out = call(layer, scene, x, freqs=FREQS)
        return out, *torch.autograd.grad(out.square().sum(), x)

    traced = make_fx(step)(make_x(scene))
    other = make_x(scene, seed=7)
    with torch.no_grad():
        results = traced(other.detach())
    assert_equal_in_fp64(results, step(other))


def test_head_dims_that_are_odd():
    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=15, num_heads=3, qk_norm=True)).double()
    torch.manual_seed(0)
    x = torch.randn(2, JOINT.num_tokens, 15, dtype=torch.float64, requires_grad=True)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 5)).unbind(2)
    q, k = (F.rms_norm(t, (5,)) for t in (q, k))
    expected = ma.reference.attention(q, k, v, ma.AttentionPlan.compile(JOINT.specs, JOINT.patterns)).flatten(2)
    assert_equal_in_fp64(layer(x, JOINT.specs, JOINT.patterns), layer.proj(expected))


# Transforms.


@pytest.mark.parametrize("qk_norm", KINDS)
def test_second_and_forward_derivatives(qk_norm):
    layer = make_layer(ma.MixedAttention, qk_norm=qk_norm, use_rope=True)
    x, direction = make_x(SELF, batch_size=1).detach(), torch.randn(1, SELF.num_tokens, DIM, dtype=torch.float64)
    ours, theirs = partial(call, layer, SELF, freqs=FREQS), lambda x: oracle(layer, x, SELF.counts(), FREQS)
    results = [
        (*torch.func.jvp(f, (x,), (direction,)), torch.func.hessian(lambda x, f=f: f(x).square().sum())(x).sum((0, 1)))
        for f in (ours, theirs)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    seconds = []
    for f in (ours, theirs):
        (grad,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()], materialize_grads=True))
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-7)
    batched = torch.func.vmap(lambda x: ours(x[None])[0])(make_x(SELF))
    assert_equal_in_fp64(batched, call(layer, SELF))


@pytest.mark.parametrize("qk_norm", KINDS)
def test_compiler_and_export(qk_norm):
    layer = make_layer(ma.MixedAttention, dtype=torch.float32, qk_norm=qk_norm, use_rope=True)
    x, freqs = make_x(SELF, dtype=torch.float32), FREQS.to(torch.complex64)
    expected = call(layer, SELF, x, freqs=freqs)
    wanted = [x, *layer.parameters()]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, SELF.specs, SELF.patterns, freqs=freqs)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradients(compiled, wanted), gradients(expected, wanted), rtol=1e-4, atol=1e-5)

    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, freqs):
            return self.layer(x, SELF.specs, SELF.patterns, freqs=freqs)

    torch.testing.assert_close(torch.export.export(Closed(), (x, freqs)).module()(x, freqs), expected)
    assert call(copy.deepcopy(layer).to("meta"), SELF, x.to("meta"), freqs=freqs.to("meta")).shape == expected.shape


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    layer = make_layer(ma.MixedAttention, qk_norm="affine", use_rope=True)
    x = make_x(SELF)
    wanted = [x, *layer.parameters()]
    expected = []
    for run in (
        lambda x: call(layer, SELF, x),
        lambda x: checkpoint(partial(call, layer, SELF), x, use_reentrant=use_reentrant),
    ):
        for each in wanted:
            each.grad = None
        run(x).square().sum().backward()
        expected.append([each.grad.clone() for each in wanted])
    assert_equal_in_fp64(*expected)


# Modules and their parameters.


@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention, ma.PerceiverAttention])
def test_weights(cls):
    config = {"dim": DIM, "num_heads": NUM_HEADS}
    torch.manual_seed(0)
    plain, state = cls(config), torch.get_rng_state()
    names = list(plain.state_dict())
    for qk_norm, more in ((False, []), (True, []), ("affine", ["q_norm.weight", "k_norm.weight"])):
        torch.manual_seed(0)
        layer = cls(config | {"qk_norm": qk_norm})
        assert torch.equal(torch.get_rng_state(), state)
        assert list(layer.state_dict()) == names + more
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in plain.state_dict().items())
        assert all(torch.equal(layer.state_dict()[name], torch.ones(HEAD_DIM)) for name in more)
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 7.0)
        layer.reset_parameters()
        assert all(torch.equal(layer.state_dict()[name], torch.ones(HEAD_DIM)) for name in more)
    with torch.device("meta"):
        deferred = cls(config | {"qk_norm": "affine"})
    deferred.to_empty(device="cpu")
    for module in deferred.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(deferred.q_norm.weight, torch.ones(HEAD_DIM))


def test_checkpoints_of_either_layout():
    fused, separate = (make_layer(cls, qk_norm="affine") for cls in (ma.MixedAttention, ma.noether.MixedAttention))
    x = make_x(SELF)
    expected = call(fused, SELF, x)
    with torch.no_grad():
        for parameter in separate.parameters():
            parameter.fill_(0.5)
    separate.load_state_dict(fused.state_dict(), strict=True)
    assert_equal_in_fp64(call(separate, SELF, x), expected)
    converted = ma.checkpoint.convert_state_dict(fused.state_dict(), "separate")
    assert converted.keys() == separate.state_dict().keys()
    back = ma.checkpoint.convert_state_dict(converted, "fused")
    assert back.keys() == fused.state_dict().keys()
    fused.load_state_dict(back, strict=True)
    with pytest.raises(RuntimeError, match="q_norm.weight"):
        make_layer(ma.MixedAttention).load_state_dict(back, strict=True)
    with pytest.raises(RuntimeError, match="q_norm.weight"):
        fused.load_state_dict(make_layer(ma.MixedAttention).state_dict(), strict=True)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_hooks_and_other_modules_in_the_place_of_norms(name):
    layer, x = make_layer(ma.MixedAttention, qk_norm=True, use_rope=True), make_x(SELF)
    weights = {"q_norm": None, "k_norm": None, name: torch.full((HEAD_DIM,), 2.0, dtype=torch.float64)}
    affine = make_layer(ma.MixedAttention, qk_norm="affine", use_rope=True)
    affine.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for each, weight in weights.items():
            getattr(affine, each).weight.copy_(torch.ones(HEAD_DIM) if weight is None else weight)
    expected = call(affine, SELF, x)
    held = []

    def doubled(module, arguments, out):
        held.append((2 * out, (2 * out).clone()))
        return held[-1][0]

    handle = getattr(layer, name).register_forward_hook(doubled)
    out = call(layer, SELF, x)
    out.sum().backward()
    assert_equal_in_fp64(out, expected)
    assert all(torch.equal(now, before) for now, before in held) and held
    handle.remove()

    class Doubled(nn.Module):
        def forward(self, x):
            return 2.0 * rms_norm(x).float()

    setattr(layer, name, Doubled())
    torch.testing.assert_close(call(layer, SELF, x), expected, rtol=1e-5, atol=1e-5)


def test_nothing_that_a_norm_has_seen_is_overwritten():
    layer, x = make_layer(ma.MixedAttention, qk_norm=True, use_rope=True), make_x(CROSS)
    seen = []
    for norm in (layer.q_norm, layer.k_norm):
        norm.register_forward_hook(lambda _, given, out: seen.extend((t, t.clone()) for t in (given[0], out)))
    call(layer, CROSS, x).sum().backward()
    assert len(seen) == 4
    assert all(torch.equal(now, before) for now, before in seen)


# Configurations.


@pytest.mark.parametrize("value", [None, "true", 2, "rms", [True]], ids=str)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="qk_norm: expected True, False or 'affine'"):
        ma.MixedAttentionConfig(DIM, NUM_HEADS, qk_norm=value)


CONFIGS = [ma.DotProductAttentionConfig, ma.MixedAttentionConfig, ma.PerceiverAttentionConfig]
HARMLESS = {
    "attn_impl": "sdpa",
    "head_dim": 7,
    "eps": 1e-6,
    "drop_path": 0.1,
    "mlp_expansion_factor": 4,
    "mlp_bias": True,
    "norm": "rms",
    "norm_eps": 1e-5,
    "pre_norm": True,
    "norm_constructor": nn.LayerNorm,
    "layer_scale": 1e-4,
    "layerscale": 1e-4,
    "condition_dim": 3,
    "branches": ["a"],
    "kv_dim": 5,
    "rope_theta": 100,
    "max_wavelength": 100,
    "mask_ratio": 0.5,
    "causal": False,
    "is_causal": None,
    "window_size": (-1, -1),
    "sliding_window": None,
    "softmax_scale": HEAD_DIM**-0.5,
    "scale": None,
    "qkv_bias": True,
    "num_kv_heads": NUM_HEADS,
    "attn_dropout": 0.0,
    "qk_norm": False,
    "use_bias": True,
    "dropout_p": 0.0,
    "attn_pdrop": 0.0,
    "v_head_dim": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "linear_attention": False,
    "attention_activation": "softmax",
    "use_rotary": False,
    "rope": {"theta": 100},
    "partial_rotary_factor": 0.5,
    "rotary_dim": 4,
}
HARMFUL = {
    "q_norm": True,
    "k_norm": "rms",
    "use_qk_norm": True,
    "qk_layernorm": True,
    "qk_rms_norm": True,
    "qk_norm_eps": 1e-3,
    "normalize_qk": True,
    "qknorm": True,
    "causal": True,
    "is_causal": True,
    "window_size": 128,
    "sliding_window": (64, 64),
    "softcap": 50.0,
    "attn_logit_softcapping": 30,
    "use_alibi": True,
    "alibi_slopes": (0.5, 0.25),
    "attn_mask": "causal",
    "attention_bias": True,
    "relative_position_bias": True,
    "rel_pos_bias": True,
    "qkv_bias": False,
    "softmax_scale": 1.0,
    "qk_scale": 0.3,
    "logit_scale": 10.0,
    "scale": 3.0,
    "temperature": 0.5,
    "num_kv_heads": 1,
    "attn_dropout": 0.1,
    "attention_sinks": 4,
    "use_bias": False,
    "dropout_p": 0.1,
    "attn_pdrop": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "v_head_dim": HEAD_DIM + 8,
    "dim_head": HEAD_DIM + 8,
    "linear_attention": True,
    "cosine_attention": True,
    "differential_attention": True,
    "attention_activation": "relu",
    "softmax": "sigmoid",
    "use_rotary": True,
    "rotary_embedding": True,
    "rope": True,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", HARMLESS)
def test_fields_of_other_modules_and_values_that_change_nothing_pass(config, name):
    config(dim=DIM, num_heads=NUM_HEADS, **{name: HARMLESS[name]})


class Slots:
    __slots__ = ("dim", "fields", "num_heads")

    def __init__(self, fields):
        self.dim, self.num_heads, self.fields = DIM, NUM_HEADS, fields

    def __getattr__(self, name):
        if name in self.fields:
            return self.fields[name]
        raise AttributeError(name)

    def __dir__(self):
        return [*super().__dir__(), *self.fields]


class Pydantic(Slots):
    def model_dump(self):
        return {"dim": DIM, "num_heads": NUM_HEADS, **self.fields}


SOURCES = {
    "mapping": lambda fields: {"dim": DIM, "num_heads": NUM_HEADS, **fields},
    "slots": Slots,
    "class": lambda fields: type("Config", (), {"dim": DIM, "num_heads": NUM_HEADS, **fields}),
    "object": lambda fields: type("Config", (), {"dim": DIM, "num_heads": NUM_HEADS, **fields})(),
    "pydantic": Pydantic,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", HARMFUL)
def test_fields_that_would_change_results_are_refused_by_name(source, name):
    with pytest.raises(ValueError, match=f"^{name}: this field is not known here"):
        ma.MixedAttention(SOURCES[source]({name: HARMFUL[name]}))


@pytest.mark.parametrize(("name", "value"), [("partial_rotary_factor", 0.5), ("rotary_pct", 0.25), ("rotary_dim", 4)])
def test_rotations_of_some_channels_are_refused_where_there_are_rotations(name, value):
    with pytest.raises(ValueError, match=f"^{name}: this field is not known here"):
        ma.MixedAttentionConfig(DIM, NUM_HEADS, use_rope=True, **{name: value})
    for whole in (1.0, None) if name != "rotary_dim" else (HEAD_DIM,):
        ma.MixedAttentionConfig(DIM, NUM_HEADS, use_rope=True, **{name: whole})


def test_implementations_change_nothing():
    x = make_x(SELF)
    layers = [make_layer(ma.MixedAttention, attn_impl=each, head_dim=5) for each in ("sdpa", "kernels-community/any")]
    assert torch.equal(*(call(layer, SELF, x) for layer in layers))


# Modules of upstream's in a model.


class UpstreamMixed(nn.Module):
    """Only what is published is re-made: names, parameters and what is computed."""

    def __init__(self, qk_norm, weights=False):
        super().__init__()
        self.num_heads, self.head_dim, self.use_rope, self.dropout = NUM_HEADS, HEAD_DIM, False, 0.0
        self.normed = qk_norm
        for name in ("q", "k", "v", "proj"):
            self.add_module(name, nn.Linear(DIM, DIM))
        if weights:
            self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
            nn.init.normal_(self.q_norm.weight)

    def forward(self, x, token_specs, attention_patterns):
        q, k, v = (layer(x).unflatten(-1, (NUM_HEADS, HEAD_DIM)) for layer in (self.q, self.k, self.v))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.normed:
            q, k = (F.rms_norm(t, (HEAD_DIM,)) for t in (q, k))
        plan = ma.AttentionPlan.compile(token_specs, attention_patterns)
        return self.proj(ma.reference.attention(q, k, v, plan).flatten(2)), None


def upstream(qk_norm, told="attribute", **options):
    module = type("MixedAttention", (UpstreamMixed,), {"__module__": "noether.modeling.modules.attention"})(
        qk_norm, **options
    )
    if told == "attribute":
        module.qk_norm = qk_norm
    elif told == "config":
        module.config = type("Config", (), {})()
        module.config.qk_norm = qk_norm
    return module


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, SELF.specs, SELF.patterns)[0]
        return x


@pytest.mark.parametrize("told", ["attribute", "config"])
def test_swap_keeps_norms_of_models_that_mix_both(told):
    torch.manual_seed(0)
    layers = (
        upstream(True, told),
        upstream(False, told),
        upstream(True, told, weights=True),
        upstream(True, "", weights=True),
    )
    model = Model(*layers).double().eval()
    x = make_x(SELF)
    wanted = [x, *model.parameters()]
    expected, state = model(x), list(model.state_dict())
    assert ma.noether.swap(model) == 4
    assert list(model.state_dict()) == state
    out = model(x)
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))
    assert [bool(layer.qk_norm) for layer in model.layers] == [True, False, True, True]
    assert isinstance(model.layers[0].q_norm, RMSNorm) and not model.layers[0].q_norm.training
    assert isinstance(model.layers[2].q_norm, nn.RMSNorm) and not isinstance(model.layers[2].q_norm, RMSNorm)


def test_swap_refuses_norms_that_are_others():
    alone, silent = upstream(True, weights=True), upstream(False, "")
    del alone.k_norm
    silent.k_norm = nn.RMSNorm(HEAD_DIM, elementwise_affine=False)
    wide = upstream(True, weights=True)
    wide.q_norm = nn.RMSNorm(DIM)
    layernorm, causal = upstream("layernorm"), upstream(False)
    causal.is_causal = True
    for layer, message in {
        alone: r"unknown parameters, .* got \['q_norm.weight'\]",
        silent: "expected both q_norm and k_norm, got k_norm alone",
        wide: r"q_norm.weight: expected shape \(8,\), .* got \(24,\)",
        layernorm: "qk_norm: expected True, False or 'affine', got 'layernorm'",
        causal: "is_causal: this field is not known here",
    }.items():
        with pytest.raises(ValueError, match=message):
            ma.noether.swap(Model(layer))
