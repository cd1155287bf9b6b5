"""The newest signatures, and the exchange of modules inside a model."""

import copy

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


def upstream(name, package="noether.modeling.modules.attention"):
    """Declares a class of upstream's under its published name."""
    return lambda cls: type(name, (cls,), {"__module__": package})


class UpstreamMixed(Upstream):
    def forward(self, x, token_specs, attention_patterns):
        scene = Scene(
            {spec.name: spec.size for spec in token_specs},
            [(list(p.query_tokens), list(p.key_value_tokens)) for p in attention_patterns],
        )
        out = oracle(self, x, scene.counts())
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
        return oracle(self, x, DENSE.counts())


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


def test_swapped_models_can_be_copied_and_saved():
    model = Model("newest").double()
    x, geometry = make_x(CROSS), torch.randn(2, 9, 5, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    ma.noether.swap(model)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    assert torch.equal(copy.deepcopy(model)(x, geometry), model(x, geometry))
