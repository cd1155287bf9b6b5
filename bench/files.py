"""Result files: ``bench/results/<machine>/<what>.json``, the newest run of each, one row of the result a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.tables import SHORT

RESULTS = Path(__file__).parent / "results"

# Vendors, words that every name has, and sizes of memory do not tell machines apart.
_SAYS_NOTHING = re.compile(r"\((r|tm)\)|\b(nvidia|intel|amd|processor|cpu|\d+gb|hbm\w*)\b|@ *[0-9.]+ghz", re.IGNORECASE)

Result = dict[str, Any]


def machine(result: Result) -> str:
    """The folder of a result: the GPU's name, or the processor's and the instruction set of the kernels that ran."""
    is_gpu = "CUDA" in result["versions"]
    name = result["device"] if is_gpu else f"{result['device']} {result['cpu_instruction_set']}"
    return "-".join(re.findall(r"[a-z0-9]+", _SAYS_NOTHING.sub(" ", name).lower()))


def name(*words: str) -> str:
    """What was measured, as the name of a file: kinds of rows, precisions, and what is special about the run."""
    return "-".join(SHORT.get(word, word).lower() for word in words)


def place(result: Result, what: str) -> Path:
    """Where a result lies unless the command line says otherwise."""
    return RESULTS / machine(result) / f"{what}.json"


def save(result: Result, path: Path) -> None:
    """Writes a result, and replaces the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(result))


def load(path: Path) -> Result:
    """Reads a result."""
    return json.loads(path.read_text())


def text(result: Result) -> str:
    """JSON with one line a fact of the run, then one line a row: a changed number is a changed line."""
    facts = (f"{json.dumps(key)}: {json.dumps(value)}," for key, value in result.items() if key != "rows")
    return "\n".join(["{", *facts, '"rows": [', *_lines(result["rows"]), "]", "}"]) + "\n"


def _lines(rows: Iterable[object]) -> Iterable[str]:
    lines = [json.dumps(row) for row in rows]
    return (line + "," * (i < len(lines) - 1) for i, line in enumerate(lines))
