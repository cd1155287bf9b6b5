"""Checks in the machine code of the Hopper kernels that exponentials run under the matrix product issued before them.

ptxas is free to move the softmax of a tile behind the wait for the product it is meant to hide under, and does so
unless the source holds it back. Between the wait for the scores (one batch of products still under way) and the wait
for the output (none left) of each kernel's main loop there must be an exponential for every score of a thread.

Usage: check_sass.py object...   (needs cuobjdump and nvdisasm on the PATH)
"""

import re
import subprocess
import sys

FUNCTION = re.compile(r"Function : (\S+)")
SCORES = re.compile(r"HGMMA\.64x(\d+)x16\S* \S+ \S+ RZ, !UPT")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")


def hidden_exponentials(sass: str) -> list[tuple[int, int]]:
    """Finds a function's overlaps of products and softmax.

    Args:
        sass: the disassembly of one function.

    Returns:
        For each wait that leaves a product under way: the exponentials up to the wait for that product, and how many
        scores a thread holds.
    """
    overlaps = []
    scores = exponentials = 0
    waiting = False
    for line in sass.splitlines():
        if product := SCORES.search(line):
            scores = int(product[1]) // 2
        if wait := WAIT.search(line):
            if waiting:
                overlaps.append((exponentials, scores))
            waiting = wait[1] != "0"
            exponentials = 0
        exponentials += "MUFU.EX2" in line
    return overlaps


def main(objects: list[str]) -> int:
    failures = checked = 0
    for path in objects:
        listing = subprocess.run(["cuobjdump", "-sass", path], check=True, capture_output=True, text=True).stdout
        _, *parts = FUNCTION.split(listing)
        for name, sass in zip(parts[::2], parts[1::2], strict=True):
            if "HGMMA" not in sass:
                continue
            overlaps = hidden_exponentials(sass)
            good = bool(overlaps) and all(exponentials >= scores for exponentials, scores in overlaps)
            found = ", ".join(f"{exponentials} of {scores}" for exponentials, scores in overlaps) or "no overlap"
            print(f"{'ok' if good else 'FAILED'}: {found} exponentials under a product in {name}")
            failures += not good
            checked += 1
    if checked == 0:
        print("no function with wgmma in these objects")
    return int(failures > 0 or checked == 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
