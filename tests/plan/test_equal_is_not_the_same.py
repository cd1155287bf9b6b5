"""Sizes and names that compare equal to others are the same or refused: no cache hands out what was made of another."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from layers import DIM, SELF, make_layer, make_x

import mixed_attention as ma
from mixed_attention.plan import AttentionPlan


@dataclass
class Spec:
    """A token group of another library, which checks nothing."""

    name: Any
    size: Any


class Size(int):
    pass


class Name(str, enum.Enum):
    A = "a"


PATTERNS = [ma.AttentionPattern(["a"], ["a"])]


def compile_fresh(size, name="a", patterns=PATTERNS):
    ma.plan._compile_cached.cache_clear()
    return AttentionPlan.compile([Spec(name, size)], patterns)


@pytest.mark.parametrize("size", [5.0, np.float64(5), "5", 5 + 0j, np.float32(5), torch.tensor(5.0), [5]], ids=repr)
def test_sizes_that_are_no_integers_are_refused(size):
    for _ in range(2):  # also where an equal one is cached
        with pytest.raises(ValueError, match="token_specs: the size of 'a'|size must be a whole number"):
            AttentionPlan.compile([Spec("a", size)], PATTERNS)
        AttentionPlan.compile([Spec("a", 5)], PATTERNS)


@pytest.mark.parametrize("size", [True, False, np.True_, torch.tensor(True)], ids=repr)
def test_truth_is_no_size(size):
    for _ in range(2):
        with pytest.raises(ValueError, match="must be an integer or None, got"):
            AttentionPlan.compile([Spec("a", size)], PATTERNS)
        AttentionPlan.compile([Spec("a", int(size))], PATTERNS)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        AttentionPlan.compile([Spec("a", -1)], PATTERNS)


@pytest.mark.parametrize("size", [np.int64(5), np.uint8(5), Size(5), torch.tensor(5)], ids=repr)
def test_integers_of_other_classes_are_plain_ones(size):
    plan = compile_fresh(size)
    assert {type(number) for number in (*plan.flat(), plan.groups[0].size, plan.num_queries)} == {int}
    assert plan is AttentionPlan.compile([ma.TokenSpec("a", 5)], PATTERNS)


@pytest.mark.parametrize("size", [5.0, True], ids=repr)
def test_cached_sizes_too(size):
    specs, patterns = [Spec("a", 3), Spec("b", None)], [ma.AttentionPattern(["a", "b"], ["b"])]
    with pytest.raises(ValueError, match="cached: the size of 'b'"):
        AttentionPlan.compile(specs, patterns, cached=[Spec("b", size)])


@pytest.mark.parametrize("name", [Name.A, np.str_("a")], ids=repr)
def test_names_of_other_classes_are_plain_ones(name):
    other = SimpleNamespace(query_tokens=[name], key_value_tokens=(name,))
    for spec, pattern in ((Spec(name, 5), other), (ma.TokenSpec(name, 5), ma.AttentionPattern([name], [name]))):
        ma.plan._compile_cached.cache_clear()
        plan = AttentionPlan.compile([spec], [pattern])
        assert type(plan.groups[0].name) is type(plan.patterns[0][0][0]) is type(plan.patterns[0][1][0]) is str


@pytest.mark.parametrize("name", [1, True, None, b"a"], ids=repr)
def test_names_that_are_no_strings_are_refused(name):
    with pytest.raises(ValueError, match="name must be a string"):
        AttentionPlan.compile([Spec(name, 5)], PATTERNS)


@pytest.mark.parametrize("names", ["a", {"a"}, iter(["a"]), [1]], ids=["string", "set", "iterator", "number"])
def test_patterns_of_other_classes_are_checked_as_ours(names):
    with pytest.raises(ValueError, match="key_value_tokens must"):
        AttentionPlan.compile([Spec("a", 5)], [SimpleNamespace(query_tokens=["a"], key_value_tokens=names)])


X = torch.randn(1, 9, DIM)
KINDS = {
    "tuples for specs": ({"token_specs": [("a", 9)]}, TypeError, r"token_specs: expected .*TokenSpec.* got \('a', 9\)"),
    "names for specs": ({"token_specs": ["a"]}, TypeError, "token_specs: expected .*TokenSpec"),
    "mapping for specs": ({"token_specs": {"a": 9}}, TypeError, "token_specs: expected a list or a tuple, got dict"),
    "one spec": (
        {"token_specs": ma.TokenSpec("a", 9)},
        TypeError,
        "token_specs: expected a list or a tuple, got To",
    ),
    "no specs": ({"token_specs": None}, TypeError, "token_specs: expected a list or a tuple, got NoneType"),
    "tuples for patterns": ({"attention_patterns": [(["a"], ["a"])]}, TypeError, "attention_patterns: .*AttentionPatt"),
    "mapping for patterns": ({"attention_patterns": {"a": "a"}}, TypeError, "attention_patterns: .* got dict"),
    "one pattern": ({"attention_patterns": PATTERNS[0]}, TypeError, "attention_patterns: .* got AttentionPattern"),
    "list for x": ({"x": [1.0]}, TypeError, "x: expected a floating-point tensor .* got list"),
    "numpy for x": ({"x": X.numpy()}, TypeError, "x: expected a floating-point tensor .* got ndarray"),
    "integers for x": ({"x": X.long()}, TypeError, "x: expected a floating-point tensor .* got torch.int64"),
    "complex x": (
        {"x": X.to(torch.complex64)},
        TypeError,
        "x: expected a floating-point tensor .* got torch.complex64",
    ),
    "list for a mask": (
        {"key_padding_mask": [True] * 9},
        ValueError,
        "key_padding_mask: expected a bool tensor.*list",
    ),
    "list for a cache": (
        {"token_specs": [ma.TokenSpec("a", 9), ma.TokenSpec("b", None)], "kv_cache": [{"b": {}}]},
        TypeError,
        "kv_cache: expected the mapping .* got list; .* every block takes its own",
    ),
}


@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.MixedAttention], ids=["fused", "separate"])
@pytest.mark.parametrize("name", KINDS)
def test_arguments_of_the_wrong_kind(name, cls):
    changes, error, message = KINDS[name]
    patterns = [ma.AttentionPattern(["a", "b"], ["a"])] if "kv_cache" in changes else PATTERNS
    arguments = {"x": X, "token_specs": [ma.TokenSpec("a", 9)], "attention_patterns": patterns, **changes}
    with pytest.raises(error, match=message):
        make_layer(cls, dtype=torch.float32)(**arguments)


@pytest.mark.parametrize("freqs", [("angles",), (None,), (X.numpy(),)], ids=["string", "none", "numpy"])
def test_angles_of_the_wrong_kind(freqs):
    layer = make_layer(use_rope=True, dtype=torch.float32)
    with pytest.raises(AssertionError, match="freqs: expected real angles"):
        layer(X, [ma.TokenSpec("a", 9)], PATTERNS, freqs=freqs)


@pytest.mark.parametrize("coords", [[1.0], X.numpy(), torch.tensor(1.0), X[..., :2].to(torch.complex64)], ids=type)
def test_coordinates_of_the_wrong_kind(coords):
    with pytest.raises((TypeError, AssertionError), match="coords: expected"):
        ma.RopeFrequency(8, 2)(coords)


@pytest.mark.parametrize("x", [X[0], X[None]], ids=["rank 2", "rank 4"])
def test_ranks_of_dense_layers(x):
    with pytest.raises(ValueError, match="x: expected tokens"):
        make_layer(ma.DotProductAttention, dtype=torch.float32)(x)
    perceiver = make_layer(ma.PerceiverAttention, dtype=torch.float32, kv_dim=None)
    for q, kv, message in ((x, X, "q: expected tokens"), (X, x, "kv: expected tokens"), (X, None, "kv")):
        with pytest.raises(ValueError, match=message):
            perceiver(q, kv)


@pytest.mark.parametrize("attn_mask", [torch.tensor(1.0), torch.ones(9), [True], "causal"], ids=repr)
def test_masks_of_dense_layers(attn_mask):
    dense = make_layer(ma.DotProductAttention, dtype=torch.float32)
    perceiver = make_layer(ma.PerceiverAttention, dtype=torch.float32, kv_dim=None)
    for call in (lambda: dense(X, attn_mask), lambda: perceiver(X, X, attn_mask)):
        with pytest.raises(ValueError, match="attn_mask: expected a tensor of rank 2 or more"):
            call()


@pytest.mark.parametrize("entry", [[("a", 3)], "a", None, {"a"}], ids=repr)
def test_entries_that_are_no_mappings(entry):
    with pytest.raises(TypeError, match="TokenSpec.from_dict: expected a mapping"):
        ma.TokenSpec.from_dict(entry)


@pytest.mark.parametrize("branches", [3, 2.5, {"a"}, b"a", iter(["a"]), object()], ids=type)
def test_branches_that_are_no_list(branches):
    with pytest.raises(ValueError, match="branches: expected a list of at least one name prefix"):
        ma.AnchorAttentionConfig(dim=8, num_heads=1, branches=branches)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(6), torch.ones(1, 6, 8)], ids=["0", "1", "3"])
@pytest.mark.parametrize("freqs", [torch.ones(1, 6, 4, dtype=torch.complex64), (torch.ones(1, 6, 4),)], ids=type)
def test_ranks_of_what_is_rotated(x, freqs):
    with pytest.raises(ValueError, match=r"x: expected shape \(batch_size, seqlen, num_heads, head_dim\)"):
        ma.apply_rope(x, freqs)


def test_batches_of_a_perceiver():
    q = make_x(SELF)
    with pytest.raises(ValueError, match="kv: expected batch_size 2 or 1 to match q, got 3"):
        make_layer(ma.PerceiverAttention, kv_dim=None)(q, q[:1].expand(3, -1, -1))
