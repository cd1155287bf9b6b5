"""What a file of kernels includes is read some fifty times a build, by the slowest of compilers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
INCLUDE = re.compile(r'^#include ([<"])(.+)[>"]$', re.MULTILINE)
# Each takes a second or more of nvcc's passes.
HEAVY = {"atomic", "functional", "iterator", "map", "memory", "mutex", "string", "thread", "tuple", "unordered_map"}


def included(path: Path, seen: dict[Path, set[str]]) -> dict[Path, set[str]]:
    """What the files that one includes include of the standard library, file by file."""
    if path in seen:
        return seen
    found = INCLUDE.findall(path.read_text())
    seen[path] = {name for kind, name in found if kind == "<"}
    for kind, name in found:
        if kind == '"':
            included(CSRC / name, seen)
    return seen


@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/instantiate_*.cu")), ids=lambda path: path.stem)
def test_kernels_include_no_heavy_headers(source):
    files = included(source, {})
    assert len(files) > 10
    heavy = {str(path.relative_to(CSRC)): names & HEAVY for path, names in files.items() if names & HEAVY}
    assert not heavy, f"{source.name}: move what needs them into a .cpp"
