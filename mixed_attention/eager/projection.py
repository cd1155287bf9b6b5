"""Linear maps from tokens to the slots of packed buffers.

Private to the layers. In plain eager mode one step of the graph stands for the cast of tokens and weights under
autocast, the choice of tokens, and the products. Everywhere else the same is composed of framework operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import ops
from mixed_attention.autocast import autocast_dtype, cat
from mixed_attention.torch_internals import (
    DeviceContext,
    function_modes,
    is_linear_torchs,
    num_function_modes,
    plain_parameters,
)

Runs = tuple[tuple[int, bool], ...]
"""Neighbouring tokens: how many, and whether they are taken; they add up to the sequence."""


class Part(NamedTuple):
    """Neighbouring rows of a weight, and the tokens that they see, None for all."""

    begin: int
    end: int
    runs: Runs | None = None


_AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(*layers: Any) -> bool:
    """Whether calling the layers does nothing but multiply by weights and add biases, which may be joined.

    Whatever else can change what a call computes makes the answer no: hooks on a layer or on all modules, another
    class (subclasses, parametrizations) or another module in its place (adapters), a forward set on the object or
    patched on the class, ``module.compile()``, another ``F.linear``, a mode that overrides functions, weights and
    biases that are tensor subclasses (quantised, distributed), or that are missing or differ in dtype or device.
    """
    if not calls_are_torchs():
        return False
    tensors: list[Tensor] = []
    for layer in layers:
        parameters = plain_parameters(layer)
        if parameters is None:
            return False
        weight, bias = parameters
        tensors += [weight] if bias is None else [weight, bias]
    return len(layers) == 1 or all(t.dtype == tensors[0].dtype and t.device == tensors[0].device for t in tensors)


def calls_are_torchs() -> bool:
    """Whether calling a linear layer runs what torch has it run, and no mode overrides the product."""
    if not is_linear_torchs():
        return False
    # NOTE: the compiler traces modes by itself, and products of parts are still calls of F.linear to them.
    if not num_function_modes() or torch.compiler.is_compiling():
        return True
    return all(type(mode) is DeviceContext for mode in function_modes())  # a default device; it changes no product


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """What ``layer(x)`` is, ``(B, N, C) -> (B, N, C')``."""
    if not is_plain(layer):
        return layer(x)
    products = _project_in_one_step(x, layer.weight, layer.bias, [Part(0, len(layer.weight))])  # type: ignore[arg-type]
    return layer(x) if products is None else products[0]


def project(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> list[Tensor]:
    """Products of tokens with parts of a weight.

    Args:
        x: Tokens ``(B, N, C)``.
        weight: ``(rows, C)``.
        bias: ``(rows,)``.
        parts: Neighbouring rows each, in ascending order, and what they see.

    Returns:
        For each part a fresh tensor that may be overwritten, and viewed as ``(B, n, its rows)``.
    """
    products = _project_in_one_step(x, weight, bias, parts)
    if products is not None:
        return products
    by_autocast = autocast_dtype(x.device.type)
    if by_autocast is not None and x.dtype == torch.float32 and len(parts) > 1:
        x = x.to(by_autocast)  # once for all
    # NOTE: rank 2 in, so that the product is no view and can be overwritten without a copy of its gradient.
    seen = (take(x, part.runs).flatten(0, 1) for part in parts)
    biases = [None] * len(parts) if bias is None else _split(bias, parts)
    return [F.linear(*each) for each in zip(seen, _split(weight, parts), biases)]


def _split(parameter: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The rows of each part."""
    if (parts[0].begin, parts[0].end) == (0, len(parameter)):
        return [parameter]
    # NOTE: one split, because its derivative is one concatenation; slices would each make a gradient of full size.
    cuts = sorted({0, len(parameter), *(part.begin for part in parts), *(part.end for part in parts)})
    pieces = dict(zip(cuts, parameter.split([end - begin for begin, end in pairwise(cuts)])))
    return [pieces[part.begin] for part in parts]


def take(x: Tensor, runs: Runs | None) -> Tensor:
    """The tokens ``(B, n, ...)`` that the runs take out of ``(B, N, ...)``."""
    if runs is None:
        return x
    if torch.compiler.is_compiling() and len(runs) > _MOST_PIECES:
        return x.index_select(1, _rows_taken(runs, x.device))
    if ops.is_distributed(x):
        # The derivative of a split has plain zeros for pieces that nobody uses, which torch does not mix with DTensors.
        return cat([x[:, start:end] for start, end in taken_ranges(runs)] or [x[:, :0]], 1)
    # NOTE: one split, because its derivative is one concatenation; slices would each make a gradient of full size.
    pieces = x.split([size for size, _ in runs], 1)
    kept = [piece for piece, (_, is_taken) in zip(pieces, runs) if is_taken]
    if not kept:
        return x[:, :0]
    return kept[0] if len(kept) == 1 else cat(kept, 1)


_MOST_PIECES = 4
"""How many pieces a compiled function cuts tokens into.

The compiler asks of every piece whether it is empty, and compiles again for other answers. Row numbers have no pieces.
"""


def _rows_taken(runs: Runs, device: torch.device) -> Tensor:
    """Row numbers of the tokens that the runs take."""
    rows = torch.arange(sum([size for size, is_taken in runs if is_taken]), device=device)
    taken, skipped = 0, rows
    for size, is_taken in runs:
        if is_taken:
            taken = taken + size
        else:
            skipped = skipped + (rows >= taken) * size
    return skipped


def _project_in_one_step(x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[Part]) -> list[Tensor] | None:
    """:func:`project` in plain eager mode, ``(B, n, rows)`` each; None elsewhere."""
    if torch.compiler.is_compiling():
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    dtype = _dtype_of_product(tensors)
    if dtype is None or not ops.is_compiled() or ops.needs_composite(*tensors):
        return None
    if x.ndim != 3 or x.shape[-1] != weight.shape[-1]:
        return None
    wanted = [(p.begin, p.end, None if p.runs is None else taken_ranges(p.runs)) for p in parts]
    return ops.project(x, weight, bias, wanted, dtype)


def _dtype_of_product(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """What plain tensors of one device are multiplied in: the dtype of all, or autocast's; else None."""
    first = tensors[0]
    by_autocast = autocast_dtype(first.device.type)
    if not ops.is_plain(*tensors):
        return None
    for tensor in tensors:
        if tensor.device != first.device:
            return None
        if tensor.dtype != first.dtype if by_autocast is None else tensor.dtype not in _AUTOCAST_FROM:
            return None
    return by_autocast or first.dtype


def taken_ranges(runs: Runs) -> list[tuple[int, int]]:
    """The tokens taken, as half-open ranges."""
    ranges, end = [], 0
    for size, is_taken in runs:
        start, end = end, end + size
        if is_taken:
            ranges.append((start, end))
    return ranges
