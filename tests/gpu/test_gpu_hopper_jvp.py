"""The forward and its tangent by Hopper's kernels: what moves, tiles, layouts, infinities, which calls they take."""

from __future__ import annotations

from collections import Counter

import pytest
import tangents
import torch
from cases import DTYPES, Case
from tangents import TANGENT_CASES, Moving, check, make_moving
from torch import Tensor

import mixed_attention as ma

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

operators = torch.ops.mixed_attention
KERNEL, OF_THREE = "hopper_attention_jvp_kernel", "hopper_attention_jvp_directions_kernel"

CASES = {
    **TANGENT_CASES,
    "joint": Case((40, 61, 20, 33), "abcd>ac", batch_size=2, num_heads=2, head_dim=64),
    "ragged unions": Case((133, 240, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, head_dim=64),
    "spread": Case((300, 430), "a>b b>ab", num_heads=3, head_dim=64, spread=0.7),
    "one token": Case((1,), "a>a"),
    "one key": Case((200, 1), "ab>b", head_dim=64),
    "80 keys": Case((129, 80), "ab>b", head_dim=64),
    "81 keys": Case((129, 81), "ab>b", head_dim=56),
}


def kernels_of(call, device: torch.device) -> Counter:
    """How often each kernel of tangents runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    names = (KERNEL, OF_THREE, "portable_jvp_kernel")
    return Counter(name for event in profile.events() for name in names if name in event.name)


def needs_hopper(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernels are those of compute capability 9.0")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("name", CASES)
def test_what_moves(name, moves, dtype, device):
    check(make_moving(CASES[name].with_(dtype=DTYPES[dtype]), moves, 1, device))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("moves", ["q", "kv", "qkv"])
@pytest.mark.parametrize("name", ["ragged unions", "packed", "k and v of batch 1"])
def test_directions(name, moves, count, device):
    check(make_moving(CASES[name].with_(dtype=torch.bfloat16), moves, count, device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("head_dim", range(8, 65, 8))
def test_widths(head_dim, moves, dtype, device):
    case = Case((77, 130, 165), "a>b bc>ac", 2, num_heads=3, head_dim=head_dim, dtype=DTYPES[dtype])
    check(make_moving(case, moves, 1, device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_sizes_around_every_tile(moves, dtype, device):
    """Groups of all these sizes, each attending to another one and to the first."""
    sizes = (1, 7, 63, 64, 65, 79, 80, 81, 127, 128, 129, 159, 160, 161, 240, 257)
    names = "abcdefghijklmnop"
    attends = " ".join(f"{name}>a{names[(i + 3) % len(names)]}" for i, name in enumerate(names) if (i + 3) % 16)
    case = Case(sizes, f"{attends} n>bc", num_heads=2, head_dim=64, dtype=DTYPES[dtype])
    check(make_moving(case, moves, 1, device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_weights_that_grow_along_the_keys(moves, dtype, device):
    """Each tile outweighs all before it: references rise and means move again and again."""
    moving = make_moving(Case((150, 900), "ab>b", num_heads=2, head_dim=64, dtype=DTYPES[dtype]), moves, 1, device)
    with torch.no_grad():
        moving.inputs.q[..., 0] = 8.0
        moving.inputs.k[..., 0] = torch.linspace(0, 40, moving.inputs.k.shape[1], device=device)[None, :, None]
    check(moving)


@pytest.mark.parametrize("moves", ["q", "k", "qkv"])
def test_a_part_that_all_tangents_share_is_not_rounded(moves, device):
    case = Case((64, 700), "ab>b", num_heads=2, head_dim=32, dtype=torch.bfloat16)
    moving = make_moving(case, moves, 1, device)
    moving.inputs.k.add_(20.0)
    moving.inputs.q.mul_(0.05)
    check(moving)


@pytest.mark.parametrize("base", [1e4, 1e7, 1e9], ids="{:.0e}".format)
def test_logits_beyond_what_an_offset_holds(base, device):
    """Shared logits of any size leave the tangents alone, where these are exact: powers of two times signs."""
    shape = 1, 300, 2, 64
    generator = torch.Generator(device).manual_seed(3)
    q, k, v, q_dot = (torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) for _ in range(4))
    q[..., 0], k[..., 0], q_dot[..., 0] = 1.0, 0.0, 0.0
    plan = ma.AttentionPlan.from_segments([(0, 300, [(0, 300)])], 300)
    lifted = k.clone()
    lifted[..., 0] = base * 8
    small, large = (
        operators.forward_jvp(q, keys, v, q_dot.unsqueeze(0), None, None, plan.flat(), 0.125, None, 0.0, None)
        for keys in (k, lifted)
    )
    # A score is rounded to fp32 of its size, and weights by as much.
    lost = base * 2.0**-23
    for name, a, b in zip(("out", "", "out_dot", "lse_dot"), small, large):
        if name and lost < 0.1:
            allowed = (4 * lost + 2**-7) * float(a.float().abs().max())
            assert float((a.float() - b.float()).abs().max()) <= allowed, name
        assert b.isfinite().all(), name


def results_of(moving: Moving, known: bool) -> dict[str, Tensor]:
    i = moving.inputs
    out, lse = operators.forward(i.q, i.k, i.v, *moving.call)
    if known:
        return dict(zip(("out_dot", "lse_dot"), operators.jvp(i.q, i.k, i.v, out, lse, *moving.tangents, *moving.call)))
    names = "out", "lse", "out_dot", "lse_dot"
    return dict(zip(names, operators.forward_jvp(i.q, i.k, i.v, *moving.tangents, *moving.call)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("moves", "count"), [("q", 1), ("q", 3), ("qkv", 2), ("v", 1)])
def test_every_number_is_written_and_bits_are_equal(moves, count, dtype, device):
    moving = make_moving(CASES["ragged unions"].with_(dtype=DTYPES[dtype]), moves, count, device)
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True  # new memory is NaN
    try:
        for known in (False, True):
            first = results_of(moving, known)
            for _ in range(3):
                for name, got in results_of(moving, known).items():
                    assert got.isfinite().all(), name
                    assert torch.equal(got, first[name]), name
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_do_not_depend_on_their_neighbours(dtype, device):
    """A row with infinities, or a segment full of NaN, leaves all others as they are."""
    moving = make_moving(CASES["ragged unions"].with_(dtype=DTYPES[dtype]), "qkv", 1, device)
    before = results_of(moving, True)
    moving.inputs.q[:, 7] = torch.inf
    moving.tangents[0][:, :, 20] = torch.nan
    after = results_of(moving, True)
    others = torch.ones(moving.inputs.q.shape[1], dtype=torch.bool, device=device)
    others[7] = others[20] = False
    assert torch.equal(before["out_dot"][:, :, others], after["out_dot"][:, :, others])
    assert torch.equal(before["lse_dot"][..., others], after["lse_dot"][..., others])
    assert not after["out_dot"][:, :, [7, 20]].isfinite().any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "k", "v", "kv", "qkv"])
def test_keys_of_minus_infinity_weigh_nothing(moves, dtype, device):
    """Their scores are -inf; where queries stay, their tangents are finite, and what else moves goes on moving."""
    moving = make_moving(Case((200,), "a>a", num_heads=2, head_dim=64, dtype=DTYPES[dtype]), moves, 1, device)
    i = moving.inputs
    blocked = torch.arange(200, device=device) % 7 == 3
    with torch.no_grad():
        i.q[..., 0] = i.q[..., 0].abs() + 0.5
        i.k[:, blocked, :, 0] = -torch.inf
        i.v[:, blocked] = 0
    got = results_of(moving, True)
    if "q" in moves:  # q' times an infinite number: not a number anywhere
        assert got["lse_dot"].isnan().any()
        return
    kept = ~blocked
    plan = ma.AttentionPlan.from_segments([(0, i.q.shape[1], [(0, int(kept.sum()))])], int(kept.sum()))
    k, v, k_dot, v_dot = (
        None if x is None else x[..., kept, :, :].contiguous()
        for x in (i.k, i.v, moving.tangents[1], moving.tangents[2])
    )
    out, lse = operators.forward(i.q, k, v, plan.flat(), i.case.scale)
    expected = operators.jvp(i.q, k, v, out, lse, None, k_dot, v_dot, plan.flat(), i.case.scale)
    for a, b in zip(got.values(), expected):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=2**-6 * float(b.abs().max()))


BEYOND = float(torch.finfo(torch.float32).max)


def make_overflowing(case: Case, moves: str, count: int, where: str, device: torch.device) -> Moving:
    """Values, or their tangents, whose means fit into bf16 while their sums leave fp32. Scores are of ordinary size."""
    moving = make_moving(case.with_(dtype=torch.bfloat16), moves, count, device)
    huge = moving.inputs.v if where == "values" else moving.tangents[2]
    with torch.no_grad():
        moving.inputs.q.mul_(0.1)
        huge.copy_(torch.where(huge.isfinite(), (1 + huge.abs().clamp(max=1)) * 2.0**124, huge))
        if moving.tangents[0] is not None:
            moving.tangents[0].mul_(0.1)
    return moving


def sums_on_the_way(moving: Moving, where: str) -> Tensor:
    """What a walk adds up at least, ``(T or 1, B, H, Nq, D)``, with weights of 1 at the largest score of a row.

    Its own weights are relative to a score that is no larger, and all numbers that it adds are positive: a walk comes
    by these sums, whatever its tiles are.
    """
    i = moving.inputs
    q, k = (x.double().transpose(-2, -3) for x in (i.q, i.k.nan_to_num(0, 0, 0)))
    weights = i.weights[:, None]
    s = torch.where(weights > 0, i.case.scale * q @ k.mT, -torch.inf)
    p = weights * (s - s.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    values = i.v[None] if where == "values" else moving.tangents[2]
    return p @ values.double().nan_to_num(0, 0, 0).transpose(-2, -3)


@pytest.mark.parametrize(
    ("where", "moves", "count"),
    [("values", moves, count) for moves, count in (("q", 1), ("q", 3), ("q", 4), ("k", 1), ("qkv", 2), ("v", 1))]
    + [("tangents of values", "v", 1), ("tangents of values", "qkv", 2)],
)
@pytest.mark.parametrize("name", ["one tile", "many tiles", "ragged unions", "rounds", "packed"])
def test_sums_that_leave_fp32_are_made_again(name, where, moves, count, device):
    """Every row of these overflows in the first walk, as its sums do; what is right comes from the second alone."""
    needs_hopper(device)
    case = Case((80, 60), "ab>b", num_heads=2, head_dim=64) if name == "one tile" else CASES[name]
    moving = make_overflowing(case, moves, count, where, device)
    assert moving.inputs.weights.sum(-1).amin() > 1
    lost = sums_on_the_way(moving, where) > BEYOND
    assert lost.double().mean() > (0.5 if name == "ragged unions" else 0.99)
    exact, yardstick = tangents.exact_and_yardstick(moving)
    for known in (False, True):
        for result, got in results_of(moving, known).items():
            expected = getattr(exact, result)
            assert got.isfinite().all(), result
            error = float((got.double() - expected).abs().max())
            assert error <= 2 * yardstick[result], f"{result}: off by {error:.3g}, allowed {2 * yardstick[result]:.3g}"


@pytest.mark.parametrize(("moves", "count"), [("q", 1), ("q", 3), ("qkv", 1)])
def test_a_second_walk_leaves_what_was_right(moves, count, device):
    """Rows of another segment keep their bits, though their block walks again; an infinite value stays infinite."""
    needs_hopper(device)
    case = Case((700, 900), "a>a b>b", num_heads=2, head_dim=64, dtype=torch.bfloat16)
    moving = make_moving(case, moves, count, device)
    before = results_of(moving, False)
    with torch.no_grad():
        moving.inputs.q[:, 700:] *= 0.1
        moving.inputs.v[:, 700:] = (1 + moving.inputs.v[:, 700:].abs().clamp(max=1)) * 2.0**124
        moving.inputs.v[:, 800, :, 5] = torch.inf
    after = results_of(moving, False)
    for name in ("out", "out_dot"):
        assert torch.equal(before[name][..., :700, :, :], after[name][..., :700, :, :]), name
    out = after["out"][:, 700:]
    assert (out[..., 5] == torch.inf).all()
    others = [column for column in range(64) if column != 5]
    assert out[..., others].isfinite().all()
    assert after["out_dot"][..., 700:, :, others].isfinite().all()


@pytest.mark.parametrize(
    ("case", "moves", "count", "expected"),
    [
        (CASES["joint"], "q", 1, {KERNEL: 1}),
        (CASES["joint"], "q", 2, {KERNEL: 2}),
        (CASES["joint"], "q", 3, {OF_THREE: 1}),
        (CASES["joint"], "q", 4, {OF_THREE: 1, KERNEL: 1}),
        (CASES["joint"], "qkv", 2, {KERNEL: 2}),
        (CASES["packed"], "kv", 1, {KERNEL: 1}),
        (CASES["many tiles"], "v", 1, {KERNEL: 1}),
        (CASES["joint"].with_(mask="random"), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(dropout_p=0.2), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(head_dim_v=32), "q", 1, {KERNEL: 1}),
        (CASES["joint"].with_(head_dim_v=20), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(head_dim_v=72), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(head_dim=72), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(head_dim=20), "q", 1, {"portable_jvp_kernel": 1}),
        (CASES["joint"].with_(layout="strided"), "q", 1, {"portable_jvp_kernel": 1}),
        (Case((5, 9000), "ab>ab", num_heads=2, head_dim=64, cached="b"), "qkv", 1, {"portable_jvp_kernel": 1}),
    ],
)
def test_which_kernels_run(case, moves, count, expected, device):
    needs_hopper(device)
    moving = make_moving(case.with_(dtype=torch.bfloat16), moves, count, device)
    results_of(moving, True)
    assert kernels_of(lambda: results_of(moving, True), device) == expected


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moves", ["q", "v", "qkv"])
def test_small(moves, dtype, device):
    tangents.run(make_moving(CASES["ragged unions"].with_(dtype=DTYPES[dtype]), moves, 1, device), known=True)
