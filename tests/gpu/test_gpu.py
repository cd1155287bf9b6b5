"""The operator on a GPU: every tile and width, streams, threads, graphs, repetition, enormous calls, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from cases import LARGE_CASES, NAMES, Case, Inputs, make_inputs
from compare import Results, check, deterministic, judge, run, units_of
from torch import Tensor

import mixed_attention as ma
from mixed_attention import ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {"fp16": FP16, "bf16": BF16, "fp32": FP32}
SPLIT = Case((40, 9000), "ab>ab", head_dim=64, cached="b")  # too few tiles of queries: the keys are split
CASES = {"abupt": LARGE_CASES["abupt"], "wide": LARGE_CASES["wide"], "masked": LARGE_CASES["masked"], "split": SPLIT}
# More key tiles than blocks; queries that read two key segments, or one twice; queries that read three.
MANY_TILES = {
    "rounds": Case((1500, 1300), "a>a b>b", num_heads=8, head_dim=64),
    "narrow": Case((1500, 1300), "a>a b>b", num_heads=8, head_dim=32, mask="random"),
    "segments": Case((2000, 1500, 900), "a>ab b>bc c>cc", num_heads=3, head_dim=64),
    "unions": Case((300, 700, 900, 500), "a>bcd b>acd c>abd d>abc", num_heads=3, head_dim=64),
    "heads of 192": Case((1500, 1300), "a>ab b>b", num_heads=4, head_dim=192),
    "heads of 256": Case((1500, 1300), "a>b b>ab", num_heads=4, head_dim=256, mask="random"),
}


def each_dtype(function: Callable) -> Callable:
    return pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)(function)


@contextmanager
def products_of(precision: str) -> Iterator[None]:
    """Lets fp32 be multiplied as TF32 (``"high"``), or not (``"highest"``)."""
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


each_precision = pytest.mark.parametrize("precision", ["highest", "high"])


def assert_equal_bits(got: Results, expected: Results) -> None:
    for field in fields(Results):
        assert_equal(getattr(got, field.name), getattr(expected, field.name), field.name)


def assert_equal(got: Tensor, expected: Tensor, name: str) -> None:
    wrong = (got != expected).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        message = f"{name}: {len(wrong)} of {got.numel()} differ; first {list(place)}: {got[place]}, {expected[place]}"
        raise AssertionError(f"{message}; last {wrong[-1].tolist()}")


# Sizes around the tiles of 16 to 256 rows that kernels are made of.
EDGES = (1, 7, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)


def many_groups(count: int, **changes: object) -> Case:
    """More ranges than fit a kernel's parameters: a group attends to itself twice, to the next and a common one."""
    names = NAMES[:count]
    attends = " ".join(f"{name}>{name}{names[(i + 1) % count]}{names[7]}{name}" for i, name in enumerate(names))
    return Case(tuple(37 * i % 150 for i in range(count)), attends, num_heads=2).with_(**changes)


@pytest.mark.parametrize(
    "case",
    [many_groups(60), many_groups(45, batch_size=3, shared="kv", heavy_tails=True, layout="spaced")],
    ids=["one sequence", "shared keys"],
)
@pytest.mark.parametrize("magnitude", [1.0, 100.0])
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_plans_of_many_ranges(dtype, head_dim, magnitude, case, device):
    case = case.with_(dtype=dtype, head_dim=head_dim, magnitude=magnitude)
    check(case, device)
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    for passes in case.plan.explain(device=device, dtype=dtype, head_dim=head_dim).split("backward: "):
        assert ("hopper kernel" in passes) == (is_hopper and head_dim in (8, 32, 40, 64, 128))


# Groups of all sizes around tiles, some of them empty; how they see each other decides who adds up their dq on Hopper:
# a block by itself where few hundred rows see each other alone, else all blocks together.
MANY_SIZES = (*EDGES, *(37 * i % 150 for i in range(len(NAMES) - len(EDGES))))
LAST = NAMES[-1]
CLIQUE, ALONE = NAMES[14:27], NAMES[:14] + NAMES[27:]
LISTS = {
    "alone": Case(MANY_SIZES, " ".join(f"{name}>{name}" for name in NAMES), 3, num_heads=2),
    "alone, twice": Case(MANY_SIZES, " ".join(f"{name}>{name}{name}{name}" for name in NAMES), num_heads=5),
    "pairs": Case(
        MANY_SIZES, " ".join(f"{a}>{a}{b}{a} {b}>{b}{a}{b}{b}" for a, b in zip(NAMES[::2], NAMES[1::2])), 2, 2
    ),
    "without keys": Case(
        MANY_SIZES, " ".join(f"{name}>{NAMES[14] if i % 3 else name}" for i, name in enumerate(NAMES)), 2, num_heads=3
    ),
    "pooled": Case((*MANY_SIZES[:-1], 700), " ".join(f"{name}>{name}{LAST}{LAST}" for name in NAMES), num_heads=3),
    "own and shared": Case(
        MANY_SIZES,
        " ".join([f"{CLIQUE}>{CLIQUE}", *(f"{name}>{name}{name}{name}" for name in ALONE)]),
        num_heads=4,
    ),
}


