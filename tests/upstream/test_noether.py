"""The newest signatures, and the exchange of modules inside a model."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layers import (
    CROSS,
    DENSE,
    DIM,
    GROUPS,
    JOINT,
    NUM_HEADS,
    SELF,
    SIZES,
    Scene,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
    oracle,
)
from torch import nn

import mixed_attention as ma

FREQS = make_freqs(SELF.num_tokens)


def test_arguments_by_position_and_by_keyword():
    layer, x = make_layer(ma.noether.MixedAttention, use_rope=True), make_x(JOINT)
    mask = torch.arange(JOINT.num_tokens)[None] % 3 > 0
    by_position = layer(x, JOINT.specs, JOINT.patterns, mask, FREQS, None)
    by_keyword = layer(
        x=x,
        token_specs=JOINT.specs,
        attention_patterns=JOINT.patterns,
        key_padding_mask=mask,
        freqs=FREQS,
        kv_cache=None,
    )
    assert torch.equal(by_position[0], by_keyword[0])
    assert list(by_position[1]) == list(by_keyword[1]) == [GROUPS[0], GROUPS[2]]


def test_second_result_is_the_cache_or_none():
    layer, x = make_layer(ma.noether.SelfAnchorAttention, use_rope=True), make_x(SELF)
    out, cache = layer(x, SELF.specs, freqs=FREQS)
    rows = SELF.rows("surface_queries")
    sizes = [None, len(rows), None, 0]
    specs = [ma.TokenSpec(name, size) for name, size in zip(GROUPS, sizes)]
    again, none = layer(x[:, rows], specs, freqs=FREQS[:, rows], kv_cache=cache)
    assert none is None
    assert_equal_in_fp64(again, out[:, rows])


def test_masks_must_be_boolean():
    with pytest.raises(ValueError, match="bool tensor"):
        make_layer(ma.noether.MixedAttention)(make_x(SELF), SELF.specs, SELF.patterns, torch.ones(1, SELF.num_tokens))


def test_dense_attention_returns_a_tensor():
    layer, x = make_layer(ma.noether.DotProductAttention), make_x(DENSE)
    assert_equal_in_fp64(layer(x), oracle(layer, x, DENSE.counts()))


def test_class_relations():
    assert issubclass(ma.noether.MixedAttention, ma.noether.DotProductAttention)
    assert issubclass(ma.noether.SelfAnchorAttention, ma.noether.MultiBranchAnchorAttention)
    assert issubclass(ma.noether.MultiBranchAnchorAttention, ma.MultiBranchAnchorAttention)
    assert ma.noether.MissingAnchorTokenError is ma.MissingAnchorTokenError


def test_rope_frequencies_default_to_the_legacy_form_with_a_warning():
    with pytest.warns(UserWarning, match="'complex' is recommended"):
        rope = ma.noether.RopeFrequency({"hidden_dim": 64, "input_dim": 3})
    assert isinstance(rope(torch.zeros(2, 3)), tuple)
    assert ma.noether.RopeFrequency(64, 3, implementation="complex")(torch.zeros(2, 3)).is_complex()


# Per-domain weights.


def make_untied(num_types=2, **config):
    layer = ma.noether.UntiedMixedAttention(
        {"dim": DIM, "num_heads": NUM_HEADS, "num_types": num_types, "init_weights": "torch", **config}
    )
    return layer.double()


def shared_layer(untied, domain):
    """The tied layer with the weights of one domain."""
    layer = make_layer(ma.noether.MixedAttention, bias=untied.proj.bias is not None, use_rope=untied.use_rope)
    state = untied.state_dict()
    suffix = f".{domain}"
    layer.load_state_dict({key.removesuffix(suffix): value for key, value in state.items() if key.endswith(suffix)})
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_domains_that_attend_to_themselves_are_tied_layers(bias):
    torch.manual_seed(0)
    untied, x = make_untied(use_rope=True, bias=bias), make_x(SELF)
    out = untied(x, SELF.specs, SELF.patterns, freqs=FREQS)
    for domain, name in enumerate(("surface", "volume")):
        rows = SELF.rows(f"{name}_anchors", f"{name}_queries")
        expected, _ = shared_layer(untied, domain)(x, SELF.specs, SELF.patterns, freqs=FREQS)
        assert_equal_in_fp64(out[:, rows], expected[:, rows])


def test_queries_of_one_domain_meet_keys_of_the_other():
    torch.manual_seed(0)
    untied, x = make_untied(), make_x(CROSS)
    q, k, v = [], [], []
    for domain, tokens in enumerate(x.split([11, 11], 1)):
        for slot, layer in zip((q, k, v), (untied.q, untied.k, untied.v)):
            slot.append(F.linear(tokens, layer.weight[domain], layer.bias[domain]).unflatten(-1, (NUM_HEADS, -1)))
    plan = ma.AttentionPlan.compile(CROSS.specs, CROSS.patterns)
    merged = ma.reference.attention(torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1), plan).flatten(2)
    pieces = enumerate(merged.split([11, 11], 1))
    expected = torch.cat([F.linear(t, untied.proj.weight[i], untied.proj.bias[i]) for i, t in pieces], 1)
    out = untied(x, CROSS.specs, CROSS.patterns)
    wanted = [x, *untied.parameters()]
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


def test_weights_do_not_depend_on_the_sizes():
    """The convention is that of linear layers whether the domains are equally long or not."""
    untied = make_untied()
    equal = Scene(dict.fromkeys(GROUPS, 4), SELF.attends)
    x = make_x(equal)
    whole = untied(x, equal.specs, equal.patterns)
    shorter = Scene({**equal.sizes, "volume_queries": 1}, SELF.attends)
    out = untied(x[:, : shorter.num_tokens], shorter.specs, shorter.patterns)
    assert_equal_in_fp64(out, whole[:, : shorter.num_tokens])


def test_published_names_of_untied_parameters():
    names = [
        f"{layer}.{kind}.{i}" for layer in ("q", "k", "v", "proj") for kind in ("weight", "bias") for i in range(3)
    ]
    state = make_untied(num_types=3).state_dict()
    assert list(state) == names
    assert all(value.shape == ((DIM, DIM) if "weight" in name else (DIM,)) for name, value in state.items())


@pytest.mark.parametrize("name", ["q", "k", "v", "proj"])
def test_hooks_on_untied_projections(name):
    torch.manual_seed(0)
    untied, x = make_untied(), make_x(SELF)
    doubled = copy.deepcopy(untied)
    with torch.no_grad():
        for parameter in getattr(doubled, name).parameters():
            parameter.mul_(2)
    getattr(untied, name).register_forward_hook(lambda _, arguments, out: 2 * out)
    assert_equal_in_fp64(untied(x, SELF.specs, SELF.patterns), doubled(x, SELF.specs, SELF.patterns))


def test_mask_with_untied_weights():
    torch.manual_seed(0)
    untied, x = make_untied(), make_x(SELF)
    mask = torch.arange(SELF.num_tokens)[None] % 3 > 0
    expected, _ = shared_layer(untied, 0)(x, SELF.specs, SELF.patterns, mask)
    rows = SELF.rows("surface_anchors", "surface_queries")
    assert_equal_in_fp64(untied(x, SELF.specs, SELF.patterns, mask)[:, rows], expected[:, rows])


def test_errors_of_untied_weights():
    untied, x = make_untied(), make_x(SELF)
    with pytest.raises(NotImplementedError, match="kv_cache is not supported"):
        untied(x, SELF.specs, SELF.patterns, kv_cache={})
    apart = Scene({name: SIZES[name] for name in (GROUPS[0], GROUPS[2], GROUPS[1], GROUPS[3])}, SELF.attends)
    with pytest.raises(ValueError, match="domain 'surface' are not consecutive"):
        untied(x, apart.specs, apart.patterns)
    with pytest.raises(RuntimeError, match="sizes do not match: 2 domains .* 1 weights"):
        make_untied(num_types=1)(x, SELF.specs, SELF.patterns)
    with pytest.raises(TypeError):
        untied(x, SELF.specs, None)
    with pytest.raises(ValueError, match="kv_cache is empty"):
        untied(x[:, 6:], [ma.TokenSpec(GROUPS[0], None), *SELF.specs[1:]], SELF.patterns)
    with pytest.raises(ValueError, match="num_types: expected an integer, got None"):
        make_untied(num_types=None)
    for mode in ("zeros", "truncnormal002-identity"):
        with pytest.raises(NotImplementedError, match="not implemented"):
            make_untied(init_weights=mode)


# Upstream's modules inside a model. Only what is published about them is re-made here: names, attributes, parameters.


class Upstream(nn.Module):
    """An attention as upstream's packages define it, computed densely."""

    def __init__(self, projections, kv_dim=DIM, bias=True):
        super().__init__()
        self.num_heads, self.head_dim = NUM_HEADS, DIM // NUM_HEADS
        self.init_weights, self.use_rope, self.dropout = "truncnormal002", False, 0.0
        for name in projections:
            self.add_module(name, nn.Linear(DIM if name[0] == "q" else kv_dim, DIM * len(name), bias=bias))
        self.proj = nn.Linear(DIM, DIM, bias=bias)
        self.proj_dropout = nn.Dropout(0.0)

    def heads_of(self, x):
        """q, k and v as the projections make them, ``(B, N, H, D)`` each."""
        made = torch.cat([self._modules[name](x) for name in ("qkv", "q", "k", "v") if name in self._modules], -1)
        return made.unflatten(-1, (3, NUM_HEADS, -1)).unbind(2)


