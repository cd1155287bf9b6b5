"""Whether what is about to be timed computes the right thing: against fp64 in full, on fresh random data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mixed_attention as ma
from mixed_attention.plan import QuerySegment

MAX_SCORES = {"cpu": 2**24, "cuda": 2**28}  # how many fp64 scores are held at a time
RESULTS = ("out", "dq", "dk", "dv")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> Tensor:
    """The operator in fp64, some rows at a time, so that any problem of the suite fits; differentiable once.

    Args:
        q, k, v: ``(B, N, H, D)``, any floating dtype.
        plan: The compiled patterns.

    Returns:
        ``(B, N, H, D)`` in fp64.
    """
    return _Exact.apply(q.double(), k.double(), v.double(), plan)


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> Tensor:
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        for segment in plan.query_segments:
            keys, values = _rows(k, segment), _rows(v, segment)
            for rows in _chunks(segment, q):
                out[:, rows] = (_weights(q[:, rows], keys) @ values).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale, delta = q.shape[-1] ** -0.5, (dout * out).sum(-1).transpose(1, 2)[..., None]
        for segment in ctx.plan.query_segments:
            keys, values = _rows(k, segment), _rows(v, segment)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for rows in _chunks(segment, q):
                p, dout_rows = _weights(q[:, rows], keys), dout[:, rows].transpose(1, 2)
                ds = p * (dout_rows @ values.mT - delta[:, :, rows]) * scale
                dq[:, rows] = (ds @ keys).transpose(1, 2)
                dkeys += ds.mT @ q[:, rows].transpose(1, 2)
                dvalues += p.mT @ dout_rows
            _add_rows(dk, dkeys, segment)
            _add_rows(dv, dvalues, segment)
        return dq, dk, dv, None


def _weights(q_rows: Tensor, keys: Tensor) -> Tensor:
    return (q_rows.transpose(1, 2) @ keys.mT * q_rows.shape[-1] ** -0.5).softmax(-1)


def _rows(tensor: Tensor, segment: QuerySegment) -> Tensor:
    """The keys or values of a segment, ``(B, H, n, D)``."""
    return torch.cat([tensor[:, start:end] for start, end in segment.key_ranges], 1).transpose(1, 2).contiguous()


def _add_rows(total: Tensor, rows: Tensor, segment: QuerySegment) -> None:
    sizes = [end - start for start, end in segment.key_ranges]
    for (start, end), part in zip(segment.key_ranges, rows.transpose(1, 2).split(sizes, 1)):
        total[:, start:end] += part


def _chunks(segment: QuerySegment, q: Tensor) -> Iterator[slice]:
    scores_a_row = q.shape[0] * q.shape[2] * sum(end - start for start, end in segment.key_ranges)
    step = max(1, MAX_SCORES[q.device.type] // max(1, scores_a_row))
    for start in range(segment.start, segment.end, step):
        yield slice(start, min(start + step, segment.end))


def errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """What is wrong with results, by name: relative to the norm, and the largest of all entries."""
    return {
        name: {"relative": relative_error(g, e), "largest": (g.double() - e).abs().max().item()}
        for name, g, e in zip(RESULTS, got, expected)
    }


def layer_reference(
    layer: ma.MixedAttention, x: Tensor, plan: ma.AttentionPlan, freqs: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of x of the layer in fp64, by its own weights."""
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    leaf = x.detach().double().requires_grad_()
    projected = F.linear(leaf, weights["qkv.weight"], weights["qkv.bias"])
    q, k, v = projected.unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(2)
    q, k = (ma.apply_rope(t, freqs.to(torch.complex128)) for t in (q, k))
    out = F.linear(exact_attention(q, k, v, plan).flatten(2), weights["proj.weight"], weights["proj.bias"])
    (grad,) = torch.autograd.grad(out, leaf, dout.double())
    return out.detach(), grad
