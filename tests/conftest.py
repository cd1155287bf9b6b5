"""What all tests share: the device they run on, and how long the random ones search."""

from __future__ import annotations

import os
from collections.abc import Iterator

# NOTE: read when torch is loaded. Threads that wait for others by spinning take the cores from them where tests share a
# machine: beside a few busy processes two dozen small cases took 13 s instead of 0.3 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=200, **_COMMON)
settings.register_profile("long", max_examples=2500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operator's tests run; test_gpu.py puts the GPU in its place."""
    return torch.device("cpu")


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
