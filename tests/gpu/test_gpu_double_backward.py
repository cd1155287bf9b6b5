"""Gradients of tangents by Hopper's kernels, in the forms in which they come: with gradients of out, of tangents alone,
and as in double backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tangents
import torch
from cases import DTYPES, Case
from tangents import TANGENT_CASES, Moving, check, make_moving

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

FORMS = "all", "tangents", "double"
CASES = {
    **TANGENT_CASES,
    "partial tiles of unions": Case((133, 240, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, head_dim=64),
    "empty groups": Case((0, 200, 70, 0), "a>b b>abcd c>d d>b", batch_size=2, num_heads=2, head_dim=64),
    "nobody reads some": Case((150, 90, 200), "abc>b", num_heads=2, head_dim=64),
    "narrow values": Case((77, 130, 165), "a>b bc>ac", 2, num_heads=3, head_dim=64, head_dim_v=40),
    "wide values": Case((77, 130, 165), "a>b bc>ac", 2, num_heads=3, head_dim=40, head_dim_v=64),
    "one token": Case((1,), "a>a", head_dim=64),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves", ["q", "k", "v", "qk", "kv", "qkv"])
@pytest.mark.parametrize("name", CASES)
def test_forms(name, moves, form, dtype, device):
    check(make_moving(CASES[name].with_(dtype=DTYPES[dtype]), moves, 1, device, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_sizes_around_every_tile(moves, form, device):
    """Groups of all these sizes, each attending to another one and to the first."""
    sizes = (1, 7, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193, 240, 255, 256, 257)
    names = "abcdefghijklmnop"
    attends = " ".join(f"{name}>a{names[(i + 3) % len(names)]}" for i, name in enumerate(names) if (i + 3) % 16)
    case = Case(sizes, f"{attends} n>bc", num_heads=2, head_dim=64, dtype=torch.bfloat16)
    check(make_moving(case, moves, 1, device, form))


def grads_of(moving: Moving) -> dict[str, torch.Tensor]:
    results = tangents.run(moving, known=True)
    return {name: getattr(results, name) for name in ("dq", "dk", "dv", "dq_dot")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("name", ["partial tiles of unions", "rounds", "listed twice", "large logits"])
def test_equal_bits_in_deterministic_mode(name, moves, form, device):
    moving = make_moving(CASES[name].with_(dtype=torch.bfloat16), moves, 1, device, form)
    torch.use_deterministic_algorithms(True)
    try:
        first = grads_of(moving)
        for _ in range(3):
            for what, got in grads_of(moving).items():
                assert got.isfinite().all(), what
                assert torch.equal(got, first[what]), what
        check(moving)
    finally:
        torch.use_deterministic_algorithms(False)


def kernels_of(moving: Moving, device: torch.device) -> Counter:
    """How often each kernel of gradients of tangents runs."""
    grads_of(moving)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        grads_of(moving)
        torch.cuda.synchronize(device)
    names = "hopper_attention_bwd_jvp_kernel", "hopper_dq_accum_kernel", "portable_dq_jvp_kernel"
    return Counter(name for event in profile.events() for name in names if name in event.name)


@pytest.mark.parametrize(
    ("form", "deterministic", "expected"),
    [("double", False, (1, 1)), ("double", True, (2, 0)), ("tangents", False, (2, 0)), ("all", False, (2, 0))],
)
@pytest.mark.parametrize("moves", ["q", "v", "qkv"])
def test_which_kernels_run(moves, form, deterministic, expected, device):
    """Double backward is one kernel, which adds to dq as its blocks come, but for deterministic mode."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernels are those of compute capability 9.0")
    moving = make_moving(CASES["packed"].with_(dtype=torch.bfloat16), moves, 1, device, form)
    torch.use_deterministic_algorithms(deterministic)
    try:
        got = kernels_of(moving, device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (got["hopper_attention_bwd_jvp_kernel"], got["hopper_dq_accum_kernel"]) == expected
    assert got["portable_dq_jvp_kernel"] == 0


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("name", ["partial tiles of unions", "rounds", "listed twice"])
def test_what_blocks_own_has_equal_bits_by_default(name, moves, device):
    moving = make_moving(CASES[name].with_(dtype=torch.bfloat16), moves, 1, device, "double")
    first = grads_of(moving)
    for _ in range(5):
        got = grads_of(moving)
        assert torch.equal(got["dk"], first["dk"])
        assert torch.equal(got["dv"], first["dv"])


@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_what_is_not_there_counts_as_zeros(moves, device):
    """A form without gradients of the output gives what zeros in their place do, but for the order of sums."""
    moving = make_moving(CASES["partial tiles of unions"].with_(dtype=torch.bfloat16), moves, 1, device, "double")
    i = moving.inputs
    dlse = None if i.dlse is None else torch.zeros_like(i.dlse)
    zeros = replace(moving, inputs=replace(i, dout=torch.zeros_like(i.dout), dlse=dlse), form="all")
    expected, got = grads_of(zeros), grads_of(moving)
    assert got["dq_dot"].shape[0] == 0
    for name in ("dq", "dk", "dv"):
        a, b = got[name].float(), expected[name].float()
        assert float((a - b).abs().max()) <= 2**-7 * float(b.abs().max()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_rows_do_not_depend_on_what_they_cannot_see(moves, form, device):
    """Queries that are not numbers spoil gradients of their own and of keys that they read, and no others."""
    case = Case((150, 90, 200, 70), "ab>b cd>d", num_heads=2, head_dim=64, dtype=torch.bfloat16)
    moving = make_moving(case, moves, 1, device, form)
    before = grads_of(moving)  # no query reads two tiles of keys, so that dq has equal bits, too
    rows = slice(0, 150)
    moving.inputs.q[:, rows] = torch.nan
    if moving.tangents[0] is not None:
        moving.tangents[0][:, :, rows] = torch.inf
    moving.dout_dot[:, :, rows] = torch.nan
    after = grads_of(moving)
    assert not after["dq"][:, rows].isfinite().any()
    assert torch.equal(before["dq"][:, 150:], after["dq"][:, 150:])
    for name in ("dk", "dv"):
        others = torch.ones(before[name].shape[1], dtype=torch.bool, device=device)
        others[150:240] = False
        assert torch.equal(before[name][:, others], after[name][:, others]), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moves", ["q", "qkv"])
def test_small(moves, form, device):
    tangents.run(
        make_moving(CASES["partial tiles of unions"].with_(dtype=torch.bfloat16), moves, 1, device, form), known=True
    )
