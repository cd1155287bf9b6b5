"""A layer by one call of C++: the same numbers as in steps, and no say wherever only the steps are right."""

from contextlib import nullcontext

import hypothesis
import pytest
import torch
from cases import Case
from hypothesis import strategies as st
from layers import JOINT, SELF, make_freqs, make_layer, make_x
from strategies import attends
from torch import nn
from torch.autograd import forward_ad

import mixed_attention as ma
from mixed_attention.eager.at_once import Request

CLASSES = {"fused": ma.MixedAttention, "separate": ma.noether.MixedAttention}


def results(call, layer, x):
    """The tokens, the cache if there is one, and all gradients."""
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    out, recorded = call()
    entries = [entry[key] for entry in (recorded or {}).values() for key in ("k", "v")]
    loss = out.float().square().sum() + sum(entry.float().square().sum() for entry in entries)
    loss.backward()
    return [out, *entries, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("scene", [SELF, JOINT], ids=["self", "joint"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("given", ["", "mask", "record", "dropout"])
def test_at_once_gives_the_bits_of_the_steps(name, scene, use_rope, autocast, given):
    layer = make_layer(CLASSES[name], dtype=torch.float32, use_rope=use_rope, dropout=0.5 * (given == "dropout"))
    x = make_x(scene, dtype=torch.float32)
    freqs = make_freqs(scene.num_tokens) if use_rope else None
    mask = torch.arange(scene.num_tokens)[None] % 3 > 0 if given == "mask" else None
    arguments = x, scene.specs, scene.patterns, mask, freqs

    def run(call, *more):
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            return call(*arguments, *more, record=given == "record")

    got = results(lambda: run(layer._at_once), layer, x)
    for one, other in zip(got, results(lambda: run(layer._in_steps, None), layer, x), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@hypothesis.given(st.data())
def test_any_plan_gives_the_bits_of_the_steps(data):
    """Empty groups and unread ones included: the same weights are dropped."""
    sizes = tuple(data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17]), min_size=1, max_size=5)))
    case = Case(sizes, data.draw(attends(len(sizes))))
    layer = make_layer(dtype=torch.float32, use_rope=True, dropout=0.5)
    x = torch.randn(2, sum(sizes), layer.proj.out_features, requires_grad=True)
    arguments = x, case.specs, case.patterns, None, make_freqs(sum(sizes))
    got = results(lambda: layer._at_once(*arguments, record=False), layer, x)
    expected = results(lambda: layer._in_steps(*arguments, None, record=False), layer, x)
    for one, other in zip(got, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def call_at_once(layer, x, freqs, mask=None):
    return layer._at_once(x, SELF.specs, SELF.patterns, mask, freqs, record=False)


class Subclass(torch.Tensor):
    pass


def with_a_tangent(layer, x, freqs):
    with forward_ad.dual_level():
        return call_at_once(layer, forward_ad.make_dual(x, torch.ones_like(x)), freqs)


def with_a_hook(layer, x, freqs):
    layer.proj.register_forward_hook(lambda *_: None)
    return call_at_once(layer, x, freqs)


def with_a_subclass_as_weight(layer, x, freqs):
    layer.qkv.weight = nn.Parameter(layer.qkv.weight.as_subclass(Subclass))
    return call_at_once(layer, x, freqs)


def with_rows_of_other_heads(layer, x, freqs):
    layer.num_heads = 1
    return call_at_once(layer, x, freqs[..., : layer.head_dim // 2])


def with_weights_of_another_dtype(layer, x, freqs):
    return call_at_once(layer.double(), x, freqs)


def under_vmap(layer, x, freqs):
    found = []
    torch.func.vmap(lambda x: (found.append(call_at_once(layer, x, freqs)), x)[1])(x[None])
    return found[0]


def under_grad(layer, x, freqs):
    found = []
    torch.func.grad(lambda x: (found.append(call_at_once(layer, x, freqs)), x.sum())[1])(x)
    return found[0]


def of_learned_frequencies(layer, x, freqs):
    return call_at_once(layer, x, freqs.clone().requires_grad_())


OTHERS = {
    "another device": lambda layer, x, freqs: call_at_once(layer.to("meta"), x.to("meta"), freqs.to("meta")),
    "frequencies on another device": lambda layer, x, freqs: call_at_once(layer, x, freqs.to("meta")),
    "an int": lambda layer, x, freqs: call_at_once(layer, x.long(), freqs),
    "a subclass": lambda layer, x, freqs: call_at_once(layer, x.as_subclass(Subclass), freqs),
    "no rotation": lambda layer, x, freqs: call_at_once(layer, x, None),
    "angles": lambda layer, x, freqs: call_at_once(layer, x, (freqs.real,)),
    "too few frequencies": lambda layer, x, freqs: call_at_once(layer, x, freqs[:, 1:]),
    "real frequencies": lambda layer, x, freqs: call_at_once(layer, x, freqs.real),
    "too few tokens": lambda layer, x, freqs: call_at_once(layer, x[:, 1:], freqs[:, 1:]),
    "too few channels": lambda layer, x, freqs: call_at_once(layer, x[..., 1:], freqs),
    "sparse tokens": lambda layer, x, freqs: call_at_once(layer, x.to_sparse(), freqs),
    "no list": lambda layer, x, freqs: layer._at_once(x, 5, SELF.patterns, None, freqs, record=False),
    **{
        each.__name__: each
        for each in (
            with_a_tangent,
            with_a_hook,
            with_a_subclass_as_weight,
            with_rows_of_other_heads,
            with_weights_of_another_dtype,
            under_vmap,
            under_grad,
            of_learned_frequencies,
        )
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_no_plain_call_goes_in_steps(name):
    layer = make_layer(dtype=torch.float32, use_rope=True)
    x, freqs = make_x(SELF, dtype=torch.float32).detach(), make_freqs(SELF.num_tokens)
    assert call_at_once(layer, x, freqs) is not None
    assert OTHERS[name](layer, x, freqs) is None


def test_a_request_is_found_by_the_objects_and_not_by_the_list():
    specs, patterns = list(SELF.specs), list(SELF.patterns)
    first = Request.of(specs, patterns)
    assert Request.of(tuple(specs), list(patterns)) is first
    specs[0] = ma.TokenSpec(specs[0].name, specs[0].size + 1)
    assert Request.of(specs, patterns).num_tokens == first.num_tokens + 1


def test_a_request_of_many_groups_is_found_by_the_objects_too():
    specs = [ma.TokenSpec(f"g{i}", i % 5) for i in range(100)]
    patterns = [ma.AttentionPattern([f"g{i}"], [f"g{i}", f"g{(i + 1) % 100}"]) for i in range(100)]
    first = Request.of(specs, patterns)
    assert Request.of(tuple(specs), tuple(patterns)) is first
    for changed in range(100):
        others = [ma.TokenSpec(s.name, s.size + 1) if i == changed else s for i, s in enumerate(specs)]
        assert Request.of(others, patterns).num_tokens == first.num_tokens + 1
        keys = [ma.AttentionPattern(p.query_tokens, ["g0"]) if i == changed else p for i, p in enumerate(patterns)]
        found = Request.of(specs, keys)
        assert found.plan(False).query_segments[changed].key_ranges == ((0, 0),), f"pattern {changed}"


def test_a_request_takes_no_objects_that_may_change():
    class Changing:
        name, size = "all", 5

    assert Request.of([Changing()], [ma.AttentionPattern(["all"], ["all"])]) is None
