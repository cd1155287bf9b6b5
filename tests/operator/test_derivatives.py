"""Derivatives beyond the first: the operators, and which of them answer which transform."""

from __future__ import annotations

from collections import Counter

import pytest
import tangents
import torch
from cases import DTYPES, EDGE_CASES, Case
from compositions import EVERY, PLAN, TRANSFORMS, T, X, attend, dense, gradients, leaves
from tangents import check, formulas, forward, make_moving
from torch.func import grad, jvp, vjp, vmap

import mixed_attention as ma
from mixed_attention import derivatives, reference, torch_internals

operators = torch.ops.mixed_attention

CASES = {
    "joint": Case((40, 61, 20, 33), "abcd>ac", batch_size=2, num_heads=2, head_dim=16),
    "many tiles": Case((100, 230), "a>ba b>b", num_heads=2, head_dim=24, head_dim_v=20),
    "listed twice": Case((19, 43), "a>abb b>aab", num_heads=2),
    "masked": Case((33, 140, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, mask="random"),
    "a sequence without keys": EDGE_CASES["a sequence fully masked"],
    "only empty keys": EDGE_CASES["only empty keys"],
    "dropout": Case((40, 61), "a>ab b>bb", batch_size=2, num_heads=2, dropout_p=0.3),
    "k and v of batch 1": EDGE_CASES["k and v of batch 1"],
    "strided": EDGE_CASES["strided, odd width"],
    "negative scale": EDGE_CASES["negative scale"],
    "scale zero": EDGE_CASES["scale zero"],
    "large logits": Case((33, 40), "a>b b>ab", head_dim=16, magnitude=60.0),
    "one token": EDGE_CASES["one token"],
}


@pytest.mark.parametrize(("moves", "count"), [("q", 1), ("q", 3), ("qkv", 1), ("kv", 2), ("v", 1), ("qkv", 4)])
@pytest.mark.parametrize("name", CASES)
def test_operators(name, moves, count):
    check(make_moving(CASES[name].with_(dtype=torch.float32), moves, count))


@pytest.mark.parametrize("form", ["tangents", "double"])
@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("name", ["joint", "listed twice", "masked"])
def test_operators_without_gradients_of_the_output(name, moves, form):
    check(make_moving(CASES[name].with_(dtype=torch.float32), moves, 1, form=form))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "fp32"])
