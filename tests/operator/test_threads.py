"""Equal bits for any number of threads and in every repetition; the instruction sets; calls from several threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import Case, make_inputs
from compare import run

import mixed_attention as ma

CASE = Case((300, 517, 260, 95), "ab>ac c>d d>aacd", batch_size=2, num_heads=3, head_dim=40, head_dim_v=24)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits_depend_on_no_number_of_threads(dtype):
    inputs = make_inputs(CASE.with_(dtype=dtype, mask="random"))
    results = []
    for threads in (1, 2, 7, 2):
        torch.set_num_threads(threads)
        results.append(run(inputs))
    for result in results[1:]:
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(result, name), getattr(results[0], name)), name


def test_several_threads_may_call_at_once():
    inputs = [make_inputs(CASE.with_(seed=seed)) for seed in range(4)]
    alone = [run(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 3))
    for index, result in enumerate(together):
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(result, name), getattr(alone[index % 4], name)), name


SCRIPT = """
from cases import DTYPES, EDGE_CASES
from compare import check
from mixed_attention import _C
from test_threads import CASE
print(_C.cpu_instruction_set())
for dtype in DTYPES.values():
    check(CASE.with_(sizes=(100, 195, 97, 31), dtype=dtype, mask="random"))  # a tile and a bit
    for name, case in EDGE_CASES.items():
        if name.startswith("head_dim"):
            check(case.with_(dtype=dtype))
"""


def _run_with(instruction_set):
    here = Path(__file__).parent
    package = Path(ma.__file__).parents[1]  # the one that is being tested
    paths = [str(here), str(here.parent), str(package)]
    environment = os.environ | {"MIXED_ATTENTION_CPU": instruction_set, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("instruction_set", ["AMX", "AVX512_BF16", "AVX512", "AVX2", "portable"])
def test_instruction_sets(instruction_set):
    done = _run_with(instruction_set)
    if "expected one of" in done.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == instruction_set


def test_an_unknown_instruction_set_is_refused():
    assert "MIXED_ATTENTION_CPU: expected one of" in _run_with("AVX9").stderr
