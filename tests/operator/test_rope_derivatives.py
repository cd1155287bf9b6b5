"""Derivatives of the rotation: the operators in numbers, and how few of them every composition calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import mixed_attention as ma
from mixed_attention import rotation

ops = torch.ops.mixed_attention
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def as_complex(x: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers of fp64; of pairs, for all heads."""
    return torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())


def as_channels(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(-2)


class Problem:
    """Random tensors of a call, and what exact arithmetic makes of them. Those that do not move are None."""

    def __init__(self, dtype, device, *, moves, count, shared, conjugate, layout="contiguous", head_dim=74):
        generator = torch.Generator().manual_seed(0)
        batch_size, seqlen, num_heads = 2, 5, 3
        random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        if layout == "packed":  # slots of one buffer
            make = lambda *front: random(*front, batch_size, seqlen, 4, num_heads, head_dim)[..., 1, :, :]  # noqa: E731
        elif layout == "transposed":
            make = lambda *front: random(*front, batch_size, num_heads, seqlen, head_dim).transpose(-3, -2)  # noqa: E731
        elif layout == "strided":
            make = lambda *front: random(*front, batch_size, seqlen, num_heads, 2 * head_dim)[..., ::2]  # noqa: E731
        else:
            make = lambda *front: random(*front, batch_size, seqlen, num_heads, head_dim)  # noqa: E731
        freqs = lambda *front: random(*front, 1 if shared else batch_size, seqlen, head_dim // 2, 2)  # noqa: E731
        of_freqs = torch.float64 if dtype == torch.float64 else torch.float32
        to = lambda x, dtype: x.to(device, dtype)  # noqa: E731
        self.x, self.freqs, self.conjugate, self.dtype = to(make(), dtype), to(freqs(), of_freqs), conjugate, dtype
        self.x_dot = to(make(count), dtype) if "x" in moves else None
        self.freqs_dot = to(freqs(count), of_freqs) if "f" in moves else None
        self.dout, self.dout_dot = to(make(), dtype), to(make(count), dtype)
        self.count, self.shared = count, shared

    def turn(self, freqs: Tensor, x: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """Products of frequencies and rows, and a bound of the sizes of what is added in each."""
        turned = torch.view_as_complex(freqs.double().contiguous()).unsqueeze(-2)
        turned = turned.conj() if self.conjugate != back else turned
        product = turned * as_complex(x)
        return as_channels(product), product.abs().repeat_interleave(2, -1)

    def of_freqs(self, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """conj(x) dout, summed over heads, and over the batch where that shares frequencies; and a bound of sizes."""
        product = as_complex(x).conj() * as_complex(dout)
        product = product.conj() if self.conjugate else product
        total, size = product.sum(-2), product.abs().sum(-2)
        if self.shared:
            total, size = total.sum(-3, keepdim=True), size.sum(-3, keepdim=True)
        return torch.view_as_real(total), size.unsqueeze(-1).expand(*size.shape, 2)


def plus(*terms):
    exact, size = (sum(each) for each in zip(*terms))
    return exact, size


def check(name: str, got: Tensor, expected: tuple[Tensor, Tensor], additions: int) -> None:
    """A component is as many products as are added, each rounded, and one rounding to the result's dtype at last."""
    exact, size = expected
    arithmetic = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    bound = (additions + 2) * arithmetic * size + torch.finfo(got.dtype).eps * exact.abs()
    if got.dtype == torch.float16:
        bound = bound + 2.0**-25  # half of the least number
    error = (got.double() - exact.to(got.device)).abs()
    assert got.shape == exact.shape, name
    assert bool((error <= bound.to(got.device)).all()), f"{name}: {float((error - bound).max())} beyond its bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("moves", "count"), [("x", 1), ("f", 1), ("xf", 1), ("xf", 3), ("f", 2), ("x", 4)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
def test_numbers(dtype, moves, count, shared, conjugate, device):
    p = Problem(dtype, device, moves=moves, count=count, shared=shared, conjugate=conjugate)
    check_all(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "transposed", "strided"])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 200])
def test_layouts_and_widths(dtype, layout, head_dim, device):
    options = {"moves": "xf", "count": 2, "shared": True, "conjugate": False}
    check_all(Problem(dtype, device, **options, layout=layout, head_dim=head_dim))


def check_all(p: Problem) -> None:
    given = p.x, p.freqs, p.x_dot, p.freqs_dot, p.conjugate
    out, out_dot = ops.rope_jvp(*given)
    none, alone = ops.rope_jvp(*given, False)
    assert none.numel() == 0
    assert torch.equal(alone, out_dot)
    check("out", out, p.turn(p.freqs, p.x), 2)
    moved = []
    if p.x_dot is not None:
        moved.append(p.turn(p.freqs, p.x_dot))
    if p.freqs_dot is not None:
        moved.append(p.turn(p.freqs_dot, p.x))
    check("out_dot", out_dot, plus(*moved), 4)

    wanted = [True, True, p.x_dot is not None, p.freqs_dot is not None]
    every = ops.rope_backward(p.dout, p.dout_dot, *given, wanted)
    first = ops.rope_backward(p.dout, None, p.x, p.freqs, None, None, p.conjugate, [True, True, False, False])
    of_tangents = ops.rope_backward(None, p.dout_dot, *given, wanted)
    by_dout = p.turn(p.freqs, p.dout, back=True), p.of_freqs(p.x, p.dout)
    nothing = tuple((0 * exact, 0 * size) for exact, size in by_dout)
    moved_x = moved_freqs = []
    if p.freqs_dot is not None:
        moved_x = [tuple(each.sum(0) for each in p.turn(p.freqs_dot, p.dout_dot, back=True))]
    if p.x_dot is not None:
        moved_freqs = [tuple(each.sum(0) for each in p.of_freqs(p.x_dot, p.dout_dot))]
    terms, rows = 2 * (1 + p.count), 2 * 3 * 2 * (1 + p.count)
    for results, by, more in ((every, by_dout, True), (first, by_dout, False), (of_tangents, nothing, True)):
        check("dx", results[0], plus(by[0], *(moved_x if more else [])), terms)
        check("dfreqs", results[1], plus(by[1], *(moved_freqs if more else [])), rows)
    for results in (every, of_tangents):
        if p.x_dot is not None:
            check("dx_dot", results[2], p.turn(p.freqs, p.dout_dot, back=True), 2)
        if p.freqs_dot is not None:
            check("dfreqs_dot", results[3], p.of_freqs(p.x, p.dout_dot), rows)
    for results, each in ((every, wanted), (first, [True, True, False, False])):
        assert [x.numel() > 0 for x in results] == each


def test_nothing_is_read_that_is_not_needed(device):
    """Where only dx is wanted, rows may be anything, and so may tangents of rows."""
    p = Problem(torch.float32, device, moves="xf", count=1, shared=False, conjugate=False)
    nan = torch.full_like(p.x, torch.nan), torch.full_like(p.x_dot, torch.nan)
    dx, *_ = ops.rope_backward(
        p.dout, p.dout_dot, nan[0], p.freqs, nan[1], p.freqs_dot, False, [True, False, False, False]
    )
    assert bool(dx.isfinite().all())


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)])
def test_nothing_to_rotate(shape, device):
    x, freqs = torch.ones(shape, device=device), torch.ones(1, shape[1], shape[3] // 2, 2, device=device)
    out, out_dot = ops.rope_jvp(x, freqs, x[None], freqs[None], False)
    assert (out.shape, out_dot.shape) == (shape, (1, *shape))
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        *_, dfreqs_dot = grads = ops.rope_backward(x, x[None], x, freqs, x[None], freqs[None], False, [True] * 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [g.shape for g in grads] == [x.shape, freqs.shape, (1, *shape), (1, *freqs.shape)]
    assert not grads[1].any()
    assert not dfreqs_dot.any()


def test_equal_bits_for_any_number_of_threads(num_threads):
    x, freqs = torch.randn(3, 700, 4, 64), torch.randn(1, 700, 32, 2)
    rounds = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rounds.append(ops.rope_backward(x.cos(), None, x, freqs, None, None, False, [True, True, False, False]))
    assert all(torch.equal(a, b) for a, b in zip(*rounds))


def test_operators_are_registered_as_torch_wants_them():
    p = Problem(torch.float32, "cpu", moves="xf", count=2, shared=True, conjugate=True)
    given = p.x, p.freqs, p.x_dot, p.freqs_dot, True
    for wants_out in (True, False):
        torch.library.opcheck(ops.rope_jvp.default, (*given, wants_out))
    torch.library.opcheck(ops.rope_backward.default, (p.dout, p.dout_dot, *given, [True, False, True, True]))


X, FREQS = torch.ones(2, 5, 3, 8), torch.ones(1, 5, 4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rope_jvp(X, FREQS, None, None, False), "x_dot: expected a tangent of x or freqs, got none"),
        (lambda: ops.rope_jvp(X, FREQS, X, None, False), "x_dot: expected shape like what it moves"),
        (lambda: ops.rope_jvp(X, FREQS, X[None, :1], None, False), r"x_dot: expected shape \[1, 2, 5, 3, 8\] like x"),
        (
            lambda: ops.rope_jvp(X, FREQS, X[None], FREQS.expand(2, 1, 5, 4, 2), False),
            "freqs_dot: expected shape .1, 1",
        ),
        (
            lambda: ops.rope_jvp(X, FREQS, X[None].double(), None, False),
            "x_dot: expected dtype Float like x, got Double",
        ),
        (lambda: ops.rope_jvp(X, FREQS, X[None][:0], None, False), "x_dot: expected at least one direction"),
        (
            lambda: ops.rope_backward(X, None, X, FREQS, None, None, False, [True, True, True, False]),
            "x_dot: expected a tensor, as its gradient is wanted",
        ),
        (
            lambda: ops.rope_backward(X, X[None], X, FREQS, None, None, False, [True, True, False, False]),
            "x_dot: expected a tangent of x or freqs beside dout_dot",
        ),
        (
            lambda: ops.rope_backward(X[:1], None, X, FREQS, None, None, False, [True, True, False, False]),
            r"dout: expected shape \[2, 5, 3, 8\] like x",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- Which operators answer which transform


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of operators, with what moves in how many directions."""
    counted: Counter = Counter()
    run = rotation._run

    def counting(name, *arguments):
        label = name
        if name == "rope_jvp":
            moved = arguments[2:4]
            label += f" {''.join(n for n, t in zip('xf', moved) if t is not None)} "
            label += str(next(len(t) for t in moved if t is not None))
        counted[label] += 1
        return run(name, *arguments)

    monkeypatch.setattr(rotation, "_run", counting)
    for name in ("rotate_composite", "_freqs_composite"):
        composed = getattr(rotation, name)

        def composing(*arguments, composed=composed):
            counted["composed"] += 1
            return composed(*arguments)

        monkeypatch.setattr(rotation, name, composing)
    return counted


def composed_rope(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs[:, :, None]).flatten(-2)


def of_angles(rope):
    """A function of rows and angles, whose frequencies move with these."""
    return lambda x, angles: rope(x, torch.polar(torch.ones_like(angles), angles))


def level(run):
    """A plain level of forward mode around all."""

    def result(f, x, a, dx, da):
        with forward_ad.dual_level():
            found = run(f, forward_ad.make_dual(x, dx), forward_ad.make_dual(a, da))
            return [part for each in found for part in forward_ad.unpack_dual(each) if part is not None]

    return result


def leaf_grads(f, x, a, order):
    x, a = x.clone().requires_grad_(), a.clone().requires_grad_()
    grads = torch.autograd.grad(f(x, a).sin().sum(), (x, a), create_graph=order > 1)
    return torch.autograd.grad(sum(g.sin().sum() for g in grads), (x, a)) if order > 1 else grads


def backward_within(f, x, a):
    # Leaves of their own, whose duals lead to them.
    x, a = (t if t.requires_grad else t.requires_grad_() for t in (x, a))
    return torch.autograd.grad(f(x, a).sin().sum(), (x, a), create_graph=True)


def grads_batched(f, x, a):
    x, a = x.clone().requires_grad_(), a.clone().requires_grad_()
    out = f(x, a)
    seeds = torch.stack([out.detach().cos(), out.detach().sin()])
    return torch.autograd.grad(out, (x, a), seeds, is_grads_batched=True)


def loss(f):
    return lambda x, a: f(x, a).sin().sum()


def slope(f, dx, da):
    return lambda x, a: jvp(f, (x, a), (dx, da))[1].sin().sum()


def seeds_of(dx, da):
    return torch.stack([dx, dx.cos(), dx.sin()]), torch.stack([da, da.cos(), da.sin()])


BOTH = (0, 1)
EVERY = {
    "jvp": (lambda f, x, a, dx, da: jvp(f, (x, a), (dx, da)), {"rope_jvp xf 1": 1}),
    "jvp of rows": (lambda f, x, a, dx, da: jvp(lambda x: f(x, a), (x,), (dx,)), {"rope_jvp x 1": 1}),
    "jvp of angles": (lambda f, x, a, dx, da: jvp(lambda a: f(x, a), (a,), (da,)), {"rope_jvp f 1": 1}),
    "dual level": (level(lambda f, x, a: [f(x, a)]), {"rope_jvp xf 1": 1}),
    "grad": (lambda f, x, a, dx, da: grad(loss(f), BOTH)(x, a), {"rope": 1, "rope_backward": 1}),
    "grad of rows": (lambda f, x, a, dx, da: grad(loss(f))(x, a), {"rope": 2}),
    "backward": (lambda f, x, a, dx, da: leaf_grads(f, x, a, 1), {"rope": 1, "rope_backward": 1}),
    "double backward": (
        lambda f, x, a, dx, da: leaf_grads(f, x, a, 2),
        # The gradient of the first backward, and once more that of the rotation, as the loss bends with its result.
        {"rope": 1, "rope_backward": 3, "rope_jvp xf 1": 1},
    ),
    "vmap of jvp": (
        lambda f, x, a, dx, da: vmap(lambda *s: jvp(f, (x, a), s), out_dims=(None, 0))(*seeds_of(dx, da)),
        {"rope_jvp xf 3": 1},
    ),
    "grad of jvp": (
        lambda f, x, a, dx, da: grad(slope(f, dx, da), BOTH)(x, a),
        {"rope_jvp xf 1": 1, "rope_backward": 1},
    ),
    "grad of vmap of jvp": (
        lambda f, x, a, dx, da: grad(lambda *p: vmap(lambda *s: jvp(f, p, s)[1])(*seeds_of(dx, da)).sin().sum(), BOTH)(
            x, a
        ),
        {"rope_jvp xf 3": 1, "rope_backward": 1},
    ),
    "grad of both and of the seeds": (
        lambda f, x, a, dx, da: grad(lambda *p: jvp(f, p[:2], p[2:])[1].sin().sum(), (0, 1, 2, 3))(x, a, dx, da),
        {"rope_jvp xf 1": 1, "rope_backward": 1},
    ),
    "jvp of grad": (
        lambda f, x, a, dx, da: jvp(grad(loss(f), BOTH), (x, a), (dx, da)),
        {"rope": 1, "rope_jvp xf 1": 1, "rope_backward": 3},
    ),
    "grad of grad": (
        lambda f, x, a, dx, da: grad(
            lambda *p: sum((g * d).sum() for g, d in zip(grad(loss(f), BOTH)(*p), (dx, da))), BOTH
        )(x, a),
        {"rope": 1, "rope_jvp xf 1": 1, "rope_backward": 3},
    ),
    "vmap over rows": (lambda f, x, a, dx, da: vmap(f, (0, None))(torch.stack([x, dx]), a), {"rope": 1}),
    "vmap over both": (
        lambda f, x, a, dx, da: vmap(f)(torch.stack([x, dx]), torch.stack([a, da])),
        {"rope": 1},
    ),
    "vmap of grad": (
        lambda f, x, a, dx, da: vmap(grad(loss(f), BOTH))(torch.stack([x, dx]), torch.stack([a, da])),
        {"rope": 1, "rope_backward": 1},
    ),
    "vmap of grad of one": (
        lambda f, x, a, dx, da: vmap(grad(loss(f), BOTH), (0, None))(torch.stack([x, dx]), a),
        {"rope": 1, "rope_backward": 1},
    ),
    "vmap of jvp over all": (
        lambda f, x, a, dx, da: vmap(lambda x, a: jvp(f, (x, a), (dx, da)))(torch.stack([x, dx]), torch.stack([a, da])),
        {"rope_jvp xf 1": 1},
    ),
    "jacrev": (lambda f, x, a, dx, da: jacrev(loss(f), BOTH)(x, a), {"rope": 1, "rope_backward": 1}),
    "vjp": (lambda f, x, a, dx, da: vjp(f, x, a)[1](dx), {"rope": 1, "rope_backward": 1}),
    "jacfwd": (lambda f, x, a, dx, da: jacfwd(f, BOTH)(x[:, :1, :1], a[:, :1]), None),
    "hessian": (lambda f, x, a, dx, da: hessian(loss(f), BOTH)(x[:, :1, :1], a[:, :1]), None),
    "jvp of jvp": (
        lambda f, x, a, dx, da: jvp(lambda *p: jvp(f, p, (dx, da)), (x, a), (dx.cos(), da.sin())),
        None,
    ),
    "jvp of jvp of jvp": (
        lambda f, x, a, dx, da: jvp(
            lambda *p: jvp(lambda *p: jvp(f, p, (dx, da))[1], p, (dx.sin(), da))[1], (x, a), (dx.cos(), da.sin())
        ),
        None,
    ),
    "grad of jvp of grad": (
        lambda f, x, a, dx, da: grad(
            lambda *p: sum(g.sin().sum() for g in jvp(grad(loss(f), BOTH), p, (dx, da))[1]), BOTH
        )(x, a),
        None,
    ),
    "grad of grad of jvp": (
        lambda f, x, a, dx, da: grad(lambda *p: sum(g.sin().sum() for g in grad(slope(f, dx, da), BOTH)(*p)), BOTH)(
            x, a
        ),
        None,
    ),
    "backward within a level": (level(backward_within), None),
    "is_grads_batched": (lambda f, x, a, dx, da: grads_batched(f, x, a), None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_every_composition_is_right_and_as_fused_as_it_is_said_to_be(name, shared, calls):
    make, expected = EVERY[name]
    torch.manual_seed(0)
    x, dx = torch.randn(2, 2, 4, 3, 6, dtype=torch.float64)
    a, da = torch.randn(2, 1 if shared else 2, 4, 3, dtype=torch.float64)
    leaves = torch.utils._pytree.tree_leaves
    got = leaves(make(of_angles(ma.apply_rope), x.clone(), a.clone(), dx, da))
    seen = dict(calls)
    wanted = leaves(make(of_angles(composed_rope), x.clone(), a.clone(), dx, da))
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    if expected is not None:
        assert seen == expected
