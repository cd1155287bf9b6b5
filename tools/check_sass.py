"""Checks in the machine code of the Hopper kernels that exponentials run under matrix products.

ptxas is free to move the exponentials of a tile behind the wait for the product that they are meant to hide under, and
does so unless the source holds it back. Each kernel must have one exponential for every score of a thread at least
where an MMA is in flight; where none is, there may be one tile's at most, as before a loop, and
another one's in the forward and its tangent, which weigh a tile again where weights overflowed. Those of bf16 may have
twice as many: their second way through the items, for outputs that overflowed, goes tile by tile.

Usage: check_sass.py object...   (needs cuobjdump and nvdisasm: CUDA's, or of the wheels that requirements.txt names)
"""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FUNCTION = re.compile(r"Function : (\S+)")
SCORES = re.compile(r"HGMMA\.64x(\d+)x16\S* R\d+, (?:R\d+, )?gdesc\[UR\d+\], RZ, !UPT")
WAIT_FOR_ALL = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")
RESCALING = 2  # exponentials beside those of the scores
FORWARD, TANGENT = "hopper_attention_fwd_kernel", "hopper_attention_jvp_"


def disassemble(path: str) -> str:
    """The listing of an object's functions."""
    of_wheels = [str(folder) for folder in Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")]
    environment = os.environ | {"PATH": os.pathsep.join([os.environ["PATH"], *of_wheels])}  # one calls the other
    command = ["cuobjdump", "-sass", path]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def count_exponentials(sass: str) -> tuple[int, int, int]:
    """Counts a function's exponentials by whether an MMA is in flight.

    Args:
        sass: the disassembly of one function.

    Returns:
        Exponentials under an MMA, exponentials under none, scores that a thread holds of one tile.
    """
    hidden = exposed = scores = 0
    in_flight = False
    for line in sass.splitlines():
        if product := SCORES.search(line):
            scores = max(scores, int(product[1]) // 2)
        in_flight = (in_flight or "HGMMA" in line) and not WAIT_FOR_ALL.search(line)
        hidden += "MUFU.EX2" in line and in_flight
        exposed += "MUFU.EX2" in line and not in_flight
    return hidden, exposed, scores


def main(objects: list[str]) -> int:
    """Prints every kernel and what is wrong; returns the exit status."""
    failures = checked = 0
    with ThreadPoolExecutor(os.cpu_count()) as several:
        listings = list(several.map(disassemble, objects))
    for listing in listings:
        _, *parts = FUNCTION.split(listing)
        for name, sass in zip(parts[::2], parts[1::2], strict=True):
            if "HGMMA" not in sass:
                continue
            hidden, exposed, scores = count_exponentials(sass)
            is_forward = FORWARD in name or TANGENT in name
            ways = 2 if is_forward and "nv_bfloat16" in name else 1
            tiles = 2 if is_forward else 1
            good = hidden >= scores > 0 and exposed <= ways * (tiles * scores + RESCALING)
            print(
                f"{'ok' if good else 'FAILED'}: {hidden} exponentials under a product, {exposed} under none, "
                f"{scores} scores in {name}"
            )
            failures += not good
            checked += 1
    if checked == 0:
        print("no function with wgmma in these objects")
    return int(failures > 0 or checked == 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
