"""Linear maps from tokens to the slots of packed buffers, whatever the parameter layout.

Private to the layers. In plain eager mode one step of the graph stands for the cast of tokens and weights under
autocast, the choice of tokens, and the products. Everywhere else the same is composed of framework operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import ops

Runs = tuple[tuple[int, bool], ...]
"""Neighbouring tokens: how many, and whether they are taken; they add up to the sequence."""

_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but multiply by its weight and add its bias.

    Not so with hooks on it, with another module in its place (adapters, quantised layers), or with another forward.
    """
    return type(layer) is nn.Linear and not (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
    )


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """What ``layer(x)`` is, ``(B, N, C) -> (B, N, C')``."""
    if not is_plain(layer):
        return layer(x)
    (out,) = _project_in_one_step(x, [layer.weight], [layer.bias], [None]) or [layer(x)]  # type: ignore[list-item]
    return out


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], runs: Sequence[Runs | None]
) -> list[Tensor]:
    """Products of tokens with some weights.

    Args:
        x: Tokens ``(B, N, C)``.
        weights: ``(rows, C)`` each.
        biases: ``(rows,)`` for each.
        runs: The tokens that each weight sees, None for all.

    Returns:
        For each weight a fresh tensor that may be overwritten, and viewed as ``(B, n, rows)``.
    """
    products = _project_in_one_step(x, weights, biases, runs)
    if products is not None:
        return products
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32 and len(weights) > 1:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for all
    # NOTE: rank 2 in, so that the product is no view and can be overwritten without a copy of its gradient.
    seen = (take(x, each).flatten(0, 1) for each in runs)
    return [F.linear(tokens, weight, bias) for tokens, weight, bias in zip(seen, weights, biases)]


def take(x: Tensor, runs: Runs | None) -> Tensor:
    """The tokens ``(B, n, ...)`` that the runs take out of ``(B, N, ...)``."""
    if runs is None:
        return x
    # NOTE: one split, because its derivative is one concatenation; slices would each make a gradient of full size.
    pieces = x.split([size for size, _ in runs], 1)
    kept = [piece for piece, (_, is_taken) in zip(pieces, runs) if is_taken]
    if not kept:
        return x[:, :0]
    return kept[0] if len(kept) == 1 else torch.cat(kept, 1)


def _project_in_one_step(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], runs: Sequence[Runs | None]
) -> list[Tensor] | None:
    """:func:`project` in plain eager mode that records a graph, ``(B, n, rows)`` each; None elsewhere."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # autocast keeps its casts of weights for later
        return None
    given = [bias for bias in biases if bias is not None]
    tensors = x, *weights, *given
    dtype = _dtype_of_product(tensors)
    if dtype is None or len(given) not in (0, len(biases)) or not ops.is_compiled() or ops.needs_composite(*tensors):
        return None
    if x.ndim != 3 or x.shape[-1] != weights[0].shape[-1]:
        return None
    return ops.project(x, weights, given, [None if each is None else _ranges(each) for each in runs], dtype)


def _dtype_of_product(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """What plain tensors of one device are multiplied in: the dtype of all, or autocast's; else None."""
    first = tensors[0]
    by_autocast = torch.is_autocast_enabled(first.device.type)
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device != first.device:
            return None
        if tensor.dtype not in _AUTOCAST_FROM if by_autocast else tensor.dtype != first.dtype:
            return None
    return torch.get_autocast_dtype(first.device.type) if by_autocast else first.dtype


def _ranges(runs: Runs) -> list[tuple[int, int]]:
    """The tokens taken, as half-open ranges."""
    ranges, end = [], 0
    for size, is_taken in runs:
        start, end = end, end + size
        if is_taken:
            ranges.append((start, end))
    return ranges