@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_gradients_of_many_groups(dtype, head_dim, case, device):
    case = case.with_(dtype=dtype, head_dim=head_dim)
    check(case, device)
    check(case.with_(layout="packed", magnitude=100.0), device)
    check(case.with_(layout="spaced", heavy_tails=True, shared="kv"), device)
    inputs = make_inputs(case, device)
    with deterministic():
        results = run(inputs)
        judge(results, inputs)
        assert_equal_bits(run(inputs), results)


@each_dtype
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("ahead", [(0,), (3,), (2, 7)], ids=["own keys", "keys ahead", "unions"])
def test_sizes_around_every_tile(ahead, head_dim, dtype, device):
    """Groups of all these sizes, each attending to itself or to others further on."""
    names = NAMES[: len(EDGES)]
    attends = " ".join(f"{name}>{''.join(names[(i + a) % len(names)] for a in ahead)}" for i, name in enumerate(names))
    check(Case(EDGES, attends, num_heads=2, head_dim=head_dim, dtype=dtype), device)


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "packed", "strided"])
@pytest.mark.parametrize("head_dim", [1, 7, 8, 16, 20, 32, 40, 48, 64, 80, 96, 112, 128, 136, 160, 192, 200, 248, 256])
def test_widths(head_dim, layout, dtype, device):
    """Strided views begin at an odd element: no base pointer is aligned."""
    check(Case((77, 130, 65), "a>b bc>ac", 2, num_heads=3, head_dim=head_dim, layout=layout, dtype=dtype), device)


@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(64, 32), (64, 128), (128, 64), (20, 48), (48, 20), (256, 8), (8, 256), (64, 65)]
)
def test_values_of_another_width(head_dim, head_dim_v, dtype, device):
    case = Case((77, 130, 65), "a>b bc>ac", num_heads=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)
    check(case, device)
    check(case.with_(layout="strided"), device)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128, 136, 256])
@pytest.mark.parametrize("shared", ["k", "v", "kv"])
def test_one_sequence_of_keys_for_a_batch(shared, head_dim, dtype, device):
    check(Case((77, 130), "a>b b>ab", 3, num_heads=2, head_dim=head_dim, shared=shared, dtype=dtype), device)


@each_dtype
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 136, 192, 248, 256])
@pytest.mark.parametrize("mask", ["random", "blocked", "front", "back", "shared"])
def test_padding_masks(mask, head_dim, dtype, device):
    case = Case((77, 730), "a>b b>ab", 2, num_heads=2, head_dim=head_dim, mask=mask, dtype=dtype)
    check(case, device)
    check(case.with_(shared="kv", layout="packed"), device)


@each_dtype
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 96, 120, 136, 200])
@pytest.mark.parametrize("mask", [None, "random", "blocked"])
def test_widths_and_masks_in_deterministic_mode(mask, head_dim, dtype, device):
    case = Case((77, 330), "a>b b>ab", 2, num_heads=2, head_dim=head_dim, mask=mask, dtype=dtype)
    with deterministic():
        check(case, device)


@each_dtype
@pytest.mark.parametrize("heavy_tails", [False, True], ids=["normal", "heavy tails"])
def test_few_queries_of_many_keys_and_many_of_few(heavy_tails, dtype, device):
    check(SPLIT.with_(dtype=dtype, heavy_tails=heavy_tails), device)
    check(SPLIT.with_(dtype=dtype, heavy_tails=heavy_tails, mask="random", batch_size=2), device)
    check(Case((9000, 40), "ab>b", head_dim=64, skip_unread_keys=True, dtype=dtype, heavy_tails=heavy_tails), device)


