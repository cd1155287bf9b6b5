"""Every number that a dtype has: huge logits, infinities, NaN, the largest, the smallest; in every input, anywhere.

The oracle is torch's own composition in fp64, which says what is finite; a head of each problem has numbers of another
kind, and heads are judged one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import compare
import pytest
import torch
from cases import DTYPES, Case, Inputs, make_inputs
from compare import Results, deterministic, judge_every_number, oracle, run
from torch import Tensor

import mixed_attention as ma


def run_reference(inputs: Inputs) -> Results:
    """What transforms make of the operator: the reference answers."""
    dlse = torch.zeros_like(run(inputs).lse) if inputs.dlse is None else inputs.dlse

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        case = inputs.case
        options = {"softmax_scale": case.softmax_scale, "key_padding_mask": inputs.key_padding_mask}
        return ma.attention(q, k, v, case.plan, return_lse=True, **options)

    (out, lse), differentiate = torch.func.vjp(attend, *(t.detach() for t in (inputs.q, inputs.k, inputs.v)))
    return Results(out, lse, *differentiate((inputs.dout, dlse)))


each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_path = pytest.mark.parametrize("path", [run, run_reference], ids=["kernels", "reference"])
Path = Callable[[Inputs], Results]

# Two tiles of keys and some more, in the forward and in the backward; and a group of few.
SIZES = (20, 210)


def logits(dtype: torch.dtype) -> list[float]:
    """Magnitudes up to the end of what scores are computed in; of fp16 as far as its products come."""
    if dtype == torch.float64:
        return [1e2, 1e4, 1e8, 1e13, 1e16, 1e30, 1e100, 1e140]
    if dtype == torch.float16:
        return [1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8]
    return [1e2, 1e4, 1e6, 1e7, 1e8, 1e10, 1e20, 1e30, 1e37]


def huge(case: Case, device: torch.device, aligned: bool) -> tuple[Inputs, Tensor]:
    """Queries and keys whose scores have a magnitude a head.

    Rows whose greatest score is not above the others by more than these are off by get no gradient: nobody can tell
    their weights. With `aligned` each query is near one of its keys, which makes such rows rare. Second, the
    other rows, ``(B, H, Nq)``.
    """
    sizes = logits(case.dtype)
    inputs = make_inputs(case.with_(num_heads=len(sizes)), device)
    q, k = inputs.q.detach(), inputs.k.detach()
    factors = torch.tensor(
        [(size / (case.head_dim * abs(case.scale))) ** 0.5 for size in sizes], dtype=torch.float64, device=device
    )
    with torch.no_grad():
        if aligned:
            partner = inputs.weights[0].argmax(-1) + torch.arange(len(q[0]), device=device) % SIZES[0]
            q.copy_(k[:, partner].nan_to_num(0, 0, 0) + q / 8)
            if case.scale < 0:
                q.neg_()
        for t in (q, k):
            finite = torch.where(t.isfinite(), t.double() * factors[:, None], t.double())
            t.copy_(finite)
    s = case.scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.nan_to_num(0, 0, 0).double())
    s = torch.where(inputs.weights[:, None] > 0, s, -torch.inf)
    top = s.topk(2, -1).values
    # Each of the sums over channels is off by less than a rounding of each of its terms and of itself.
    size = q.double().abs().amax(-1) * case.head_dim
    largest = k.nan_to_num(0, 0, 0).double().abs().amax((1, 3))
    unit = torch.finfo(dtype_of_sums(case.dtype)).eps * (8 if device.type == "cuda" else 1)
    off = unit * case.head_dim * abs(case.scale) * (size * largest[:, None]).transpose(1, 2)
    is_clear = (top[..., 0] - top[..., 1] > 2 * off + 100) | (top[..., 0] == -torch.inf)
    dlse = None if inputs.dlse is None else inputs.dlse * is_clear
    return replace(inputs, dout=inputs.dout * is_clear.transpose(1, 2)[..., None], dlse=dlse), is_clear


def dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


HUGE = {
    "dense": Case(SIZES, "a>b b>ab", head_dim=16),
    "random mask": Case(SIZES, "a>b b>ab", head_dim=16, batch_size=2, mask="random"),
    "negative scale": Case(SIZES, "a>b b>ab", head_dim=24, softmax_scale=-0.3, dlse=False),
    "large scale": Case(SIZES, "a>b b>ab", head_dim=8, softmax_scale=50.0),
}


@each_path
@each_dtype
@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "random"])
def test_huge_logits(aligned: bool, name: str, dtype: torch.dtype, path: Path, device: torch.device):
    """Rows whose greatest score stands out are as exact as those of small scores; all others are means of values."""
    inputs, is_clear = huge(HUGE[name].with_(dtype=dtype), device, aligned)
    results = path(inputs)
    rows = is_clear.transpose(1, 2)[..., None]
    assert results.out.isfinite().all()
    limit = inputs.v.detach().nan_to_num(0, 0, 0).abs().amax() * (1 + 8 * torch.finfo(dtype).eps)
    assert (results.out.abs() <= limit).all()
    exact, _ = oracle(inputs)
    judge_every_number(
        replace(results, out=torch.where(rows, results.out, exact.out.to(dtype))), inputs, exact_scores=True
    )


@each_path
@each_dtype
@pytest.mark.parametrize("sign", [1, -1], ids=["above zero", "below zero"])
def test_small_differences_of_large_logits(sign: int, dtype: torch.dtype, path: Path, device: torch.device):
    """Scores that are sums without rounding, of a large number and small integers: weights are as exact as of these."""
    last = 49 if dtype == torch.float64 else 20
    bases = [2.0**i for i in (*range(0, 12, 4), *range(12, last + 1, 2))]
    case = Case(SIZES, "a>b b>ab", num_heads=len(bases), head_dim=8, softmax_scale=1.0, dtype=dtype)
    inputs = make_inputs(case, device)
    with torch.no_grad():
        inputs.q.round_().clamp_(-2, 2)
        inputs.k.round_().clamp_(-2, 2)
        for head, base in enumerate(bases):
            inputs.q[:, :, head, 0] = 2.0 ** (math.log2(base) // 2)
            inputs.k[:, :, head, 0] = sign * 2.0 ** (math.log2(base) - math.log2(base) // 2)
    judge_every_number(path(inputs), inputs, exact_scores=True)


def values(dtype: torch.dtype) -> list[float]:
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    return [-torch.inf, torch.inf, torch.nan, limits.max, -limits.max, smallest, 0.0]


# By the rows of the group b, which are rows of keys and of queries.
PLACES = {
    "first": slice(SIZES[0], SIZES[0] + 1),
    "last": slice(-1, None),
    "a tile": slice(SIZES[0], SIZES[0] + 192),
    "one group": slice(SIZES[0], None),
    "everywhere": slice(None),
}


@each_path
@each_dtype
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
def test_any_number_anywhere(name: str, place: str, dtype: torch.dtype, path: Path, device: torch.device):
    """One number a head: in one channel of a row, in all channels of many.

    Equal keys must have equal scores, however large, which torch's own in fp64 have only where sums are exact: the
    largest number here is a power of two, as the scale's root is, and what it is multiplied by has few bits.
    """
    power = math.ldexp(0.5, math.frexp(torch.finfo(dtype).max)[1])
    numbers = [min(max(number, -power), power) if math.isfinite(number) else number for number in values(dtype)]
    inputs = make_inputs(Case(SIZES, "a>b b>ab", num_heads=len(numbers), head_dim=16, dtype=dtype), device)
    with torch.no_grad():
        for factor in (inputs.q, inputs.k):
            factor.mul_(8).round_().div_(8)
    tensor, rows = getattr(inputs, name).detach(), PLACES[place]
    for head, number in enumerate(numbers):
        if name == "dlse":
            tensor[:, head, rows] = number / 64
        elif place in ("first", "last"):
            # Gradients are scaled last: what is summed may be larger by the inverse of the softmax scale.
            tensor[:, rows, head, 3] = number / 16
        else:
            # Sums over channels of the very largest may overflow on their way, in one order or another.
            tensor[:, rows, head] = number / 64
    judge_every_number(path(inputs), inputs)


@each_dtype
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_what_a_row_may_not_see_changes_no_bit(name: str, dtype: torch.dtype, device: torch.device):
    """Masked keys, keys of other groups, queries of other groups: whatever they are, and however large its logits."""
    case = Case((*SIZES, 70), "a>b b>ab c>c", num_heads=3, head_dim=16, dtype=dtype, mask="random", softmax_scale=1.0)
    inputs, other = make_inputs(case, device), make_inputs(case, device)
    for each in (inputs, other):
        with torch.no_grad():
            each.q.mul_(torch.tensor([1.0, 1e2, 1e4 if dtype != torch.float16 else 1e3], device=device)[:, None])
    numbers = torch.tensor(values(dtype), device=device).repeat(3)[:16]
    with torch.no_grad():
        getattr(other, name)[:, -70:] = numbers.to(dtype)
    with deterministic():
        expected, got = run(inputs), run(other)
    for field in fields(Results):
        results = (getattr(each, field.name) for each in (expected, got))
        assert_equal_bits(*(r[..., :-70] if field.name == "lse" else r[:, :-70] for r in results))


def assert_equal_bits(expected: Tensor, got: Tensor) -> None:
    assert torch.equal(expected.nan_to_num(12345.0), got.nan_to_num(12345.0))


@each_path
@each_dtype
@pytest.mark.parametrize("scale", [0.0, 1e-39, -1e-30, 1e-8, -1e8, 1e30])
def test_scales(scale: float, dtype: torch.dtype, path: Path, device: torch.device):
    """Scores of ordinary size from products and scales of any, as far as factors of the dtype go."""
    largest = {torch.float16: 1e4}.get(dtype, 1e19)
    factor = max(1 / largest, min(abs(scale) ** -0.5, largest)) if scale else largest
    inputs = make_inputs(Case(SIZES, "a>b b>ab", num_heads=2, softmax_scale=scale, dtype=dtype), device)
    with torch.no_grad():
        inputs.q.mul_(factor)
        inputs.k.mul_(factor)
    judge_every_number(path(inputs), inputs)


@each_path
@each_dtype
def test_values_up_to_the_largest(dtype: torch.dtype, path: Path, device: torch.device):
    """A mean of numbers is no larger than they are, and sums on the way to it must not overflow."""
    has_kernels = path is run and ma.ops.has_kernels(device.type, dtype)
    largest = torch.finfo(dtype).max * (1 if has_kernels else 0.999)  # the reference rounds as torch does, up too
    parts = [1.0, 0.75, 0.5, 2.0**-4, 2.0**-10]
    inputs = make_inputs(Case(SIZES, "a>b b>ab", num_heads=2 * len(parts), dtype=dtype, dlse=False), device)
    with torch.no_grad():
        for head, part in enumerate(parts):
            inputs.v[:, :, head] = part * largest
            inputs.v[:, :, len(parts) + head] = part * largest * inputs.v[:, :, len(parts) + head].clamp(-1, 1)
        inputs.dout.mul_(2.0**-20)
    results = path(inputs)
    assert results.out.isfinite().all()
    shrink = 2.0**-600  # so that the oracle, which is linear in v, does not overflow in fp64
    exact, rounding = oracle(replace(inputs, v=inputs.v.detach().double() * shrink))
    off = (results.out.double() * shrink - exact.out).abs().amax((0, 1, 3))
    assert (off <= 2 * rounding.out.amax((0, 1, 3))).all()
    assert results.dv.isfinite().all()


@each_dtype
def test_dropout_of_huge_logits(dtype: torch.dtype, device: torch.device):
    """A row that drops its only weight is zero, others are as the reference has them."""
    inputs, is_clear = huge(HUGE["dense"].with_(dtype=dtype), device, aligned=True)
    seed = torch.tensor([7], device=device)
    segments = inputs.case.plan.flat()
    q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out, _ = torch.ops.mixed_attention.forward(q, k, v, segments, inputs.case.scale, None, 0.5, seed)
    expected, _ = ma.reference.attention(
        *(t.double() for t in (q, k, v)), inputs.case.plan, dropout_p=0.5, dropout_seed=seed, return_lse=True
    )
    grads = torch.autograd.grad(out, (q, k, v), inputs.dout)
    expected_grads = torch.autograd.grad(expected, (q, k, v), inputs.dout.double())
    rows = is_clear.transpose(1, 2)[..., None]
    for got, wanted in zip((out * rows, grads[2]), (expected * rows, expected_grads[2].double())):
        unit = 2 * torch.finfo(dtype).eps + compare.LARGE_LSE[device.type] * torch.finfo(torch.float32).eps
        assert ((got.double() - wanted).abs() <= unit * wanted.abs().amax()).all()


def test_second_derivatives_of_huge_logits(device: torch.device):
    inputs, _ = huge(HUGE["dense"].with_(dtype=torch.float64), device, aligned=True)

    def second(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        tensors = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        first = torch.autograd.grad(attend(*tensors), tensors, inputs.dout, create_graph=True)
        return torch.autograd.grad(first, tensors, [t.detach() * 0 + 1 for t in first], materialize_grads=True)

    assert all(t.isfinite().all() for t in second(lambda q, k, v: ma.attention(q, k, v, inputs.case.plan)))
