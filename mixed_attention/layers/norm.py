"""The norm of queries and keys as a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixed_attention.eager.projection import calls_are_torchs
from mixed_attention.rms_norm import rms_norm
from mixed_attention.torch_internals import has_nothing_beside, is_call_torchs


class RMSNorm(nn.RMSNorm):
    """:func:`mixed_attention.rms_norm.rms_norm` of heads, so that hooks on it and others in its place count.

    Args:
        head_dim: Channels of a head.
        affine: Whether there is a weight per channel, ones at first.
    """

    def __init__(self, head_dim: int, *, affine: bool) -> None:
        super().__init__(head_dim, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """See :func:`mixed_attention.rms_norm.rms_norm`."""
        return rms_norm(x, self.weight)


_FORWARD = RMSNorm.forward


def are_plain(norms: Iterable[Any]) -> bool:
    """Whether calling the norms does nothing but divide rows by their root mean square.

    Whatever else can change what a call computes makes the answer no, see
    :func:`mixed_attention.eager.projection.is_plain`; and so do weights. Modes that see every operation do not: a
    checkpoint may be recomputed under one, and must save what it saved.
    """
    if torch.compiler.is_compiling():
        return False
    if RMSNorm.forward is not _FORWARD or not is_call_torchs(RMSNorm) or not calls_are_torchs():
        return False
    return all(type(norm) is RMSNorm and norm.weight is None and has_nothing_beside(norm) for norm in norms)
