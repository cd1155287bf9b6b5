"""The judge: results against dense attention in fp64, with the error of torch's own attention as the yardstick.

The largest error of a tensor may be twice that of torch's ``scaled_dot_product_attention``, called once per pattern in
the same dtype, plus what *one rounding* makes of the exact result. The latter counts where the yardstick is lucky: of
five numbers, all may come out exact. It is derived, not chosen. Each intermediate result of the exact computation (the
scores, the sum of their exponentials, its logarithm, the log-sum-exp, the weights, the output, ``dp``, ``delta``,
``ds``, the gradients) is off by one rounding: the sums over channels as below; the weights, ``ds`` and what is stored
by the unit roundoff of the dtype. These errors are carried through the formulas to first order: those of different
weights in quadrature, since they are independent; those that a whole row shares (of its log-sum-exp and its delta)
added.

Where products of fp32 are made in TF32, torch's own attention, which makes none, says too little. There the yardstick
is the exact computation with every factor of a product rounded to TF32, which is what that mode permits. It knows what
independent errors do not: all weights of a row are off by the one rounding of its query, all of a column by that of its
key, and weights that are alike are rounded alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
import torch.nn.functional as F
from cases import Case, Inputs, make_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma


@dataclass
class Results:
    """What a forward and a backward give; shapes as the operator's."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@contextmanager
def _poisoned_memory(device: torch.device) -> Iterator[None]:
    """Lets torch hand out memory full of NaN, as it does when it is asked for deterministic algorithms.

    NOTE: on CPUs alone; on GPUs torch would refuse the matrix products of the reference, which serves fp64 there.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(inputs: Inputs) -> Results:
    """Forward and backward of the operator, whose outputs must overwrite what their memory held."""
    if inputs.case.dropout_p > 0:
        torch.manual_seed(inputs.case.seed)
    with _poisoned_memory(inputs.q.device):
        out, lse = ma.attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.case.plan,
            softmax_scale=inputs.case.softmax_scale,
            key_padding_mask=inputs.key_padding_mask,
            dropout_p=inputs.case.dropout_p,
            return_lse=True,
        )
        outputs, grads_in = (out, lse), (inputs.dout, inputs.dlse)
        if inputs.dlse is None:
            outputs, grads_in = (out,), (inputs.dout,)
        grads = torch.autograd.grad(outputs, (inputs.q, inputs.k, inputs.v), grads_in)
    return Results(out.detach(), lse.detach(), *grads)


@contextmanager
def deterministic() -> Iterator[None]:
    """Asks for gradients of equal bits in every run; without it, kernels for GPUs may add in any order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: Case, device: torch.device | str = "cpu") -> Results:
    """Makes inputs, runs the operator and judges the results."""
    inputs = make_inputs(case, device)
    results = run(inputs)
    judge(results, inputs)
    return results


def judge(actual: Results, inputs: Inputs) -> None:
    """Holds results against the oracle.

    Raises:
        AssertionError: Naming the tensor, the place of the worst error, both numbers, and the bound.
    """
    exact, rounding = oracle(inputs)
    error_of_torch = cache(lambda: _error_of_torch(inputs, exact))  # most results need no yardstick
    names = [field.name for field in fields(Results)]
    errors = {}
    for name in names:
        got, expected = getattr(actual, name), getattr(exact, name)
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        assert got.dtype == _dtype(name, inputs), f"{name}: dtype {got.dtype}"
        got = got.double()
        errors[name] = torch.where(got == expected, 0.0, (got - expected).abs())  # equal infinities differ by 0
    # All maxima come from the device at once. That of errors is not finite where only one of two numbers is.
    all_errors, one_roundings = largest_of(errors.values()), largest_of(getattr(rounding, name) for name in names)
    maxima = torch.stack([all_errors, one_roundings], 1).tolist()
    for name, (largest, one_rounding) in zip(names, maxima):
        if math.isfinite(largest) and largest <= one_rounding:
            continue
        got, expected, error = getattr(actual, name).double(), getattr(exact, name), errors[name]
        _check_non_finite(name, got, expected)
        limits = torch.finfo(inputs.case.dtype)
        # Below the normal numbers a rounding is worth the distance of two neighbours, however small the exact result.
        bound = 2 * error_of_torch()[name] + one_rounding + limits.smallest_normal * limits.eps
        if largest > bound:
            place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{name}{list(place)} is {got[place]:.9g}, expected {expected[place]:.9g}: off by {largest:.3g}, "
                f"allowed {bound:.3g} = 2 x {error_of_torch()[name]:.3g} (torch's own) + {one_rounding:.3g} "
                f"(one rounding); "
                f"{int((error > bound).sum())} of {error.numel()} are off by more; {inputs.case}"
            )


