"""Attention that falls off with distance: the bias is exact, and so are its gradients; values of another width."""

import math

import pytest
import torch

import mixed_attention as ma
from mixed_attention import ops

SIZES = (40, 27)
SPECS = [ma.TokenSpec("a", SIZES[0]), ma.TokenSpec("b", SIZES[1])]
PLAN = ma.AttentionPlan.compile(SPECS, [ma.AttentionPattern(["a"], ["a", "b"]), ma.AttentionPattern(["b"], ["a"])])
NUM_TOKENS = sum(SIZES)

# As the docstring states, as factors of beta and of the square of the radius. The errors of 16 bits: a factor is two
# numbers, of which the second is off by u² of the first, and the product of both second ones is left out: 3 u² of a
# product, and products add up to 4 beta R². fp32 and fp64 take some 30 roundings of numbers that are no larger.
STATED = {torch.float64: 2.0**-48, torch.float32: 2.0**-19, torch.bfloat16: 2.0**-14, torch.float16: 2.0**-18}
LEAST = {torch.float16: 2.0**-20}


def make(dtype=torch.float64, *, batch=2, heads=3, width=16, dims=3, extent=1.0, offset=0.0, seed=0):
    """q, k, v and coordinates, leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, NUM_TOKENS, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    coords = torch.rand(batch, NUM_TOKENS, dims, generator=generator, dtype=torch.float64) * extent + offset
    coords = coords if dtype == torch.float64 else coords.float()
    return [t.requires_grad_() for t in (q, k, v, coords)]


def distances(x, y):
    """Squares of distances, of differences and not of products."""
    return (x[:, :, None] - y[:, None]).square().sum(-1)


def exact(q, k, v, coords, beta, scale=None, mask=None):
    """The attention in fp64 with an explicit bias; out and log-sum-exp."""
    q, k, v, coords = (t.double() for t in (q, k, v, coords))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bihc,bjhc->bhij", q, k)
    beta = torch.as_tensor(beta, dtype=torch.float64, device=q.device).reshape(-1, 1, 1)
    scores = scores - beta * distances(coords, coords)[:, None]
    seen = PLAN.mask().to(scores.device) if mask is None else PLAN.mask() & mask
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v), scores.logsumexp(-1)


def ours(q, k, v, coords, beta, scale=None, **options):
    q, k, scale = ma.coordinate_bias(q, k, coords, beta=beta, softmax_scale=scale)
    return ma.attention(q, k, v, PLAN, softmax_scale=scale, return_lse=True, **options)


def gradients(out, lse, wanted):
    generator = torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, lse))
    return torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), wanted)


@pytest.mark.parametrize("dims", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [None, 0.7, -0.2])
@pytest.mark.parametrize("beta", [3.0, 0.0, -0.5, "a head each"])
def test_attention_has_the_bias(beta, scale, dims):
    leaves = make(dims=dims, offset=100.0)
    if beta == "a head each":
        beta = torch.tensor([0.3, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    wanted = [*leaves, beta] if isinstance(beta, torch.Tensor) else leaves
    got, expected = ours(*leaves, beta, scale), exact(*leaves, beta, scale)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(*got, wanted), gradients(*expected, wanted), rtol=1e-9, atol=1e-10)


def test_derivatives_of_the_second_order():
    leaves = make()
    second = []
    for function in (ours, exact):
        out, _ = function(*leaves, 2.0)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(t.square().sum() for t in first), leaves))
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)


SETTINGS = [
    (1.0, 0.0, 4.0),
    (1.0, 1000.0, 40.0),
    (30.0, -50.0, 2.0),
    (1e3, 0.0, 1e-2),
    (1e-3, 0.0, 1e6),
    (1.0, 0.0, 1e-6),
]


@pytest.mark.parametrize(("extent", "offset", "beta"), SETTINGS)
@pytest.mark.parametrize("dtype", STATED, ids=str)
def test_the_bias_is_as_exact_as_stated(dtype, extent, offset, beta):
    q, k, _, coords = make(dtype, extent=extent, offset=offset)
    zeros = torch.zeros_like(q)
    wide_q, wide_k, scale = ma.coordinate_bias(zeros, zeros, coords, beta=beta)
    assert wide_q.dtype == wide_k.dtype == dtype
    assert wide_q.shape[-1] == wide_k.shape[-1] == (32 if dtype in (torch.bfloat16, torch.float16) else 24)
    got = scale * torch.einsum("bihc,bjhc->bhij", wide_q.double(), wide_k.double())
    points = coords.detach().double()
    middle = (points.amin((0, 1)) + points.amax((0, 1))) / 2
    radius = (points - middle).norm(dim=-1).amax()
    error = (got + beta * distances(points, points)[:, None]).abs().amax()
    bound = max(STATED[dtype] * beta * radius**2, LEAST.get(dtype, 0))
    assert error <= bound, f"{error:.3e} of {bound:.3e}, {error / (beta * radius**2):.2e} of beta R²"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_as_exact_as_without_a_bias(dtype, device):
    leaves, beta = [t.detach().to(device).requires_grad_() for t in make(dtype, width=32)], 20.0
    got, expected = (function(*leaves, beta) for function in (ours, exact))
    plain, expected_plain = ours(*leaves, 0.0), exact(*leaves, 0.0)
    radius = (leaves[-1].detach() - 0.5).norm(dim=-1).amax().item()
    off = 2 * STATED[dtype] * beta * radius**2  # what scores that are off by half as much do to weights

    def error(one, other):
        return ((one.double() - other).norm() / other.norm()).item()

    pairs = zip((*got, *gradients(*got, leaves)), (*expected, *gradients(*expected, leaves)))
    plain_pairs = zip(
        (*plain, *gradients(*plain, leaves[:3])), (*expected_plain, *gradients(*expected_plain, leaves[:3]))
    )
    names = ("out", "lse", "dq", "dk", "dv", "dcoords")
    errors, plain_errors = ({n: error(*pair) for n, pair in zip(names, each)} for each in (pairs, plain_pairs))
    unit = torch.finfo(dtype).eps / 2
    for name in names[:-1]:
        bound = 2 * plain_errors[name] + 2 * off + unit
        assert errors[name] <= bound, f"{name}: {errors[name]:.2e} of {bound:.2e}"
    # Gradients of coordinates add up those of the channels, which are about as exact as those of q and k, and cancel.
    channels = 2 * max(plain_errors["dq"], plain_errors["dk"]) + unit
    bound = channels * _cancellation(leaves, beta) + 2 * off
    assert errors["dcoords"] <= bound, f"dcoords: {errors['dcoords']:.2e} of {bound:.2e}"


def _cancellation(leaves, beta):
    """Norm of the sizes of what is added up to the gradient of the coordinates, over the norm of that."""
    q, k, v, coords = (t.detach().double().requires_grad_() for t in leaves)
    wide_q, wide_k, scale = ma.coordinate_bias(q, k, coords, beta=beta)
    grads = gradients(*ma.attention(wide_q, wide_k, v, PLAN, softmax_scale=scale, return_lse=True), (wide_q, wide_k))
    sizes = torch.zeros_like(coords)
    for wide, grad in zip((wide_q, wide_k), grads):
        for term in (wide * grad)[..., q.shape[-1] :].sum((0, 1)).flatten():  # of each head and channel
            sizes += torch.autograd.grad(term, coords, retain_graph=True)[0].abs()
    return (sizes.norm() / gradients(*exact(q, k, v, coords, beta), (coords,))[0].norm()).item()


def test_tokens_that_nobody_sees_do_not_matter():
    mask = torch.arange(NUM_TOKENS) % 4 != 2
    q, k, v, coords = make()
    wrong = coords.detach().clone()
    wrong[:, ~mask] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    wrong.requires_grad_()
    wide_q, wide_k, scale = ma.coordinate_bias(q, k, coords, wrong, beta=3.0)
    seen = mask[None].expand(2, -1)
    out = ma.attention(wide_q, wide_k, v, PLAN, softmax_scale=scale, key_padding_mask=seen)
    expected, _ = exact(q, k, v, coords, 3.0, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(out.square().sum(), (q, k, v, coords, wrong))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v, coords))
    torch.testing.assert_close(got[:3], wanted[:3], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close((got[3] + got[4])[:, mask], wanted[3][:, mask], rtol=1e-9, atol=1e-10)


def test_keys_may_have_coordinates_of_their_own_and_serve_the_whole_batch():
    q, k, v, coords = make()
    k, v, k_coords = k[:1], v[:1], coords[:1] + 0.25
    wide_q, wide_k, scale = ma.coordinate_bias(q, k, coords, k_coords, beta=2.0)
    assert wide_k.shape[0] == 1
    got = scale * torch.einsum("bihc,bjhc->bhij", wide_q, wide_k.expand(2, -1, -1, -1))
    plain = q.shape[-1] ** -0.5 * torch.einsum("bihc,bjhc->bhij", q, k.expand(2, -1, -1, -1))
    torch.testing.assert_close(got, plain - 2 * distances(coords, k_coords.expand(2, -1, -1))[:, None])
    assert ma.attention(wide_q, wide_k, v, PLAN, softmax_scale=scale).shape == q.shape


@pytest.mark.parametrize("num", [0, 1])
def test_no_token_and_one(num):
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", num)], [ma.AttentionPattern(["a"], ["a"])])
    q, k, v = torch.randn(3, 2, num, 3, 8)
    q, k, scale = ma.coordinate_bias(q, k, torch.full((2, num, 3), 7.0), beta=2.0)
    torch.testing.assert_close(ma.attention(q, k, v, plan, softmax_scale=scale), v)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_before_numbers_are_split(autocast):
    leaves = make(torch.float32)
    with torch.autocast("cpu", autocast):
        wide_q, wide_k, scale = ma.coordinate_bias(*leaves[:2], leaves[-1], beta=5.0)
        out = ma.attention(wide_q, wide_k, leaves[2], PLAN, softmax_scale=scale)
    halves = [t.to(autocast) for t in leaves[:3]]
    assert torch.equal(out, ours(*halves, leaves[-1], 5.0)[0])


def test_under_the_compiler():
    leaves = make(torch.float32)
    beta = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, expected = compiled(*leaves, beta), ours(*leaves, beta)
    torch.testing.assert_close(got, expected)
    wanted = [*leaves, beta]
    torch.testing.assert_close(gradients(*got, wanted), gradients(*expected, wanted), rtol=1e-4, atol=1e-4)


GOOD = {"q": (2, 5, 3, 8), "k": (2, 7, 3, 8), "coords": (2, 5, 3), "k_coords": (2, 7, 3)}
WRONG = {
    "q of rank 3": ({"q": (2, 5, 8)}, ValueError, r"q: expected shape .*, got \(2, 5, 8\)"),
    "heads of k": ({"k": (2, 7, 2, 8)}, ValueError, r"k: expected shape \(2 or 1, seqlen_k, 3, 8\) to match q, got"),
    "batch of k": ({"k": (3, 7, 3, 8)}, ValueError, r"k: expected shape \(2 or 1, "),
    "length of coords": ({"coords": (2, 6, 3)}, ValueError, r"coords: expected shape \(2 or 1, 5, 3\) to match q, got"),
    "rank of coords": ({"coords": (5, 3)}, ValueError, r"coords: expected shape \(2 or 1, 5, d\) to match q"),
    "length of k_coords": (
        {"k_coords": (2, 5, 3)},
        ValueError,
        r"k_coords: expected shape \(2 or 1, 7, 3\) to match k",
    ),
    "dimensions": ({"k_coords": (2, 7, 2)}, ValueError, r"k_coords: expected shape \(2 or 1, 7, 3\) to match k, got"),
    "no k_coords": ({"k_coords": None}, ValueError, r"k_coords: expected shape \(2 or 1, 7, 3\) to match k"),
    "no tensor": ({"coords": 3}, TypeError, "coords: expected a tensor, got int"),
    "integers": ({"coords": torch.zeros(2, 5, 3, dtype=torch.int64)}, ValueError, "coords: expected floating-point"),
    "dtype of k": ({"k": torch.zeros(2, 7, 3, 8).half()}, ValueError, "k: expected dtype torch.float32 like q"),
    "dtype of k_coords": ({"k_coords": torch.zeros(2, 7, 3).double()}, ValueError, "k_coords: expected dtype"),
    "device": ({"k": torch.zeros(2, 7, 3, 8, device="meta")}, ValueError, "k: expected device cpu like q, got meta"),
    "beta is text": ({"beta": "3"}, TypeError, "beta: expected a number or a tensor, got str"),
    "beta is a truth": ({"beta": True}, TypeError, "beta: expected a number or a tensor, got bool"),
    "beta is nan": ({"beta": math.nan}, ValueError, "beta: expected a finite number, got nan"),
    "beta of two heads": ({"beta": torch.ones(2)}, ValueError, r"beta: expected shape \(\) or \(3,\)"),
    "scale of zero": ({"softmax_scale": 0.0}, ValueError, "softmax_scale: expected a finite number other than 0"),
    "infinite scale": ({"softmax_scale": math.inf}, ValueError, "softmax_scale: expected a finite number other than 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case):
    changes, error, message = WRONG[case]
    given = {**GOOD, "beta": 1.0, **changes}
    given = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in given.items()}
    with pytest.raises(error, match=message):
        ma.coordinate_bias(given.pop("q"), given.pop("k"), given.pop("coords"), given.pop("k_coords"), **given)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shared", [False, True], ids=["v for each", "v of batch 1"])
def test_values_that_are_filled_up_give_the_same(monkeypatch, shared, compiled):
    q, k, v, _ = make(width=24)
    v = v[: 1 if shared else 2, ..., :10].detach().requires_grad_()
    results = []
    for fills_up in (False, True):
        monkeypatch.setattr(ops, "_fills_up", lambda *_, fills_up=fills_up: fills_up)
        torch._dynamo.reset()
        attend = torch.compile(ma.attention, backend="aot_eager", fullgraph=True) if compiled else ma.attention
        out, lse = attend(q, k, v, PLAN, return_lse=True)
        assert out.shape == (2, NUM_TOKENS, 3, 10)
        results.append((out, lse, *gradients(out, lse, (q, k, v))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_values_are_filled_up_where_that_brings_faster_kernels(monkeypatch):
    def family(dtype, head_dim, head_dim_v, index, backward):
        is_served = head_dim == head_dim_v and not (backward and head_dim > 64)
        return ("hopper" if is_served else "portable"), ""

    monkeypatch.setattr(ops._C, "cuda_kernel", family)
    gpu = torch.device("cuda", 0)
    assert ops._fills_up(torch.bfloat16, 64, 48, gpu)
    assert ops._fills_up(torch.bfloat16, 128, 48, gpu)  # for the forward
    assert not ops._fills_up(torch.bfloat16, 64, 48, torch.device("cpu"))
    monkeypatch.setattr(ops._C, "cuda_kernel", lambda *_: ("portable", ""))
    assert not ops._fills_up(torch.bfloat16, 64, 48, gpu)
    monkeypatch.setattr(ops._C, "cuda_kernel", lambda *_: ("hopper", ""))
    assert not ops._fills_up(torch.bfloat16, 64, 48, gpu)