# Walks over the keys that are split: of every tile, of the longest, and of those that are left for a last wave.
SPLITS = {
    "all": Case((50, 1000, 1, 130, 3, 65, 700), "abcdefg>bdfbdg", 3, num_heads=4, cached="bcdefg"),
    "longest": Case((40, 9000, 500), "ab>ab c>c", num_heads=3, cached="b"),
    "last wave": Case((8500, 1100), "ab>b", num_heads=3, skip_unread_keys=True),
}


@each_dtype
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("case", SPLITS.values(), ids=SPLITS)
def test_parts_of_keys(case, head_dim, dtype, device):
    check(case.with_(head_dim=head_dim, dtype=dtype), device)
    check(case.with_(head_dim=head_dim, dtype=dtype, mask="back"), device)


@each_dtype
@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_heavy_tails(case, dtype, device):
    """Student's t of three degrees of freedom: single keys take all the weight of a row."""
    check(case.with_(dtype=dtype, heavy_tails=True), device)


@each_precision
@pytest.mark.parametrize("head_dim", [40, 64])
def test_a_query_that_matters_little_beside_others_loses_nothing(head_dim, precision, device):
    """Gradients of a query in fp32 scale with those that come in for it, bit by bit, whatever comes in for others."""
    inputs = make_inputs(Case((300, 77), "ab>ab", num_heads=2, head_dim=head_dim, dlse=False), device)
    factors = torch.tensor([2.0 ** (row % 121 - 60) for row in range(377)], device=device)[None, :, None, None]
    with products_of(precision), deterministic():
        expected = run(inputs)
        got = run(replace(inputs, dout=inputs.dout * factors))
    assert_equal(got.dq, expected.dq * factors, "dq")
    assert got.dk.isfinite().all() and got.dv.isfinite().all()


@pytest.mark.parametrize("attends", ["a>b b>a", "ab>ab"])
def test_logits_that_would_overflow(attends, device):
    for dtype in (FP16, BF16):
        check(Case((200, 130), attends, head_dim=64, magnitude=300.0, dtype=dtype), device)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_keys_beside_a_single_one_of_small_logits(head_dim, device):
    """The weight of a key that does not count, masked or past the end, would be infinite."""
    case = Case((200, 2), "a>b b>b", num_heads=2, skip_unread_keys=True, mask="front", magnitude=300.0)
    for dtype in (FP16, BF16):
        check(case.with_(head_dim=head_dim, dtype=dtype), device)
        with deterministic():
            check(case.with_(head_dim=head_dim, dtype=dtype), device)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tf32_where_torch_allows_it(case, device):
    with products_of("high"):
        check(case, device)
        check(case.with_(heavy_tails=True), device)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128])
@pytest.mark.parametrize("ahead", [0, 3], ids=["own keys", "keys ahead"])
def test_tf32_of_sizes_around_every_tile(ahead, head_dim, device):
    sizes = (*EDGES, 95, 97)
    attends = " ".join(f"{name}>{NAMES[(i + ahead) % len(sizes)]}" for i, name in enumerate(NAMES[: len(sizes)]))
    with products_of("high"):
        check(Case(sizes, attends, batch_size=2, num_heads=2, head_dim=head_dim, shared="v"), device)


@pytest.mark.parametrize("case", SPLITS.values(), ids=SPLITS)
def test_tf32_of_parts_of_keys(case, device):
    with products_of("high"):
        for head_dim in (64, 128):
            check(case.with_(head_dim=head_dim), device)