def _dtype(name: str, inputs: Inputs) -> torch.dtype:
    is_fp64 = inputs.case.dtype == torch.float64
    return (torch.float64 if is_fp64 else torch.float32) if name == "lse" else inputs.case.dtype


def _check_non_finite(name: str, got: Tensor, expected: Tensor) -> None:
    for kind, is_kind in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (is_kind(got) != is_kind(expected)).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name}: {len(wrong)} of {got.numel()} are {kind} in one only; first at {list(place)}: "
                f"got {got[place]}, expected {expected[place]}"
            )


def largest_of(tensors: Iterable[Tensor]) -> Tensor:
    """The largest number of each, 0 of those that have none, in fp64 on their device."""
    return torch.stack([t.max().double() if t.numel() else t.new_zeros((), dtype=torch.float64) for t in tensors])


def oracle(
    inputs: Inputs, factor: Callable[[Tensor], Tensor] = lambda t: t, *, exact_scores: bool = False
) -> tuple[Results, Results]:
    """Dense attention in fp64 over all pairs, by the multiplicities of the case; and what one rounding makes of it.

    With `exact_scores` no rounding of the scores counts, and none of a log-sum-exp beyond `LARGE_LSE`, but in the
    log-sum-exp that is returned. So it is where the products are sums without rounding, or where one score of a row
    is above all others by more than they can be off: weights are then as exact as of small scores.

    Args:
        inputs: What was computed from.
        factor: Rounds a factor of a product over channels, keys or queries; for yardsticks.
        exact_scores: See above.
    """
    case, weights = inputs.case, inputs.weights[:, None]  # (B, 1, Nq, Nk)
    visible = inputs.weights.any(1)[:, :, None, None]
    batch = case.batch_size
    heads_first = (0, 2, 1, 3)
    q, dout = inputs.q.detach().double().permute(heads_first), inputs.dout.double().permute(heads_first)
    k, v = (t.detach().double().expand(batch, -1, -1, -1) for t in (inputs.k, inputs.v))
    k, v = (torch.where(visible, t, 0.0).permute(heads_first) for t in (k, v))
    dlse = torch.zeros(q.shape[:3], device=q.device) if inputs.dlse is None else inputs.dlse
    dlse = dlse.double()[..., None]  # columns, (B, H, Nq, 1), like all that a row shares
    q_factor, k_factor, v_factor, dout_factor = (factor(t) for t in (q, k, v, dout))

    s = case.scale * q_factor @ k_factor.mT
    dout_v = dout_factor @ v_factor.mT
    s_max = torch.cat([torch.where(weights > 0, s, -torch.inf), torch.full_like(dlse, -1e300)], -1).amax(-1, True)
    once = torch.where(weights > 0, torch.exp(s - s_max), 0.0)  # of a key that counts once
    p_sum = (weights * once).sum(-1, keepdim=True)
    has_keys = p_sum > 0
    once = once / torch.where(has_keys, p_sum, 1.0)
    p = weights * once
    kept, keep_probability = weights if inputs.kept is None else inputs.kept, inputs.keep_probability
    p_kept = kept * once / keep_probability
    lse = torch.where(has_keys, s_max + torch.log(p_sum), -torch.inf)
    out = factor(p_kept) @ v_factor
    dp, delta = dout_v / keep_probability, (dout * out).sum(-1, True) - dlse
    ds = once * (kept * dp - weights * delta)
    ds_factor = factor(ds)
    dq, dk = case.scale * ds_factor @ k_factor, case.scale * ds_factor.mT @ q_factor
    dv = factor(p_kept).mT @ dout_factor

    units = units_of(case.dtype, q.device)
    u, w = units.accumulator, units.dtype
    # Sums over keys and over queries: what a tile adds up in the tensor cores, 64 terms, may have lost that much.
    stored = w + units.lost * 64 / 8
    off_s = _off_sum(case.scale * q, k, s, units) + u * s.abs()  # summed, and scaled
    off_s = torch.where(s.isfinite(), off_s, 0.0)  # a score of -inf has the weight 0, whatever its key
    log_sum, lse_size = torch.where(has_keys, torch.log(p_sum), 0.0).abs(), torch.where(has_keys, lse, 0.0).abs()
    off_own_lse = _norm(p * off_s, -1, keepdim=True) + u * lse_size
    if exact_scores:
        off_s, lse_size = torch.zeros_like(s), lse_size.clamp(max=LARGE_LSE[q.device.type])
    off_exp = _hypot(off_s, units.exponential)  # of 1, as is the next but one
    off_lse = _norm(p * off_exp, -1, keepdim=True) + u * (1 + log_sum + lse_size)  # the sum, its logarithm, their whole
    off_weight = _hypot(off_exp, w, units.product)  # without what the row shares
    off_p = p_kept * off_weight
    off_out = _quadrature(off_p, v) + (off_lse + stored) * out.abs()
    off_delta = _norm(dout * off_out, -1, keepdim=True) + u * ((dout * out).abs().sum(-1, True) + dlse.abs())
    off_dp = _off_sum(dout, v, dout_v, units)
    ds_size = ds.abs()
    if inputs.kept is not None:  # a key that is listed twice may be kept once: two numbers that cancel
        ds_size = once * (kept * (dp - delta).abs() + (weights - kept) * delta.abs())
    off_ds = _hypot(p_kept * off_dp, ds_size * _hypot(off_weight, w, units.product))
    off_row = off_delta * (p @ k).abs() + off_lse * (ds @ k).abs()
    off_dq = abs(case.scale) * (_quadrature(off_ds, k) + off_row) + stored * dq.abs()
    off_ds_column = _hypot(off_ds, p * off_delta, ds * off_lse)
    off_dk = abs(case.scale) * _quadrature(off_ds_column.mT, q) + stored * dk.abs()
    # Rows that are alike, as all are under a scale of 0, have log-sum-exps that are off alike.
    off_alike = off_lse.amax(-2, keepdim=True) if off_lse.numel() else 0.0
    off_dv = _quadrature(_hypot(off_p, p_kept * off_lse).mT, dout) + (off_alike + stored) * dv.abs()

    def rows_first(t: Tensor, like: Tensor) -> Tensor:
        return t.permute(heads_first).sum_to_size(like.shape)

    exact = Results(
        rows_first(out, inputs.dout),
        lse.squeeze(-1),
        rows_first(dq, inputs.q),
        rows_first(dk, inputs.k),
        rows_first(dv, inputs.v),
    )
    rounding = Results(
        rows_first(off_out, inputs.dout),
        (off_lse + off_own_lse if exact_scores else off_lse).squeeze(-1),
        rows_first(off_dq, inputs.q),
        rows_first(off_dk, inputs.k),
        rows_first(off_dv, inputs.v),
    )
    return exact, rounding


