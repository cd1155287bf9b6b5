"""Autocast as it is for a type of device: what it casts to, and how to go without it.

The only module that asks torch, which raises an error about types of devices that it never casts for, meta among them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# Asked once: the compilers of older releases of torch cannot trace the question.
_CASTS = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", torch._C._get_privateuse1_backend_name())
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
