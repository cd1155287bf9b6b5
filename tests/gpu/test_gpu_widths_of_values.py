"""Values narrower, or wider, than queries and keys, on the kernels of Hopper; nothing beside them is touched."""

from __future__ import annotations

import random

import pytest
import torch
from cases import NAMES, Case, make_inputs
from compare import Results, check, deterministic, judge, run
from tangents import check as check_tangents
from tangents import make_moving
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
MODES = {"fp16": (FP16, "highest"), "bf16": (BF16, "highest"), "fp32": (FP32, "highest"), "tf32": (FP32, "high")}

# Widths of queries and keys, and of values: for every width of a kernel a pair whose tiles have equally many slabs of
# columns, and pairs of which one lacks slabs that the other has.
OF_EQUAL_SLABS = [(32, 8), (64, 16), (96, 72), (128, 72), (192, 136), (256, 200), (40, 64), (72, 88)]
OF_OTHER_SLABS = [(80, 64), (24, 96), (128, 64), (8, 128), (192, 64), (104, 192), (256, 56), (136, 256)]
WIDTHS = OF_EQUAL_SLABS + OF_OTHER_SLABS


@pytest.fixture(params=MODES.values(), ids=MODES)
def dtype(request):
    """A dtype of which products are as exact as they can be, and fp32 once more with products of TF32."""
    dtype, precision = request.param
    torch.set_float32_matmul_precision(precision)
    yield dtype
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def order(request):
    """Gradients that blocks add up as they come, or in a fixed order."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


def kernel_width(head_dim: int, head_dim_v: int, dtype: torch.dtype, *, backward: bool) -> int | None:
    """The columns of the Hopper kernel that serves such widths, if one does."""
    kernels = (32, 64, 96, 128, 192, 256) if dtype != FP32 else (64,) if backward else (64, 128)
    least = 8 if dtype != FP32 else 40
    widest = max(head_dim, head_dim_v)
    if head_dim % 8 or head_dim_v % 8 or widest < least:
        return None
    return min((kernel for kernel in kernels if kernel >= widest), default=None)


def is_served(case: Case, *, backward: bool) -> bool:
    """Whether Hopper's kernels say that they serve such a call."""
    return kernel_width(case.head_dim, case.head_dim_v or case.head_dim, case.dtype, backward=backward) is not None


