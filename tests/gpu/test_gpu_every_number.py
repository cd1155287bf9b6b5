"""Large scores, and rows none of whose scores are finite, on every family of GPU kernels; the oracle is fp64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import Case, Inputs, make_inputs
from compare import deterministic, oracle, run, uses_tf32
from torch import Tensor

import mixed_attention as ma

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
PATTERNS = ((70, 300), "a>b b>ab")
# What serves them: Hopper's kernels of each width, with one or more tiles of keys, masks, parts, clusters and shares;
# those of fp32, whose backward is the portable one from 72 columns on; and the portable ones, for width or scale.
FAMILIES = {
    **{f"bf16 of {width}": Case(*PATTERNS, head_dim=width, dtype=BF16) for width in (32, 64, 96, 128, 192, 256)},
    "fp16 of 64": Case(*PATTERNS, head_dim=64, dtype=FP16),
    "fp16 of 40": Case(*PATTERNS, head_dim=40, dtype=FP16),
    "fp32 of 64": Case(*PATTERNS, head_dim=64),
    "fp32 of 128": Case(*PATTERNS, head_dim=128),
    "fp32 of 16": Case(*PATTERNS, head_dim=16),
    "values of another width": Case(*PATTERNS, head_dim=64, head_dim_v=40, dtype=BF16),
    "negative scale": Case(*PATTERNS, head_dim=64, softmax_scale=-1.0, dtype=BF16),
    "masked": Case(*PATTERNS, head_dim=64, batch_size=2, mask="random", dtype=BF16),
    "masked, wide": Case(*PATTERNS, head_dim=256, batch_size=2, mask="random", dtype=FP16),
    "masked, fp32": Case(*PATTERNS, head_dim=64, batch_size=2, mask="random"),
    "many keys": Case((40, 6000), "ab>ab", head_dim=64, dtype=BF16, cached="b"),
    "many keys, fp32": Case((40, 6000), "ab>ab", head_dim=64, cached="b"),
    "many keys, portable": Case((40, 6000), "ab>ab", head_dim=16, cached="b"),
    "many queries": Case((3000, 500), "a>b b>a", head_dim=64, dtype=BF16),
    "TF32 of 64": Case(*PATTERNS, head_dim=64),
    "TF32 of 128": Case(*PATTERNS, head_dim=128),
    "TF32 of 16": Case(*PATTERNS, head_dim=16),
}
each_family = pytest.mark.parametrize("case", FAMILIES, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A family's case, and torch's setting of it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param.startswith("TF32") else "highest")
    yield FAMILIES[request.param]
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[False, True], ids=["as it comes", "deterministic"])
def any_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both forms of the backward."""
    if request.param:
        with deterministic():
            yield
    else:
        yield


def judge(inputs: Inputs) -> None:
    """Holds all results to the exact ones, as if no score were rounded.

    What is left is one rounding of each weight, each product and each result, summed by the sizes of what is summed;
    of fp32 also what a log-sum-exp of 2^8 leaves of a weight, for the backward takes the weights from it.
    """
    case, results, (exact, _) = inputs.case, run(inputs), oracle(inputs)
    unit = {FP16: 2.0**-10, BF16: 2.0**-7, FP32: 2.0**-14}[case.dtype]
    if uses_tf32(case.dtype, inputs.q.device):
        unit = 2.0**-10
    q, k, v, dout = (t.detach().double().nan_to_num(0, 0, 0) for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
    w = inputs.weights[:, None]
    s = torch.where(w > 0, case.scale * torch.einsum("bqhd,bkhd->bhqk", q, k), -torch.inf)
    p = w * torch.exp(s - s.amax(-1, keepdim=True).clamp(min=-1e300))
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-300)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout.abs(), v.abs())
    ds = abs(case.scale) * p * (dp + (p * dp).sum(-1, keepdim=True))
    if inputs.dlse is not None:
        ds += abs(case.scale) * p * inputs.dlse.double().abs()[..., None]
    sizes = {
        "out": torch.einsum("bhqk,bkhd->bqhd", p, v.abs()),
        "lse": torch.where(exact.lse.isfinite(), exact.lse.abs(), 0) + 1,
        "dq": torch.einsum("bhqk,bkhd->bqhd", ds, k.abs()),
        "dk": torch.einsum("bhqk,bqhd->bkhd", ds, q.abs()),
        "dv": torch.einsum("bhqk,bqhd->bkhd", p, dout.abs()),
    }
    for name, size in sizes.items():
        got, expected = getattr(results, name).double(), getattr(exact, name)
        allowed = (2.0**-21 if name == "lse" else 4 * unit) * size + torch.finfo(case.dtype).smallest_normal
        off = torch.where(got == expected, 0, (got - expected).abs())  # of two infinities nothing
        assert (off <= allowed).all(), (
            f"{name}: off by {float((off / allowed).max()):.3g} times what is allowed, {case}"
        )


