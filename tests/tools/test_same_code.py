"""tools/same_code.py: what counts as a change of a kernel's machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
LISTING = """
arch = sm_90a
\t\tFunction : {name}
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x{first} */
                                                                   /* 0x0000000000000800 */
"""


@pytest.fixture(scope="module")
def same_code():
    sys.path.insert(0, str(TOOLS))
    try:
        import same_code

        yield same_code
    finally:
        sys.path.remove(str(TOOLS))


def kernels(same_code, *functions: tuple[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, first in functions:
        for named, fingerprint in same_code.fingerprints(LISTING.format(name=name, first=first)):
            found.setdefault(fingerprint, []).append(named)
    return found


ONE, OTHER = "00000a00ff017b82", "00000a00ff017b83"


def test_names_do_not_count(same_code):
    assert same_code.differences(kernels(same_code, ("a", ONE)), kernels(same_code, ("b", ONE))) == []


def test_a_bit_of_an_instruction_counts(same_code):
    lines = same_code.differences(kernels(same_code, ("a", ONE)), kernels(same_code, ("a", OTHER)))
    assert [line[0] for line in lines] == ["-", "+"] and all(line.endswith(" a") for line in lines)
    assert all("sm_90a:1 instructions" in line for line in lines)


def test_kernels_of_equal_code_are_counted(same_code):
    twice, once = kernels(same_code, ("a", ONE), ("b", ONE)), kernels(same_code, ("a", ONE))
    assert [line[0] for line in same_code.differences(twice, once)] == ["-"]
