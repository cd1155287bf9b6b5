"""The flat plan as the operator reads it: whatever arrives, it is understood or refused, never followed blindly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, make_inputs
from compare import judge, run
from hypothesis import given
from hypothesis import strategies as st

import mixed_attention as ma

SEQLEN_Q, SEQLEN_K = 6, 8


def forward(segments: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 4, device=device) for n in (SEQLEN_Q, SEQLEN_K, SEQLEN_K))
    return torch.ops.mixed_attention.forward(q, k, v, segments, 0.5)


MALFORMED = {
    "nothing": ([], r"covers 0 queries, q has 6; build the plan from the same token_specs"),
    "too few queries": ([0, 5, 1, 0, 8], "covers 5 queries, q has 6"),
    "too many queries": ([0, 7, 1, 0, 8], "covers 7 queries, q has 6"),
    "a gap": ([0, 2, 1, 0, 8, 3, 6, 1, 0, 8], r"query segment \[3, 6\) does not begin at row 2"),
    "an overlap": ([0, 4, 1, 0, 8, 3, 6, 1, 0, 8], r"query segment \[3, 6\) does not begin at row 4"),
    "out of order": ([3, 6, 1, 0, 8, 0, 3, 1, 0, 8], r"query segment \[3, 6\) does not begin at row 0"),
    "backwards": ([0, -1, 1, 0, 8], r"query segment \[0, -1\)"),
    "keys out of range": ([0, 6, 1, 0, 9], r"key range \[0, 9\) is not within the 8 rows of k"),
    "keys before the start": ([0, 6, 1, -1, 8], r"key range \[-1, 8\)"),
    "keys backwards": ([0, 6, 1, 5, 4], r"key range \[5, 4\)"),
    "enormous keys": ([0, 6, 1, 0, 2**62], "is not within the 8 rows of k"),
    "enormous rows": ([0, 2**62, 1, 0, 8], "covers 4611686018427387904 queries"),
    "no count": ([0, 6], "ends inside a segment"),
    "a count too many": ([0, 6, 2, 0, 8], "ends inside a segment"),
    "an enormous count": ([0, 6, 2**62, 0, 8], "ends inside a segment"),
    "a negative count": ([0, 6, -1], "ends inside a segment"),
    "half a range": ([0, 6, 1, 0], "ends inside a segment"),
    "something behind": ([0, 6, 1, 0, 8, 6], "ends inside a segment"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plans_are_refused(name: str, device: torch.device):
    segments, message = MALFORMED[name]
    with pytest.raises(ValueError, match="plan: .*" + message):
        forward(segments, device)


@given(segments=st.lists(st.one_of(st.integers(-2, 10), st.integers(-(2**63), 2**63 - 1)), max_size=12))
def test_any_numbers_are_understood_or_refused(segments: list[int], device: torch.device):
    try:
        out, lse = forward(segments, device)
    except ValueError as error:
        assert str(error).startswith("plan: ")  # noqa: PT017, whether it raises depends on the numbers
    else:
        assert out.isfinite().all()
        assert not lse.isnan().any()


def test_segments_without_ranges_give_zeros(device: torch.device):
    out, lse = forward([0, 2, 0, 2, 6, 1, 0, 8], device)
    assert (out[:, :2] == 0).all()
    assert (lse[..., :2] == -torch.inf).all()
    assert (out[:, 2:] != 0).all()


def test_segments_may_be_cut_anywhere(device: torch.device):
    """How queries are divided into segments changes no bit of their results."""
    whole = forward([0, 6, 2, 1, 4, 3, 8], device)
    cut = forward([0, 1, 2, 1, 4, 3, 8, 1, 1, 1, 0, 0, 1, 6, 2, 1, 4, 3, 8], device)
    for got, expected in zip(cut, whole):
        assert torch.equal(got, expected)


def test_overlapping_ranges_count_twice(device: torch.device):
    """A plan never makes them, but the operator's format allows them: keys 3 to 6 stand in two ranges."""
    inputs = make_inputs(Case((0, 3, 3, 2), "abcd>bccd", skip_unread_keys=True, dlse=False), device)
    out, lse = torch.ops.mixed_attention.forward(inputs.q, inputs.k, inputs.v, [0, 8, 2, 0, 6, 3, 8], inputs.case.scale)
    dq, dk, dv = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
    results = run(inputs)
    results.out, results.lse, results.dq, results.dk, results.dv = out.detach(), lse.detach(), dq, dk, dv
    judge(results, inputs)


