"""Two GPUs in one process: what a device is asked or told once must be asked and told of every device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from compare import check, deterministic, judge, make_inputs, run

import mixed_attention as ma
from mixed_attention import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs"),
    pytest.mark.skipif(not ops.has_kernels("cuda", torch.float32), reason="built without CUDA kernels"),
]

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SIZES = Case((300, 200, 65), "ab>ab c>acc", batch_size=2, num_heads=2)
SPLIT = Case((40, 5000), "ab>ab", cached="b")  # few queries of many keys: cut into parts
# Strided rows and odd widths are the portable kernels', on every GPU.
CASES = {
    **{f"hopper, {width}": SIZES.with_(head_dim=width) for width in (32, 64, 96, 128, 192, 256)},
    "hopper, masked": SIZES.with_(head_dim=64, mask="random"),
    "hopper, split": SPLIT.with_(head_dim=64),
    **{f"portable, {width}": SIZES.with_(head_dim=width, layout="strided") for width in (20, 64, 96, 128, 192, 256)},
    "portable, masked": SIZES.with_(head_dim=64, layout="strided", mask="random"),
    "portable, split": SPLIT.with_(head_dim=64, head_dim_v=20),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def on_each_device(act: Callable[[torch.device], object]) -> None:
    """Acts on every one of two devices while the other one is current."""
    for index in (0, 1):
        with torch.cuda.device(1 - index):
            act(torch.device("cuda", index))
            assert torch.cuda.current_device() == 1 - index


@each_case
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("mode", [nullcontext, deterministic], ids=["", "deterministic"])
def test_one_device_after_the_other(case, dtype, mode):
    def check_mode(device: torch.device) -> None:
        inputs = make_inputs(case.with_(dtype=dtype), device)
        with mode():
            results = run(inputs)
        judge(results, inputs)

    on_each_device(check_mode)


@each_case
def test_both_devices_at_once(case):
    """A thread to each, both from the start: neither may take the other's leave for its own."""
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(check, case.with_(dtype=BF16), torch.device("cuda", i)) for i in (1, 0)]:
            done.result()


def test_tables_of_many_groups():
    """Each device has its own, of the same plan."""
    segments = [(2 * i, 2 * i + 2, [(2 * i, 2 * i + 2)]) for i in range(500)]
    plan = ma.AttentionPlan.from_segments(segments)

    def act(device: torch.device) -> None:
        q = torch.randn(1, 1000, 2, 16, device=device)
        out = ma.attention(q, q, q, plan)
        groups = q.double().view(500, 2, 2, 16).transpose(1, 2)
        expected = F.scaled_dot_product_attention(groups, groups, groups).transpose(1, 2).reshape(1, 1000, 2, 16)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)

    for _ in range(2):
        on_each_device(act)


def test_tf32():
    torch.set_float32_matmul_precision("high")
    try:
        on_each_device(lambda device: check(CASES["hopper, 64"].with_(dtype=FP32), device))
        on_each_device(lambda device: check(CASES["portable, 64"].with_(dtype=FP32), device))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    asked = []
    monkeypatch.setattr(ops._C, "cuda_kernel", lambda *arguments: (asked.append(arguments[3]), ("hopper", ""))[1])
    for index in (0, 1):
        with torch.cuda.device(index):
            ops.cuda_kernel(BF16, 64, torch.device("cuda"), backward=False)
    assert asked == [0, 1]