def upstream(name, package="noether.modeling.modules.attention"):
    """Declares a class of upstream's under its published name."""
    return lambda cls: type(name, (cls,), {"__module__": package})


class UpstreamMixed(Upstream):
    def forward(self, x, token_specs, attention_patterns):
        plan = ma.AttentionPlan.compile(token_specs, attention_patterns)
        out = self.proj(ma.reference.attention(*self.heads_of(x), plan).flatten(2))
        return (out, {}) if hasattr(self, "q") else out


class UpstreamSibling(nn.Module):
    def __init__(self, core, branches):
        super().__init__()
        self.mixed_attention = core
        self.branches, self.anchor_suffix = branches, "_anchors"

    def forward(self, x, token_specs):
        return self.mixed_attention(x, token_specs, CROSS.patterns)


class UpstreamPerceiver(Upstream):
    def forward(self, q, kv):
        k, v = self.kv(kv).chunk(2, -1) if hasattr(self, "kv") else (self.k(kv), self.v(kv))
        q, k, v = (t.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for t in (self.q(q), k, v))
        out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out if hasattr(self, "kv") else (out, {})


class UpstreamDense(Upstream):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads_of(x))
        return self.proj_dropout(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


LAYOUTS = {
    "newest": ("noether.modeling.modules.attention", ("q", "k", "v"), ("k", "v", "q"), ma.noether),
    "older": ("emmi.modules.attention", ("qkv",), ("kv", "q"), ma),
}


class Model(nn.Module):
    """Blocks as upstream's models arrange them, which take a tensor or a pair."""

    def __init__(self, layout):
        super().__init__()
        package, projections, perceiver_projections, _ = LAYOUTS[layout]
        mixed = upstream("MixedAttention", package)(UpstreamMixed)
        self.dense = upstream("DotProductAttention", package)(UpstreamDense)(projections)
        self.perceiver = upstream("PerceiverAttention", package)(UpstreamPerceiver)(perceiver_projections, kv_dim=5)
        cross = upstream("CrossAnchorAttention", package)(UpstreamSibling)(
            mixed(projections, bias=False), ["surface", "volume"]
        )
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"attention_block": cross}), nn.ModuleDict({"attention_block": cross})]
        )
        self.mixed = nn.Sequential(mixed(projections))
        self.mlp = nn.Linear(DIM, DIM)

    def forward(self, x, geometry):
        x = x + self.dense(x)
        results = [self.perceiver(x, geometry)]
        results += [block["attention_block"](x, CROSS.specs) for block in self.blocks]
        results += [self.mixed[0](x, JOINT.specs, JOINT.patterns)]
        return self.mlp(sum(result[0] if isinstance(result, tuple) else result for result in results))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swap_keeps_what_a_model_computes(layout):
    torch.manual_seed(0)
    model = Model(layout).double()
    x, geometry = make_x(CROSS), torch.randn(2, 9, 5, dtype=torch.float64)
    parameters, state = dict(model.named_parameters()), torch.get_rng_state()
    wanted = [x, *parameters.values()]
    expected = model(x, geometry)
    assert ma.noether.swap(model) == 4
    assert torch.equal(torch.get_rng_state(), state)
    namespace = LAYOUTS[layout][3]
    assert type(model.dense) is namespace.DotProductAttention
    assert type(model.perceiver) is namespace.PerceiverAttention
    assert type(model.mixed[0]) is namespace.MixedAttention
    assert type(model.blocks[0]["attention_block"]) is namespace.CrossAnchorAttention
    assert model.blocks[0]["attention_block"] is model.blocks[1]["attention_block"]
    assert model.dense.init_weights == "truncnormal002"
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    out = model(x, geometry)
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))
    assert ma.noether.swap(model) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_models_learn_along_the_same_curve(layout):
    torch.manual_seed(0)
    model = Model(layout).double()
    swapped = copy.deepcopy(model)
    ma.noether.swap(swapped)
    x, geometry, wanted = make_x(CROSS).detach(), torch.randn(2, 9, 5).double(), torch.randn(2, CROSS.num_tokens, DIM)
    curves = []
    for each in (model, swapped):
        optimizer, losses = torch.optim.Adam(each.parameters(), lr=1e-2), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(each(x, geometry), wanted.double())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-9, atol=0)  # roundings, carried along by ten steps


