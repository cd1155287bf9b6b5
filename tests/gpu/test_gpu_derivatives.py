"""Derivatives beyond the first on a GPU: the kernels of tangents, and what is composed where there are none."""

from __future__ import annotations

import pytest
import tangents
import torch
from cases import DTYPES, EDGE_CASES, Case
from compositions import EVERY, attend, dense, inputs_on
from tangents import check, make_moving
from torch.utils._pytree import tree_leaves

import mixed_attention as ma
from mixed_attention import derivatives, ops

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

CASES = {
    "joint": Case((40, 61, 20, 33), "abcd>ac", batch_size=2, num_heads=2, head_dim=16),
    "masked": Case((133, 240, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, head_dim=64, mask="random"),
    "dropout": Case((140, 261), "a>ab b>bb", batch_size=2, num_heads=2, head_dim=64, dropout_p=0.3),
    "a sequence without keys": EDGE_CASES["a sequence fully masked"],
    "k and v of batch 1": EDGE_CASES["k and v of batch 1"],
    "many tiles": Case((100, 730), "a>ba b>b", num_heads=2, head_dim=24, head_dim_v=20),
    "listed twice": Case((219, 143), "a>abb b>aab", num_heads=2, head_dim=32),
    "heads of 128": Case((150, 75), "a>ab b>a", num_heads=2, head_dim=128),
    "heads of 100, values of 40": Case((150, 75), "a>ab b>a", num_heads=2, head_dim=100, head_dim_v=40),
    "many keys, few queries": Case((5, 9000), "ab>ab", num_heads=2, head_dim=64, cached="b"),
    "many queries, few keys": Case((3000, 9), "a>b b>b", num_heads=1, head_dim=64),
    "only empty keys": EDGE_CASES["only empty keys"],
    "packed": Case((133, 240), "a>ab b>a", batch_size=2, num_heads=3, head_dim=64, layout="packed"),
    "strided": Case((133, 240), "a>ab b>a", batch_size=2, num_heads=3, head_dim=33, layout="strided"),
    "negative scale": EDGE_CASES["negative scale"],
    "scale zero": EDGE_CASES["scale zero"],
    "large logits": Case((133, 140), "a>b b>ab", head_dim=32, magnitude=60.0),
    "one token": EDGE_CASES["one token"],
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("moves", "count"), [("q", 1), ("q", 3), ("qkv", 1), ("v", 2), ("q", 5), ("k", 1)])
@pytest.mark.parametrize("name", CASES)
def test_operators(name, moves, count, dtype, device):
    check(make_moving(CASES[name].with_(dtype=DTYPES[dtype]), moves, count, device))


def test_a_part_that_all_tangents_share_is_not_rounded(device):
    """Where keys have a large common part, so have tangents of scores: it moves no weight and drowns what does."""
    case = Case((64, 300), "ab>b", num_heads=2, head_dim=32, dtype=torch.bfloat16)
    moving = make_moving(case, "q", 1, device)
    moving.inputs.k.add_(20.0)
    moving.inputs.q.mul_(0.05)
    check(moving)


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_output_beside_tangents_has_what_sums_do_not_hold(dtype, moves, device, monkeypatch):
    """Sums of the largest values overflow on their way to a mean that does not; an infinite key may weigh nothing."""
    monkeypatch.setenv("MIXED_ATTENTION_GPU", "portable")
    case = Case((70, 150), "a>ab b>a", batch_size=2, num_heads=2, head_dim=32, dtype=dtype)
    moving = make_moving(case, moves, 1, device)
    i = moving.inputs
    i.v.fill_(torch.finfo(dtype).max)
    i.q[..., 0] = i.q[..., 0].abs() + 1
    i.k[:, 3, :, 0] = -torch.inf
    expected = torch.ops.mixed_attention.forward(i.q, i.k, i.v, *moving.call)
    got = torch.ops.mixed_attention.forward_jvp(i.q, i.k, i.v, *moving.tangents, *moving.call)[:2]
    assert expected[0].isfinite().all()
    assert expected[1].isfinite().all()
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.sanitizer
@pytest.mark.every_kind
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["many keys, few queries", "listed twice", "dropout"])
def test_equal_bits(name, dtype, device):
    moving = make_moving(CASES[name].with_(dtype=DTYPES[dtype]), "qkv", 2, device)
    first = tangents.run(moving, known=False)
    for _ in range(3):
        for what, got in vars(tangents.run(moving, known=False)).items():
            assert torch.equal(got, getattr(first, what)), what


