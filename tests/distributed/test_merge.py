"""Attention to parts of the keys, merged."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mixed_attention as ma

# Rows 0 to 3 see all keys, rows 4 and 5 none, row 6 keys of the second part alone.
SEGMENTS = [(0, 4, [(0, 9)]), (4, 6, []), (6, 7, [(5, 7)])]
CUTS = [(0, 3), (3, 8), (8, 9)]


def part_of(start: int, end: int) -> ma.AttentionPlan:
    segments = []
    for first, last, ranges in SEGMENTS:
        clipped = [(max(a, start) - start, min(b, end) - start) for a, b in ranges]
        segments.append((first, last, [(a, b) for a, b in clipped if a < b]))
    return ma.AttentionPlan.from_segments(segments, end - start)


def parts(q, k, v):
    results = [ma.attention(q, k[:, a:b], v[:, a:b], part_of(a, b), return_lse=True) for a, b in CUTS]
    return [out for out, _ in results], [lse for _, lse in results]


def inputs(dtype, magnitude=1.0):
    torch.manual_seed(1)
    q = magnitude * torch.randn(2, 7, 3, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 3, 4, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("magnitude", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_merge_into_the_whole(dtype, magnitude):
    """Each part's output is rounded to the dtype, and the sum of these once more."""
    q, k, v = inputs(dtype, magnitude)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    whole = ma.AttentionPlan.from_segments(SEGMENTS, 9)
    exact, exact_lse = ma.attention(*doubles, whole, return_lse=True)
    out, lse = ma.distributed.merge(*parts(q, k, v))
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    # Scores of that size are off by their rounding, and weights with them.
    scores = 1 + magnitude * 10 * torch.finfo(lse.dtype).eps / eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * eps * scores * v.abs().max().item())
    rows = torch.tensor([0, 1, 2, 3, 6])
    bound = 40 * magnitude * torch.finfo(lse.dtype).eps * 10
    torch.testing.assert_close(lse[:, :, rows].double(), exact_lse[:, :, rows], rtol=0, atol=bound)
    assert (out[:, 4:6] == 0).all() and (lse[:, :, 4:6] == -torch.inf).all()


def test_gradients_are_those_of_the_whole():
    leaves = inputs(torch.float64)
    whole = ma.AttentionPlan.from_segments(SEGMENTS, 9)
    dout, dlse = torch.randn(2, 7, 3, 4, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    expected = torch.autograd.grad(ma.attention(*leaves, whole, return_lse=True), leaves, (dout, dlse))
    got = torch.autograd.grad(ma.distributed.merge(*parts(*leaves)), leaves, (dout, dlse))
    for actual, wanted in zip(got, expected):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_derivatives_of_any_order():
    torch.manual_seed(2)
    outs = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return ma.distributed.merge(tensors[:3], tensors[3:])

    assert gradcheck(call, (*outs, *lses), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, (*outs, *lses))


def test_a_part_without_keys_does_not_count_whatever_it_holds():
    leaves = inputs(torch.float64)
    outs, lses = parts(*leaves)
    out, lse = ma.distributed.merge(outs, lses)
    poisoned = torch.full_like(outs[0], torch.nan, requires_grad=True)
    nothing = torch.full_like(lses[0], -torch.inf, requires_grad=True)
    got, got_lse = ma.distributed.merge([*outs, poisoned], [*lses, nothing])
    assert torch.equal(got, out) and torch.equal(got_lse, lse)
    grads = torch.autograd.grad(got.sum() + got_lse[:, :, :4].sum(), (poisoned, nothing, *leaves))
    for grad in grads:
        assert grad.isfinite().all()
    assert not grads[0].any() and not grads[1].any()


def test_what_is_not_a_number_shows():
    outs, lses = parts(*inputs(torch.float64))
    outs[1] = torch.where(outs[1] == outs[1][0, 0, 0, 0], torch.nan, outs[1])
    lses[2] = torch.where(lses[2] == lses[2][1, 0, 2], torch.nan, lses[2])
    out, lse = ma.distributed.merge(outs, lses)
    assert out[0, 0, 0, 0].isnan() and out[1, 2, 0].isnan().all() and lse[1, 0, 2].isnan()
    assert lse.isnan().sum() == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda outs, lses: ([], []), ValueError, "expected one of each for every part"),
        (lambda outs, lses: (outs, lses[:2]), ValueError, "got 3 and 2"),
        (lambda outs, lses: ([*outs[:2], outs[2][:1]], lses), ValueError, r"outs\[2\]"),
        (lambda outs, lses: ([*outs[:2], outs[2].float()], lses), ValueError, r"outs\[2\]"),
        (lambda outs, lses: (outs, [lses[0].mT, *lses[1:]]), ValueError, r"lses\[0\]: expected .*\(2, 3, 7\)"),
        (lambda outs, lses: (outs, [lses[0], 5, lses[2]]), TypeError, r"lses\[1\]: expected a tensor, got int"),
    ],
)
def test_parts_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        ma.distributed.merge(*change(*parts(*inputs(torch.float64))))
