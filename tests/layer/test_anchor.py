import pytest
import torch
from layers import CROSS, DIM, GROUPS, JOINT, NUM_HEADS, SELF, make_freqs, make_layer, make_x, tensor_of

import mixed_attention as ma

SIBLINGS = {
    "self": (ma.SelfAnchorAttention, SELF),
    "cross": (ma.CrossAnchorAttention, CROSS),
    "joint": (ma.JointAnchorAttention, JOINT),
}
ADAPTERS = {
    "self": ma.noether.SelfAnchorAttention,
    "cross": ma.noether.CrossAnchorAttention,
    "joint": ma.noether.JointAnchorAttention,
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_patterns_are_derived_from_names(name):
    cls, scene = SIBLINGS[name]
    sibling, x = make_layer(cls, use_rope=True), make_x(scene)
    freqs = make_freqs(scene.num_tokens)
    patterns = sibling._create_attention_patterns(scene.specs)
    assert [(list(p.query_tokens), list(p.key_value_tokens)) for p in patterns] == scene.attends
    expected = sibling.mixed_attention(x, scene.specs, scene.patterns, freqs=freqs)
    assert torch.equal(sibling(x, scene.specs, freqs), expected)
    assert torch.equal(sibling(x, scene.specs, freqs=freqs), expected)
    adapter = make_layer(ADAPTERS[name], use_rope=True)
    adapter.load_state_dict(sibling.state_dict())
    assert torch.equal(adapter(x, scene.specs, None, freqs)[0], expected)


def test_three_branches():
    sibling = make_layer(ma.CrossAnchorAttention, branches=("a", "b", "c"))
    assert sibling.branches == ["a", "b", "c"]
    specs = [ma.TokenSpec(name, 1) for name in ("b_anchors", "c_anchors", "a_points", "a_anchors")]
    patterns = sibling._create_attention_patterns(specs)
    assert [(p.query_tokens, p.key_value_tokens) for p in patterns] == [
        (("a_points", "a_anchors"), ("b_anchors", "c_anchors")),
        (("b_anchors",), ("a_anchors", "c_anchors")),
        (("c_anchors",), ("a_anchors", "b_anchors")),
    ]


def test_any_suffix():
    sibling = make_layer(ma.SelfAnchorAttention, branches=["surface"], anchor_suffix="_queries")
    specs = [ma.TokenSpec("surface_points", 2), ma.TokenSpec("surface_queries", 3)]
    (pattern,) = sibling._create_attention_patterns(specs)
    assert pattern.key_value_tokens == ("surface_queries",)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    out, cache = sibling(x, specs, return_kv_cache=True)
    assert list(cache) == ["surface_queries"]
    cached = [specs[0], ma.TokenSpec("surface_queries", None)]
    torch.testing.assert_close(sibling(x[:, :2], cached, kv_cache=cache), out[:, :2], rtol=0, atol=1e-14)


ERRORS = {
    "unexpected": (ma.UnexpectedTokenError, "Unexpected token", ["surface_anchors", "volume_anchors", "wing_anchors"]),
    "no tokens": (ma.MissingBranchTokensError, "'volume' has no tokens present", ["surface_anchors"]),
    "no anchors": (
        ma.MissingAnchorTokenError,
        "'volume' is missing its required anchor token group 'volume_anchors'",
        ["surface_anchors", "volume_queries"],
    ),
}


@pytest.mark.parametrize("cls", [*(cls for cls, _ in SIBLINGS.values()), *ADAPTERS.values()])
@pytest.mark.parametrize("name", ERRORS)
def test_names_that_do_not_fit_the_branches(cls, name):
    error, message, names = ERRORS[name]
    specs = [ma.TokenSpec(group, 1) for group in names]
    with pytest.raises(error, match=message) as info:
        make_layer(cls)(torch.ones(1, 99, DIM, dtype=torch.float64), specs, freqs=make_freqs(99))  # wrong besides
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    "specs", [[("surface_anchors", 6)], {"surface_anchors": 6}, ["surface_anchors"], None, 6], ids=str
)
@pytest.mark.parametrize("namespace", [ma, ma.noether], ids=["top", "noether"])
def test_groups_of_a_wrong_kind_are_named(namespace, specs):
    with pytest.raises(TypeError, match="^token_specs"):
        make_layer(namespace.SelfAnchorAttention)(make_x(SELF), specs)


