"""Derivatives beyond the first on a GPU, whose operators of tangents are composed of framework operators."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, EDGE_CASES, Case
from compositions import EVERY, attend, dense, inputs_on
from tangents import check, make_moving
from torch.utils._pytree import tree_leaves

import mixed_attention as ma

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

CASES = {
    "joint": Case((40, 61, 20, 33), "abcd>ac", batch_size=2, num_heads=2, head_dim=16),
    "masked": Case((133, 240, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, head_dim=64, mask="random"),
    "dropout": Case((140, 261), "a>ab b>bb", batch_size=2, num_heads=2, head_dim=64, dropout_p=0.3),
    "a sequence without keys": EDGE_CASES["a sequence fully masked"],
    "k and v of batch 1": EDGE_CASES["k and v of batch 1"],
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("moves", "count"), [("q", 3), ("qkv", 1), ("v", 2)])
@pytest.mark.parametrize("name", CASES)
def test_operators(name, moves, count, dtype, device):
    check(make_moving(CASES[name].with_(dtype=DTYPES[dtype]), moves, count, device))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", EVERY)
def test_every_composition_is_right(name, dtype, device):
    """On fp64 the reference runs alone. Sums of a dozen fp32 products of three parts, over at most three orders."""
    make, _ = EVERY[name]
    expected = tree_leaves(make(dense))
    with inputs_on(device, dtype):
        got = tree_leaves(make(attend))
    assert len(got) == len(expected)
    tolerance = 1e-11 if dtype == torch.float64 else 100 * 3 * 2**-22
    for a, b in zip(got, expected):
        assert a.device == device
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=tolerance * (1 + float(b.abs().max())))


def test_a_first_backward_that_may_be_differentiated_is_the_kernel(device):
    """Its gradients have the bits of a plain backward."""
    plan = ma.AttentionPlan.from_segments([(0, 200, [(0, 300)])], 300)
    x = [torch.randn(1, n, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (200, 300, 300)]
    torch.use_deterministic_algorithms(True)
    try:
        plain, kept = (
            torch.autograd.grad(ma.attention(*x, plan).float().square().sum(), x, create_graph=create_graph)
            for create_graph in (False, True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(plain, kept):
        assert torch.equal(a, b)
        assert b.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_compiled(dtype, device):
    make, _ = EVERY["jvp of queries"]
    expected = tree_leaves(make(dense))
    torch._dynamo.reset()
    with inputs_on(device, dtype):
        got = tree_leaves(torch.compile(lambda: make(attend), fullgraph=True, backend="aot_eager")())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=1e-4 * (1 + float(b.abs().max())))
