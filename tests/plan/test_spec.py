import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

import mixed_attention as ma


def test_token_spec_is_a_value():
    spec = ma.TokenSpec("surface_anchors", 100)
    assert spec == ma.TokenSpec(name="surface_anchors", size=100)
    assert len({spec, ma.TokenSpec("surface_anchors", 100), ma.TokenSpec("surface_anchors", 99)}) == 2
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.size = 3


@pytest.mark.parametrize("size", [3, 3.0, "3", torch.tensor(3)], ids=str)
def test_token_spec_takes_whole_numbers_of_any_type(size):
    assert ma.TokenSpec("a", size).size == 3


def test_token_spec_of_size_none_is_legal_but_must_be_written():
    assert ma.TokenSpec("a", None).size is None
    with pytest.raises(TypeError):
        ma.TokenSpec("a")


@pytest.mark.parametrize("size", [-1, 2.5, "many", [1]], ids=str)
def test_token_spec_refuses_other_sizes(size):
    with pytest.raises(ValueError, match="TokenSpec 'a': size must be"):
        ma.TokenSpec("a", size)


def test_token_spec_refuses_a_name_that_is_no_string():
    with pytest.raises(ValueError, match="name must be a string"):
        ma.TokenSpec(3, 3)


def test_token_spec_to_and_from_dict():
    assert ma.TokenSpec.from_dict({"volume_queries": 50}) == ma.TokenSpec("volume_queries", 50)
    assert ma.TokenSpec("volume_queries", 50).to_dict() == {"volume_queries": 50}
    for entry in ({}, {"a": 1, "b": 2}):
        with pytest.raises(ValueError, match="exactly one key-value pair"):
            ma.TokenSpec.from_dict(entry)


@pytest.mark.parametrize(
    "name, domain, attn_type",
    [("surface_anchors", "surface", "anchors"), ("a_b_c", "a", "c"), ("plain", "plain", "plain")],
)
def test_token_spec_reads_its_name(name, domain, attn_type):
    spec = ma.TokenSpec(name, 1)
    assert (spec.domain, spec.attn_type) == (domain, attn_type)


def test_pattern_takes_lists_and_tuples():
    pattern = ma.AttentionPattern(["a", "b"], ("c",))
    assert pattern == ma.AttentionPattern(query_tokens=("a", "b"), key_value_tokens=["c"])
    assert hash(pattern) == hash(ma.AttentionPattern(["a", "b"], ["c"]))


@pytest.mark.parametrize("names", ["abc", {"a"}, (n for n in "ab"), None], ids=["string", "set", "generator", "none"])
@pytest.mark.parametrize("side", ["query_tokens", "key_value_tokens"])
def test_pattern_refuses_what_is_no_sequence_of_names(side, names):
    with pytest.raises(ValueError, match=f"{side} must be a list or tuple"):
        ma.AttentionPattern(**{"query_tokens": ["a"], "key_value_tokens": ["a"], side: names})


def test_pattern_refuses_token_indices():
    with pytest.raises(ValueError, match="must hold group names"):
        ma.AttentionPattern([0], ["a"])


CONFIGS = [
    ma.DotProductAttentionConfig,
    ma.MixedAttentionConfig,
    ma.PerceiverAttentionConfig,
    lambda *args, **kwargs: ma.AnchorAttentionConfig(*args, **{"branches": ["a"], **kwargs}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_config_knows_the_width_by_two_names(config):
    for made in (config(dim=192, num_heads=3), config(hidden_dim=192, num_heads=3), config(192, 3, hidden_dim=192)):
        assert (made.dim, made.hidden_dim, made.head_dim, made.num_heads) == (192, 192, 64, 3)
    with pytest.raises(ValueError, match="two names of one width, got 192 and 96"):
        config(dim=192, hidden_dim=96, num_heads=3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dim": 100, "num_heads": 3}, "must be divisible by 'num_heads'"),
        ({"num_heads": 3}, "dim: expected an integer, got None"),
        ({"dim": 192}, "num_heads: expected an integer, got None"),
        ({"dim": 0, "num_heads": 3}, "dim: expected an integer of at least 1, got 0"),
        ({"dim": 192, "num_heads": 0}, "num_heads: expected an integer of at least 1"),
        ({"dim": 192, "num_heads": 3, "dropout": 1.5}, "dropout: expected a probability, got 1.5"),
        ({"dim": 192, "num_heads": 3, "init_weights": "xavier"}, "init_weights: expected one of .* got 'xavier'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_refuses_what_is_not_allowed(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_keeps_what_it_does_not_know(config):
    made = config(dim=192, num_heads=3, drop_path=0.1, head_dim=7)
    assert made.drop_path == 0.1
    assert made.head_dim == 64
    with pytest.raises(AttributeError, match="no field 'mlp_dim'"):
        _ = made.mlp_dim


def test_config_is_a_value():
    made = ma.MixedAttentionConfig(dim=192, num_heads=3, eps=1e-6)
    assert made == ma.MixedAttentionConfig(hidden_dim=192, num_heads=3, eps=1e-6)
    assert made != ma.MixedAttentionConfig(dim=192, num_heads=3, eps=1e-5)
    assert pickle.loads(pickle.dumps(made)) == made
    assert eval(repr(made), {"MixedAttentionConfig": ma.MixedAttentionConfig}) == made


class PydanticLike:
    """Offers its fields through model_dump() alone."""

    def __init__(self, **fields):
        self._fields = fields

    def model_dump(self):
        return dict(self._fields)


@pytest.mark.parametrize("source", [dict, SimpleNamespace, PydanticLike, ma.AnchorAttentionConfig])
def test_config_is_read_from_whatever_describes_one(source):
    fields = {"hidden_dim": 192, "num_heads": 3, "bias": False, "dropout": 0.25, "branches": ("a", "b")}
    made = ma.AnchorAttentionConfig.of(source(**fields))
    assert (made.dim, made.num_heads, made.bias, made.dropout) == (192, 3, False, 0.25)
    assert made.branches == ["a", "b"]
    assert made.anchor_suffix == "_anchors"


def test_generic_config_carries_the_fields_of_special_modules():
    generic = ma.DotProductAttentionConfig(dim=192, num_heads=3, branches=["a"], kv_dim=7)
    assert ma.AnchorAttentionConfig.of(generic).branches == ["a"]
    assert ma.PerceiverAttentionConfig.of(generic).kv_dim == 7


@pytest.mark.parametrize("branches", [None, [], "surface", [1]], ids=str)
def test_anchor_config_needs_branches(branches):
    with pytest.raises(ValueError, match="branches: expected a list of at least one name prefix"):
        ma.AnchorAttentionConfig(dim=192, num_heads=3, branches=branches)


def test_perceiver_config_defaults_to_keys_as_wide_as_queries():
    assert ma.PerceiverAttentionConfig(dim=192, num_heads=3).kv_dim == 192


@pytest.mark.parametrize(
    "fields", [{"hidden_dim": 0}, {"input_dim": None}, {"max_wavelength": 0.5}, {"implementation": "x"}]
)
def test_rope_config_refuses_what_is_not_allowed(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: expected"):
        ma.RopeFrequencyConfig(**{"hidden_dim": 64, "input_dim": 3, **fields})