@each_precision
@pytest.mark.parametrize("heavy_tails", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_rows_of_very_different_magnitudes(head_dim, heavy_tails, precision, device):
    """Tokens from e^-20 to e^20 times as large as others, under a scale that keeps their scores in the range of exp."""
    scale = math.exp(-20) / head_dim**0.5
    inputs = make_inputs(Case((300, 77), "ab>ab", 2, 2, head_dim, softmax_scale=scale, heavy_tails=heavy_tails), device)
    generator = torch.Generator().manual_seed(0)

    def spread(tensor: Tensor, largest: float = 20) -> Tensor:
        exponents = -20 + (20 + largest) * torch.rand((*tensor.shape[:-1], 1), generator=generator)
        return tensor.detach() * exponents.exp().to(device)

    q, k, v = spread(inputs.q), spread(inputs.k, largest=0), spread(inputs.v)
    spread_inputs = replace(inputs, q=q, k=k, v=v, dout=spread(inputs.dout))
    with products_of(precision):
        leaves = with_own_leaves(spread_inputs)
        judge(run(leaves), leaves)


@pytest.mark.sanitizer
@each_dtype
@pytest.mark.parametrize("head_dim", [32, 64, 128, 20])
@pytest.mark.parametrize("mask", [None, "random"])
def test_small_problems(mask, head_dim, dtype, device):
    check(Case((70, 0, 33), "a>c bc>ac", 2, head_dim=head_dim, layout="strided", mask=mask, dtype=dtype), device)


# A problem or two for each kind of kernel, with masks, ragged ends and a group without tokens. Hopper's own kernels
# take aligned rows alone; what is strided goes to the portable ones.
TINY = Case((70, 0, 133), "a>c bc>ac", 2, num_heads=2)
KINDS = {
    "hopper, 64, queries in halves": TINY.with_(head_dim=64, dtype=BF16, sizes=(310, 0, 133)),  # by pairs of blocks
    "hopper, 64, many tiles": TINY.with_(head_dim=64, dtype=FP16, batch_size=6, num_heads=12),
    "hopper, 64, masked": TINY.with_(head_dim=64, dtype=BF16, mask="random"),
    "hopper, 128": TINY.with_(head_dim=128, dtype=FP16),
    "hopper, 128, masked": TINY.with_(head_dim=128, dtype=BF16, mask="random"),
    "hopper, 192": TINY.with_(head_dim=192, dtype=FP16),
    "hopper, 192, masked": TINY.with_(head_dim=192, dtype=BF16, mask="random"),
    "hopper, 256": TINY.with_(head_dim=256, dtype=BF16),
    "hopper, 256, masked": TINY.with_(head_dim=256, dtype=FP16, mask="random"),
    "hopper, fp32, 64": TINY.with_(head_dim=64),
    "hopper, fp32, 128": TINY.with_(head_dim=128),
    "hopper, list, 32": many_groups(45, head_dim=32, dtype=FP16),  # two blocks a multiprocessor
    "hopper, list, 64": many_groups(45, head_dim=64, dtype=BF16),
    "hopper, split keys": Case((3, 2100), "ab>ab", head_dim=64, cached="b", dtype=BF16),
    "portable, 64, masked": TINY.with_(head_dim=64, dtype=BF16, layout="strided", mask="random"),
    "portable, fp32, 20": TINY.with_(head_dim=20, layout="strided"),
}


@pytest.mark.sanitizer
@pytest.mark.every_kind
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_every_kind_of_kernel(case, device):
    check(case, device)
    with deterministic():
        check(case, device)


@pytest.mark.sanitizer
@pytest.mark.parametrize("head_dim", [64, 128, 20])
def test_small_problems_in_tf32(head_dim, device):
    with products_of("high"):
        check(Case((70, 0, 33), "a>c bc>ac", 2, head_dim=head_dim, layout="strided"), device)


@pytest.mark.sanitizer
@each_dtype
def test_small_problems_of_split_keys(dtype, device):
    check(Case((3, 2100), "ab>ab", head_dim=64, cached="b", dtype=dtype), device)


@pytest.mark.sanitizer
@each_dtype
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_against_the_reference(masked, head_dim, dtype, device):
    inputs = make_inputs(Case((70, 45), "a>ab b>bba", 2, num_heads=2, head_dim=head_dim, dlse=False), device)
    mask = torch.rand(2, 115, generator=torch.Generator().manual_seed(0)).to(device) < 0.7 if masked else None
    seed, dropout_p = torch.tensor([12345], device=device), 0.3

    def results(attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(inputs_dtype).to(dtype).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, inputs.dout.to(inputs_dtype).to(dtype))]

    def kernels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.mixed_attention.forward(q, k, v, plan.flat(), inputs.case.scale, mask, dropout_p, seed)[0]

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"key_padding_mask": mask, "dropout_p": dropout_p, "dropout_seed": seed}
        return reference.attention(q, k, v, plan, softmax_scale=inputs.case.scale, **options)

    plan, inputs_dtype = inputs.case.plan, dtype
    exact, theirs, ours = results(definition, torch.float64), results(definition, dtype), results(kernels, dtype)
    for name, expected, yardstick, got in zip(("out", "dq", "dk", "dv"), exact, theirs, ours):
        # Besides, one rounding each of scores, weights, their gradients and the result, and as often of products.
        rounding = torch.finfo(dtype).eps + units_of(dtype, device).product
        bound = 2 * (yardstick - expected).abs().max() + 4 * rounding * expected.abs().max()
        assert (got - expected).abs().max() <= bound, name


