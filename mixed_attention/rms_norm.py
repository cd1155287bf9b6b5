"""Rows over their root mean square: the definition that every path follows, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divides rows by their root mean square: ``x / sqrt(mean(x²) + eps) * weight``.

    The arithmetic is fp32 (fp64 for fp64 inputs) and rounded once. So is eps, the distance of 1 to the next number:
    what ``torch.nn.functional.rms_norm`` takes by default, for 16-bit inputs as well. Differentiable any number of
    times, in both modes, under any transform.

    Args:
        x: Rows ``(..., D)``, floating point.
        weight: ``(D,)``, of any floating-point dtype; ones if None.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    wide, rstd = _wide(x)
    normed = wide * rstd
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    return normed.to(x.dtype)


def rms_norm_back(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` for that of :func:`rms_norm` without a weight, ``(..., D)``; differentiable itself."""
    wide, rstd = _wide(x)
    normed, dout = wide * rstd, dout.to(wide.dtype)
    along = (dout * normed).sum(-1, keepdim=True) / x.shape[-1]
    return (rstd * (dout - normed * along)).to(x.dtype)


def _wide(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in the dtype of the arithmetic, and one over their root mean square."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.square().sum(-1, keepdim=True) / x.shape[-1]
    return wide, torch.rsqrt(mean + torch.finfo(wide.dtype).eps)
