"""Tangents of attention and gradients of them: inputs of a case, the formulas in fp64, and what roundings make of them.

The formulas are dense and by multiplicity, as `compare.oracle` is; `test_derivatives.py` holds them against derivatives
that torch takes of the forward. What roundings make is tried: every intermediate result is off by up to one rounding,
at random, of its dtype or of the accumulator, relative to what is summed. The largest error of several trials is the
yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import EDGE_CASES, Case, Inputs, make_inputs
from compare import units_of
from torch import Tensor

from mixed_attention import derivatives, reference

operators = torch.ops.mixed_attention
Noise = Callable[..., Tensor]

# What Hopper's kernels of either order are tried on.
TANGENT_CASES = {
    "listed twice": Case((219, 143), "a>abb b>aab", num_heads=2, head_dim=32),
    "k and v of batch 1": EDGE_CASES["k and v of batch 1"].with_(head_dim=64, layout="contiguous"),
    "k of batch 1": EDGE_CASES["k of batch 1"].with_(head_dim=16),
    "many tiles": Case((700, 730), "a>ba b>b", batch_size=2, num_heads=4, head_dim=24),
    "rounds": Case((1500, 1300), "a>a b>b", num_heads=8, head_dim=64),
    "many queries, few keys": Case((3000, 9), "a>b b>b", num_heads=2, head_dim=64),
    "only empty keys": EDGE_CASES["only empty keys"],
    "packed": Case((133, 240), "a>ab b>a", batch_size=2, num_heads=3, head_dim=64, layout="packed"),
    "spaced": Case((133, 240), "a>ab b>a", batch_size=2, num_heads=3, head_dim=40, layout="spaced"),
    "heads before rows": Case((133, 240), "a>ab b>a", batch_size=2, num_heads=3, head_dim=48, layout="transposed"),
    "negative scale": Case((133, 140), "a>b b>ab", head_dim=16, softmax_scale=-0.3),
    "large logits": Case((133, 540), "a>b b>ab", head_dim=32, magnitude=60.0),
    "heavy tails": Case((100, 530), "a>b b>ab", num_heads=3, head_dim=64, heavy_tails=True),
}


@dataclass(frozen=True)
class Moving:
    """Inputs of the operators of tangents.

    Attributes:
        inputs: The case, and its tensors.
        tangents: Those of q, k and v, ``(T, ...)``; None of what stays.
        dout_dot, dlse_dot: Cotangents of the tangents of out and log-sum-exp.
        form: ``"all"``: out and log-sum-exp have cotangents as well; ``"tangents"``: they have none; ``"double"``: nor
            are gradients of the tangents wanted, as in double backward.
    """

    inputs: Inputs
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None]
    dout_dot: Tensor
    dlse_dot: Tensor
    form: str = "all"

    @property
    def cotangents(self) -> tuple[Tensor | None, ...]:
        """Those of the tangents of out and log-sum-exp, and of these themselves."""
        i = self.inputs
        return self.dout_dot, self.dlse_dot, *((i.dout, i.dlse) if self.form == "all" else (None, None))

    @property
    def wants_dq_dot(self) -> bool:
        return self.tangents[0] is not None and self.form != "double"

    @property
    def call(self) -> tuple:
        """The last arguments of the operators."""
        case = self.inputs.case
        seed = torch.tensor([case.seed + 5], device=self.inputs.q.device) if case.dropout_p > 0 else None
        return case.plan.flat(), case.scale, self.inputs.key_padding_mask, case.dropout_p, seed


def make_moving(case: Case, moving: str, count: int, device: torch.device | str = "cpu", form: str = "all") -> Moving:
    """Fresh tensors; where nobody may see keys, their tangents are NaN."""
    inputs = make_inputs(case, device)
    inputs = replace(inputs, q=inputs.q.detach(), k=inputs.k.detach(), v=inputs.v.detach())
    generator = torch.Generator().manual_seed(case.seed + 1)

    def draw(like: Tensor) -> Tensor:
        x = torch.randn((count, *like.shape), generator=generator).to(like)
        return torch.where(like.isfinite(), x, torch.nan)

    tangents = tuple(draw(x) if name in moving else None for name, x in zip("qkv", (inputs.q, inputs.k, inputs.v)))
    lse_shape = (count, case.batch_size, case.num_heads, inputs.q.shape[1])
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    dlse_dot = torch.randn(lse_shape, generator=generator).to(device, lse_dtype)
    return Moving(inputs, tangents, draw(inputs.dout), dlse_dot, form)


@dataclass
class Results:
    """What the operators give; lse is 0 where there are no keys; gradients of the tangents of q where these move."""

    out: Tensor
    lse: Tensor
    out_dot: Tensor
    lse_dot: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_dot: Tensor


def run(moving: Moving, *, known: bool, composed: bool = False) -> Results:
    """Calls the operators, or what stands for them: behind a forward, or with it."""
    i, call = moving.inputs, moving.call
    forward_jvp, jvp, backward_jvp = (
        getattr(derivatives, f"{name}_composed") if composed else getattr(operators, name)
        for name in ("forward_jvp", "jvp", "backward_jvp")
    )
    out, lse = operators.forward(i.q, i.k, i.v, *call)
    if known:
        out_dot, lse_dot = jvp(i.q, i.k, i.v, out, lse, *moving.tangents, *call)
    else:
        with_tangents = forward_jvp(i.q, i.k, i.v, *moving.tangents, *call)
        if i.q.is_cpu:  # on GPUs another kernel may write both, which adds up in another order
            assert torch.equal(with_tangents[0], out)
            assert torch.equal(with_tangents[1], lse)
        assert torch.equal(with_tangents[1].isneginf(), lse.isneginf())
        out, lse, out_dot, lse_dot = with_tangents
    saved = i.q, i.k, i.v, out, lse, *moving.tangents, out_dot, lse_dot
    grads = backward_jvp(*moving.cotangents, *saved, *call, moving.wants_dq_dot)
    return Results(out, lse.where(~lse.isneginf(), 0.0), out_dot, lse_dot, *grads)


def check(moving: Moving, *, composed: bool = False) -> None:
    """Runs the operators with the forward and behind it, and holds them against the formulas.

    Errors may be twice those of trials of roundings, of which a few do not find the largest.

    Args:
        moving: What goes in.
        composed: Whether to run what stands for the operators where they have no kernels.
    """
    exact, yardstick = exact_and_yardstick(moving)
    limits = torch.finfo(moving.inputs.case.dtype)
    for known in (False, True):
        for name, got in vars(run(moving, known=known, composed=composed)).items():
            expected, what = getattr(exact, name), f"{name}, {'behind' if known else 'with'} the forward"
            assert got.shape == expected.shape, what
            assert got.isfinite().all(), what
            error = float((got.double() - expected).abs().max()) if got.numel() else 0.0
            bound = 2 * yardstick[name] + limits.smallest_normal
            assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}; {moving.inputs.case}"


def exact_and_yardstick(moving: Moving, trials: int = 8) -> tuple[Results, dict[str, float]]:
    """The exact results, and for each the largest error of several trials of roundings."""
    exact = formulas(moving, lambda x, *_: x)
    device = moving.inputs.q.device
    generator = torch.Generator(device).manual_seed(1)
    units = units_of(moving.inputs.case.dtype, device)
    of_sums = units.accumulator + units.product + units.lost
    of_exponentials = max(1.0, units.exponential / of_sums)  # in roundings of a sum

    def rounded(x: Tensor, stored: bool = False, size: Tensor | None = None) -> Tensor:
        """Off by a rounding of the accumulator relative to size, and where it is stored by one of the dtype."""
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device) * 2 - 1
        off = of_sums * (x.abs() if size is None else size) + stored * units.dtype * x.abs()
        return x + off * noise

    errors: dict[str, float] = {}
    for _ in range(trials):
        for name, x in vars(formulas(moving, rounded, of_exponentials)).items():
            expected = getattr(exact, name)
            error = float((x - expected).abs().max()) if x.numel() else 0.0
            errors[name] = max(errors.get(name, 0.0), error)
    return exact, errors


def formulas(moving: Moving, r: Noise, of_exponentials: float = 1.0) -> Results:
    """The operators' results in fp64, where r makes what it likes of intermediate results.

    Exponentials are off by so many roundings of a sum, those of a row perhaps all alike.
    """
    i, case = moving.inputs, moving.inputs.case
    weights, kept, seen = _multiplicities(moving)

    def heads(x: Tensor | None, like: Tensor, masked: bool = False) -> Tensor:
        x = torch.zeros_like(like) if x is None else x
        x = x.double().expand(*x.shape[:-4], case.batch_size, *x.shape[-3:])
        x = torch.where(seen[:, :, None, None], x, 0.0) if masked else x
        return x.transpose(-2, -3)

    q, k, v = heads(i.q, i.q), heads(i.k, i.k, True), heads(i.v, i.v, True)
    many = torch.zeros_like
    count = len(moving.dout_dot)
    tangents = [many(x).expand(count, *x.shape) if t is None else t for x, t in zip((i.q, i.k, i.v), moving.tangents)]
    q_dot, k_dot, v_dot = (heads(t, t, masked) for t, masked in zip(tangents, (False, True, True)))
    _, dlse_dot, dout, dlse = moving.cotangents
    y, y2 = heads(moving.dout_dot, i.dout), heads(dout, i.dout)
    y_lse, y2_lse = (i.dout.new_zeros(1) if x is None else x.double() for x in (dlse_dot, dlse))
    # One number, that all scores are off by alike.
    scale = float(r(torch.tensor(case.scale, dtype=torch.float64, device=i.q.device)))

    def product(a: Tensor, b: Tensor, factor: float = 1.0, stored: bool = False) -> Tensor:
        return r(factor * a @ b, stored, abs(factor) * a.abs() @ b.abs())

    def total(x: Tensor, roundings: float = 1.0) -> Tensor:
        return r(x.sum(-1, keepdim=True), False, roundings * x.abs().sum(-1, keepdim=True))

    s = torch.where(weights > 0, product(q, k.mT, scale), -torch.inf)
    top = s.amax(-1, keepdim=True).clamp(min=-1e300) if s.shape[-1] else 0.0
    once = torch.where(weights > 0, torch.exp(s - top), 0.0)
    mass = total(weights * once)
    # Kernels read it in another base, which rounds it once more; all weights of a row are off by that alike.
    lse = r(r(top + torch.log(mass.where(mass > 0, 1.0))))
    # An exponent is a difference of two numbers that may be larger than it is.
    finite = torch.where(weights > 0, s, 0.0)
    once = torch.where(weights > 0, torch.exp(r(finite - lse, False, finite.abs() + lse.abs())), 0.0)
    once = r(once, False, of_exponentials * once)
    p, dropped = weights * once, kept * once
    out = r(product(dropped, v), True)
    s_dot = r(product(q_dot, k.mT, scale) + product(q, k_dot.mT, scale))
    mu = total(p * s_dot, of_exponentials)
    z = torch.where(weights > 0, s_dot - mu, 0.0)
    out_dot = r(product(r(dropped * z, True), v) + product(r(dropped, True), v_dot), True)
    eps = total(y * out) - y_lse[..., None]
    gamma = (total(y * out_dot)).sum(0) + total(y2 * out) - y2_lse[..., None]
    e, x = product(y, v.mT), product(y2, v.mT) + product(y, v_dot.mT).sum(0)
    g = r(dropped * e - p * eps, True)
    ds = r(dropped * x - p * gamma + (z * (dropped * e - p * eps)).sum(0), True)
    dq = r(product(ds, k, scale) + product(g, k_dot, scale).sum(0), True)
    dk = r(product(ds.mT, q, scale) + product(g.mT, q_dot, scale).sum(0), True)
    dv = r(product(r(dropped, True).mT, y2) + product(r(dropped * z, True).mT, y).sum(0), True)
    dq_dot = product(g, k, scale, True) if moving.wants_dq_dot else q_dot[:0]
    rows = lambda t, like: t.transpose(-2, -3).sum_to_size(like.shape)  # noqa: E731
    return Results(
        r(product(r(dropped, True), v), True).transpose(-2, -3),
        lse.where(mass > 0, 0.0).squeeze(-1),
        out_dot.transpose(-2, -3),
        mu.squeeze(-1),
        rows(dq, i.q),
        rows(dk, i.k),
        rows(dv, i.v),
        dq_dot.transpose(-2, -3),
    )


def forward(moving: Moving, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The forward in fp64, to be differentiated by torch; log-sum-exps of rows without keys are 0."""
    weights, kept, seen = _multiplicities(moving)
    batch_size = len(q)
    k, v = (torch.where(seen[:, :, None, None], x.expand(batch_size, -1, -1, -1), 0.0) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * moving.inputs.case.scale
    s = torch.where(weights > 0, s, -torch.inf)
    top = s.detach().amax(-1, keepdim=True).clamp(min=-1e300)
    once = torch.exp(s - top)
    mass = (weights * once).sum(-1, keepdim=True)
    has_keys = mass > 0
    mass = torch.where(has_keys, mass, 1.0)
    out = torch.einsum("bhqk,bkhd->bqhd", kept * once / mass, v)
    return out, torch.where(has_keys, top + mass.log(), 0.0).squeeze(-1)


def _multiplicities(moving: Moving) -> tuple[Tensor, Tensor, Tensor]:
    """How often pairs count, ``(B, 1, Nq, Nk)``, times dropout's factors, and which keys anybody sees, ``(B, Nk)``."""
    i, case = moving.inputs, moving.inputs.case
    weights = i.weights[:, None]
    kept = weights
    if case.dropout_p > 0:
        seed = moving.call[-1]
        kept = weights.new_zeros(case.batch_size, case.num_heads, *weights.shape[2:])
        for segment in case.plan.query_segments:
            keep, probability = reference.dropout_keep(segment, case.batch_size, case.num_heads, case.dropout_p, seed)
            keys = torch.cat([torch.arange(*key_range, device=kept.device) for key_range in segment.key_ranges])
            kept[:, :, segment.start : segment.end].index_add_(3, keys, keep.double() / probability)
        kept = torch.where(weights > 0, kept, 0.0)
    return weights, kept, i.weights.any(1)