# Streams, threads, graphs.


def lagging(inputs: Inputs) -> Inputs:
    """The same inputs, whose values arrive on the current stream only after a while; until then they are NaN."""
    late = make_inputs(inputs.case, inputs.q.device)
    with torch.no_grad():
        pairs = [(getattr(late, name), getattr(inputs, name)) for name in ("q", "k", "v", "dout")]
        for tensor, _ in pairs:
            tensor.fill_(torch.nan)
        torch.cuda._sleep(50_000_000)  # cycles: far longer than the host needs for what follows
        for tensor, value in pairs:
            tensor.copy_(value)
    return late


@each_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_work_is_queued_on_the_current_stream(case, dtype, device):
    inputs = make_inputs(case.with_(dtype=dtype), device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = run(lagging(inputs))
    torch.cuda.synchronize()
    judge(results, inputs)


def test_several_threads_may_call_at_once(device):
    def run_on_own_stream(inputs: Inputs) -> Results:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = run(with_own_leaves(inputs))
            torch.cuda.current_stream().synchronize()
        return results

    dtypes = [FP16, BF16, FP32, FP16]
    inputs = [make_inputs(LARGE_CASES["groups"].with_(seed=i, dtype=dtype), device) for i, dtype in enumerate(dtypes)]
    torch.cuda.synchronize()
    with deterministic():
        alone = [run(each) for each in inputs]
        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run_on_own_stream, inputs * 8))
    for index, results in enumerate(together):
        assert_equal_bits(results, alone[index % 4])


