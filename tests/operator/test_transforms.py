"""Derivatives of every order and mode, and batching: right, or an error; never zeros."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import mixed_attention as ma
from mixed_attention import reference
from mixed_attention.ops import rotate

PLAN = ma.AttentionPlan.compile(
    [ma.TokenSpec("a", 3), ma.TokenSpec("b", 2), ma.TokenSpec("c", 1)],
    [ma.AttentionPattern(["a"], ["a", "c"]), ma.AttentionPattern(["b", "c"], ["b", "b"])],
)
MASK = torch.tensor([[True, False, True, True, True, False]])


def inputs(batch_size=1):
    return [torch.randn(batch_size, 6, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def attend(q, k, v):
    return ma.attention(q, k, v, PLAN)


def expected(q, k, v):
    return reference.attention(q, k, v, PLAN)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_first_derivatives(mask):
    def both(q, k, v):
        out, lse = ma.attention(q, k, v, PLAN, key_padding_mask=mask, return_lse=True)
        return out, lse.clamp(min=-1e3)  # finite differences cannot take -inf

    assert gradcheck(both, inputs(), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_second_derivatives(mask):
    assert gradgradcheck(lambda q, k, v: ma.attention(q, k, v, PLAN, key_padding_mask=mask), inputs())


def test_rotation():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    freqs = torch.randn(1, 3, 2, dtype=torch.complex128, requires_grad=True)
    assert gradcheck(rotate, (x, freqs), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(rotate, (x, freqs))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2)),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2)),
    "hessian": lambda f: torch.func.hessian(lambda *x: f(*x).square().sum(), argnums=(0, 2)),
    "jvp of grad": lambda f: lambda *x: torch.func.jvp(TRANSFORMS["grad"](f), x, tuple(t.cos() for t in x)),
    "grad of jvp": lambda f: torch.func.grad(
        lambda *x: torch.func.jvp(f, x, tuple(t.cos() for t in x))[1].square().sum(), argnums=(0, 1, 2)
    ),
    "vjp": lambda f: lambda *x: torch.func.vjp(f, *x)[1](x[2].sin()),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms(transform):
    x = [t.detach() for t in inputs()]
    torch.testing.assert_close(transform(attend)(*x), transform(expected)(*x))


def operator(q, k, v):
    return torch.ops.mixed_attention.forward(q, k, v, PLAN.flat(), 2**-0.5)[0]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_operator_itself_is_right_or_raises(transform):
    x = [t.detach() for t in inputs()]
    try:
        got = transform(operator)(*x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, transform(expected)(*x))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1), (2, 0, None)])
def test_vmap(in_dims):
    x = [t.detach() for t in inputs()]
    batched = [t if d is None else torch.stack([t, t.sin(), t.cos()], d) for t, d in zip(x, in_dims)]
    torch.testing.assert_close(torch.vmap(attend, in_dims)(*batched), torch.vmap(expected, in_dims)(*batched))


def test_forward_mode():
    x = [t.detach() for t in inputs()]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in x]
        tangent = forward_ad.unpack_dual(attend(*duals)).tangent
    _, wanted = torch.func.jvp(expected, tuple(x), tuple(t.cos() for t in x))
    torch.testing.assert_close(tangent, wanted)


def test_create_graph_in_fp32():
    x = [t.detach().float().requires_grad_() for t in inputs()]
    exact = [t.detach().double().requires_grad_() for t in x]
    results = []
    for function, leaves in ((attend, x), (expected, exact)):
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for got, wanted in zip(*results):
        # A few dozen fp32 roundings of values of this size.
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_dropout_has_second_derivatives_of_the_same_mask():
    q, k, v = inputs()

    def drop(q, k, v):
        torch.manual_seed(0)
        return ma.attention(q, k, v, PLAN, dropout_p=0.4)

    assert gradgradcheck(drop, (q, k, v))


def gradient_of_queries(make):
    """What the backward of an eager graph makes of a gradient, a linear map."""
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    out = make(x)
    return lambda dout: torch.autograd.grad(out, x, dout, retain_graph=True)[0]


def by_operator(x):
    _, k, v = inputs()
    return attend(x.unflatten(2, (1, 2)), k, v).flatten(2)


def by_layer(x):
    specs = [ma.TokenSpec("a", 4), ma.TokenSpec("b", 2)]
    patterns = [ma.AttentionPattern(["a"], ["a", "b"]), ma.AttentionPattern(["b"], ["b"])]
    return ma.MixedAttention(ma.MixedAttentionConfig(dim=2, num_heads=1, use_rope=False)).double()(x, specs, patterns)


TRANSFORMS_OF_LINEAR_MAPS = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x).flatten(3).matmul(t.flatten()),
    "vmap": lambda f, x, t: torch.vmap(f)(torch.stack([t, x]))[0],
}


@pytest.mark.parametrize("make", [by_operator, by_layer])
@pytest.mark.parametrize("transform", TRANSFORMS_OF_LINEAR_MAPS.values(), ids=TRANSFORMS_OF_LINEAR_MAPS)
def test_transforms_of_an_eager_backward_are_right_or_raise(transform, make):
    backward = gradient_of_queries(make)
    x, t = torch.randn(2, 1, 6, 2, dtype=torch.float64)
    try:
        got = transform(backward, x, t)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, backward(t))


@pytest.mark.parametrize("make", [by_operator, by_layer])
def test_forward_mode_through_an_eager_backward(make):
    backward = gradient_of_queries(make)
    x, t = torch.randn(2, 1, 6, 2, dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(backward(forward_ad.make_dual(x, t))).tangent
    torch.testing.assert_close(tangent, backward(t))
