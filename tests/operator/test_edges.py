"""Problems at which kernels go wrong: each against the oracle, in every dtype."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cases import DTYPES, EDGE_CASES, LARGE_CASES, Case, Inputs, counts, make_inputs
from compare import Results, check, deterministic, judge, run

import mixed_attention as ma


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", EDGE_CASES.values(), ids=EDGE_CASES)
def test_edge(case: Case, dtype: torch.dtype, device: torch.device):
    check(case.with_(dtype=dtype), device)


@pytest.mark.parametrize("heavy_tails", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_real_widths_over_many_tiles(case: Case, dtype: torch.dtype, heavy_tails: bool, device: torch.device):
    check(case.with_(dtype=dtype, heavy_tails=heavy_tails), device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", [None, "random"])
def test_outputs_are_written_whole(mask: str | None, dtype: torch.dtype, device: torch.device):
    """Gradients go to buffers full of NaN, which are slices of larger ones: all of theirs is written, nothing else."""
    case = Case((33, 20, 0, 18), "a>bc bcd>bb", batch_size=2, num_heads=3, dtype=dtype, layout="packed", mask=mask)
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("there the reference computes fp64, which has no such buffers")
    inputs = make_inputs(case, device)
    q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
    arguments = case.plan.flat(), case.scale, inputs.key_padding_mask
    out, lse = torch.ops.mixed_attention.forward(q, k, v, *arguments)
    packed = torch.full((2, q.shape[1] + 2, 3, 4, case.head_dim + 1), torch.nan, dtype=dtype, device=device)
    grads = packed[:, 1:-1, :, 1:, :-1].unbind(2)
    torch.ops.mixed_attention.backward_out(inputs.dout, inputs.dlse, q, k, v, out, lse, *arguments, 0.0, None, *grads)
    judge(Results(out, lse, *grads), inputs)
    packed[:, 1:-1, :, 1:, :-1] = torch.nan
    assert packed.isnan().all()


POISONED = Case((33, 20, 18, 70), "a>b b>ac c>c d>ab", batch_size=2, num_heads=2, head_dim=12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("asking", ["a", "b", "c", "d"])
def test_what_a_group_may_not_see_changes_no_bit(asking: str, dtype: torch.dtype, device: torch.device):
    """One group's results with everything poisoned that its pattern does not name, other groups' queries included."""
    case = POISONED.with_(dtype=dtype)
    rows = _rows_of(case, asking)
    inputs, poisoned = make_inputs(case, device), make_inputs(case, device)
    read = counts(case)[rows].any(0).to(device)
    own = torch.zeros_like(read).index_fill_(0, rows.to(device), True)
    with torch.no_grad():
        poisoned.k[:, ~read], poisoned.v[:, ~read] = torch.nan, torch.inf
        poisoned.q[:, ~own], poisoned.dout[:, ~own] = torch.nan, -torch.inf
    with deterministic():
        clean, other = run(inputs), run(poisoned)
    for name in ("out", "dq"):
        assert torch.equal(getattr(clean, name)[:, own], getattr(other, name)[:, own]), name
    assert torch.equal(clean.lse[..., own], other.lse[..., own])
    only_here = read & ~counts(case)[~own.cpu()].any(0).to(device)
    for name in ("dk", "dv"):
        assert torch.equal(getattr(clean, name)[:, only_here], getattr(other, name)[:, only_here]), name


def _rows_of(case: Case, name: str) -> torch.Tensor:
    starts = torch.tensor([0, *case.sizes]).cumsum(0).tolist()
    index = [group for group, _ in case.groups].index(name)
    return torch.arange(starts[index], starts[index + 1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_a_group_may_see_shows(where: str, dtype: torch.dtype, device: torch.device):
    """A NaN reaches exactly those results that depend on it."""
    case = POISONED.with_(dtype=dtype)
    inputs = make_inputs(case, device)
    token, head, channel = 40, 1, 5  # the token is one of b, which a and d read
    with torch.no_grad():
        getattr(inputs, where)[1, token, head, channel] = torch.nan
    got = _forward(inputs)
    depends = torch.zeros(2, 141, 2, 12, dtype=torch.bool, device=device)
    readers = torch.tensor([token]) if where == "q" else counts(case)[:, token].nonzero()[:, 0]
    depends[1, readers, head] = True
    if where == "v":
        depends[..., :channel] = depends[..., channel + 1 :] = False
    assert torch.equal(got[0].isnan(), depends)
    if where != "v":
        assert torch.equal(got[1].isnan(), depends[..., 0].transpose(1, 2))


def _forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return ma.attention(inputs.q, inputs.k, inputs.v, inputs.case.plan, return_lse=True)


def test_one_pattern_over_everything_is_dense_attention(device: torch.device):
    case = Case((30, 0, 45, 7), "abcd>dbca", num_heads=3, head_dim=32, dtype=torch.float64)
    inputs = make_inputs(case, device)
    q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(_forward(inputs)[0], dense)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_repeated_calls_give_equal_bits(dtype: torch.dtype, device: torch.device):
    inputs = make_inputs(LARGE_CASES["groups"].with_(dtype=dtype, mask="random"), device)
    with deterministic():
        first, again = run(inputs), run(inputs)
    for field in fields(Results):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name


def test_views_that_last_dims_stride_over(device: torch.device):
    """The last dim may have any stride: such tensors are copied."""
    case = Case((20, 33), "a>ab b>a", num_heads=2, head_dim=8)
    inputs = make_inputs(case, device)
    turned = [
        t.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)
    ]
    dout = inputs.dout.transpose(1, 3).contiguous().transpose(1, 3)
    judge(run(Inputs(case, *turned, None, dout, inputs.dlse, inputs.weights)), inputs)


def test_the_reference_has_derivatives_where_nobody_asks(device: torch.device):
    case = Case((20, 7), "a>b b>a", cached="ab", dtype=torch.float64)
    inputs = make_inputs(case, device)
    out, lse = ma.reference.attention(inputs.q, inputs.k, inputs.v, case.plan, return_lse=True)
    for grad in torch.autograd.grad((out, lse), (inputs.q, inputs.k, inputs.v), (inputs.dout, inputs.dlse)):
        assert not grad.any()
