"""Rows of a result file: dictionaries that go to JSON as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from bench.timing import Timing

Row = dict[str, Any]

# "tf32" is fp32 whose products torch may round to TF32.
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def timing_row(kind: str, case: str, who: str, timing: Timing, **facts: Any) -> Row:
    """What was timed."""
    return {"kind": kind, "case": case, "who": who, **facts, "milliseconds": asdict(timing)}


def absent_row(case: str, who: str, precision: str, error: Exception, **facts: Any) -> Row:
    """What could not be measured, and why: the first line of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
    return {"kind": "absent", "case": case, "who": who, "dtype": precision, **facts, "reason": reason}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the tensors."""
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


@contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """Lets torch round fp32 products to TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