def test_swap_keeps_mode_rope_dropout_and_branches():
    package, projections, *_ = LAYOUTS["newest"]
    core = upstream("MixedAttention", package)(UpstreamMixed)(projections)
    core.use_rope, core.dropout = True, 0.25
    sibling = upstream("SelfAnchorAttention", package)(UpstreamSibling)(core, ["surface", "volume"])
    sibling.anchor_suffix = "_points"
    model = nn.Sequential(sibling).eval()
    ma.noether.swap(model)
    assert not model[0].training and not model[0].mixed_attention.training
    assert (model[0].branches, model[0].anchor_suffix) == (["surface", "volume"], "_points")
    assert model[0].mixed_attention.use_rope
    assert model[0].mixed_attention.dropout == model[0].mixed_attention.proj_dropout.p == 0.25


def test_swap_leaves_alone_what_is_not_upstreams():
    package, projections, *_ = LAYOUTS["newest"]
    theirs = upstream("MixedAttention", package)(UpstreamMixed)
    derived = type("MixedAttention", (theirs,), {"__module__": "my_project.attention"})(projections)
    untied = upstream("UntiedMixedAttention", package)(UpstreamMixed)(projections)
    model = nn.Sequential(derived, untied, nn.MultiheadAttention(DIM, NUM_HEADS), make_layer())
    children = list(model)
    with pytest.warns(
        UserWarning, match=r"0 \(M.*defined in my_project.attention; 1 \(Untied.*the sizes of the groups$"
    ):
        assert ma.noether.swap(model) == 0
    assert list(model) == children