def slabs(kernel: int, width: int) -> int:
    """How many of the slabs of a kernel's tile hold columns of a tensor."""
    return -(-width // (64 if kernel % 64 == 0 else 32))


def leave_nan(dtype: torch.dtype, device: torch.device) -> None:
    """Lets kernels of every width fill shared memory with NaN, which stays there for the next ones."""
    for width in (256, 128, 96) if dtype != FP32 else (128, 64):
        case = Case((4096,), "a>a", num_heads=8, head_dim=width, dtype=dtype)
        poison = torch.full((1, 4096, 8, width), torch.nan, dtype=dtype, device=device)
        torch.ops.mixed_attention.forward(poison, poison, poison, case.plan.flat(), case.scale, None)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_width(head_dim, dtype, order, device):
    """Each with the narrowest values, the next narrower ones, and others; tensors also between columns of NaN."""
    rng = random.Random(head_dim)
    for head_dim_v in sorted({8, max(8, head_dim - 8), rng.randrange(8, head_dim + 8, 8), rng.randrange(8, 257, 8)}):
        case = Case((77, 130, 65), "a>b bc>ac", num_heads=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
        check(case, device)
        check(case.with_(layout="spaced", batch_size=2, shared=rng.choice(["", "k", "v", "kv"])), device)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_pair_of_other_slabs(head_dim, dtype, device):
    """NaN lies behind the columns of every row, and in shared memory wherever no copy brings anything."""
    for head_dim_v in range(8, 257, 8):
        kernel = kernel_width(head_dim, head_dim_v, dtype, backward=False)
        if kernel is None or slabs(kernel, head_dim) == slabs(kernel, head_dim_v):
            continue
        widths = {"head_dim": head_dim, "head_dim_v": head_dim_v}
        case = Case((77, 130, 65), "a>b bc>ac", 2, num_heads=2, layout="spaced", dtype=dtype, **widths)
        inputs = make_inputs(case, device)
        leave_nan(dtype, device)
        judge(run(inputs), inputs)


def many_groups(count: int) -> Case:
    """More ranges than fit a kernel's parameters: a group attends to itself, to the next one and to a common one."""
    names = NAMES[:count]
    attends = " ".join(f"{name}>{name}{names[(i + 1) % count]}{names[7]}" for i, name in enumerate(names))
    return Case(tuple(37 * i % 130 for i in range(count)), attends, num_heads=2)


# Keys that are cut into parts, many key tiles, queries that read several segments of keys, lists, padding masks.
SCENES = {
    "parts": Case((40, 9000), "ab>ab", cached="b"),
    "parts of the longest": Case((40, 9000, 500), "ab>ab c>c", num_heads=3, cached="b"),
    "rounds": Case((150, 130), "a>a b>b", 12, num_heads=8),
    "unions": Case((300, 700, 900, 500), "a>bcd b>acd c>abd d>abc", num_heads=3),
    "many groups": many_groups(50),
    "heavy tails": Case((200, 330), "a>ab b>b", 2, num_heads=2, heavy_tails=True),
    "large logits": Case((200, 130), "a>b b>a", num_heads=2, magnitude=300.0),
    "random mask": Case((77, 730), "a>b b>ab", 2, num_heads=2, mask="random"),
    "blocked mask": Case((77, 730), "a>b b>ab", 2, num_heads=2, mask="blocked", shared="kv"),
    "shared mask": Case((77, 730), "a>b b>ab", 3, num_heads=2, mask="shared", layout="packed"),
    "one sequence of keys": Case((77, 130), "a>b b>ab", 3, num_heads=2, shared="kv", layout="spaced"),
    "heads before rows": Case((77, 130), "a>b b>ab", 3, num_heads=2, layout="transposed"),
}


@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
@pytest.mark.parametrize("case", SCENES.values(), ids=SCENES)
def test_every_way_through_the_kernels(case, head_dim, head_dim_v, dtype, order, device):
    if (case.magnitude > 100 or case.heavy_tails) and dtype == FP32:
        pytest.skip("scores of TF32 may be off by more than a little, which is more than the judge's first order knows")
    check(case.with_(head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype), device)


def beside_poison(like: Tensor, poison: float) -> tuple[Tensor, Tensor]:
    """Room for a result between rows, heads and columns that must keep what they hold; and all of that memory."""
    batch, rows, heads, width = like.shape
    memory = torch.full((batch, rows + 2, heads + 1, width + 16), poison, dtype=like.dtype, device=like.device)
    return memory[:, 1:-1, :-1, 8:-8], memory


@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
@pytest.mark.parametrize("mask", [None, "random"])
def test_nothing_is_written_beside_gradients(mask, head_dim, head_dim_v, dtype, order, device):
    widths = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    case = Case((77, 130, 165), "a>b bc>ac", 2, num_heads=2, mask=mask, layout="spaced", dtype=dtype, **widths)
    inputs = make_inputs(case, device)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    rest = case.plan.flat(), case.scale, inputs.key_padding_mask
    out, lse = torch.ops.mixed_attention.forward(q, k, v, *rest)
    out_room, out_memory = beside_poison(out, torch.nan)
    out_room.copy_(out)
    found = {}
    for poison in (torch.nan, -3.0):  # NaN would not show where NaN is written beside
        rooms = [beside_poison(t, poison) for t in (q, k, v)]
        grads = [room for room, _ in rooms]
        torch.ops.mixed_attention.backward_out(
            inputs.dout, inputs.dlse, q, k, v, out_room, lse, *rest, 0.0, None, *grads
        )
        judge(Results(out, lse, *grads), inputs)
        for name, (room, memory) in zip(("dq", "dk", "dv"), rooms):
            room.fill_(poison)
            found[name, poison] = int((memory.nan_to_num(-3.0) != -3.0).sum())
    assert not any(found.values()), f"numbers beside gradients that were overwritten: {found}"
    assert torch.equal(out_room, out)
    out_room.fill_(torch.nan)
    assert out_memory.isnan().all()


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(head_dim, v) for head_dim, v in WIDTHS if head_dim <= 96])
@pytest.mark.parametrize(("moves", "count"), [("q", 1), ("qkv", 2), ("v", 1)])
@pytest.mark.parametrize("layout", ["contiguous", "spaced"])
def test_tangents(layout, moves, count, head_dim, head_dim_v, dtype, device):
    if torch.get_float32_matmul_precision() == "high":
        pytest.skip("the yardstick of tangents knows no TF32")
    widths = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    case = Case((133, 240), "a>ab b>a", 2, num_heads=2, layout=layout, dtype=dtype, **widths)
    check_tangents(make_moving(case, moves, count, device))


def kernels_of(function) -> set[str]:
    """The names of what a call launches."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [*WIDTHS, (64, 20), (20, 8), (64, 100)])
def test_who_serves_it_is_what_a_plan_says(head_dim, head_dim_v, dtype, device):
    """Takes v as a slice of a wider projection; narrower values of odd widths are filled up first."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the device has no kernels of its own")
    case = Case((300, 200), "a>ab b>b", num_heads=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    inputs = make_inputs(case.with_(layout="spaced"), device)
    names = kernels_of(lambda: run(inputs))
    text = case.plan.explain(device=device, dtype=dtype, num_heads=2, head_dim=head_dim, head_dim_v=head_dim_v)
    as_wide = case.with_(head_dim_v=head_dim)
    fills_up = head_dim_v < head_dim and any(
        is_served(as_wide, backward=backward) and not is_served(case, backward=backward) for backward in (False, True)
    )
    filled = as_wide if fills_up else case
    for backward, name in ((False, "fwd_kernel"), (True, "dk_dv_kernel")):
        expected = is_served(filled, backward=backward)
        (line,) = (line for line in text.splitlines() if f"{'backward' if backward else 'forward'}: " in line)
        assert ("hopper kernel" in line) == expected, line
        launched = {kernel for kernel in names if name in kernel}
        assert launched and all(("hopper" in kernel) == expected for kernel in launched), names


@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
def test_deterministic_gradients_have_equal_bits(head_dim, head_dim_v, dtype, device):
    case = Case((700, 900), "a>ab b>ab", num_heads=3, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    inputs = make_inputs(case, device)
    with deterministic():
        first, second = run(inputs), run(inputs)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.sanitizer
@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(32, 8), (80, 64), (128, 8), (8, 128), (192, 56), (56, 192), (256, 8), (72, 256), (24, 40)],
)
def test_small(head_dim, head_dim_v, mask, dtype, order, device):
    widths = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    check(Case((33, 70), "a>ab b>a", 2, num_heads=2, mask=mask, dtype=dtype, **widths), device)