def with_own_leaves(inputs: Inputs) -> Inputs:
    """The same tensors as fresh leaves: autograd delivers a gradient on the stream that its leaf was first used on."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")}
    return replace(inputs, **leaves)


def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A function as a CUDA graph: its replay, and the tensors that every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function()
    # NOTE: before it captures, torch fills the seed and offset that the graph reads, on the stream of the capture; a
    # replay fills them anew, on its own stream. Where the GPU is busy with others, the first fill may come last.
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, outputs


def step(inputs: Inputs, **options: object) -> tuple[Tensor, ...]:
    """Forward and backward."""
    own = with_own_leaves(inputs)
    leaves = own.q, own.k, own.v
    out = ma.attention(*leaves, inputs.case.plan, key_padding_mask=inputs.key_padding_mask, **options)
    return out, *torch.autograd.grad(out, leaves, inputs.dout)


def copy_values(target: Inputs, source: Inputs) -> None:
    with torch.no_grad():
        for name in ("q", "k", "v", "dout", "key_padding_mask"):
            if getattr(target, name) is not None:
                getattr(target, name).copy_(getattr(source, name))


@each_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_graphs_replay_with_new_data(case, dtype, device):
    case = case.with_(dtype=dtype, dlse=False)
    static = make_inputs(case, device)
    with deterministic():
        replay, outputs = captured(lambda: step(static))
        for seed in (1, 2, 3):
            fresh = make_inputs(case.with_(seed=seed), device)
            copy_values(static, fresh)
            for output in outputs:
                output.fill_(torch.nan)
            replay()
            for name, got, expected in zip(("out", "dq", "dk", "dv"), outputs, step(fresh)):
                assert_equal(got, expected, name)


@each_dtype
def test_graphs_draw_new_dropout_in_every_replay(dtype, device):
    inputs = make_inputs(LARGE_CASES["abupt"].with_(dtype=dtype, dlse=False), device)
    with deterministic():
        replay, outputs = captured(lambda: step(inputs, dropout_p=0.3))
        torch.manual_seed(7)
        replay()
        first = [output.clone() for output in outputs]
        replay()
        assert not torch.equal(outputs[0], first[0])
        torch.manual_seed(7)
        for name, got, expected in zip(("out", "dq", "dk", "dv"), first, step(inputs, dropout_p=0.3)):
            assert_equal(got, expected, name)


# Repetition.


@each_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_forward_repeats_bit_by_bit(case, dtype, device):
    inputs = make_inputs(case.with_(dtype=dtype), device)
    with torch.no_grad():
        first = forward(inputs)
        for _ in range(200):
            for name, got, expected in zip(("out", "lse"), forward(inputs), first):
                assert_equal(got, expected, name)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    options = {"key_padding_mask": inputs.key_padding_mask, "return_lse": True}
    return ma.attention(inputs.q, inputs.k, inputs.v, inputs.case.plan, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_tokens_cost_others_no_bit(head_dim, device):
    """fp32 may be scaled into the range of shorter numbers, but not by what a query does not see."""
    case = Case((77, 130, 65, 20), "a>b b>ab c>bc d>a", 2, num_heads=3, head_dim=head_dim, dtype=FP32)
    small, large = make_inputs(case, device), make_inputs(case, device)
    with torch.no_grad():
        for tensor in (large.q, large.k, large.v):
            tensor[:, 77 + 130 :] *= 2.0**60
        for name, got, expected in zip(("out", "lse"), forward(large), forward(small)):
            rows = (slice(None), slice(77 + 130)) if name == "out" else (..., slice(77 + 130))
            assert_equal(got[rows], expected[rows], name)


@each_dtype
@pytest.mark.parametrize("case", [*CASES.values(), *MANY_TILES.values()], ids=[*CASES, *MANY_TILES])
def test_deterministic_mode_repeats_bit_by_bit_and_is_right(case, dtype, device):
    inputs = make_inputs(case.with_(dtype=dtype), device)
    with deterministic():
        first = run(inputs)
        judge(first, inputs)
        for _ in range(100):
            assert_equal_bits(run(inputs), first)


@each_dtype
def test_no_update_is_lost_in_many_repetitions(dtype, device):
    """Gradients may differ by the order of their sums, not by a term: every repetition passes the judge."""
    inputs = make_inputs(LARGE_CASES["joint"].with_(dtype=dtype), device)
    runs = [run(inputs) for _ in range(50)]
    judge(runs[0], inputs)
    for name in ("dq", "dk", "dv"):
        every = torch.stack([getattr(results, name) for results in runs]).float()
        spread = (every.amax(0) - every.amin(0)).max()
        # fp32 sums of a thousand terms in another order, then the rounding of the dtype, which may fall either way.
        assert spread <= (torch.finfo(dtype).eps + 1000 * torch.finfo(FP32).eps) * every.abs().max(), name


def test_different_plans_one_after_the_other(device):
    """What one call leaves behind on the device (tables, counters) does not reach the next."""
    cases = [LARGE_CASES["abupt"], LARGE_CASES["groups"], SPLIT, Case((1,), "a>a", head_dim=64), LARGE_CASES["wide"]]
    inputs = [make_inputs(case.with_(dtype=BF16), device) for case in cases]
    with deterministic():
        alone = [run(each) for each in inputs]
        for _ in range(5):
            for each, expected in zip(inputs, alone):
                assert_equal_bits(run(each), expected)


def test_memory_is_given_back(device):
    inputs = make_inputs(SPLIT.with_(dtype=BF16, head_dim=128), device)
    run(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        run(inputs)
    assert torch.cuda.memory_allocated() == before


# Enormous calls.


def test_thirty_million_queries(device):
    """Their rows, some of the gradients' too, against fp64."""
    num_queries, num_keys, width = 30_000_000, 100, 16
    plan = ma.AttentionPlan.compile(
        [ma.TokenSpec("anchors", None), ma.TokenSpec("queries", num_queries)],
        [ma.AttentionPattern(["anchors", "queries"], ["anchors"])],
        cached=[ma.TokenSpec("anchors", num_keys)],
        skip_unread_keys=True,
    )
    torch.manual_seed(0)
    q = torch.randn(1, num_queries, 1, width, dtype=FP16, device=device, requires_grad=True)
    k, v = (torch.randn(1, num_keys, 1, width, dtype=FP16, device=device, requires_grad=True) for _ in range(2))
    rows = torch.randint(num_queries, (4000,), device=device)
    rows[:2] = torch.tensor([0, num_queries - 1])
    dout = torch.zeros_like(q).index_copy_(1, rows, torch.randn(1, len(rows), 1, width, dtype=FP16, device=device))
    out, lse = ma.attention(q, k, v, plan, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert lse.isfinite().all()

    rows = rows.unique()  # a row that was drawn twice has one gradient
    got = [out[:, rows], dq[:, rows], dk, dv]
    results = []
    for dtype in (torch.float64, FP16):
        leaves = [t.detach().to(dtype).transpose(1, 2).requires_grad_() for t in (q[:, rows], k, v)]
        dense = F.scaled_dot_product_attention(*leaves)
        grads = torch.autograd.grad(dense, leaves, dout[:, rows].to(dtype).transpose(1, 2))
        results.append([t.transpose(1, 2) for t in (dense, *grads)])
    for name, ours, exact, theirs in zip(("out", "dq", "dk", "dv"), got, *results):
        bound = 2 * (theirs - exact).abs().max() + torch.finfo(FP16).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= bound, name


def test_offsets_beyond_32_bits(device):
    """More than 2^31 elements in q and out; the last rows must be their own."""
    num_queries, width = 2**31 // 128 + 1000, 128
    if torch.cuda.mem_get_info(device)[0] < 5 * num_queries * width * 2:
        pytest.skip("too little free memory")
    specs = [ma.TokenSpec("keys", None), ma.TokenSpec("queries", num_queries)]
    pattern = ma.AttentionPattern(["keys", "queries"], ["keys"])
    plan = ma.AttentionPlan.compile(specs, [pattern], cached=[ma.TokenSpec("keys", 64)], skip_unread_keys=True)
    few = ma.AttentionPlan.compile(
        [specs[0], ma.TokenSpec("queries", 1000)], [pattern], cached=[ma.TokenSpec("keys", 64)], skip_unread_keys=True
    )
    q = torch.empty(1, num_queries, 1, width, dtype=BF16, device=device).normal_()
    k, v = (torch.randn(1, 64, 1, width, dtype=BF16, device=device) for _ in range(2))
    out, lse = torch.ops.mixed_attention.forward(q, k, v, plan.flat(), width**-0.5)
    torch.testing.assert_close(out[:, -1000:], ma.attention(q[:, -1000:], k, v, few))
    dq, dk, dv = torch.ops.mixed_attention.backward(out, None, q, k, v, out, lse, plan.flat(), width**-0.5)
    tail = [t[:, -1000:].contiguous() for t in (out, q, out)]
    arguments = k, v, tail[2], lse[..., -1000:].contiguous(), few.flat(), width**-0.5
    dq_tail, _, _ = torch.ops.mixed_attention.backward(tail[0], None, tail[1], *arguments)
    torch.testing.assert_close(dq[:, -1000:], dq_tail)
    assert dk.isfinite().all() and dv.isfinite().all()


# Refusals.


@pytest.fixture
def works_afterwards(device: torch.device) -> Iterator[None]:
    yield
    check(LARGE_CASES["abupt"].with_(dtype=BF16), device)


@pytest.mark.usefixtures("works_afterwards")
def test_out_of_memory_leaves_the_process_usable(device):
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 2**20)], [ma.AttentionPattern(["a"], ["a"])])
    q = torch.randn(1, 2**20, 1, 64, dtype=FP16, device=device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**24) / total, device)
    rest = []
    try:
        with pytest.raises(torch.OutOfMemoryError):  # what earlier tests left of larger blocks is filled up first
            rest += (torch.empty_like(q) for _ in range(2**16))
        with pytest.raises(torch.OutOfMemoryError):
            ma.attention(q, q, q, plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.usefixtures("works_afterwards")
@pytest.mark.parametrize("grad", [False, True])
def test_widths_that_no_kernel_serves(grad, device):
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 9)], [ma.AttentionPattern(["a"], ["a"])])
    q = torch.randn(1, 9, 1, 264, dtype=BF16, device=device, requires_grad=grad)
    with pytest.raises(NotImplementedError, match="head_dim"):
        ma.attention(q, q, q, plan)


