"""The judge itself: torch's own arithmetic passes, small mistakes do not."""

from __future__ import annotations

from dataclasses import fields

import compare
import pytest
import torch
from cases import DTYPES, Case, Inputs, make_inputs
from compare import Results, judge, oracle, run_torch
from torch import Tensor

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


# Where errors of TF32 do not add up as independent ones do: rows that share the rounding of their query, of which keys
# are so many that all else averages out, and weights that are alike. And some where they do.
TF32_CASES = {
    "a few keys": CASE.with_(dropout_p=0.4),
    "many keys": Case((1300, 2, 12), "b>aa ac>ab", batch_size=2, head_dim=64, cached="ba"),
    "weights alike": Case((183, 15, 16), "abc>ba", num_heads=3, head_dim=64, mask="back", softmax_scale=1.5625e-06),
    "keys alike": Case((40, 39), "ab>aab", num_heads=2, head_dim=64, magnitude=0.0, layout="strided"),
    "weights nearly alike": Case((191, 161), "b>aa a>ba", head_dim=112, softmax_scale=-0.0046, dlse=False),
    "peaked weights": Case((64, 65), "ab>ab", num_heads=2, head_dim=32, softmax_scale=1.0),
}


@pytest.fixture
def cuda_units(monkeypatch):
    """Results of CPU tensors are judged as if a GPU had computed them, with TF32."""
    units_of, uses_tf32, device = compare.units_of, compare.uses_tf32, torch.device("cuda")
    monkeypatch.setattr(compare, "units_of", lambda dtype, _: units_of(dtype, device))
    monkeypatch.setattr(compare, "uses_tf32", lambda dtype, _: uses_tf32(dtype, device))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("cuda_units")
@pytest.mark.parametrize("case", TF32_CASES.values(), ids=TF32_CASES)
def test_tf32_passes_and_two_bits_less_do_not(case: Case):
    for seed in range(3):
        inputs = make_inputs(case.with_(seed=seed))
        judge(attention_of_rounded(inputs, 11), inputs)
        with pytest.raises(AssertionError, match="off by"):
            judge(attention_of_rounded(inputs, 9), inputs)


def attention_of_rounded(inputs: Inputs, bits: int) -> Results:
    """Attention in fp32 as kernels compute it, each factor of a product rounded to so many significant bits.

    Unlike the oracle it rounds ties to even, and weights before they are divided by their sum or after the log-sum-exp
    was rounded.
    """
    case, weights, kept = inputs.case, inputs.weights[:, None].float(), inputs.kept
    kept = (weights if kept is None else kept.float()) / inputs.keep_probability
    is_visible = inputs.weights.any(1)[:, :, None, None]
    q, dout = inputs.q.detach().transpose(1, 2), inputs.dout.transpose(1, 2)
    k, v = (torch.where(is_visible, t.detach(), 0.0).transpose(1, 2) for t in (inputs.k, inputs.v))
    q_factor, k_factor, v_factor, dout_factor = (_rounded(t, bits) for t in (q, k, v, dout))
    s = case.scale * (q_factor @ k_factor.mT)
    s_max = torch.where(weights > 0, s, -torch.inf).amax(-1, True).clamp(min=-1e30)
    once = torch.exp(s - s_max)
    p_sum = (weights * once).sum(-1, keepdim=True)
    out = (kept * _rounded(once, bits)) @ v_factor / torch.where(p_sum > 0, p_sum, 1.0)
    lse = s_max + torch.log(p_sum)
    once = torch.where(weights > 0, torch.exp(s - lse), 0.0)
    delta = (dout * out).sum(-1, True) - (0.0 if inputs.dlse is None else inputs.dlse[..., None])
    ds = once * (kept * (dout_factor @ v_factor.mT) - weights * delta)
    dq, dk = (case.scale * t for t in (_rounded(ds, bits) @ k_factor, _rounded(ds, bits).mT @ q_factor))
    dv = (kept * _rounded(once, bits)).mT @ dout_factor
    return Results(out.transpose(1, 2), lse[..., 0], *(t.transpose(1, 2) for t in (dq, dk, dv)))


def _rounded(t: Tensor, bits: int) -> Tensor:
    left_out = 24 - bits
    ulp, pattern = 1 << left_out, t.view(torch.int32)
    return (pattern + (ulp // 2 - 1) + (pattern >> left_out & 1) & -ulp).view(torch.float32)
