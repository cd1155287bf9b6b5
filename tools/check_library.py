"""Tells what a shared library needs of the machines it goes to; fails where it needs or shows more than it may.

Wheels for Linux are tagged manylinux_2_N by the oldest C library that they run with, glibc 2.N. The symbols that a
library takes from there have versions, of which the newest decides.

Usage: check_library.py LIBRARY    (needs objdump)
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ALLOWED = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux[-\w]*)\.so\.\d+")
LEAST_GLIBC = 28  # that of the oldest systems which torch's own wheels serve
SHOWN = {"mixed_attention_kernels"}


@dataclass(frozen=True)
class Needs:
    """What a library needs and shows.

    Attributes:
        libraries: Names of the libraries that are loaded with it.
        glibc: Newest version of a symbol of glibc: 28 for 2.28, at least `LEAST_GLIBC`.
        shown: Names that it defines for others.
    """

    libraries: frozenset[str]
    glibc: int
    shown: frozenset[str]

    @staticmethod
    def of(library: Path) -> Needs:
        """Reads a library."""
        headers, symbols = (
            subprocess.run(["objdump", option, library], capture_output=True, text=True, check=True).stdout
            for option in ("--private-headers", "--dynamic-syms")
        )
        return Needs.told(headers, symbols)

    @staticmethod
    def told(headers: str, symbols: str) -> Needs:
        """Reads what objdump says."""
        taken, defined = [], []
        for line in symbols.splitlines():
            if re.match(r"[0-9a-f]{8}", line):
                (taken if "*UND*" in line else defined).append(line)
        versions = [int(minor) for line in taken for minor in re.findall(r"\(GLIBC_2\.(\d+)", line)]
        return Needs(
            libraries=frozenset(re.findall(r"^\s*NEEDED\s+(\S+)$", headers, re.MULTILINE)),
            glibc=max([LEAST_GLIBC, *versions]),
            shown=frozenset(line.split()[-1] for line in defined),
        )

    def platform(self) -> str:
        """Tag of wheels that have the library."""
        return f"manylinux_2_{self.glibc}_{platform.machine()}"


def failures(needs: Needs) -> list[str]:
    """What is wrong with a library of kernels, a sentence each."""
    found = [
        f"needs {name}, which a machine may lack" for name in sorted(needs.libraries) if not ALLOWED.fullmatch(name)
    ]
    if needs.shown != SHOWN:
        found.append(f"shows {', '.join(sorted(needs.shown)) or 'nothing'}, expected {', '.join(SHOWN)}")
    return found


def main(library: Path) -> int:
    """Prints what the library needs; returns the exit status."""
    needs = Needs.of(library)
    size = library.stat().st_size / 1e6
    print(f"{library.name}: {size:.1f} MB, {needs.platform()}, needs {', '.join(sorted(needs.libraries))}")
    wrong = failures(needs)
    print(*(f"FAILED {library.name} {sentence}" for sentence in wrong), sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
