"""``python -m bench``: measures ours beside its peers on this machine, writes JSON, prints the tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import (
    bias,
    derivatives,
    facts,
    files,
    groups,
    host,
    layer,
    memory,
    operator,
    ragged,
    repeats,
    rotation,
    streamed,
    tables,
    timeline,
)
from bench.cases import QUICK, Case, suite
from bench.peers import BACKWARD, FORWARD, peers
from bench.rows import PRECISIONS, Row, dtype_of

OURS = ("ours", "ours, deterministic")
WHAT = ("operator", "layer", "host", "memory", "groups", "ragged", "repeats", "timeline", "derivatives", "bias")
PASSES = {"fwd": FORWARD, "bwd": BACKWARD}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=WHAT, help=f"default: {', '.join(WHAT[:3])}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, help="tf32 is float32 that torch may round to TF32")
    parser.add_argument("--case", nargs="+", help="names of cases; default all of the device's suite")
    parser.add_argument("--peers", nargs="+", help="who is measured beside ours; default all")
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=list(PASSES), help="of the operator, or none")
    parser.add_argument("--rounds", type=int, default=9, help="how often each takes its turn")
    parser.add_argument("--repeats", type=int, default=10000, help="how often a call must give the same bits")
    parser.add_argument("--quick", action="store_true", help="the operator alone, few cases, peers and rounds")
    parser.add_argument("--no-graphs", action="store_true", help="nothing replayed from CUDA graphs")
    parser.add_argument("--no-errors", action="store_true", help="nothing compared with fp64")
    parser.add_argument("--compiled", action="store_true", help="the layers under torch.compile too")
    parser.add_argument("--commit", help="what is measured; default what git says")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/MACHINE/WHAT.json")
    args = parser.parse_args()
    if args.quick:
        args.what = args.what or ["operator"]
        args.dtype = args.dtype or ["bfloat16"]
        args.case = args.case or list(QUICK)
        args.peers = args.peers or ["cudnn", "fa2"]
        args.rounds = min(args.rounds, 5)
    args.what = args.what or list(WHAT[:3])
    if "timeline" in args.what and args.device == "cpu":
        parser.error("--what timeline needs a GPU")
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    return args


def _measure(args: argparse.Namespace, cases: tuple[Case, ...], device: torch.device) -> Iterator[Row]:
    everybody = peers(device.type)
    wanted = {name: make for name, make in everybody.items() if not args.peers or name in (*args.peers, *OURS)}
    what = operator.What(
        [PASSES[name] for name in args.passes],
        args.rounds,
        graphs=not args.no_graphs,
        data=() if args.no_errors else operator.DATA,
    )
    layers = layer.What(args.rounds, args.peers, compiled=args.compiled, graphs=not args.no_graphs)
    for precision in args.dtype:
        for case in cases:
            if "operator" in args.what:
                yield from operator.measure(case, device, precision, wanted, what)
            if "layer" in args.what:
                yield from layer.measure(case, device, precision, layers)
            if "bias" in args.what:
                yield from bias.measure(case, device, precision, args.rounds)
            if "timeline" in args.what and (args.case or case.name in timeline.CASES):
                yield from timeline.measure(case, device, precision, args.peers, args.rounds)
            if "memory" in args.what and device.type == "cuda":
                yield operator.gpu_memory(case, device, precision, everybody["ours"]())
        if "derivatives" in args.what:
            for case in (*cases, *_wanted(derivatives.cases(device.type), args)):
                yield from derivatives.measure(case, device, precision, args.rounds)
            if not args.case or "streamed" in args.case:
                yield from streamed.measure(device, precision, args.rounds)
            if not args.case or "rotation" in args.case:
                yield from rotation.measure(device, precision, args.rounds)
        if "groups" in args.what:
            yield from groups.measure(device, precision, args.rounds)
        if "ragged" in args.what:
            yield from ragged.measure(device, precision, args.rounds)
    if "host" in args.what:
        yield from host.measure(device, args.rounds)
    if "repeats" in args.what:
        yield from repeats.measure(device, args.repeats)
    if "memory" in args.what and device.type == "cpu":
        for precision in args.dtype:
            for num_tokens in (16384, 32768, 65536):
                yield memory.measure(num_tokens, dtype_of(precision))


def _wanted(cases: tuple[Case, ...], args: argparse.Namespace) -> tuple[Case, ...]:
    return tuple(case for case in cases if not args.case or case.name in args.case)


def main() -> int:
    """Runs the command line; 1 if ours was absent from something, or not equal to itself where it promises to be."""
    args = _arguments()
    device = torch.device(args.device)
    torch.manual_seed(0)
    cases = _wanted(suite(device.type), args)
    result = facts.of_run("bench", device, args.commit)
    try:
        for row in _measure(args, cases, device):
            result["rows"].append(row)
            print(tables.line(row), flush=True)
    finally:  # what was measured before an error or an interruption is worth keeping
        facts.save(result, device, _name(args), args.out)
    return int(any(_is_a_failure(row) for row in result["rows"]))


def _name(args: argparse.Namespace) -> str:
    """The file of a run. What leaves out cases has a name of its own, so that it replaces no whole run."""
    precisions = args.dtype if {*args.what} - {"host", "repeats"} else []
    special = [
        *(["compiled"] if args.compiled else []),
        *([facts.family()] if facts.family() else []),
        *(["quick"] if args.quick else ["selected"] if args.case else []),
    ]
    return files.name(*args.what, *precisions, *special)


def _is_a_failure(row: Row) -> bool:
    return (row["kind"] == "absent" and row["who"] in OURS) or (row.get("promised", False) and row["unequal"] > 0)


if __name__ == "__main__":
    sys.exit(main())
