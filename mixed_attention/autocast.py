"""Autocast as it is for a type of device: what it casts to, and how to go without it.

The only module that asks torch, which raises an error about types of devices that it never casts for, meta among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mixed_attention.torch_internals import private_backend_name

# Asked once: the compilers of older releases of torch cannot trace the question.
_CASTS = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", private_backend_name())
    if torch.amp.is_autocast_available(name)
)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast multiplies in on a type of device; None where it is off or does not exist."""
    if device_type in _CASTS and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which nothing is cast."""
    if device_type in _CASTS:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` of tensors of one dtype, also of that of 16 bits which autocast does not cast to.

    Autocast takes part in it to promote, and raises an error about that dtype, which linear layers take.
    """
    first = tensors[0]
    if first.dtype not in (torch.bfloat16, torch.float16) or autocast_dtype(first.device.type) in (None, first.dtype):
        return torch.cat(tensors, dim)  # type: ignore[arg-type]
    with without_autocast(first.device.type):
        return torch.cat(tensors, dim)  # type: ignore[arg-type]
