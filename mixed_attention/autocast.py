"""Autocast as it is for a type of device: what it casts to, and how to go without it.

The only module that asks torch, which raises an error about types of devices that it never casts for, meta among them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast multiplies in on a type of device; None where it is off or does not exist."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which nothing is cast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
