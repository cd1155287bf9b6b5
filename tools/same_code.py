"""Tells whether the machine code of the kernels is what it was: a move or a change of names may not change it.

A kernel is known by a hash of its instructions. Names, addresses of the listing and line tables are no part of it, so
that a kernel may be called otherwise, or lie in another file, and keep its hash.

Usage:
    same_code.py FOLDER > before.json              every kernel of the objects below FOLDER (build/cuda), by its hash
    same_code.py FOLDER --against before.json      compares; fails and names the kernels where code came or went

(needs cuobjdump and nvdisasm: CUDA's, or of the wheels that requirements.txt names)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from check_sass import FUNCTION, disassemble

ARCHITECTURE = re.compile(r"^arch = (\S+)$", re.MULTILINE)
ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")  # half of an instruction, with what ptxas says of its timing


def fingerprints(listing: str) -> Iterator[tuple[str, str]]:
    """The name and the fingerprint, ``architecture:length:hash``, of every function of a disassembled object."""
    _, *parts = ARCHITECTURE.split(listing)
    for architecture, code in zip(parts[::2], parts[1::2], strict=True):
        _, *functions = FUNCTION.split(code)
        for name, body in zip(functions[::2], functions[1::2], strict=True):
            words = ENCODING.findall(body)
            digest = hashlib.sha256("".join(words).encode()).hexdigest()[:16]
            yield name, f"{architecture}:{len(words) // 2} instructions:{digest}"


def kernels(folder: Path) -> dict[str, list[str]]:
    """The names of the functions below a folder, by fingerprint."""
    objects = sorted(folder.rglob("*.o"))
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(cpu_count()) as pool:
        for listing in pool.map(disassemble, map(str, objects)):
            for name, fingerprint in fingerprints(listing):
                found.setdefault(fingerprint, []).append(name)
    return found


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """What came and what went, a line a kernel. Kernels of equal code are as many as their names."""
    lines = []
    for sign, these, others in (("-", before, after), ("+", after, before)):
        count = Counter({fingerprint: len(names) for fingerprint, names in these.items()})
        count.subtract({fingerprint: len(names) for fingerprint, names in others.items()})
        lines += [f"{sign} {fingerprint} {these[fingerprint][0]}" for fingerprint, n in count.items() if n > 0]
    return lines


def main() -> int:
    """Runs the command line; 1 where code differs, or where there is none."""
    parser = argparse.ArgumentParser(prog="same_code.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the objects are, build/cuda")
    parser.add_argument("--against", type=Path, help="what an earlier call wrote")
    args = parser.parse_args()
    after = kernels(args.folder)
    if not after:
        print(f"no kernels below {args.folder}", file=sys.stderr)
        return 1
    if args.against is None:
        json.dump(after, sys.stdout, indent=0, sort_keys=True)
        return 0
    lines = differences(json.loads(args.against.read_text()), after)
    print("\n".join([*lines, f"{sum(map(len, after.values()))} kernels, {len(lines)} differences"]))
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