@pytest.mark.usefixtures("works_afterwards")
def test_bad_input_is_refused(device):
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 9)], [ma.AttentionPattern(["a"], ["a"])])
    q = torch.randn(1, 9, 1, 64, dtype=BF16, device=device)
    with pytest.raises(ValueError, match="k: expected device cuda:0 like q, got cpu"):
        ma.attention(q, q.cpu(), q, plan)
    with pytest.raises(ValueError, match="v: expected dtype BFloat16 like q, got Half"):
        ma.attention(q, q, q.half(), plan)
    with pytest.raises(ValueError, match="plan: covers 9 queries, q has 8"):
        ma.attention(q[:, :8], q, q, plan)
    with pytest.raises(ValueError, match="key_padding_mask: expected device cuda:0"):
        ma.attention(q, q, q, plan, key_padding_mask=torch.ones(1, 9, dtype=torch.bool))


# The framework.


@each_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_plan_tells_what_kernels_do_with_it(case, dtype, device):
    shape = {"batch_size": case.batch_size, "num_heads": case.num_heads, "head_dim": case.head_dim, "dtype": dtype}
    lines = case.plan.explain(device=device, **shape).splitlines()[-2:]
    for line, backward in zip(lines, (False, True)):
        launch = ops.cuda_launch(case.plan, **shape, device=device, backward=backward)
        rows = case.plan.num_keys if backward else case.plan.num_queries
        num_whole_tiles = launch.num_tiles - launch.num_split_tiles * (launch.num_splits - 1)
        assert num_whole_tiles * launch.tile_rows >= rows * case.num_heads * case.batch_size
        assert f"{launch.family} kernel, tiles of {launch.tile_rows}" in line and f": {launch.num_tiles} in" in line


