"""Whether what is about to be timed computes the right thing: fp64, on fresh random data, before any timing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mixed_attention as ma
from bench.cases import Case

SAMPLED_ROWS = 64  # per query segment: a full fp64 score matrix of the large cases does not fit


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def sampled_rows(case: Case, generator: torch.Generator) -> Tensor:
    """Some query rows of every segment."""
    rows = [
        torch.randint(s.start, s.end, (SAMPLED_ROWS,), generator=generator)
        for s in case.plan().query_segments
        if s.end > s.start
    ]
    return torch.cat(rows).unique()


def attention_error(attend: Callable[[Tensor, Tensor, Tensor, Case], Tensor], qkv: Tensor, case: Case) -> float:
    """The largest relative error among out, dq, dk and dv of an attention, over sampled query rows.

    The incoming gradient is zero in all other rows, so that dk and dv have contributions of the sampled rows only and
    can be checked in full.
    """
    generator = torch.Generator().manual_seed(1)
    rows = sampled_rows(case, generator).to(qkv.device)
    leaf = qkv.detach().clone().requires_grad_()
    out = attend(*leaf.unbind(2), case)
    dout = torch.zeros_like(out)
    dout[:, rows] = torch.randn(dout[:, rows].shape, generator=generator).to(dout)
    (grad,) = torch.autograd.grad(out, leaf, dout)

    exact = qkv.detach().double().requires_grad_()
    expected = _sampled_reference(exact, case, rows)
    (expected_grad,) = torch.autograd.grad(expected, exact, dout[:, rows].double())
    errors = [relative_error(out[:, rows], expected)]
    errors += [relative_error(grad[:, :, i], expected_grad[:, :, i]) for i in range(3)]
    return max(errors)


def _sampled_reference(qkv: Tensor, case: Case, rows: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    outs = []
    for segment in case.plan().query_segments:
        chosen = rows[(rows >= segment.start) & (rows < segment.end)]
        keys = torch.cat([torch.arange(*r, device=rows.device) for r in segment.key_ranges])
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, chosen], k[:, keys]) * case.head_dim**-0.5
        outs.append(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, keys]))
    return torch.cat(outs, 1)


def layer_reference(
    layer: ma.MixedAttention, x: Tensor, case: Case, freqs: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of x of the sequential reference in fp64, over copies of the layer's weights."""
    config = ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True, parallel=False)
    exact = ma.MixedAttention(config).to(x.device, torch.float64)
    exact.load_state_dict(layer.state_dict())
    leaf = x.detach().double().requires_grad_()
    out = exact(leaf, case.specs, case.attention_patterns, freqs=freqs.to(torch.complex128))
    (grad,) = torch.autograd.grad(out, leaf, dout.double())
    return out.detach(), grad