def test_swap_refuses_what_it_cannot_do():
    package, projections, *_ = LAYOUTS["newest"]
    theirs = upstream("MixedAttention", package)(UpstreamMixed)(projections)
    with pytest.raises(ValueError, match="the model itself is a MixedAttention"):
        ma.noether.swap(theirs)
    theirs.gate = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="MixedAttention: unknown parameters"):
        ma.noether.swap(nn.Sequential(theirs))


# Whatever hangs on a module stays, or the module does.


class Scaled(nn.Linear):
    """An adapter, as far as a layer can tell."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) * self.factor


class Wrapped(nn.Module):
    """An adapter that is no linear layer and shows neither weight nor width."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.down = layer, nn.Linear(DIM, 2, dtype=torch.float64)
        self.up = nn.Linear(2, DIM if layer.out_features == DIM else 3 * DIM, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def scaled(value, factor=1.5):
    if isinstance(value, tuple):
        return tuple(scaled(each, factor) if isinstance(each, torch.Tensor) else each for each in value)
    return value * factor


def parts_of(model):
    """The attentions of a model, the layers inside siblings, and a first projection and the last one of each."""
    sibling = model.blocks[0]["attention_block"]
    cores = {"dense": model.dense, "inner": sibling.mixed_attention, "mixed": model.mixed[0]}
    parts = {**cores, "perceiver": model.perceiver, "sibling": sibling}
    for name, core in cores.items():
        parts[f"{name}.q"] = core.q if hasattr(core, "q") else core.qkv
        parts[f"{name}.proj"] = core.proj
    return parts


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda _, arguments, out: scaled(out)),
    "forward, with keywords": lambda m: m.register_forward_hook(lambda _, a, k, out: scaled(out), with_kwargs=True),
    "forward, always": lambda m: m.register_forward_hook(lambda _, a, out: scaled(out), always_call=True),
    "before forward": lambda m: m.register_forward_pre_hook(lambda _, a: (a[0] * 1.5, *a[1:])),
    "before forward, with keywords": lambda m: m.register_forward_pre_hook(
        lambda _, a, k: ((a[0] * 1.5, *a[1:]), k), with_kwargs=True
    ),
    "backward": lambda m: m.register_full_backward_hook(lambda _, grads_in, grads_out: scaled(grads_in)),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda _, grads_out: scaled(grads_out)),
}


