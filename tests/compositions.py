"""Derivatives of attention in every order and mode that torch has, composed as users may, and which operators answer.

Each takes a function of q, k and v that returns out and log-sum-exp, ours or `dense`, and derives it at X along T.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import mixed_attention as ma

PLAN = ma.AttentionPlan.from_segments([(0, 3, [(0, 4)]), (3, 5, [(2, 7), (2, 3)])], 7)
_generator = torch.Generator().manual_seed(0)
X, T = ([torch.randn(1, n, 2, 8, generator=_generator, dtype=torch.float64) for n in (5, 7, 7)] for _ in range(2))


@contextmanager
def inputs_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Moves X and T there for as long as it lasts."""
    before = X[:], T[:]
    X[:], T[:] = ([x.to(device, dtype) for x in xs] for xs in before)
    try:
        yield
    finally:
        X[:], T[:] = before


def attend(q, k, v):
    return ma.attention(q, k, v, PLAN, return_lse=True)


def dense(q, k, v):
    """The same by torch alone."""
    counts = torch.zeros(5, 7, dtype=q.dtype, device=q.device)
    counts[:3, :4], counts[3:, 2:7], counts[3:, 2] = 1, 1, 2
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    top = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - top) * counts
    total = e.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", e / total, v), (top + total.log()).squeeze(-1)


def loss(f):
    return lambda *x: sum((o * torch.cos(o)).sum() for o in f(*x))


def moved_loss(f):
    return lambda *x: sum((o * torch.sin(o)).sum() for o in jvp(f, x, tuple(T))[1])


def of_queries(f, *x):
    return lambda q: f(q, *x[1:])


def three(f, *x):
    seeds = torch.stack([T[0], X[0], T[0].cos()])
    return vmap(lambda s: jvp(of_queries(f, *x), (x[0],), (s,)), out_dims=(None, 0))(seeds)