# Plain eager calls hand over an object that the plan keeps, whose integers C++ knows by where they lie.


def plan_of(starts: list[int]) -> ma.AttentionPlan:
    """As many segments as there are starts, each attends to the keys from its start on."""
    return ma.AttentionPlan.from_segments([(i, i + 1, [(start, SEQLEN_K)]) for i, start in enumerate(starts)], SEQLEN_K)


@given(plans=st.lists(st.lists(st.integers(0, SEQLEN_K), min_size=1, max_size=4), min_size=2, max_size=12))
def test_plans_come_and_go_at_the_same_place(plans: list[list[int]], device: torch.device):
    """The integers of a plan may lie where those of one lay that is gone, and be as many."""
    k, v = (torch.randn(1, SEQLEN_K, 1, 4, device=device) for _ in range(2))
    for starts in plans:
        q = torch.randn(1, len(starts), 1, 4, device=device)
        plan = plan_of(starts)
        for _ in range(2):
            got = ma.attention(q, k, v, plan, return_lse=True)
            wanted = torch.ops.mixed_attention.forward(q, k, v, plan.flat(), 0.5)
            assert all(torch.equal(*pair) for pair in zip(got, wanted))


def test_a_kept_plan_is_checked_against_every_call(device: torch.device):
    plan = plan_of([0, 2, 5])
    q, k = torch.randn(1, 3, 1, 4, device=device), torch.randn(1, SEQLEN_K + 2, 1, 4, device=device)
    for _ in range(2):
        short, exact, longer = k[:, : SEQLEN_K - 1], k[:, :SEQLEN_K], k
        with pytest.raises(ValueError, match=r"key range \[0, 8\) is not within the 7 rows of k"):
            ma.attention(q, short, short, plan)
        with pytest.raises(ValueError, match="plan: covers 3 queries, q has 2"):
            ma.attention(q[:, :2], exact, exact, plan)
        assert torch.equal(ma.attention(q, exact, exact, plan), ma.attention(q, longer, longer, plan))


def test_a_backward_outlives_its_plan(device: torch.device):
    q, k = (torch.randn(1, n, 1, 4, device=device, requires_grad=True) for n in (3, SEQLEN_K))
    wanted = torch.autograd.grad(ma.attention(q, k, k, plan_of([1, 3, 6])).sum(), (q, k))
    out = ma.attention(q, k, k, plan_of([1, 3, 6]))  # whose plan is gone behind this line
    for starts in ([2, 2, 2], [0, 7, 8], [5, 1, 0]):
        ma.attention(q, k, k, plan_of(starts))
    for got, expected in zip(torch.autograd.grad(out.sum(), (q, k)), wanted):
        assert torch.equal(got, expected)


def test_threads_share_a_kept_plan(device: torch.device):
    plans = [plan_of([i % SEQLEN_K, (3 * i) % SEQLEN_K]) for i in range(8)]
    q, k = (torch.randn(1, n, 1, 4, device=device, requires_grad=True) for n in (2, SEQLEN_K))

    def step(plan: ma.AttentionPlan) -> tuple[torch.Tensor, ...]:
        out = ma.attention(q, k, k, plan)
        return out, *torch.autograd.grad(out.sum(), (q, k))

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(step, plans * 8))
    for plan, result in zip(plans * 8, results):
        assert all(torch.equal(*pair) for pair in zip(result, step(plan)))
