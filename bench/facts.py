"""What a result file says of its run: when it was, of which commit, on which machine and with which versions."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mixed_attention as ma
from bench import files, tables

PEER_PACKAGES = ("triton", "fa3_fwd", "flash-attn-4", "nvidia-cutlass-dsl", "jvp-flash-attention", "emmiai-noether")


def of_run(module: str, device: torch.device, commit: str | None) -> dict[str, Any]:
    """A result without rows yet.

    Args:
        module: What was started, ``python -m module``.
        device: Where it runs.
        commit: What is measured, without changes, where git cannot tell; by default what git says.
    """
    return {
        "date": date.today().isoformat(),
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": commit is None
        and bool(_output("git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_instruction_set": ma.ops.cpu_instruction_set(),
        "versions": dict(_versions(device)),
        "command": f"{_setting()}python -m {module} {shlex.join(_without_places(sys.argv[1:]))}",
        "rows": [],
    }


def save(result: dict[str, Any], device: torch.device, what: str, out: Path | None) -> None:
    """Writes a result, and prints its tables.

    Args:
        result: What was measured.
        device: Where it ran.
        what: The name of its file in ``bench/results/<machine>``.
        out: Another file instead of that one.
    """
    if device.type == "cuda":
        result["clocks"] = _clocks()
    path = out or files.place(result, what)
    files.save(result, path)
    print(f"\nwritten to {path}\n\n{tables.tables(result)}")


def _without_places(arguments: list[str]) -> list[str]:
    """The command without the options that say where things lie and not what is measured."""
    places = [i for i, argument in enumerate(arguments) if argument in ("--out", "--commit")]
    return [argument for i, argument in enumerate(arguments) if i not in places and i - 1 not in places]


def family() -> str:
    """The only kernels of GPUs that take part, where the environment says so."""
    return os.environ.get("MIXED_ATTENTION_GPU", "")


def _setting() -> str:
    """The variable that leaves kernels out, where it is set, as a command line has it."""
    return f"MIXED_ATTENTION_GPU={family()} " if family() else ""


def _output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    if device.type == "cuda":
        yield "CUDA", str(torch.version.cuda)
        yield "cuDNN", str(torch.backends.cudnn.version())
        yield "driver", _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    for package in PEER_PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _clocks() -> str:
    """The GPU's clocks at this moment: right after work they are those of the work."""
    return _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader")