@pytest.mark.parametrize("name", ["joint", "many tiles", "masked", "dropout"])
def test_operators_in_other_dtypes(name, dtype):
    for moves, count in (("q", 3), ("qkv", 1)):
        check(make_moving(CASES[name].with_(dtype=DTYPES[dtype]), moves, count))


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("name", ["joint", "listed twice", "masked", "dropout", "k and v of batch 1"])
def test_formulas_are_what_torch_derives_from_the_forward(name, moves):
    moving = make_moving(CASES[name].with_(dtype=torch.float64), moves, 2)
    i = moving.inputs
    x = tuple(torch.nan_to_num(t, 0.0, 0.0, 0.0).double() for t in (i.q, i.k, i.v))
    moved = [None if t is None else torch.nan_to_num(t.double(), 0.0) for t in moving.tangents]
    places = [place for place, t in enumerate(moved) if t is not None]

    def everything(q, k, v, *given):
        every = [torch.zeros_like(t)[None].expand(2, *t.shape) for t in x]
        for place, t in zip(places, given):
            every[place] = t
        run = lambda *each: jvp(lambda *x: forward(moving, *x), (q, k, v), each)  # noqa: E731
        return vmap(run, out_dims=((None, None), 0))(*every)

    given = [moved[place] for place in places]
    (outputs, (out_dot, lse_dot)), pull = vjp(everything, *x, *given)
    dlse = torch.zeros_like(outputs[1]) if i.dlse is None else i.dlse.double()
    finite = i.weights.any(-1)[:, None]
    grads = pull(((i.dout.double(), dlse * finite), (moving.dout_dot.double(), moving.dlse_dot.double() * finite)))
    exact = formulas(moving, lambda t, *_: t)
    for name_, got in zip(("out_dot", "lse_dot", "dq", "dk", "dv", "dq_dot"), (out_dot, lse_dot, *grads)):
        torch.testing.assert_close(getattr(exact, name_), got, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_operators(name):
    moving = make_moving(CASES[name].with_(dtype=torch.float64, mask=CASES[name].mask), "qkv", 1)
    i = moving.inputs
    poisoned = [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (i.q, i.k, i.v)]
    moved = [torch.nan_to_num(t[0], 0.0) for t in moving.tangents]
    _, scale, mask, dropout_p, seed = moving.call
    call = i.case.plan.query_segments, scale, mask, dropout_p, seed
    exact = formulas(moving, lambda t, *_: t)
    found = reference.jvp(*poisoned, *moved, *call)
    grads = reference.backward_jvp(moving.dout_dot[0], moving.dlse_dot[0], i.dout, i.dlse, *poisoned, *moved, *call)
    for got, expected in zip((*found, *grads), (exact.out_dot[0], exact.lse_dot[0], exact.dq, exact.dk, exact.dv)):
        torch.testing.assert_close(
            got, expected, rtol=1e-9, atol=1e-9 * (1 + float(expected.abs().max() if expected.numel() else 0))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_for_any_number_of_threads(dtype, num_threads):
    moving = make_moving(Case((300, 411), "a>b b>ab", num_heads=2, head_dim=32, dtype=dtype), "qkv", 2)
    rounds = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        rounds.append(tangents.run(moving, known=False))
    for other in rounds[1:]:
        for name, got in vars(rounds[0]).items():
            assert torch.equal(got, getattr(other, name)), name


def test_a_part_that_all_tangents_share_is_not_rounded():
    """Where keys have a large common part, so have tangents of scores: it moves no weight and drowns what does."""
    moving = make_moving(Case((64, 300), "ab>b", num_heads=2, head_dim=32, dtype=torch.bfloat16), "q", 1)
    moving.inputs.k.add_(20.0)
    moving.inputs.q.mul_(0.05)
    check(moving)


# -- Which operators answer which transform


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of operators, with who moves in how many directions, and those of the reference."""
    counted = Counter()
    run = derivatives._run

    def counting(name, *arguments):
        first, label = {"forward_jvp": 3, "jvp": 5, "backward_jvp": 9}.get(name), name
        if first is not None:
            moved = arguments[first : first + 3]
            names = "".join(each for each, t in zip("qkv", moved) if t is not None)
            label = f"{name} {names} {next(len(t) for t in moved if t is not None)}"
        counted[label] += 1
        return run(name, *arguments)

    monkeypatch.setattr(derivatives, "_run", counting)
    for name in ("attend", "jvp", "backward", "backward_jvp"):
        monkeypatch.setattr(reference, name, _counting(counted, name, getattr(reference, name)))
    return counted


def _counting(counted, name, function):
    def run(*arguments):
        counted["reference"] += 1
        return function(*arguments)

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_every_composition_is_right_and_as_fused_as_it_is_said_to_be(name, calls):
    make, expected_calls = EVERY[name]
    got = torch.utils._pytree.tree_leaves(make(attend))
    seen = dict(calls)
    wanted = torch.utils._pytree.tree_leaves(make(dense))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if expected_calls is not None:
        assert seen == expected_calls


@pytest.fixture
def composed(monkeypatch):
    """Leaves out the kernels of tangents, as where there are none: on GPUs."""
    run = derivatives._run

    def run_composed(name, *arguments):
        if "jvp" not in name:
            return run(name, *arguments)
        with torch_internals.below_autograd():
            return getattr(derivatives, f"{name}_composed")(*arguments)

    monkeypatch.setattr(derivatives, "_run", run_composed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.usefixtures("composed")
def test_every_composition_is_right_without_kernels_of_tangents(name):
    make, _ = EVERY[name]
    got, wanted = (torch.utils._pytree.tree_leaves(make(f)) for f in (attend, dense))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("moves", "count"), [("q", 3), ("kv", 1), ("v", 2)])
@pytest.mark.parametrize("name", ["masked", "dropout", "k and v of batch 1", "only empty keys", "strided"])
def test_operators_that_are_composed(name, moves, count, dtype):
    check(make_moving(CASES[name].with_(dtype=dtype), moves, count), composed=True)


def test_a_first_backward_that_may_be_differentiated_is_one_kernel(calls):
    x = leaves()
    gradients(attend, x, create_graph=True)
    assert calls == {"backward": 1}


@pytest.mark.parametrize("function", ["jvp", "vmap of jvp", "grad of jvp", "jvp of grad"])
def test_dropout_is_the_same_in_all_orders(function):
    def drop(f):
        def run(q, k, v):
            return f(q, k, v, PLAN, softmax_scale=0.5, dropout_p=0.3, **options)

        options = {} if f is ma.attention else {"dropout_seed": seed}
        return run

    torch.manual_seed(0)
    seed = ma.ops.draw_seed(torch.device("cpu"))
    run = {
        "jvp": lambda f: jvp(f, tuple(X), tuple(T)),
        "vmap of jvp": lambda f: vmap(lambda t: jvp(f, tuple(X), (t, *T[1:])), randomness="same")(
            torch.stack([X[0], T[0]])
        ),
        "grad of jvp": lambda f: grad(lambda *x: jvp(f, x, tuple(T))[1].sin().sum(), (0, 1, 2))(*X),
        "jvp of grad": lambda f: jvp(grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)), tuple(X), tuple(T)),
    }[function]
    torch.manual_seed(0)
    got = run(drop(ma.attention))
    torch.testing.assert_close(got, run(drop(reference.attention)), rtol=1e-9, atol=1e-11)


def layer_of(dim=8):
    torch.manual_seed(0)
    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=dim, num_heads=2, use_rope=True)).double()
    specs = [ma.TokenSpec("a_anchor", None), ma.TokenSpec("q", 6)]
    patterns = [ma.AttentionPattern(["a_anchor", "q"], ["a_anchor"])]
    anchors = torch.randn(1, 9, dim, dtype=torch.float64)
    freqs = torch.polar(torch.ones(1, 9, 2, dtype=torch.float64), torch.randn(1, 9, 2, dtype=torch.float64))
    with torch.no_grad():
        _, cache = layer(
            anchors,
            [ma.TokenSpec("a_anchor", 9)],
            [ma.AttentionPattern(["a_anchor"], ["a_anchor"])],
            freqs=freqs,
            return_kv_cache=True,
        )

    def run(x, angles):
        return layer(x, specs, patterns, freqs=torch.polar(torch.ones_like(angles), angles), kv_cache=cache)

    return layer, run


def test_a_layer_moves_with_tokens_and_angles(calls):
    layer, run = layer_of()
    x, angles = torch.randn(1, 6, 8, dtype=torch.float64), torch.randn(1, 6, 2, dtype=torch.float64)
    dx, dangles = torch.randn_like(x), torch.randn_like(angles)
    _, got = jvp(run, (x, angles), (dx, dangles))
    assert calls == {"forward_jvp q 1": 1}
    step = 1e-6
    with torch.no_grad():
        differences = (run(x + step * dx, angles + step * dangles) - run(x - step * dx, angles - step * dangles)) / (
            2 * step
        )
    torch.testing.assert_close(got, differences, rtol=1e-6, atol=1e-8)


def test_gradients_of_a_layer_of_its_tangents():
    layer, run = layer_of()
    x, angles = torch.randn(1, 6, 8, dtype=torch.float64), torch.randn(1, 6, 2, dtype=torch.float64)
    dx, dangles = torch.randn_like(x), torch.randn_like(angles)
    weight = layer.qkv.weight
    slope = lambda: jvp(run, (x, angles), (dx, dangles))[1].sin().sum()  # noqa: E731
    (got,) = torch.autograd.grad(slope(), weight)
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        above = slope()
        weight.sub_(2 * step * direction)
        below = slope()
        weight.add_(step * direction)
    torch.testing.assert_close((got * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


def test_double_backward_of_a_layer_is_fused(calls):
    torch.manual_seed(0)
    layer = ma.MixedAttention(ma.MixedAttentionConfig(dim=8, num_heads=2, use_rope=True)).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 6, 2, dtype=torch.float64)
    specs, patterns = [ma.TokenSpec("a", 6)], [ma.AttentionPattern(["a"], ["a"])]

    def slopes(x, parallel):
        layer.parallel = parallel
        out = layer(x, specs, patterns, freqs=torch.polar(torch.ones_like(angles), angles))
        (dx,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, layer.qkv.weight))

    got = slopes(x, True)
    assert calls == {"backward": 1, "jvp qkv 1": 1, "backward_jvp qkv 1": 1}
    for a, b in zip(got, slopes(x, False)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# -- The operators themselves


def arguments(moves="qkv", count=2, **changes):
    moving = make_moving(
        Case((5, 7, 4), "ab>a c>abb", batch_size=2, num_heads=3, dtype=torch.float32, **changes), moves, count
    )
    clean = [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (moving.inputs.q, moving.inputs.k, moving.inputs.v)]
    return moving, clean, [t if t is None else torch.nan_to_num(t, 0.0) for t in moving.tangents]


@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_operators_are_registered_rightly(moves):
    moving, x, moved = arguments(moves)
    call = moving.call
    torch.library.opcheck(operators.forward_jvp.default, (*x, *moved, *call))
    out, lse, out_dot, lse_dot = operators.forward_jvp(*x, *moved, *call)
    torch.library.opcheck(operators.jvp.default, (*x, out, lse, *moved, *call))
    i = moving.inputs
    saved = *x, out, lse, *moved, out_dot, lse_dot
    torch.library.opcheck(
        operators.backward_jvp.default, (moving.dout_dot, moving.dlse_dot, i.dout, i.dlse, *saved, *call, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (None, None, None), "q_dot: expected a tangent of q, k or v, got none"),
        (
            lambda q, k, v: (q[0], None, None),
            r"q_dot: expected shape \(directions, batch_size, rows, num_heads, channels\)",
        ),
        (lambda q, k, v: (q, k[:1], None), r"k_dot: expected shape \[2, 2, 16, 3, 8\] of the tensor that it moves"),
        (lambda q, k, v: (q, None, v.double()), "v_dot: expected dtype Float to match q, got Double"),
        (lambda q, k, v: (q[:0], None, None), "q_dot: expected at least one direction"),
    ],
)
def test_bad_tangents_are_refused(change, message):
    moving, x, moved = arguments()
    with pytest.raises(ValueError, match=message):
        operators.forward_jvp(*x, *change(*moved), *moving.call)
    with pytest.raises(ValueError, match=message):
        operators.forward_jvp(
            *(t.to("meta") for t in x), *(t if t is None else t.to("meta") for t in change(*moved)), *moving.call
        )


def test_operators_without_derivatives_say_so():
    moving, x, moved = arguments()
    out, lse = operators.forward(*x, *moving.call)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        operators.jvp(x[0].requires_grad_(), *x[1:], out, lse, *moved, *moving.call)


def test_compiled():
    make, _ = TRANSFORMS["jvp of queries"]
    torch._dynamo.reset()
    got = torch.compile(lambda: make(attend), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, make(dense), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", [torch.func.jacrev, grad], ids=["jacrev", "grad"])
def test_what_torch_would_answer_with_zeros_is_refused(transform):
    """A backward that makes no graph has no derivative; torch takes it for a constant, without a word."""
    x = leaves()
    out, _ = attend(*x)
    backward = lambda dout: torch.autograd.grad(out, x[0], dout, retain_graph=True)[0].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        transform(backward)(torch.randn_like(out))
    keeping = lambda dout: torch.autograd.grad(out, x[0], dout, create_graph=True)[0].sum()  # noqa: E731
    got = transform(keeping)(torch.zeros_like(out))
    dout = torch.zeros_like(out).requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(keeping(dout), dout)[0])
