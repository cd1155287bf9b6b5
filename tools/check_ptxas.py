"""Reads what nvcc and ptxas said about the CUDA kernels; fails on spills that csrc/cuda/spills.txt does not admit.

Registers that do not fit are spilled to a stack in local memory. Where that is the better choice, a row of that list
says so: kernel, object, architecture, the most bytes that may be stored or loaded, and the reason. The name of the
object may be a pattern (``portable_bwd_*16_d64``). Performance warnings of ptxas, such as a wgmma that was serialised
(C7510), always fail.

Usage: check_ptxas.py FOLDER    with the build.ninja, objects and logs of setup.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ADMITTED = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "spills.txt"
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
LENGTH = re.compile(r"\d+")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
WARNING = re.compile(r"\bC75\d\d\b|Potential Performance Loss|ptxas (warning|error)")
OBJECT = re.compile(r"^build (\S+\.o): nvcc", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """What ptxas made of one kernel for one architecture."""

    instantiation: str
    name: str
    arch: str
    registers: int
    spilled: int  # the most bytes of stack frame, stores and loads

    def __str__(self) -> str:
        spilled = f", {self.spilled} bytes spilled" if self.spilled else ""
        return f"{self.instantiation} {self.name} {self.arch}: {self.registers} registers{spilled}"


@dataclass(frozen=True)
class Admission:
    """A row of the list, which admits spills."""

    name: str
    instantiation: str
    arch: str
    most: int

    def admits(self, kernel: Kernel) -> bool:
        return (
            (kernel.name, kernel.arch) == (self.name, self.arch)
            and fnmatch(kernel.instantiation, self.instantiation)
            and kernel.spilled <= self.most
        )


def name_of(mangled: str) -> str:
    """The last of the names, each after its length, at the beginning of a mangled one: ``_ZN2ma4cuda5applyIfEEvv``."""
    name, rest = mangled, mangled.removeprefix("_Z").removeprefix("N")
    while length := LENGTH.match(rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def kernels(instantiation: str, log: str) -> Iterator[Kernel]:
    """The kernels that a log tells of."""
    _, *parts = ENTRY.split(log)
    for mangled, arch, report in zip(parts[::3], parts[1::3], parts[2::3]):
        stack, registers = STACK.search(report), REGISTERS.search(report)
        if stack is None or registers is None:
            raise ValueError(f"{instantiation}: the report on {mangled} has no registers or no stack frame:\n{report}")
        spilled = max(int(number) for number in stack.groups())
        yield Kernel(instantiation, name_of(mangled), arch, int(registers[1]), spilled)


def warnings(log: str) -> Iterator[str]:
    """Lines of a log that always fail."""
    return (line for line in log.splitlines() if WARNING.search(line))


def admissions(text: str) -> list[Admission]:
    """The rows of a list.

    Raises:
        ValueError: If a row lacks something, the reason say, or its bytes are no number.
    """
    found = []
    for row in text.splitlines():
        if not row.strip() or row.startswith("#"):
            continue
        fields = row.split(maxsplit=4)
        if len(fields) != 5 or not fields[3].isdecimal():
            raise ValueError(f"{ADMITTED.name}: expected kernel, object, architecture, bytes, reason, got {row!r}")
        found.append(Admission(*fields[:3], int(fields[3])))
    return found


def main(folder: Path) -> int:
    """Prints every kernel and what is wrong; returns the exit status."""
    admitted = admissions(ADMITTED.read_text())
    objects = [folder / name for name in OBJECT.findall((folder / "build.ninja").read_text())]
    logs = {path.stem: path.with_suffix(".o.log").read_text() for path in objects}
    found = [kernel for name, log in logs.items() for kernel in kernels(name, log)]
    failures = [f"{name}: {line}" for name, log in logs.items() for line in warnings(log)]
    for kernel in found:
        print(kernel)
        if kernel.spilled and not any(admission.admits(kernel) for admission in admitted):
            failures.append(f"{kernel}: spills.txt does not admit that")
    if not found:
        failures.append(f"{folder} has no report on a kernel")
    print(*(f"FAILED {failure}" for failure in failures), sep="\n", end="\n" if failures else "")
    print(f"{len(found)} kernels in {len(logs)} objects, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