# Up to here the backward may take weights from a log-sum-exp that was rounded, and which they then are off by. On GPUs
# the rows beyond cost more.
LARGE_LSE = {"cpu": 2.0**8, "cuda": 2.0**12}


@dataclass(frozen=True)
class Units:
    """Relative errors of one rounding each.

    Attributes:
        accumulator: That of a sum.
        dtype: That of a value that is stored.
        product: That of a factor before it is multiplied; 0 where products are exact, or rounded with their sum.
        exponential: That of an exponential.
        lost: What a sum of eight products loses each time that it is added to.
    """

    accumulator: float
    dtype: float
    product: float
    exponential: float
    lost: float


def units_of(dtype: torch.dtype, device: torch.device) -> Units:
    if dtype == torch.float64:  # rounds twice: the oracle is no better
        eps = torch.finfo(dtype).eps
        return Units(eps, eps, 0, eps, 0)
    accumulator = torch.finfo(torch.float32).eps / 2
    stored = torch.finfo(dtype).eps / 2
    if device.type == "cpu":
        return Units(accumulator, stored, 0, accumulator, 0)
    exponential = 2**-22  # of ex2.approx, says the PTX manual
    if dtype == torch.float32:  # whose p begin at 2^8: an exponent beyond 8 is rounded to a multiple of 2^-20
        exponential += math.log(2) * 2**-21
    # Tensor cores cut sums off instead of rounding them: each of the additions loses half a unit on average, always
    # towards zero, and of half of the sum on average. An addition brings 16 products of 16 bits.
    if dtype != torch.float32:
        return Units(accumulator, stored, 0, exponential, accumulator / 4)
    # TF32 has 11 significant bits. Either both factors are rounded to them, or each is split into two such numbers:
    # then the product of the two lower parts is left out, and what the second part of either factor does not hold.
    # There are three additions for eight products where these have three parts.
    # The yardstick of TF32 says what largest errors these two roundings make. Here they are what they are on average:
    # each spreads evenly over a unit to both sides, so that its square is a third of the unit's.
    parts, product = (1, (2 / 3) ** 0.5 * 2**-11) if uses_tf32(dtype, device) else (3, 3 * 2**-22)
    return Units(accumulator, stored, product, exponential, parts * accumulator / 2)


