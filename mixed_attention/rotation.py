"""Rotation of channel pairs as an autograd function over the operator, and in framework operators.

It is linear in the rows and in the frequencies. So its derivatives in either mode are rotations again, by frequencies
of any magnitude, and sums over heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mixed_attention import torch_internals
from mixed_attention.derivatives import forward_rule, is_legacy_batched


class Rotate(Function):
    """(conjugate, x, pairs) -> x rotated; the frequencies as pairs of real numbers ``(B or 1, N, D / 2, 2)``."""

    @staticmethod
    def forward(conjugate, x, pairs):
        with torch_internals.below_autograd():
            return torch.ops.mixed_attention.rope.default(x, pairs, conjugate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.conjugate, x, pairs = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, pairs)
        ctx.save_for_forward(x, pairs)

    @staticmethod
    def backward(ctx, dout):
        x, pairs = ctx.saved_tensors
        conjugate = ctx.conjugate
        dx = rotate_back(dout, pairs, conjugate) if ctx.needs_input_grad[1] else None
        dpairs = _freqs_grad(x, dout, pairs, conjugate) if ctx.needs_input_grad[2] else None
        return None, dx, dpairs

    @forward_rule
    def jvp(ctx: Any, saved, moved):
        x, pairs = saved
        _, x_dot, pairs_dot = moved
        by_x = None if x_dot is None else Rotate.apply(ctx.conjugate, x_dot, pairs)
        if pairs_dot is None:
            return by_x
        by_pairs = Rotate.apply(ctx.conjugate, x, pairs_dot)
        return by_pairs if by_x is None else by_x + by_pairs

    @staticmethod
    def vmap(info, in_dims, conjugate, x, pairs):
        size, (_, x_dim, pairs_dim) = info.batch_size, in_dims
        x = x.expand(size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        batch_size = x.shape[1]
        if pairs_dim is None and len(pairs) != 1 and batch_size != 1:
            # Frequencies of each sequence serve what is mapped as they serve heads.
            rows = x.permute(1, 2, 0, 3, 4)
            turned = Rotate.apply(conjugate, rows.flatten(2, 3), pairs)
            return turned.unflatten(2, rows.shape[2:4]), 2
        if pairs_dim is not None:
            pairs = pairs.movedim(pairs_dim, 0)
            pairs = pairs.expand(size, batch_size, *pairs.shape[2:]).flatten(0, 1)
        return Rotate.apply(conjugate, x.flatten(0, 1), pairs).unflatten(0, (size, batch_size)), 0


def rotate_back(dout: Tensor, pairs: Tensor, conjugate: bool = False) -> Tensor:
    """The gradient of what was rotated, differentiable itself."""
    if is_legacy_batched(dout, pairs):  # is_grads_batched
        return rotate_composite(dout, pairs, not conjugate)
    return Rotate.apply(not conjugate, dout, pairs)


def rotate_composite(x: Tensor, pairs: Tensor, conjugate: bool) -> Tensor:
    """The same in framework operators."""
    cos, sin = pairs[..., 0].unsqueeze(2), pairs[..., 1].unsqueeze(2)
    sin = -sin if conjugate else sin
    even, odd = _even_odd(x, pairs.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape).to(x.dtype)


def _even_odd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # NOTE: reshape instead of unflatten, which has no batching rule under is_grads_batched.
    return x.to(dtype).reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)


def _freqs_grad(x: Tensor, dout: Tensor, pairs: Tensor, conjugate: bool) -> Tensor:
    """conj(x) * dout, summed over what shares a frequency: the heads, and the batch where one sequence serves all."""
    x_even, x_odd = _even_odd(x, pairs.dtype)
    dout_even, dout_odd = _even_odd(dout, pairs.dtype)
    dcos = x_even * dout_even + x_odd * dout_odd
    dsin = x_even * dout_odd - x_odd * dout_even
    return torch.stack((dcos, -dsin if conjugate else dsin), -1).sum(2).sum_to_size(pairs.shape)
