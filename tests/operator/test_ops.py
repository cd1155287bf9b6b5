"""The registered operators: torch's own checker, and what they say of bad input."""

import pytest
import torch
from cases import Case, make_inputs

import mixed_attention as ma

ops = torch.ops.mixed_attention


def sample(dtype=torch.float32, **changes):
    inputs = make_inputs(Case((5, 7, 4), "ab>a c>abb", batch_size=2, num_heads=3, dtype=dtype, **changes))
    return inputs, (inputs.q, inputs.k, inputs.v, inputs.case.plan.flat(), inputs.case.scale, inputs.key_padding_mask)


@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_forward_is_registered_rightly(mask, dropout_p):
    _, arguments = sample(mask=mask)
    seed = torch.tensor([7]) if dropout_p else None
    torch.library.opcheck(ops.forward.default, (*arguments, dropout_p, seed))


def test_backward_is_registered_rightly():
    inputs, (q, k, v, segments, scale, mask) = sample()
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = ops.forward(q, k, v, segments, scale, mask)
    arguments = (inputs.dout, inputs.dlse, q, k, v, out, lse, segments, scale, mask, 0.0, None)
    torch.library.opcheck(ops.backward.default, arguments)
    grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    torch.library.opcheck(ops.backward_out.default, (*arguments, *grads))


def test_rotation_is_registered_rightly():
    x, freqs = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 4, 2)
    torch.library.opcheck(ops.rope.default, (x, freqs, False))
    torch.library.opcheck(ops.rope_out.default, (x, freqs, False, torch.empty_like(x)))


PLAN = ma.AttentionPlan.compile([ma.TokenSpec("a", 6)], [ma.AttentionPattern(["a"], ["a"])])
X = torch.randn(2, 6, 3, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "message"),
    [
        (X[0], X, X, {}, r"q: expected shape \(batch_size, seqlen_q, num_heads, head_dim\), got \[6, 3, 8\]"),
        (X, X[0], X, {}, "k: expected shape"),
        (X, X, X[0], {}, "v: expected shape"),
        (X, X.double(), X, {}, "k: expected dtype Float like q, got Double"),
        (X, X, X.half(), {}, "v: expected dtype Float like q, got Half"),
        (X.long(), X.long(), X.long(), {}, "q: expected dtype float32, float64, bfloat16 or float16, got Long"),
        (X, X[..., :4], X, {}, r"k: expected shape \[2, 6, 3, 8\] to match q, got \[2, 6, 3, 4\]"),
        (X, X[:, :, :2], X, {}, r"k: expected shape \[2, 6, 3, 8\] to match q, got \[2, 6, 2, 8\]"),
        (X, X, X[:, :5], {}, r"v: expected shape \[2, 6, 3, 8\] to match q and k, got \[2, 5, 3, 8\]"),
        (X, X.expand(2, 6, 3, 8).repeat(2, 1, 1, 1), X, {}, "k: expected shape"),
        (X[..., :0], X[..., :0], X, {}, "q: expected head_dim of at least 1"),
        (X, X, X[..., :0], {}, "v: expected head_dim of at least 1"),
        (X[:, :5], X, X, {}, "plan: covers 6 queries, q has 5; build the plan from the same token_specs"),
        (X, X[:, :5], X[:, :5], {}, r"plan: key range \[0, 6\) is not within the 5 rows of k"),
        (X, X, X, {"key_padding_mask": torch.ones(2, 6)}, "key_padding_mask: expected dtype Bool"),
        (X, X, X, {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_padding_mask: expected shape"),
        (X, X, X, {"key_padding_mask": torch.ones(6, dtype=torch.bool)}, "key_padding_mask: expected shape"),
        (X, X, X, {"dropout_p": 1.5}, "dropout_p: expected a probability, got 1.5"),
    ],
)
def test_bad_input_is_refused(q, k, v, options, message):
    with pytest.raises(ValueError, match=message):
        ma.attention(q, k, v, PLAN, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dout", lambda t: t[:, :5], "dout: expected shape"),
        ("dout", lambda t: t.double(), "dout: expected dtype Float"),
        ("lse", lambda t: t.double(), "lse: expected dtype Float"),
        ("lse", lambda t: t[..., :5], "lse: expected shape"),
        ("out", lambda t: t[..., :4], "out: expected shape"),
    ],
)
def test_bad_input_of_the_backward_is_refused(name, change, message):
    out, lse = ops.forward(X, X, X, PLAN.flat(), 1.0)
    tensors = {"dout": torch.randn_like(out), "out": out, "lse": lse}
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=message):
        ops.backward(tensors["dout"], None, X, X, X, tensors["out"], tensors["lse"], PLAN.flat(), 1.0)


@pytest.mark.parametrize(
    ("seed", "message"),
    [(None, "dropout_seed: expected an int64 tensor"), (torch.zeros(1), "dtype Long"), (torch.tensor([1, 2]), "shape")],
)
def test_dropout_needs_its_seed(seed, message):
    with pytest.raises(ValueError, match=message):
        ops.forward(X, X, X, PLAN.flat(), 1.0, None, 0.5, seed)


@pytest.mark.parametrize(
    ("x", "freqs", "message"),
    [
        (X[..., :7], torch.ones(1, 6, 3, 2), "x: expected an even head_dim"),
        (X, torch.ones(1, 6, 3, 2), "freqs: expected shape"),
        (X, torch.ones(1, 6, 4, 2, dtype=torch.float64), "freqs: expected dtype Float"),
        (X[0], torch.ones(1, 6, 4, 2), "x: expected shape"),
    ],
)
def test_bad_input_of_the_rotation_is_refused(x, freqs, message):
    with pytest.raises(ValueError, match=message):
        ops.rope_out(x, freqs, False, torch.empty_like(x))