def uses_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    is_allowed = torch.get_float32_matmul_precision() != "highest"
    return dtype == torch.float32 and device.type == "cuda" and is_allowed


def to_tf32(t: Tensor) -> Tensor:
    """The nearest numbers of 11 significant bits, ties away from zero, in the dtype of ``t``."""
    bits = t.float().view(torch.int32)
    return (bits + 0x1000 & -0x2000).view(torch.float32).to(t.dtype)


def _off_sum(left: Tensor, right: Tensor, product: Tensor, units: Units) -> Tensor:
    """The error of ``product = left @ right.mT``, if each of the n partial sums of an entry is rounded.

    Terms of random signs make partial sums of the size of the square root of their number: together the errors are u
    times the sum of magnitudes. Terms of one sign make a steadily growing sum: sqrt(n / 3) u times the result. The
    errors of the products are independent.
    """
    size = product.abs()
    off = units.accumulator * (left.abs() @ right.abs().mT + (left.shape[-1] / 3) ** 0.5 * size)
    if units.product > 0:
        off += units.product * (left.square() @ right.square().mT).sqrt()
    if units.lost > 0:
        off += units.lost * (left.shape[-1] / 8) * size
    return off


# The squares of numbers near the largest overflow, so the three that follow square nothing as it is.


def _hypot(first: Tensor, *others: Tensor | float) -> Tensor:
    for other in others:
        first = torch.hypot(first, torch.as_tensor(other, dtype=first.dtype, device=first.device))
    return first


