"""The judge itself: torch's own arithmetic passes, small mistakes do not."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from compare import Results, judge, oracle, run_torch

import mixed_attention as ma

CASE = Case((70, 41, 5), "a>ab b>aab c>b", batch_size=2, num_heads=2, head_dim=24, mask="random")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_torch_itself_passes(dtype: torch.dtype):
    inputs = make_inputs(CASE.with_(dtype=dtype))
    judge(run_torch(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [field.name for field in fields(Results)])
def test_errors_of_some_roundings_do_not_pass(name: str, dtype: torch.dtype):
    """The largest number of any tensor may be off by so many units in its last place as sums over channels and keys
    make in its dtype, not by more; in 16 bits these sums are made in fp32, and it may be off by its own rounding."""
    units = 4 if dtype.itemsize == 2 and name != "lse" else 50
    inputs = make_inputs(CASE.with_(dtype=dtype))
    results = run_torch(inputs)
    wrong = getattr(results, name)
    wrong.flatten()[torch.where(wrong.isfinite(), wrong.abs(), 0).argmax()] *= 1 + units * torch.finfo(wrong.dtype).eps
    with pytest.raises(AssertionError, match=rf"^{name}\[.*\] is .* expected .* allowed .*torch's own"):
        judge(results, inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [field.name for field in fields(Results)])
def test_what_is_not_finite_does_not_pass(name: str, value: float):
    inputs = make_inputs(CASE)
    results = run_torch(inputs)
    getattr(results, name)[0, 1, 1] = value
    with pytest.raises(AssertionError, match=rf"^{name}: \d+ of \d+ are"):
        judge(results, inputs)


def test_rows_without_keys_must_say_so():
    inputs = make_inputs(CASE.with_(mask="blocked"))
    results = run_torch(inputs)
    assert (results.lse[0] == -torch.inf).all()
    results.lse[0, 0, 0] = 0.0
    with pytest.raises(AssertionError, match="lse: 1 of 464 are -inf in one only"):
        judge(results, inputs)


@pytest.mark.parametrize("name", [field.name for field in fields(Results)])
def test_wrong_shapes_and_dtypes_do_not_pass(name: str):
    inputs = make_inputs(CASE)
    for change in (lambda t: t[:1], lambda t: t.double()):
        results = run_torch(inputs)
        setattr(results, name, change(getattr(results, name)))
        with pytest.raises(AssertionError, match=f"{name}: (shape|dtype)"):
            judge(results, inputs)


def test_the_oracle_differentiates_rightly():
    """Its written-out gradients against those of autograd through its own forward."""
    inputs = make_inputs(CASE.with_(attends="a>ab b>aac c>b", dtype=torch.float64, mask=None, shared="k"))
    exact, _ = oracle(inputs)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs.q, inputs.k.expand(2, -1, -1, -1)) * CASE.scale
    scores = scores + inputs.weights[:, None].log()
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), inputs.v)
    lse = scores.logsumexp(-1)
    grads = torch.autograd.grad((out, lse), (inputs.q, inputs.k, inputs.v), (inputs.dout, inputs.dlse))
    torch.testing.assert_close((exact.out, exact.lse), (out, lse))
    torch.testing.assert_close((exact.dq, exact.dk, exact.dv), grads)


def test_the_oracle_knows_dropout():
    """Against the definition of dropout and autograd through it; keys that are listed twice are dropped one by one."""
    case = CASE.with_(attends="a>ab b>aac c>b", dtype=torch.float64, shared="v", dropout_p=0.4, seed=5)
    inputs = make_inputs(case)
    exact, _ = oracle(inputs)
    torch.manual_seed(case.seed)
    arguments = {"key_padding_mask": inputs.key_padding_mask, "dropout_p": 0.4, "return_lse": True}
    seed = ma.ops.draw_seed(inputs.q.device)
    outputs = ma.reference.attention(inputs.q, inputs.k, inputs.v, case.plan, dropout_seed=seed, **arguments)
    grads = torch.autograd.grad(outputs, (inputs.q, inputs.k, inputs.v), (inputs.dout, inputs.dlse))
    torch.testing.assert_close((exact.out, exact.lse), outputs)
    torch.testing.assert_close((exact.dq, exact.dk, exact.dv), grads)
