"""What all tests share: the device they run on, and how long the random ones search."""

from __future__ import annotations

import os
from collections.abc import Iterator

# NOTE: read when torch is loaded. Threads that wait for others by spinning take the cores from them where tests share a
# machine: beside a few busy processes two dozen small cases took 13 s instead of 0.3 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: as few threads as are still several
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import Ranks

from mixed_attention import ops

# Without it torch's own matrix products refuse to run on a GPU while deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=200, **_COMMON)
settings.register_profile("long", max_examples=2500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs: on the CPU and, with ``-m gpu``, on a GPU."""
    if request.param == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if not ops.has_kernels("cuda", torch.float32):
        pytest.skip("built without CUDA kernels; rebuild with MIXED_ATTENTION_CUDA=1")
    return torch.device("cuda", 0)


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that share a process group."""
    made = Ranks()
    yield made
    made.stop()