def results(model):
    x, geometry = make_x(CROSS), torch.ones(2, 9, 5, dtype=torch.float64)
    out = model(x, geometry)
    return out, gradients(out, [x, *(p for p in model.parameters() if p.requires_grad)])


def assert_swap_changes_nothing(model, count=4):
    before = results(model)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ma.noether.swap(model) == count
    assert list(model.state_dict()) == list(state)
    assert_equal_in_fp64(results(model), before)
    model.load_state_dict(state)
    assert_equal_in_fp64(results(model), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_stay(layout, kind):
    torch.manual_seed(0)
    model = Model(layout).double()
    without = results(model)
    handles = [HOOKS[kind](part) for part in parts_of(model).values()]
    assert_swap_changes_nothing(model)
    for handle in handles:
        handle.remove()
    assert_equal_in_fp64(results(model), without)


@pytest.mark.parametrize("name", ["dense", "inner", "sibling", "mixed", "perceiver"])
def test_hooks_of_state_dicts_stay_and_see_the_module(name):
    model, seen = Model("newest").double(), []
    part = parts_of(model)[name]
    part.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append(("save before", module)))
    part.register_state_dict_post_hook(lambda module, state, prefix, meta: seen.append(("save", module)))
    part.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("load before", module)))
    part.register_load_state_dict_post_hook(lambda module, keys: seen.append(("load", module)))
    ma.noether.swap(model)
    model.load_state_dict(model.state_dict())
    seen = list(dict.fromkeys(seen))  # a module in two places is saved and loaded twice
    assert seen == [(what, part) for what in ("save before", "save", "load before", "load")]
    assert type(part).__module__.startswith("mixed_attention.")


def test_swapped_layers_load_either_layout():
    torch.manual_seed(0)
    model, other = Model("newest").double(), Model("older").double()
    ma.noether.swap(model)
    for name in ("dense", "mixed.0"):
        model.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
    x = make_x(CROSS)
    assert_equal_in_fp64(model.dense(x), other.dense(x))


def replace_child(adapter, core, name):
    core._modules[name] = adapter(core._modules[name])


def set_forward(core, name):
    layer = core._modules[name]
    layer.forward = lambda x, old=layer.forward: 2 * old(x)


def normalise(core, name):
    nn.utils.parametrizations.weight_norm(core._modules[name])


def round_twice(core, name):
    core._modules[name] = nn.Sequential(core._modules[name], nn.Tanh())


def tie(core, name):
    first = next(layer for layer in core.children() if isinstance(layer, nn.Linear))
    if core._modules[name].weight.shape == first.weight.shape:
        core._modules[name].weight = first.weight


def freeze(core, name):
    core._modules[name].weight.requires_grad_(False)


