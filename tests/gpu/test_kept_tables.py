"""Plans too large for the parameters of kernels: their tables stay on the device, and nobody reads another's.

A store holds the tables of a stream until it is full, so that few plans of thousands of groups fill it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from compare import deterministic
from torch import Tensor

import mixed_attention as ma

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session"),
    pytest.mark.parametrize("numbers", [(torch.float32, 16), (torch.bfloat16, 64)], ids=["fp32", "bf16"]),
]

ROWS = 2  # of a group
HEADS = 2
Numbers = tuple[torch.dtype, int]  # and head_dim: the portable kernels, and on Hopper its own
# A number is rounded a few times on its way: inputs and gradients are of a size of 1, few of 10.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 10 * 2**-8}
MANY = 4096  # groups, of which a store holds some fifty tables
ENOUGH_TO_FORGET = 70


def make_plan(num_groups: int, shift: int = 0) -> ma.AttentionPlan:
    """Groups of which each attends to another one, `shift` places behind it."""

    def rows(group: int) -> tuple[int, int]:
        return group * ROWS, (group + 1) * ROWS

    segments = [(*rows(i), [rows((i + shift) % num_groups)]) for i in range(num_groups)]
    return ma.AttentionPlan.from_segments(segments)


def make_inputs(
    plan: ma.AttentionPlan, device: torch.device, numbers: Numbers, batch_size: int = 1, num_heads: int = HEADS
) -> list[Tensor]:
    dtype, head_dim = numbers
    generator = torch.Generator(device).manual_seed(plan.num_queries)
    shape = batch_size, plan.num_queries, num_heads, head_dim
    return [torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(3)]


def expected(inputs: list[Tensor], shift: int) -> tuple[Tensor, ...]:
    """The same by the framework's attention, a group at a time, in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = (x.unflatten(1, (-1, ROWS)).transpose(2, 3) for x in leaves)
    k, v = (x.roll(-shift, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
    return out, *torch.autograd.grad(out.sum(), leaves)


def step(inputs: list[Tensor], plan: ma.AttentionPlan) -> tuple[Tensor, ...]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = ma.attention(*leaves, plan)
    return out, *torch.autograd.grad(out.sum(), leaves)


def judge(results: tuple[Tensor, ...], inputs: list[Tensor], shift: int) -> None:
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), results, expected(inputs, shift)):
        most = TOLERANCE[inputs[0].dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=most, atol=most, msg=lambda text, n=name: f"{n}: {text}")


def forget(device: torch.device, numbers: Numbers) -> None:
    """Fills the store of the current stream with tables of other plans."""
    with torch.no_grad():
        for i in range(ENOUGH_TO_FORGET):
            plan = make_plan(MANY + i)
            ma.attention(*make_inputs(plan, device, numbers), plan)


@pytest.mark.parametrize("mode", [nullcontext, deterministic], ids=["", "deterministic"])
@pytest.mark.parametrize("num_groups", [49, 1000])
def test_kept_tables_serve_any_number_of_calls(num_groups, mode, numbers, device):
    plan = make_plan(num_groups, shift=3)
    inputs = make_inputs(plan, device, numbers)
    with mode():
        for _ in range(3):
            judge(step(inputs, plan), inputs, 3)


def test_one_plan_of_several_shapes(numbers, device):
    plan = make_plan(300, shift=1)
    for batch_size, num_heads in ((1, 1), (3, 2), (1, 2), (1, 1), (3, 2)):
        inputs = make_inputs(plan, device, numbers, batch_size, num_heads)
        judge(step(inputs, plan), inputs, 1)


def test_tables_are_forgotten_and_made_again(numbers, device):
    plan = make_plan(MANY, shift=5)
    inputs = make_inputs(plan, device, numbers)
    for _ in range(2):
        judge(step(inputs, plan), inputs, 5)
        forget(device, numbers)
    judge(step(inputs, plan), inputs, 5)


def test_more_streams_than_there_are_stores(numbers, device):
    """Each stream is busy when it is asked: its table may be written late, and is read later."""
    plan = make_plan(500, shift=2)
    inputs = make_inputs(plan, device, numbers)
    torch.cuda.synchronize()
    results = []
    streams = [torch.cuda.Stream() for _ in range(7)]
    for _ in range(2):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(step(inputs, plan))
    torch.cuda.synchronize()
    for each in results:
        judge(each, inputs, 2)


@pytest.mark.parametrize("is_known", [False, True], ids=["captured first", "captured after a call"])
def test_graphs_bring_their_tables_along(is_known, numbers, device):
    warm = make_plan(100)  # the same kernels, but other tables
    stream = torch.cuda.Stream()
    plan = make_plan(MANY, shift=7)
    inputs = make_inputs(plan, device, numbers)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(make_inputs(warm, device, numbers), warm)
            if is_known:
                step(inputs, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(inputs, plan)
    torch.cuda.synchronize()
    for where in (torch.cuda.current_stream(), stream):
        with torch.cuda.stream(where):
            forget(device, numbers)
            for result in results:
                result.detach().fill_(torch.nan)
            graph.replay()
        torch.cuda.synchronize()
        judge(results, inputs, 7)
    judge(step(inputs, plan), inputs, 7)  # nothing of the graph was kept for others


def test_threads_share_a_stream(numbers, device):
    """Two threads that forget one another's tables, which are large."""

    def work(shift: int) -> None:
        for i in range(6):
            plan = make_plan(40_000 + i, shift)
            inputs = make_inputs(plan, device, numbers)
            for _ in range(2):
                judge(step(inputs, plan), inputs, shift)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work, shift) for shift in (1, 2)]:
            done.result()


def test_explain_tells_who_serves_a_plan_of_many_groups(numbers, device):
    """What the plan itself rules out is told as well, not only what its shapes do."""
    few, many = (make_plan(n).explain(device=device, dtype=torch.bfloat16, head_dim=64) for n in (10, 1000))
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    assert ("hopper kernel" in few) == is_hopper
    for passes in many.split("backward: "):
        assert ("hopper kernel" in passes) == is_hopper
    for passes in make_plan(1000).explain(device=device, dtype=torch.bfloat16, head_dim=96).split("backward: "):
        assert "portable kernel" in passes
        assert ("for the plan has more segments and ranges than fit the parameters of a kernel" in passes) == is_hopper
