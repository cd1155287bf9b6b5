"""What layers are given, held against what they expect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixed_attention.plan import read_specs
from mixed_attention.spec import TokenSpec


def check_rank(name: str, x: Any) -> None:
    """Checks that tokens are a tensor of rank 3, for layers without sizes to compare.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If they have another rank.
    """
    _check_kind(name, x)
    if x.ndim != 3:
        raise ValueError(f"{name}: expected tokens (batch_size, n_tokens, dim), got shape {tuple(x.shape)}")


def check_batch(q: Tensor, kv: Tensor) -> None:
    """Checks that there is one sequence of keys for each of queries, or one for all.

    Raises:
        ValueError: If there is not.
    """
    if kv.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"kv: expected batch_size {q.shape[0]} or 1 to match q, got {kv.shape[0]}")


def check_tokens(x: Tensor, token_specs: Any, key_padding_mask: Tensor | None) -> list[TokenSpec]:
    """Checks the mask and the sizes of the groups against ``x``, in upstream's order.

    Returns:
        The groups, whatever their class was, see :func:`mixed_attention.plan.read_specs`.

    Raises:
        TypeError: If the tokens or the groups are of the wrong kind.
        ValueError: If one does not fit.
    """
    _check_kind("x", x)
    token_specs = read_specs(token_specs)
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            got = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
            raise ValueError(f"key_padding_mask: expected a bool tensor, True = real token, got {got}")
        if key_padding_mask.ndim != 2:
            raise ValueError(f"key_padding_mask: expected a 2D tensor, got shape {tuple(key_padding_mask.shape)}")
        if key_padding_mask.shape[1] != x.shape[1]:
            raise ValueError(f"key_padding_mask: n_tokens dim is {key_padding_mask.shape[1]}, but x has {x.shape[1]}")
        if key_padding_mask.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"key_padding_mask: batch_size is {key_padding_mask.shape[0]}, but x has {x.shape[0]}")
    total = sum(spec.size for spec in token_specs if spec.size is not None)
    if x.ndim != 3 or total != x.shape[1]:
        raise ValueError(
            f"Token specs total size {total} does not match x of shape {tuple(x.shape)}, "
            f"expected (batch_size, {total}, dim)"
        )
    return token_specs


def as_padding_mask(attention_mask: Any, key_padding_mask: Tensor | None, x: Tensor) -> Tensor:
    """Reads an attention mask as one of keys alone.

    Raises:
        NotImplementedError: If it is anything else.
        ValueError: If there is a mask of keys already.
    """
    is_padding_mask = (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.bool
        and attention_mask.ndim == 2
        and attention_mask.shape[0] in (1, x.shape[0])
        and attention_mask.shape[1] == x.shape[1]
    )
    if not is_padding_mask:
        raise NotImplementedError(
            "Attention masks are not supported: say who attends to whom with attention_patterns, and mask padding with "
            "a boolean key_padding_mask (batch_size, n_tokens), True = real token"
        )
    if key_padding_mask is not None:
        raise ValueError("attention_mask and key_padding_mask are both given; a padding mask is needed once")
    return attention_mask


def _check_kind(name: str, x: Any) -> None:
    """Checks that tokens are a tensor of numbers that have gradients.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor (batch_size, n_tokens, dim), got {got}")


def rope_mismatch(use_rope: bool) -> str:
    """What is wrong where frequencies are given to a layer without rotation, or missing in one with it."""
    return f"RoPE usage mismatch: use_rope is {use_rope}, but freqs were {'not ' if use_rope else ''}given"
