"""Random specs and patterns against the oracle: 200 by default, thousands under ``HYPOTHESIS_PROFILE=long``."""

from __future__ import annotations

import torch
from cases import Case
from compare import check
from hypothesis import given
from strategies import cases


@given(case=cases())
def test_any_problem(case: Case, device: torch.device):
    check(case, device)