PROJECTIONS = {
    "adapter": partial(replace_child, Scaled),
    "wrapped": partial(replace_child, Wrapped),
    "forward on the object": set_forward,
    "parametrized": normalise,
    "followed by more": round_twice,
    "tied": tie,
    "frozen": freeze,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("which", ["first", "proj"])
def test_projections_stay_whatever_they_have_become(layout, kind, which):
    torch.manual_seed(0)
    model = Model(layout).double()
    for core in (model.dense, model.mixed[0], model.blocks[0]["attention_block"].mixed_attention):
        PROJECTIONS[kind](core, which if which == "proj" else LAYOUTS[layout][1][0])
    assert_swap_changes_nothing(model)


def test_all_else_that_a_module_holds_stays():
    model = Model("newest").double()
    core, sibling = model.mixed[0], model.blocks[0]["attention_block"]
    references, children = [core, sibling], dict(core.named_modules())
    for part in (core, sibling):
        part.register_buffer("calls", torch.tensor(3))
        part.register_buffer("scratch", torch.ones(2), persistent=False)
        part.tag, part._is_hf_initialized, part.notes = "seventh block", True, ["a list"]
        part.observer = nn.Identity()
    notes, keys = core.notes, list(model.state_dict())
    core.q.eval()
    core.proj_dropout.register_forward_hook(lambda *_: None)
    core.k.weight.requires_grad_(False)
    core.v.weight.tag = "hot"
    modes = {name: module.training for name, module in model.named_modules()}
    ma.noether.swap(model)
    assert [core, sibling] == references and type(core) is ma.noether.MixedAttention
    assert model.mixed[0] is core and model.blocks[1]["attention_block"] is sibling
    assert {**dict(core.named_modules()), "observer": None} == {**children, "observer": None}
    assert list(model.state_dict()) == keys
    assert "mixed.0.calls" in keys and "mixed.0.scratch" not in keys
    for part in (core, sibling):
        assert (part.tag, part._is_hf_initialized, part.calls.item()) == ("seventh block", True, 3)
    assert core.notes is notes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(core.proj_dropout._forward_hooks) == 1
    assert not core.k.weight.requires_grad and core.v.weight.tag == "hot"


@pytest.mark.parametrize("form", [{"dtype": torch.bfloat16}, {"device": "meta"}, {"dtype": torch.float16}], ids=str)
def test_parameters_stay_on_their_device_in_their_dtype(form):
    model = Model("older").to(**form)
    before = [(p.dtype, p.device) for p in model.parameters()]
    ma.noether.swap(model)
    assert [(p.dtype, p.device) for p in model.parameters()] == before
    model.to_empty(device="cpu") if "device" in form else model.to(torch.float32)
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_swap_reaches_modules_in_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    model = Model("newest").double()
    model.dense = checkpoint_wrapper(model.dense)
    model.perceiver = torch.compile(model.perceiver, backend="eager")
    assert_swap_changes_nothing(model)
    assert type(model.perceiver._orig_mod) is ma.noether.PerceiverAttention
    torch._dynamo.reset()


def test_swapped_models_are_copied_with_what_hangs_on_them():
    torch.manual_seed(0)
    model = Model("newest").double()
    for part in parts_of(model).values():
        part.register_forward_hook(hook_that_pickles)
    before = results(model)
    ma.noether.swap(model)
    assert_equal_in_fp64(results(copy.deepcopy(model)), before)


def hook_that_pickles(_, arguments, out):
    return scaled(out)


def test_swapped_layers_are_pickled_as_ours():
    model = Model("newest").double()
    model.dense.register_forward_hook(hook_that_pickles)
    ma.noether.swap(model)
    x = make_x(CROSS)
    assert torch.equal(pickle.loads(pickle.dumps(model.dense))(x), model.dense(x))


def with_forward_set(part):
    part.forward = lambda *arguments, old=part.forward, **options: scaled(old(*arguments, **options))


def compiled_by_itself(part):
    part.compile(backend="eager")


def subclassed(part):
    part.__class__ = type("Gated", (type(part),), {"__module__": "my_project.attention"})


def with_a_method_of_ours(part):
    part._project = lambda *_: None


STRANGE = {
    "'forward' was set on the object": with_forward_set,
    "'_compiled_call_impl' was set on the object": compiled_by_itself,
    "a subclass, defined in my_project.attention": subclassed,
    "'_project' was set on the object": with_a_method_of_ours,
}


@pytest.mark.parametrize("name", ["dense", "mixed", "perceiver"])
@pytest.mark.parametrize("reason", STRANGE)
def test_what_may_compute_something_else_is_left_alone_and_named(reason, name):
    torch.manual_seed(0)
    model = Model("newest").double()
    part = parts_of(model)[name]
    STRANGE[reason](part)
    kind, before = type(part), results(model)
    path = {"mixed": "mixed.0"}.get(name, name)
    with pytest.warns(UserWarning, match=rf"swap left these modules alone: {path} \({kind.__name__}\): .*{reason}"):
        assert ma.noether.swap(model) == 3
    assert type(part) is kind
    assert_equal_in_fp64(results(model), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("reason", list(STRANGE)[:3])
def test_siblings_stay_with_a_layer_that_is_left_alone(reason):
    torch.manual_seed(0)
    model = Model("newest").double()
    sibling = model.blocks[0]["attention_block"]
    STRANGE[reason](sibling.mixed_attention)
    kinds, before = (type(sibling), type(sibling.mixed_attention)), results(model)
    with pytest.warns(UserWarning, match=r"blocks.0.attention_block \(CrossAnchorAttention\): .*mixed_attention"):
        assert ma.noether.swap(model) == 3
    assert (type(sibling), type(sibling.mixed_attention)) == kinds
    assert_equal_in_fp64(results(model), before)
    torch._dynamo.reset()


def test_the_layer_of_a_sibling_that_is_left_alone_is_swapped():
    torch.manual_seed(0)
    model = Model("newest").double()
    sibling = model.blocks[0]["attention_block"]
    with_forward_set(sibling)
    before = results(model)
    with pytest.warns(UserWarning, match="blocks.0.attention_block"):
        assert ma.noether.swap(model) == 4
    assert type(sibling.mixed_attention) is ma.noether.MixedAttention
    assert_equal_in_fp64(results(model), before)


def with_a_parameter(part):
    part.gate = nn.Parameter(torch.ones(1))


def with_a_layer(part):
    part.q_norm = nn.LayerNorm(DIM)


def without_a_projection(part):
    del part._modules["proj"]


def without_heads(part):
    del part.num_heads


def with_no_number_of_heads(part):
    part.num_heads = "many"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_a_parameter, "unknown parameters, expected those of .* got .'gate'"),
        (with_a_layer, "unknown parameters, expected those of .* got .'q_norm.weight', 'q_norm.bias'"),
        (without_a_projection, "expected a layer 'proj', got .'q', 'k', 'v', 'proj_dropout'"),
        (without_heads, "not the published one: .* no attribute 'num_heads'"),
        (with_no_number_of_heads, "not the published one: "),
    ],
)
@pytest.mark.parametrize("name", ["mixed", "inner"])
def test_after_an_error_the_model_is_what_it_was(spoil, message, name):
    torch.manual_seed(0)
    model = Model("newest").double()
    part = parts_of(model)[name]
    spoil(part)

    def snapshot():
        return [
            (path, type(m), list(vars(m)), list(m._modules), len(m._load_state_dict_pre_hooks))
            for path, m in model.named_modules()
        ]

    before = snapshot()
    path = {"mixed": "mixed.0", "inner": "blocks.0.attention_block"}[name]
    with pytest.raises(ValueError, match=path + ".*" + message):
        ma.noether.swap(model)
    assert snapshot() == before


@pytest.mark.parametrize("model", [None, [nn.Linear(2, 2)], nn.Linear])
def test_swap_wants_a_module(model):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got"):
        ma.noether.swap(model)


def test_swapped_models_can_be_copied_and_saved():
    model = Model("newest").double()
    x, geometry = make_x(CROSS), torch.randn(2, 9, 5, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    ma.noether.swap(model)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    assert torch.equal(copy.deepcopy(model)(x, geometry), model(x, geometry))