def _norm(t: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    t, size = _scaled(t, dim)
    norm = t.square().sum(dim, True).sqrt() * size
    return norm if keepdim else norm.squeeze(dim)


def _quadrature(off_left: Tensor, right: Tensor) -> Tensor:
    """The error of ``left @ right`` if the entries of ``left`` are off independently."""
    (off_left, off_size), (right, size) = _scaled(off_left, -1), _scaled(right, -2)
    return (off_left.square() @ right.square()).sqrt() * off_size * size


def _scaled(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Numbers up to one along a dim, and what they were divided by."""
    if not t.numel():
        return t, t.new_ones(())
    size = t.abs().amax(dim, True)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    return t / size, size


def _error_of_torch(inputs: Inputs, exact: Results) -> dict[str, float]:
    """The largest errors of torch's attention in the same dtype; in TF32 those of rounded factors, if these are larger.

    It has no dropout that we could predict: there it is its error without, as if every weight were kept, and so as
    much larger as its weights would be.
    """
    kept_all = exact if inputs.kept is None else oracle(replace(inputs, kept=None, keep_probability=1.0))[0]
    errors = _largest_differences(run_torch(inputs), kept_all)
    errors = {name: error if name == "lse" else error / inputs.keep_probability for name, error in errors.items()}
    if uses_tf32(inputs.case.dtype, inputs.q.device):
        rounded, _ = oracle(inputs, to_tf32)
        errors = {name: max(error, errors[name]) for name, error in _largest_differences(rounded, exact).items()}
    return errors


def _largest_differences(got: Results, expected: Results) -> dict[str, float]:
    pairs = {f.name: (getattr(got, f.name).double(), getattr(expected, f.name)) for f in fields(Results)}
    errors = (torch.where(torch.isfinite(right), (left - right).abs(), 0.0) for left, right in pairs.values())
    return dict(zip(pairs, largest_of(errors).tolist()))


def run_torch(inputs: Inputs, lse_of: Callable[[Tensor], Tensor] = lambda s: s.logsumexp(-1)) -> Results:
    """``scaled_dot_product_attention`` for each sequence and each set of queries that count keys alike.

    The log-sum-exp, which torch does not give, and its part of the gradients come from a matrix product and
    ``logsumexp`` in the accumulator's dtype.
    """
    case = inputs.case
    accumulator = _dtype("lse", inputs)
    q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    out = torch.zeros_like(inputs.dout, memory_format=torch.contiguous_format)
    lse = torch.full((case.batch_size, case.num_heads, q.shape[1]), -torch.inf, dtype=accumulator, device=q.device)
    totals = [torch.zeros_like(t) for t in (q, k, v)]
    for batch_idx in range(case.batch_size if case.num_heads else 0):  # on GPUs it takes no tensors without heads
        k_idx, v_idx = min(batch_idx, k.shape[0] - 1), min(batch_idx, v.shape[0] - 1)
        for rows, columns in _patterns(inputs.weights[batch_idx]):
            parts = q[batch_idx, rows], k[k_idx, columns], v[v_idx, columns]
            q_rows, k_rows, v_rows = (t.transpose(0, 1)[None] for t in parts)
            o = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, scale=case.scale)
            outputs, grads_in = [o], [inputs.dout[batch_idx, rows].transpose(0, 1)[None]]
            pattern_lse = lse_of(case.scale * (q_rows.to(accumulator) @ k_rows.to(accumulator).mT))
            if inputs.dlse is not None:
                outputs, grads_in = [*outputs, pattern_lse], [*grads_in, inputs.dlse[batch_idx, :, rows][None]]
            for total, grad in zip(totals, torch.autograd.grad(outputs, (q, k, v), grads_in)):
                total += grad
            out[batch_idx, rows] = o.detach()[0].transpose(0, 1)
            lse[batch_idx, :, rows] = pattern_lse.detach()[0]
    return Results(out, lse, *totals)


def run_math(inputs: Inputs, dtype: torch.dtype) -> Results:
    """:func:`run_torch` in another dtype, by the composition that torch documents as the meaning of its attention."""
    q, k, v, dout = (t.detach().to(dtype) for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = None if inputs.dlse is None else inputs.dlse.to(accumulator)
    case = inputs.case.with_(dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return run_torch(Inputs(case, q, k, v, inputs.key_padding_mask, dout, dlse, inputs.weights), _stable_lse)


def _stable_lse(s: Tensor) -> Tensor:
    """The log-sum-exp with the derivative of a softmax: torch's own takes it from a rounded result."""
    largest = s.detach().amax(-1, True).clamp(min=torch.finfo(s.dtype).min)
    total = (s - largest).exp().sum(-1)
    has_scores = total != 0
    return torch.where(has_scores, largest[..., 0] + torch.where(has_scores, total, 1).log(), -torch.inf)


def judge_every_number(actual: Results, inputs: Inputs, *, exact_scores: bool = False) -> None:
    """Holds results against torch's own composition in fp64 where numbers may be anything; head by head.

    A result has to be finite, and right, where it is finite in exact arithmetic and does not overflow in torch's own
    arithmetic of the same dtype, and not finite where it is in neither. Infinity or NaN is the same here: a weight
    that is zero after rounding makes a NaN of an infinite value, one that is not an infinity.

    Raises:
        AssertionError: Naming the tensor, the place and both numbers.
    """
    exact, own = run_math(inputs, torch.float64), run_math(inputs, inputs.case.dtype)
    _, rounding = oracle(inputs, exact_scores=exact_scores)
    for field in fields(Results):
        name = field.name
        got, expected, torchs, off = (getattr(results, name).detach() for results in (actual, exact, own, rounding))
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        assert got.dtype == _dtype(name, inputs), f"{name}: dtype {got.dtype}"
        is_finite = expected.to(got.dtype).isfinite() & torchs.isfinite()
        is_not = ~expected.isfinite() & ~torchs.isfinite()
        for wrong in (is_finite & ~got.isfinite(), is_not & got.isfinite()):
            if wrong.any():
                place = tuple(wrong.nonzero()[0].tolist())
                raise AssertionError(
                    f"{name}{list(place)} is {got[place]}, expected {expected[place]}, torch's own {torchs[place]}; "
                    f"{int(wrong.sum())} of {got.numel()} like this; {inputs.case}"
                )
        heads = 1 if name == "lse" else 2
        others = [dim for dim in range(got.ndim) if dim != heads]
        error = torch.where(is_finite, (got.double() - expected).abs(), 0)
        torch_error = torch.where(is_finite, (torchs.double() - expected).abs(), 0).amax(others, True)
        smallest = torch.finfo(got.dtype).smallest_normal  # below it kernels may round to zero
        # No range is wider than that of fp64: where errors overflow, it is those of sums of the head's largest results.
        largest = torch.where(is_finite, expected.abs(), 0).amax(others, True)
        off = torch.where(off.isfinite(), off, torch.finfo(got.dtype).eps * max(inputs.weights.shape[1:]) * largest)
        one_rounding = torch.where(is_finite, off, 0).amax(others, True)
        bound = 2 * (torch_error + one_rounding) + smallest  # twice too: of a head there may be few numbers
        wrong = error > bound
        if wrong.any():
            place = tuple(int(i) for i in torch.unravel_index((error / bound).argmax(), error.shape))
            raise AssertionError(
                f"{name}{list(place)} is {got[place]:.9g}, expected {expected[place]:.9g}, torch's own "
                f"{torchs[place]:.9g}, allowed {float(bound.expand_as(error)[place]):.3g}; "
                f"{int(wrong.sum())} of {got.numel()} like this; {inputs.case}"
            )


def _patterns(weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows that count keys alike, and their keys, a key that counts twice listed twice; without rows that have none."""
    if not weights.numel():
        return []
    kinds, kind_of_row = weights.unique(dim=0, return_inverse=True)
    keys = [torch.arange(weights.shape[1], device=weights.device).repeat_interleave(kind.long()) for kind in kinds]
    return [((kind_of_row == i).nonzero()[:, 0], columns) for i, columns in enumerate(keys) if len(columns)]