TRANSFORMS = {
    "grad": (lambda f: grad(loss(f), (0, 1, 2))(*X), {"forward": 1, "backward": 1}),
    "jvp": (lambda f: jvp(f, tuple(X), tuple(T)), {"forward_jvp qkv 1": 1}),
    "jvp of queries": (lambda f: jvp(of_queries(f, *X), (X[0],), (T[0],)), {"forward_jvp q 1": 1}),
    "jvp of values": (lambda f: jvp(lambda v: f(*X[:2], v), (X[2],), (T[2],)), {"forward_jvp v 1": 1}),
    "vmap of jvp": (lambda f: three(f, *X), {"forward_jvp q 3": 1}),
    "grad of vmap of jvp": (
        lambda f: grad(lambda *x: sum(o.sin().sum() for o in three(f, *x)[1]), (0, 1, 2))(*X),
        {"forward_jvp q 3": 1, "backward_jvp q 3": 1},
    ),
    "jacrev": (lambda f: jacrev(f, (0, 1, 2))(*X), {"forward": 1, "backward": 1}),
    "jacfwd of queries": (lambda f: jacfwd(f, 0)(*X), {"forward_jvp q 80": 1}),
    "hessian": (lambda f: hessian(loss(f), (0, 2))(*X), None),
    "jacrev of jacrev": (lambda f: jacrev(jacrev(loss(f), 0), 1)(*X), None),
    "grad of jvp": (
        lambda f: grad(moved_loss(f), (0, 1, 2))(*X),
        {"forward_jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    ),
    "jvp of grad": (
        lambda f: jvp(grad(loss(f), (0, 1, 2)), tuple(X), tuple(T)),
        {"forward": 1, "backward": 1, "jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    ),
    "grad of grad": (
        lambda f: grad(lambda *x: sum((a * b).sum() for a, b in zip(grad(loss(f), (0, 1, 2))(*x), T)), (0, 1, 2))(*X),
        {"forward": 1, "backward": 2, "jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    ),
    "vmap": (lambda f: vmap(f)(*(torch.stack([x, x.sin()]) for x in X)), {"forward": 1}),
    "vmap of grad, keys shared": (
        lambda f: vmap(grad(loss(f), (0, 1, 2)), (0, None, None))(torch.stack([X[0], X[0].sin()]), *X[1:]),
        {"forward": 1, "backward": 1},
    ),
    "vmap of jvp, primals mapped": (
        lambda f: vmap(lambda *x: jvp(f, x, tuple(T)))(*(torch.stack([x, x.sin()]) for x in X)),
        {"forward_jvp qkv 1": 1},
    ),
    "vmap of grad of jvp": (
        lambda f: vmap(grad(moved_loss(f), (0, 1, 2)), (1, None, 0))(
            torch.stack([X[0], X[0].sin()], 1), X[1], torch.stack([X[2], X[2].sin()])
        ),
        {"forward_jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    ),
    "jvp of jvp": (lambda f: jvp(lambda *x: jvp(f, x, tuple(T))[1], tuple(X), tuple(X)), None),
    "jvp of jvp of jvp": (
        lambda f: jvp(lambda *x: jvp(lambda *x: jvp(f, x, tuple(T))[1], x, tuple(X))[1], tuple(X), tuple(T)),
        None,
    ),
    "grad of jvp of grad": (
        lambda f: grad(lambda *x: sum(a.sin().sum() for a in jvp(grad(loss(f), (0, 1, 2)), x, tuple(T))[1]), (0, 1, 2))(
            *X
        ),
        None,
    ),
    "grad of jvp of jvp": (
        lambda f: grad(
            lambda *x: sum(
                a.sin().sum() for a in jvp(lambda *x: jvp(f, x, tuple(T))[1], x, tuple(t.sin() for t in T))[1]
            ),
            (0, 1, 2),
        )(*X),
        None,
    ),
}


def leaves():
    return [x.clone().requires_grad_() for x in X]


def gradients(f, x, **options):
    return torch.autograd.grad(loss(f)(*x), x, **options)


def double_backward(f):
    x = leaves()
    return torch.autograd.grad(sum(g.sin().sum() for g in gradients(f, x, create_graph=True)), x)


def penalty(f):
    x = leaves()
    (dq,) = torch.autograd.grad(f(*x)[0].sin().sum(), x[:1], create_graph=True)
    return torch.autograd.grad(dq.square().sum(), x)


def triple_backward(f):
    x = leaves()
    second = torch.autograd.grad(sum(g.sin().sum() for g in gradients(f, x, create_graph=True)), x, create_graph=True)
    return torch.autograd.grad(sum(g.cos().sum() for g in second), x)


def dual_level(f):
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(o).tangent for o in f(*(forward_ad.make_dual(x, t) for x, t in zip(X, T)))]


def backward_within_a_level(f):
    x = leaves()
    with forward_ad.dual_level():
        outputs = [forward_ad.unpack_dual(o) for o in f(*(forward_ad.make_dual(p, t) for p, t in zip(x, T)))]
        return torch.autograd.grad(sum(o.tangent.sin().sum() + o.primal.cos().sum() for o in outputs), x)


def backward_of_jvp(f):
    x = leaves()
    return torch.autograd.grad(sum(t.sin().sum() for t in jvp(f, tuple(x), tuple(T))[1]), x)


def backward_of_a_jacobian(f):
    x = leaves()
    return torch.autograd.grad(sum(t.sin().sum() for t in three(f, *x)[1]), x)


def level_over_backward(f):
    x = leaves()
    out = f(*x)[0]
    with forward_ad.dual_level():
        grads = torch.autograd.grad(out, x, forward_ad.make_dual(out.detach().sin(), out.detach().cos()))
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def level_over_backward_of_duals(f):
    x = leaves()
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(x[0], T[0]), *x[1:])[0]
        grads = torch.autograd.grad(out, x, torch.ones_like(out.detach()))
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def batched_grads(f):
    x = leaves()
    return batched(f(*x)[0], x)


def batched_grads_of_log_sum_exps(f):
    x = leaves()
    return batched(f(*x)[1], x[:2])


def batched(out, x, **options):
    grads = torch.stack([out.detach(), out.detach().cos()])
    return torch.autograd.grad(out, x, grads, is_grads_batched=True, **options)


def batched_double_backward(f):
    x = leaves()
    return batched(gradients(f, x, create_graph=True)[1], x)


def batched_grads_of_jvp(f):
    x = leaves()
    return batched(jvp(f, tuple(x), tuple(T))[1][0], x)


def batched_grads_of_tangents(f):
    """Gradients of tangents that are computed with an operator of their own, behind the forward."""
    x = leaves()
    grads = [g.detach().requires_grad_() for g in X]
    (out,) = torch.autograd.grad(f(*x)[0], x[2:], T[2].sum(1, keepdim=True).expand(-1, 5, -1, -1), create_graph=True)
    moved = torch.autograd.grad(out, x[:2], grads[2], create_graph=True)
    return batched(moved[0], (*x[:2], grads[2]))


def backward_of_batched_grads(f):
    x = leaves()
    return torch.autograd.grad(sum(g.sin().sum() for g in batched(f(*x)[0], x, create_graph=True)), x)


def batched_grads_within_a_level(f):
    x = leaves()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x[0], T[0]), *x[1:])[0])
        return batched(out.tangent, x)


EAGER = {
    double_backward: {"backward": 1, "jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    penalty: {"backward": 1, "jvp q 1": 1, "backward_jvp q 1": 1},
    triple_backward: None,
    dual_level: {"forward_jvp qkv 1": 1},
    backward_within_a_level: None,
    backward_of_jvp: {"forward_jvp qkv 1": 1, "backward_jvp qkv 1": 1},
    backward_of_a_jacobian: {"forward_jvp q 3": 1, "backward_jvp q 3": 1},
    level_over_backward: {"backward": 2},
    level_over_backward_of_duals: {"forward_jvp q 1": 1, "backward": 1, "backward_jvp q 1": 1},
    batched_grads: None,
    batched_grads_of_log_sum_exps: None,
    batched_double_backward: None,
    batched_grads_of_jvp: None,
    batched_grads_of_tangents: None,
    backward_of_batched_grads: None,
    batched_grads_within_a_level: None,
}
EVERY = {**TRANSFORMS, **{f.__name__: (f, expected) for f, expected in EAGER.items()}}
