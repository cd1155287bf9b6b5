"""Queries and keys over their root mean square: the definition that every path follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps)
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    return normed.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """:func:`rms_norm` of heads as a module, so that hooks on it and others in its place count.

    Args:
        head_dim: Channels of a head.
        affine: Whether there is a weight per channel, ones at first.
    """

    def __init__(self, head_dim: int, *, affine: bool) -> None:
        super().__init__(head_dim, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """See :func:`rms_norm`."""
        return rms_norm(x, self.weight)
