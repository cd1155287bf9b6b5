"""``python -m bench``: measures ours beside its peers on this machine, writes JSON, prints the tables."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

import mixed_attention as ma
from bench import measure, report
from bench.cases import Case, suite

WHAT = ("operator", "layer", "overhead", "memory")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT[:3]), help="memory takes minutes on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes to measure")
    parser.add_argument("--case", nargs="+", help="names of cases; default all of the device's suite")
    parser.add_argument("--rounds", type=int, default=9, help="how often each takes its turn")
    parser.add_argument("--compiled", action="store_true", help="the layers under torch.compile too")
    parser.add_argument("--graphs", action="store_true", help="forward replayed from a CUDA graph too")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/DATE-DEVICE.json")
    parser.add_argument("--plot", type=Path, help="also draw the ratios to this picture")
    return parser.parse_args()


def _facts(device: torch.device) -> dict[str, object]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "date": date.today().isoformat(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")),
        "device": name,
        "threads": torch.get_num_threads(),
        "cpu_instruction_set": ma.ops.cpu_instruction_set(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _measure(args: argparse.Namespace, cases: tuple[Case, ...]) -> Iterator[measure.Row]:
    device = torch.device(args.device)
    dtypes = [getattr(torch, name) for name in args.dtype]
    for dtype in dtypes:
        for case in cases:
            if "operator" in args.what:
                yield from measure.operator(case, device, dtype, args.rounds, graphs=args.graphs)
            if "layer" in args.what:
                yield from measure.layer(case, device, dtype, args.rounds, compiled=args.compiled)
    if "overhead" in args.what:
        yield from measure.overhead(device, args.rounds)
    if "memory" in args.what:
        for dtype in dtypes:
            for num_tokens in (16384, 32768, 65536):
                yield measure.memory(num_tokens, dtype)


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    cases = tuple(case for case in suite(torch.device(args.device).type) if not args.case or case.name in args.case)
    result = _facts(torch.device(args.device)) | {"rows": []}
    for row in _measure(args, cases):
        result["rows"].append(row)
        print(report.line(row), flush=True)
    out = args.out or Path(__file__).parent / "results" / f"{result['date']}-{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {out}\n\n{report.tables(result)}")
    if args.plot:
        report.plot(result, args.plot)


if __name__ == "__main__":
    main()
