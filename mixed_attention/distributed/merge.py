"""Attention to parts of the keys, merged into attention to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges what :func:`mixed_attention.attention` makes of disjoint parts of the keys of the same queries.

    For rings and other schemes that see the keys one part after the other. With ``m = max_i lse_i``::

        w_i = exp(lse_i - m)    s = sum_i w_i    out = sum_i w_i out_i / s    lse = m + log s

    in fp32 at least. A part without keys for a row has a log-sum-exp of -inf there and does not count, whatever its
    output. Differentiable any number of times, in both modes, under any transform.

    Args:
        outs: The output ``(B, N, H, D)`` of each part.
        lses: The log-sum-exp ``(B, H, N)`` of each part, as ``return_lse=True`` gives it.

    Returns:
        The output ``(B, N, H, D)`` in the dtype of the parts, and the log-sum-exp ``(B, H, N)``. A row without keys in
        any part: 0 and -inf, gradients 0.

    Raises:
        TypeError: If something is no tensor.
        ValueError: If there is no part, numbers of outputs and log-sum-exps differ, or shapes or dtypes do not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 10, 2, 8).unbind(0)
        >>> half = ma.AttentionPlan.from_segments([(0, 10, [(0, 5)])])
        >>> parts = [ma.attention(q, k[:, r], v[:, r], half, return_lse=True) for r in (slice(5), slice(5, 10))]
        >>> out, lse = merge(*zip(*parts))
        >>> whole = ma.attention(q, k, v, ma.AttentionPlan.from_segments([(0, 10, [(0, 10)])]))
        >>> torch.allclose(out, whole, atol=1e-5)
        True
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses)
    dtype = outs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.stack([each.to(torch.promote_types(each.dtype, wide)) for each in lses])
    # The maximum cancels, in derivatives, too: it is a constant. Rows without keys in any part have none.
    highest = lse.detach().amax(0)
    highest = torch.where(highest == -torch.inf, 0, highest)
    weights = torch.exp(lse - highest)
    total = weights.sum(0)
    has_keys = total != 0  # not "> 0": a NaN must show
    total = torch.where(has_keys, total, 1)
    out = torch.zeros_like(outs[0], dtype=wide)
    for part, weight, part_lse in zip(outs, weights / total, lse):
        rows = (part_lse != -torch.inf).transpose(1, 2).unsqueeze(-1)
        out = out + weight.transpose(1, 2).unsqueeze(-1) * torch.where(rows, part.to(wide), 0)
    return out.to(dtype), torch.where(has_keys, highest + torch.log(total), -torch.inf).to(lses[0].dtype)


def _check(outs: list[Tensor], lses: list[Tensor]) -> None:
    for name, tensors in (("outs", outs), ("lses", lses)):
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{index}]: expected a tensor, got {type(tensor).__name__}")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs, lses: expected one of each for every part, got {len(outs)} and {len(lses)}")
    for index, (out, lse) in enumerate(zip(outs, lses)):
        if out.ndim != 4 or out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            raise ValueError(
                f"outs[{index}]: expected (batch_size, seqlen, num_heads, head_dim) in one shape and dtype, got "
                f"{tuple(out.shape)} in {out.dtype} beside {tuple(outs[0].shape)} in {outs[0].dtype}"
            )
        expected = (out.shape[0], out.shape[2], out.shape[1])
        if tuple(lse.shape) != expected or lse.dtype != lses[0].dtype or not lse.is_floating_point():
            raise ValueError(
                f"lses[{index}]: expected (batch_size, num_heads, seqlen) = {expected} in one dtype, got "
                f"{tuple(lse.shape)} in {lse.dtype}"
            )
