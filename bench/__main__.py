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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mixed_attention as ma
from bench import layer, memory, operator, overhead, report
from bench.cases import QUICK, Case, suite
from bench.peers import BACKWARD, FORWARD, peers
from bench.rows import PRECISIONS, Row, dtype_of

OURS = ("ours", "ours, deterministic")
WHAT = ("operator", "layer", "overhead", "memory")
PASSES = {"fwd": FORWARD, "bwd": BACKWARD}
PEER_PACKAGES = ("triton", "fa3_fwd", "flash-attn-4", "nvidia-cutlass-dsl")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=WHAT, help="default: all but memory, which takes minutes on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, help="tf32 is float32 that torch may round to TF32")
    parser.add_argument("--case", nargs="+", help="names of cases; default all of the device's suite")
    parser.add_argument("--peers", nargs="+", help="who is measured beside ours; default all")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="of the operator")
    parser.add_argument("--rounds", type=int, default=9, help="how often each takes its turn")
    parser.add_argument("--quick", action="store_true", help="the operator alone, few cases, peers and rounds")
    parser.add_argument("--no-graphs", action="store_true", help="nothing replayed from CUDA graphs")
    parser.add_argument("--no-errors", action="store_true", help="nothing compared with fp64")
    parser.add_argument("--compiled", action="store_true", help="the layers under torch.compile too")
    parser.add_argument("--commit", help="what is measured; default what git says")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/DATE-DEVICE.json")
    parser.add_argument("--plot", type=Path, help="also draw the ratios to this picture")
    args = parser.parse_args()
    if args.quick:
        args.what = args.what or ["operator"]
        args.dtype = args.dtype or ["bfloat16"]
        args.case = args.case or list(QUICK)
        args.peers = args.peers or ["cudnn", "fa2"]
        args.rounds = min(args.rounds, 5)
    args.what = args.what or list(WHAT[:3])
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    return args


def _facts(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    return {
        "date": date.today().isoformat(),
        "commit": args.commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(
            _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
        ),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_instruction_set": ma.ops.cpu_instruction_set(),
        "versions": dict(_versions(device)),
        "command": "python -m bench " + shlex.join(_without_places(sys.argv[1:])),
    }


def _without_places(arguments: list[str]) -> list[str]:
    """The command without the options that say where things lie and not what is measured."""
    places = [i for i, argument in enumerate(arguments) if argument in ("--out", "--plot", "--commit")]
    return [argument for i, argument in enumerate(arguments) if i not in places and i - 1 not in places]


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
    if device.type != "cuda":
        return
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


def _measure(args: argparse.Namespace, cases: tuple[Case, ...], device: torch.device) -> Iterator[Row]:
    everybody = peers(device.type)
    wanted = {name: make for name, make in everybody.items() if not args.peers or name in (*args.peers, *OURS)}
    what = operator.What(
        [PASSES[name] for name in args.passes],
        args.rounds,
        graphs=not args.no_graphs,
        data=() if args.no_errors else operator.DATA,
    )
    for precision in args.dtype:
        for case in cases:
            if "operator" in args.what:
                yield from operator.measure(case, device, precision, wanted, what)
            if "layer" in args.what:
                yield from layer.measure(case, device, precision, args.rounds, compiled=args.compiled)
            if "memory" in args.what and device.type == "cuda":
                yield operator.gpu_memory(case, device, precision, everybody["ours"]())
    if "overhead" in args.what:
        yield from overhead.measure(device, args.rounds)
    if "memory" in args.what and device.type == "cpu":
        for precision in args.dtype:
            for num_tokens in (16384, 32768, 65536):
                yield memory.measure(num_tokens, dtype_of(precision))


def main() -> int:
    """Runs the command line; 1 if ours was absent from something."""
    args = _arguments()
    device = torch.device(args.device)
    torch.manual_seed(0)
    cases = tuple(case for case in suite(device.type) if not args.case or case.name in args.case)
    result = _facts(args, device) | {"rows": []}
    out = args.out or Path(__file__).parent / "results" / f"{result['date']}-{args.device}.json"
    try:
        for row in _measure(args, cases, device):
            result["rows"].append(row)
            print(report.line(row), flush=True)
    finally:  # what was measured before an error or an interruption is worth keeping
        if device.type == "cuda":
            result["clocks"] = _clocks()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {out}\n\n{report.tables(result)}")
    if args.plot:
        report.plot(result, args.plot)
    return int(any(row["kind"] == "absent" and row["who"] in OURS for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