@pytest.mark.parametrize(
    ("moves", "count", "expected"),
    [
        ("q", 1, {"portable_jvp_kernel": 1, "portable_dq_jvp_kernel": 1, "portable_dk_dv_jvp_kernel": 1}),
        ("q", 3, {"portable_jvp_kernel": 1, "portable_dq_jvp_kernel": 3, "portable_dk_dv_jvp_kernel": 3}),
        ("qkv", 1, {"portable_jvp_kernel": 1, "portable_dq_jvp_kernel": 1, "portable_dk_dv_jvp_kernel": 1}),
        ("qkv", 2, {"portable_jvp_kernel": 2, "portable_dq_jvp_kernel": 2, "portable_dk_dv_jvp_kernel": 2}),
    ],
)
def test_kernels_run_and_no_reference(moves, count, expected, device, monkeypatch):
    """Three directions of queries share the scores of one pass; nothing is composed."""
    for name in ("jvp_composed", "backward_jvp_composed", "_jvp_reference", "_backward_jvp_reference"):
        monkeypatch.setattr(derivatives, name, None)
    if torch.cuda.get_device_capability(device) == (9, 0):
        kernel = (
            "hopper_attention_jvp_directions_kernel" if (moves, count) == ("q", 3) else "hopper_attention_jvp_kernel"
        )
        expected = {**dict.fromkeys(expected, 0), kernel: 1 if (moves, count) == ("q", 3) else count}
        expected["hopper_attention_bwd_jvp_kernel"] = 2 * count
    case = Case((140, 261), "a>ab b>a", batch_size=2, num_heads=2, head_dim=64, dtype=torch.bfloat16)
    moving = make_moving(case, moves, count, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tangents.run(moving, known=True)
        torch.cuda.synchronize(device)
    names = [event.name for event in profile.events()]
    assert {kernel: sum(kernel in name for name in names) for kernel in expected} == expected


@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 64), ("fp32", 64), ("fp16", 128)])
def test_memory_grows_with_rows_alone(dtype, head_dim, device):
    """Beside the results: some numbers a row and head, parts of split walks, and what the first order takes."""
    num_rows, num_heads = 16384, 3
    plan = ma.AttentionPlan.from_segments([(0, num_rows, [(0, num_rows)])], num_rows)
    q, k, v, *moved = torch.randn(6, 1, num_rows, num_heads, head_dim, device=device, dtype=DTYPES[dtype]).unbind(0)
    tensors = [x.unsqueeze(0) for x in moved]
    call = plan.flat(), head_dim**-0.5
    out, lse = torch.ops.mixed_attention.forward(q, k, v, *call, None, 0.0, None)

    def peak(function) -> tuple[int, tuple[torch.Tensor, ...]]:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = function()
        return torch.cuda.max_memory_allocated(device) - before, results

    size_of = lambda results: sum(x.nbytes for x in results)  # noqa: E731
    slack = 40 * num_rows * num_heads + 2**21  # bytes a row and head; and the allocator rounds
    taken, (out_dot, lse_dot) = peak(lambda: torch.ops.mixed_attention.jvp(q, k, v, out, lse, *tensors, *call))
    assert taken <= size_of((out_dot, lse_dot)) + slack
    arguments = out_dot, None, None, None, q, k, v, out, lse, *tensors, out_dot, lse_dot, *call
    torch.use_deterministic_algorithms(True)
    try:
        taken, grads = peak(lambda: torch.ops.mixed_attention.backward_jvp(*arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken <= size_of(grads) + slack
    # By default one kernel may add up dq in fp32, as that of the first order does.
    sums = q.numel() * 4
    taken, grads = peak(lambda: torch.ops.mixed_attention.backward_jvp(*arguments))
    assert taken <= size_of(grads) + sums + slack


def test_what_no_kernel_serves_is_composed(device):
    for dtype, head_dim, serves in [("bf16", 128, True), ("fp32", 64, True), ("fp32", 65, False), ("fp16", 129, False)]:
        assert ops.has_tangent_kernels(DTYPES[dtype], head_dim, head_dim, device) == serves
    assert not ops.has_tangent_kernels(torch.float64, 64, 64, device)
    check(make_moving(Case((40, 61), "a>ab b>b", num_heads=2, head_dim=136, dtype=torch.bfloat16), "qkv", 2, device))


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