def test_names_are_checked_in_order():
    layer, x = make_layer(ma.SelfAnchorAttention), torch.ones(1, 1, DIM, dtype=torch.float64)
    with pytest.raises(ma.UnexpectedTokenError):
        layer(x, [ma.TokenSpec("wing", 1)])
    with pytest.raises(ma.MissingBranchTokensError, match="volume"):
        layer(x, [ma.TokenSpec("surface_queries", 1)])


@pytest.mark.parametrize("cls", [ma.CrossAnchorAttention, ma.JointAnchorAttention])
def test_two_branches_are_needed(cls):
    with pytest.raises(ValueError, match="requires at least two branches"):
        make_layer(cls, branches=["surface"])


@pytest.mark.parametrize("cls", [cls for cls, _ in SIBLINGS.values()])
def test_branches_must_be_given(cls):
    with pytest.raises(ValueError, match="branches: expected a list"):
        cls({"dim": DIM, "num_heads": NUM_HEADS})


@pytest.mark.parametrize("cls", [ma.SelfAnchorAttention, ma.CrossAnchorAttention])
@pytest.mark.parametrize("branches", [["vol", "volume"], ["vol", "vol"]], ids=["prefix", "twice"])
def test_branches_that_begin_alike(cls, branches):
    specs = [ma.TokenSpec(name, 1) for name in ("vol_anchors", "volume_anchors")]
    with pytest.raises(
        ValueError, match=f"cannot be a query in multiple .* branches .'{branches[0]}', '{branches[1]}'."
    ):
        make_layer(cls, branches=branches)(torch.ones(1, 2, DIM, dtype=torch.float64), specs)


def test_joint_attention_takes_branches_that_begin_alike():
    specs = [ma.TokenSpec(name, 2) for name in ("vol_anchors", "volume_anchors")]
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    expected = make_layer(ma.JointAnchorAttention, branches=["vol_", "volume_"], anchor_suffix="anchors")(x, specs)
    assert torch.equal(make_layer(ma.JointAnchorAttention, branches=["vol", "volume"])(x, specs), expected)


@pytest.mark.parametrize("base", [ma.MultiBranchAnchorAttention, ma.noether.MultiBranchAnchorAttention])
def test_subclasses_choose_their_own_patterns(base):
    class ToTheSurface(base):
        def _create_attention_patterns(self, token_specs):
            return [ma.AttentionPattern([spec.name for spec in token_specs], ["surface_anchors"])]

    sibling, x = make_layer(ToTheSurface), make_x(SELF)
    expected = sibling.mixed_attention(x, SELF.specs, [ma.AttentionPattern(GROUPS, GROUPS[:1])])
    assert torch.equal(tensor_of(sibling(x, SELF.specs)), tensor_of(expected))


def test_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        make_layer(ma.MultiBranchAnchorAttention)


def test_mask_is_handed_on():
    sibling, x = make_layer(ma.JointAnchorAttention), make_x(JOINT)
    mask = torch.arange(JOINT.num_tokens)[None] % 3 > 0
    expected = sibling.mixed_attention(x, JOINT.specs, JOINT.patterns, key_padding_mask=mask)
    assert torch.equal(sibling(x, JOINT.specs, key_padding_mask=mask), expected)


def test_seeded_weights_are_those_of_the_layer_inside():
    torch.manual_seed(0)
    alone = ma.MixedAttention({"dim": DIM, "num_heads": NUM_HEADS})
    torch.manual_seed(0)
    sibling = ma.SelfAnchorAttention({"dim": DIM, "num_heads": NUM_HEADS, "branches": ["a"]})
    assert torch.equal(sibling.mixed_attention.qkv.weight, alone.qkv.weight)
    assert list(sibling.state_dict()) == [f"mixed_attention.{name}" for name in alone.state_dict()]