@each_family
@pytest.mark.parametrize("sign", [1, -1], ids=["above zero", "below zero"])
def test_small_differences_of_large_scores(case: Case, sign: int, any_order: None, device: torch.device):
    """Scores that are sums without rounding, a large one and small integers: weights are those of the integers."""
    powers = (0, 8, 12, 16, 20)
    inputs = make_inputs(case.with_(num_heads=len(powers), softmax_scale=-1.0 if case.scale < 0 else 1.0), device)
    with torch.no_grad():
        for t in (inputs.q, inputs.k):
            t.round_().clamp_(-1, 1)
            t[..., 8:] = torch.where(t[..., 8:].isfinite(), 0.0, t[..., 8:])
        unseen = ~inputs.k[..., 1].isfinite()
        for head, power in enumerate(powers):
            inputs.q[:, :, head, 0] = 2.0 ** (power // 2)
            inputs.k[:, :, head, 0] = sign * 2.0 ** (power - power // 2)
        inputs.k[unseen] = torch.nan
    judge(inputs)


@each_family
def test_huge_scores(case: Case, any_order: None, device: torch.device):
    """Where one score is above all others by more than they are off, the row is that key's; no weight exceeds 1."""
    sizes = (1e4, 1e7) if case.dtype == FP16 else (1e4, 1e7, 1e10, 1e20, 1e35)
    inputs = make_inputs(case.with_(num_heads=len(sizes), dlse=False), device)
    q, k, weights = inputs.q.detach(), inputs.k.detach(), inputs.weights
    for head, size in enumerate(sizes):
        factor = (size / (case.head_dim * abs(case.scale))) ** 0.5
        q[:, :, head] *= factor
        k[:, :, head] *= factor
    s = case.scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().nan_to_num(0, 0, 0))
    s = torch.where(weights[:, None] > 0, s, -torch.inf)
    top = s.topk(2, -1).values
    size = torch.einsum("bqhd,bkhd->bhqk", q.double().abs(), k.double().nan_to_num(0, 0, 0).abs()).amax(-1)
    # By how much the two factors of a product of fp32 are off: they keep 22 bits, in two parts, and leave out the
    # product of the lower ones; or they keep 11 bits, which the largest weight is rounded to as well, unless it is 1.
    # Parts of fp16 are in units of their row, so that small numbers are off by up to 2^-39 of its largest
    # (half_limbs.h).
    split, of_largest = (3 * 2.0**-22, 2.0**-39) if case.dtype == FP32 else (0, 0)
    is_tf32 = uses_tf32(case.dtype, device)
    if is_tf32:
        split = 2 * 2.0**-11
    least_gap = 2.0**-8 if is_tf32 else 2.0**-17  # of the sizes' sum: more than two scores are off together
    is_clear = (top[..., 0] - top[..., 1] > least_gap * abs(case.scale) * size + 100) | (top[..., 0] == -torch.inf)
    assert is_clear.float().mean() > 0.5
    rows = is_clear.transpose(1, 2)[..., None]
    inputs.dout.mul_(rows)
    out = ma.attention(inputs.q, inputs.k, inputs.v, case.plan, **options_of(inputs))
    exact, _ = oracle(inputs)
    off = ((out.double() - exact.out) * rows).abs()
    v_largest = inputs.v.detach().double().nan_to_num(0, 0, 0).abs().amax((1, 3), True)
    assert (
        off <= ((2 * torch.finfo(case.dtype).eps + split) * exact.out.abs() + of_largest * v_largest) * rows + 1e-30
    ).all()
    grads = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
    # The backward has a weight from the log-sum-exp, up to 2^12 of it to base 2, and an error of an exponent is one of
    # the weight. The exponent is off by five roundings of its size: of the scale, of the sum of the base and the
    # logarithm, of that times log 2, of the result times log2(e), and of the base.
    lse = torch.where(is_clear & (top[..., 0].abs() * math.log2(math.e) <= 2.0**12), top[..., 0].abs(), 0)
    # Its scores may come from other kernels than the forward's, each off by what their factors left out.
    off_scores = torch.where(lse > 0, 2 * split * abs(case.scale) * size, 0)
    off_weight = torch.expm1(5 * 2.0**-24 * lse + off_scores) + 4 * torch.finfo(case.dtype).eps + split
    is_top, dout = (s == top[..., :1]).double(), inputs.dout.double()
    seen = torch.einsum("bhqk,bqhd->bkhd", is_top * is_clear[..., None], dout)
    allowed = torch.einsum("bhqk,bqhd->bkhd", is_top * off_weight[..., None], dout.abs())
    allowed += of_largest * torch.einsum("bhqk,bqhd->bkh", is_top, dout.abs().amax(-1, True))[..., None]
    dv_off = (grads[2].double() - seen).abs()
    assert (dv_off <= allowed.sum_to_size(dv_off.shape) + 1e-30).all()
    assert all(grad.isfinite().all() for grad in grads)


def options_of(inputs: Inputs) -> dict[str, Tensor | float | None]:
    return {"softmax_scale": inputs.case.softmax_scale, "key_padding_mask": inputs.key_padding_mask}


@each_family
@pytest.mark.parametrize("which", ["all", "all but the last", "the last"])
def test_scores_of_minus_infinity(case: Case, which: str, device: torch.device):
    """Keys with such a score have no weight; a row that sees no others is as one without keys, as torch has it."""
    inputs = make_inputs(case, device)
    is_visible = inputs.weights.any(1)[:, :, None]
    chosen = torch.ones_like(is_visible)
    if which != "all":
        chosen[:, :-1], chosen[:, -1] = which != "the last", which == "the last"
    with torch.no_grad():
        inputs.q[..., 0] = 1 if case.scale > 0 else -1
        inputs.k[..., 0] = torch.where(chosen & is_visible, -torch.inf, inputs.k[..., 0])
    out, lse = ma.attention(inputs.q, inputs.k, inputs.v, case.plan, return_lse=True, **options_of(inputs))
    left = inputs.weights * ~chosen[:, None, :, 0]
    has_weight = left.any(-1)
    rows = out.transpose(1, 2)[:, 0]
    assert (rows[~has_weight] == 0).all() and (lse[:, 0][~has_weight] == -torch.inf).all()
    assert rows[has_weight].isfinite().all() and lse[:, 0][has_weight].isfinite().all()
    grads = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
    # 0 times infinity is NaN in one column of dq, and in no other.
    assert grads[0][..., 1:].isfinite().all() and all(grad.isfinite().all() for grad in grads[1:])


@each_family
@pytest.mark.parametrize("rise", [0, 30, 300], ids=["any scores", "rising scores", "steeply rising scores"])
def test_values_up_to_the_largest(case: Case, rise: int, device: torch.device):
    """A mean of numbers is no larger than they are, and sums on the way to it do not overflow."""
    inputs = make_inputs(case, device)
    largest = 0.75 * torch.finfo(case.dtype).max  # which rounding does not take beyond the end
    with torch.no_grad():
        if rise:  # from the first key to the last
            inputs.q.zero_()
            inputs.q[..., 0] = 1 / case.scale
            places = torch.linspace(0, rise, inputs.k.shape[1], device=device)[None, :, None]
            inputs.k[..., 0] = torch.where(inputs.k[..., 0].isfinite(), places, inputs.k[..., 0])
        inputs.v.copy_(torch.where(inputs.v.isfinite(), largest, inputs.v))
    out = ma.attention(inputs.q, inputs.k, inputs.v, case.plan, **options_of(inputs))
    sees = inputs.weights.any(-1)[..., None, None].expand_as(out)
    # Each of the additions rounds the sum in fp32, and so does each of those of the weights.
    allowed = 4 * torch.finfo(case.dtype).eps + 2 * inputs.k.shape[1] * 2.0**-24
    if uses_tf32(case.dtype, device):
        allowed += 2 * 2.0**-11  # of the value and of its weight
    assert (out[sees].double() >= largest * (1 - allowed)).all() and out.isfinite().all()


def test_portable_kernels(device: torch.device):
    """All of this once more by the portable kernels, which a process chooses once."""
    environment = {**os.environ, "MIXED_ATTENTION_GPU": "portable"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", __file__, "-k", "not test_portable_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