@each_dtype
@pytest.mark.parametrize("mask", [None, "random"])
def test_operators_are_registered_rightly(mask, dtype, device):
    ops = torch.ops.mixed_attention
    inputs = make_inputs(Case((5, 7, 4), "ab>a c>abb", 2, num_heads=3, mask=mask, dtype=dtype), device)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    arguments = inputs.case.plan.flat(), inputs.case.scale, inputs.key_padding_mask
    with deterministic():
        torch.library.opcheck(ops.forward.default, (inputs.q, inputs.k, inputs.v, *arguments))
        out, lse = ops.forward(q, k, v, *arguments)
        torch.library.opcheck(ops.backward.default, (inputs.dout, inputs.dlse, q, k, v, out, lse, *arguments))
    x, freqs = torch.randn(2, 5, 3, 8, device=device).to(dtype), torch.randn(1, 5, 4, 2, device=device)
    torch.library.opcheck(ops.rope_out.default, (x, freqs, False, torch.empty_like(x)))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_autocast_casts_once(dtype, device):
    inputs = make_inputs(LARGE_CASES["abupt"], device)
    with torch.autocast("cuda", dtype):
        out = ma.attention(inputs.q, inputs.k, inputs.v, inputs.case.plan)
    assert out.dtype == dtype
    low = [t.detach().to(dtype) for t in (inputs.q, inputs.k, inputs.v)]
    assert torch.equal(out, ma.attention(*low, inputs.case.plan))


def test_derivatives_of_second_order(device):
    q, k, v = (torch.randn(1, 6, 1, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3))
    patterns = [ma.AttentionPattern(["a"], ["a", "b"]), ma.AttentionPattern(["b"], ["b", "b"])]
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 4), ma.TokenSpec("b", 2)], patterns)
    assert torch.autograd.gradcheck(lambda *x: ma.attention(*x, plan), (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: ma.attention(*x, plan), (q, k, v), fast_mode=True)
    low = [t.detach().float().requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(ma.attention(*low, plan).sin().sum(), low, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), low)
    exact = torch.autograd.grad(ma.attention(q, k, v, plan).sin().sum(), (q, k, v), create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in exact), (q, k, v))
    for got, wanted in zip(second, expected):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "fp64"])
@pytest.mark.parametrize("head_dim", [2, 6, 16, pytest.param(64, marks=pytest.mark.every_kind), 128])
@pytest.mark.parametrize("batch_size_freqs", [1, 2])
def test_rotation(batch_size_freqs, head_dim, dtype, device):
    """Strided tokens are rotated, with both gradients, as the composite does it in fp64."""
    torch.manual_seed(0)
    exact_dtype = torch.float64 if dtype == torch.float64 else FP32
    x = torch.randn(2, 37, 4, head_dim + 3, dtype=torch.float64)[..., 1 : head_dim + 1].to(device, dtype)
    dout = torch.randn(2, 37, 4, head_dim, dtype=torch.float64).to(device, dtype)
    freqs = torch.randn(batch_size_freqs, 37, head_dim // 2, dtype=torch.complex128).to(device)
    freqs = freqs.to(torch.complex128 if exact_dtype == torch.float64 else torch.complex64)
    results = []
    for leaves in ([x, freqs], [x.double(), freqs.to(torch.complex128)]):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = ma.apply_rope(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for name, got, exact in zip(("out", "dx", "dfreqs"), *results):
        # Three roundings of two products and their sum, over heads and sequences too for the frequencies; one to store.
        terms = 2 * (8 if name == "dfreqs" else 1)
        unit = torch.finfo(FP32 if name == "dfreqs" and dtype != torch.float64 else dtype).eps
        size = x.double().abs().max() * max(freqs.abs().max(), dout.double().abs().max()) * terms
        assert (got - exact).abs().max() <= (3 * torch.finfo(exact_dtype).eps + unit) * size, name
