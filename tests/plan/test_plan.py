"""The compiled plan against the meaning of specs and patterns."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import EDGE_CASES, NAMES, Case, counts, make_inputs
from compare import run
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases

import mixed_attention as ma
from mixed_attention import ops
from mixed_attention import plan as plan_module

A, B, C = ma.TokenSpec("a", 3), ma.TokenSpec("b", 4), ma.TokenSpec("c", 2)


def pattern(queries: str, keys: str) -> ma.AttentionPattern:
    return ma.AttentionPattern(list(queries), list(keys))


def multiplicities(plan: ma.AttentionPlan) -> torch.Tensor:
    """The dense matrix that the query segments say."""
    total = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.float64)
    for segment in plan.query_segments:
        for start, end in segment.key_ranges:
            total[segment.start : segment.end, start:end] += 1
    return total


@given(case=cases())
def test_segments_say_what_the_patterns_say(case: Case):
    plan, expected = case.plan, counts(case)
    assert torch.equal(multiplicities(plan), expected)
    assert torch.equal(plan.mask(), expected > 0)
    assert plan.num_pairs() == expected.sum()


@given(case=cases())
def test_query_segments_cover_the_queries_once_and_in_order(case: Case):
    plan = case.plan
    ends = [0, *(segment.end for segment in plan.query_segments)]
    assert [segment.start for segment in plan.query_segments] == ends[:-1]
    assert ends[-1] == plan.num_queries


def check_key_segments(plan: ma.AttentionPlan, case: Case) -> None:
    """Key segments follow each other up to the last key, and count each pair as often as the patterns of the case."""
    total = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.float64)
    ends = [0]
    for segment in plan.key_segments:
        assert segment.start == ends[-1]
        ends.append(segment.end)
        for start, end in segment.query_ranges:
            total[start:end, segment.start : segment.end] += 1
    assert ends[-1] == plan.num_keys
    assert torch.equal(total, counts(case))


@given(case=cases())
def test_key_segments_are_the_inverse(case: Case):
    check_key_segments(case.plan, case)


@given(case=cases(), data=st.data())
def test_order_of_patterns_and_names_leaves_the_plan_alone(case: Case, data: st.DataObject):
    patterns = data.draw(st.permutations(case.attends.split()))
    shuffled = ["".join(data.draw(st.permutations(side))) for p in patterns for side in p.split(">")]
    attends = " ".join(f"{queries}>{keys}" for queries, keys in zip(shuffled[::2], shuffled[1::2]))
    assert case.with_(attends=attends).plan.flat() == case.plan.flat()


def test_order_of_patterns_and_names_changes_no_bit():
    case = Case((33, 17, 20, 9), "ab>acc cd>ca", batch_size=2, num_heads=2, head_dim=20)
    other = case.with_(attends="dc>ac ba>cac")
    for got, expected in zip(vars(run(make_inputs(other))).values(), vars(run(make_inputs(case))).values()):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("attends", "segments"),
    [
        ("abc>abc", [(0, 9, [(0, 9)])]),
        ("ab>ab c>c", [(0, 7, [(0, 7)]), (7, 9, [(7, 9)])]),
        ("ac>b b>ac", [(0, 3, [(3, 7)]), (3, 7, [(0, 3), (7, 9)]), (7, 9, [(3, 7)])]),
        ("abc>aba", [(0, 9, [(0, 7), (0, 3)])]),
        ("abc>abcacab", [(0, 9, [(0, 9), (0, 9), (0, 3)])]),
    ],
)
def test_neighbours_merge(attends, segments):
    plan = ma.AttentionPlan.compile([A, B, C], [pattern(*p.split(">")) for p in attends.split()])
    assert [(s.start, s.end, list(s.key_ranges)) for s in plan.query_segments] == segments


def test_merging_looks_at_positions_not_at_sizes():
    """An empty group between two groups keeps them apart, so that a plan's form depends on no size."""
    forms = [
        [(s.pattern, len(s.key_ranges)) for s in Case((4, size, 5), "ac>ac b>b").plan.query_segments]
        for size in (0, 1, 7)
    ]
    assert forms[0] == forms[1] == forms[2]


def test_flat_form():
    plan = ma.AttentionPlan.compile([A, B, C], [pattern("ab", "ac"), pattern("c", "b")])
    assert plan.flat() == [0, 7, 2, 0, 3, 7, 9, 7, 9, 1, 3, 7]


def test_flops_count_attended_pairs():
    plan = ma.AttentionPlan.compile([A, B], [pattern("a", "bb"), pattern("b", "a")])
    assert plan.num_pairs() == 3 * 8 + 4 * 3
    assert plan.flops(2, 16) == 4 * 2 * 16 * 36
    assert plan.flops(2, 16, backward=True) == 5 * plan.flops(2, 16) // 2


def test_equal_arguments_give_the_same_plan():
    first = ma.AttentionPlan.compile([A, B], [pattern("a", "b"), pattern("b", "a")])
    again = ma.AttentionPlan.compile((ma.TokenSpec("a", 3), B), (pattern("a", "b"), pattern("b", "a")))
    assert first is again
    other = ma.AttentionPlan.compile([A, C, B], [pattern("a", "b"), pattern("bc", "a")])
    assert first != other
    assert len({first, again, other}) == 2
    assert hash(first) == hash(pickle.loads(pickle.dumps(first)))
    assert first == pickle.loads(pickle.dumps(first))


def test_plans_are_immutable():
    plan = ma.AttentionPlan.compile([A], [pattern("a", "a")])
    with pytest.raises(FrozenInstanceError):
        plan.num_queries = 7


def test_any_object_with_the_attributes_serves():
    specs = [SimpleNamespace(name="a", size=3), SimpleNamespace(name="b", size=4)]
    patterns = [SimpleNamespace(query_tokens=["b", "a"], key_value_tokens=("a",))]
    assert ma.AttentionPlan.compile(specs, patterns) == ma.AttentionPlan.compile([A, B], [pattern("ba", "a")])


def test_cached_groups_ask_nothing_and_are_attended_to():
    plan = ma.AttentionPlan.compile(
        [ma.TokenSpec("a", None), B, ma.TokenSpec("c", None)], [pattern("ab", "ac"), pattern("c", "b")], cached=[A, C]
    )
    assert (plan.num_queries, plan.num_keys) == (4, 9)
    assert plan.flat() == [0, 4, 2, 0, 3, 7, 9]
    assert [group.query_start for group in plan.groups] == [None, 0, None]
    assert [group.key_start for group in plan.groups] == [0, 3, 7]


def test_cached_sizes_are_part_of_the_plan():
    specs, patterns = [ma.TokenSpec("a", None), B], [pattern("ab", "a")]
    plans = [ma.AttentionPlan.compile(specs, patterns, cached=[ma.TokenSpec("a", n)]) for n in (3, 5)]
    assert [plan.num_keys for plan in plans] == [7, 9]


def test_keys_that_nobody_reads_can_be_left_out():
    arguments = [A, B, C], [pattern("abc", "ac")]
    assert ma.AttentionPlan.compile(*arguments).flat() == [0, 9, 2, 0, 3, 7, 9]
    plan = ma.AttentionPlan.compile(*arguments, skip_unread_keys=True)
    assert plan.flat() == [0, 9, 1, 0, 5]
    assert [group.key_start for group in plan.groups] == [0, None, 3]
    assert (plan.num_queries, plan.num_keys) == (9, 5)


def test_explain_names_segments_and_keys_that_nobody_reads():
    text = ma.AttentionPlan.compile([A, B, C], [pattern("ab", "aac"), pattern("c", "a")]).explain()
    assert "3 token groups, 2 patterns: 9 queries, 9 keys" in text
    assert "[0, 7) -> keys [0, 3) + [7, 9) + [0, 3)" in text
    assert "nobody attends to: b" in text


def test_explain_names_the_kernels_of_a_gpu(monkeypatch):
    none = ops.CudaLaunch("none", "head_dim: 264 is not supported, expected at most 256", 0, 0, 1, 0, 0, 0)
    monkeypatch.setattr(ops, "has_kernels", lambda device_type, dtype: dtype != torch.float64)
    launch = ops.CudaLaunch("hopper", "", 192, 128, num_splits=2, num_tiles=198, num_slots=132, num_split_tiles=99)
    of_tangents = ops.CudaLaunch("portable", "", 128, 64, num_splits=1, num_tiles=99, num_slots=132, num_split_tiles=0)

    def choose(plan, *, backward, tangents=False, **call):
        return of_tangents if tangents else none if backward else launch

    monkeypatch.setattr(ops, "cuda_launch", choose)
    monkeypatch.setattr(
        ops, "why_no_tangent_kernels", lambda dtype, head_dim, *_: "" if head_dim <= 64 else "its heads"
    )
    plan = ma.AttentionPlan.compile([A, B], [pattern("ab", "a")])
    tangents = "  tangents and gradients of them: "
    assert plan.explain(device="cuda").splitlines()[-3] == f"{tangents}portable kernels"
    of_tangents = of_tangents._replace(why="a reason")
    assert plan.explain(device="cuda").splitlines()[-3] == f"{tangents}portable kernels; no faster ones, for a reason"
    of_tangents = of_tangents._replace(family="hopper", why="")
    assert plan.explain(device="cuda").splitlines()[-3] == f"{tangents}hopper kernels"
    assert plan.explain(device="cuda", head_dim=72).splitlines()[-3] == f"{tangents}the reference, for its heads"
    assert plan.explain(device="cuda", dtype=torch.float64).splitlines()[-3] == f"{tangents}the reference"
    assert plan.explain(device="cuda").splitlines()[-2:] == [
        "  forward: hopper kernel, tiles of 192 queries that take up 128 keys at a time, cut into 2 parts each: "
        "198 in 1.50 waves of 132",
        "  backward: no kernel, for head_dim: 264 is not supported, expected at most 256",
    ]
    launch = launch._replace(num_splits=8, num_tiles=756, num_split_tiles=12)
    assert "a time, 12 of them cut into 8 parts each: 756 in 5.73 waves" in plan.explain(device="cuda")
    launch = launch._replace(num_splits=1, num_tiles=672, num_split_tiles=0)
    assert "a time: 672 in 5.09 waves" in plan.explain(device="cuda")
    launch = launch._replace(family="portable", why="the plan has too many segments")
    assert "forward: portable kernel, tiles of 192" in plan.explain(device="cuda")
    assert "of 132; no faster one, for the plan has too many segments" in plan.explain(device="cuda")
    lines = plan.explain(device="cuda", dtype=torch.float64).splitlines()[-2:]
    assert lines == ["  forward: the reference", "  backward: the reference"]


@pytest.mark.parametrize(("width", "seen"), [(None, 72), (64, 64), (20, 72), (80, 80)])
def test_explain_asks_about_the_width_of_values(monkeypatch, width, seen):
    """As a call would be served: values that Hopper's kernels cannot load are filled up to where they can."""
    asked = []
    monkeypatch.setattr(ops, "has_kernels", lambda *_: True)
    monkeypatch.setattr(ops._C, "cuda_kernel", lambda *call: ("portable" if call[2] % 8 else "hopper", ""))
    monkeypatch.setattr(
        ops._C, "cuda_launch", lambda dtype, shape, *_: asked.append(shape[4:]) or ("hopper", "", 1, 1, 1, 1, 1, 0)
    )
    plan = ma.AttentionPlan.compile([A, B], [pattern("ab", "a")])
    assert "forward: hopper kernel" in plan.explain(device="cuda:0", head_dim=72, head_dim_v=width)
    assert asked == [(72, seen)] * 4  # two passes, and the same with tangents


def test_no_tokens_at_all():
    plan = ma.AttentionPlan.compile([], [])
    assert (plan.num_queries, plan.num_keys, plan.flat(), plan.num_pairs()) == (0, 0, [], 0)
    assert plan.mask().shape == (0, 0)
    q = torch.empty(2, 0, 3, 8)
    assert ma.attention(q, q, q, plan).shape == (2, 0, 3, 8)


def test_kept_arguments_are_known_by_what_they_are(monkeypatch):
    """Arguments whose ends are the same objects differ in the middle, in what is cached, in the flag."""
    monkeypatch.setattr(plan_module, "MANY", 0)
    middles = [ma.TokenSpec("m", size) for size in (1, 2)]
    patterns = [pattern("abm", "am")]
    for _ in range(2):
        for middle in middles:
            assert ma.AttentionPlan.compile([A, middle, B], patterns).num_keys == 7 + middle.size
    unread = [A, C, B], [pattern("acb", "a")]
    for _ in range(2):
        sizes = [ma.AttentionPlan.compile(*unread, skip_unread_keys=flag).num_keys for flag in (False, True)]
        assert sizes == [9, 3]
    specs, patterns = [A, ma.TokenSpec("b", None), C], [pattern("abc", "b")]
    for size in (4, 5, 4, 5):
        assert ma.AttentionPlan.compile(specs, patterns, cached=[ma.TokenSpec("b", size)]).num_keys == 5 + size


def test_kept_arguments_may_be_changed_afterwards(monkeypatch):
    monkeypatch.setattr(plan_module, "MANY", 0)
    specs, patterns = [A, B], [pattern("a", "a"), pattern("b", "b")]
    before = ma.AttentionPlan.compile(specs, patterns)
    specs.insert(1, C)
    patterns.insert(1, pattern("c", "c"))
    assert ma.AttentionPlan.compile(specs, patterns).num_queries == 9
    assert before.num_queries == 7
    flat = before.flat()
    flat[0] = 99
    assert before.flat() == [0, 3, 1, 0, 3, 3, 7, 1, 3, 7]


def test_plans_can_be_replaced_and_copied_without_what_they_keep():
    plan = ma.AttentionPlan.compile([A, B], [pattern("ab", "a")])
    hash(plan), plan.flat()
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan and hash(other) == hash(plan) and other.flat() == plan.flat()
    shorter = replace(plan, query_segments=plan.query_segments[:0])
    assert shorter != plan and shorter.flat() == []
    assert b"_hash" not in pickle.dumps(plan)  # hashes of strings differ between processes


def steps(work: Callable[[], object]) -> int:
    """How many instructions of the plan's own code a piece of work takes."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != plan_module.__file__:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def many_groups(kind: str, num_groups: int) -> tuple[list[ma.TokenSpec], list[ma.AttentionPattern]]:
    """Patterns that name few groups each, but for one, or one group very often."""
    names = [f"{kind}{i}" for i in range(num_groups)]
    patterns = {
        "self": [([name], [name]) for name in names],
        "pooled": [([name], [name, names[0]]) for name in names[1:]] + [(names[:1], names)],
        "window": [([name], names[max(i - 2, 0) : i + 3]) for i, name in enumerate(names)],
        "repeats": [(names, [names[0]] * num_groups)],
        "alternate": [(names[::2], names[1:3]), (names[1::2], names[:2])],
    }[kind]
    return [ma.TokenSpec(name, 3) for name in names], [ma.AttentionPattern(*each) for each in patterns]


@pytest.mark.parametrize("kind", ["self", "pooled", "window", "repeats", "alternate"])
def test_work_is_linear_in_the_groups(kind):
    def work(arguments):
        plan = ma.AttentionPlan.compile(*arguments)
        return plan.flat(), plan.num_pairs(), plan.key_segments, hash(plan)

    steps(lambda: work(many_groups(kind, 40)))  # NOTE: Python 3.12.1 tells of instructions from the second time on
    few, many = (steps(lambda n=n: work(many_groups(kind, n))) for n in (50, 200))
    assert many < 4.5 * few
    few, many = (steps(ma.AttentionPlan.compile(*many_groups(kind, n)).explain) for n in (50, 200))
    assert many < 4.5 * few


def rows_of(plan: ma.AttentionPlan) -> list[tuple[int, int, list[tuple[int, int]]]]:
    return [(s.start, s.end, list(s.key_ranges)) for s in plan.query_segments]


@given(case=cases())
def test_row_ranges_say_the_same_as_the_names_they_came_from(case: Case):
    named = case.plan
    plan = ma.AttentionPlan.from_segments(rows_of(named), named.num_keys)
    assert plan.flat() == named.flat()
    assert (plan.num_queries, plan.num_keys, plan.num_pairs()) == (named.num_queries, named.num_keys, named.num_pairs())
    assert torch.equal(plan.mask(), named.mask())
    check_key_segments(plan, case)


def test_attention_by_row_ranges_is_that_by_names():
    case = Case((33, 17, 20, 9), "ab>acc cd>ca", batch_size=2, num_heads=2, head_dim=20)
    inputs = make_inputs(case)
    rows = ma.AttentionPlan.from_segments(rows_of(case.plan), case.plan.num_keys)
    arguments = inputs.q, inputs.k, inputs.v
    assert torch.equal(ma.attention(*arguments, rows), ma.attention(*arguments, case.plan))


def test_row_ranges_in_any_order_overlapping_and_without_keys():
    plan = ma.AttentionPlan.from_segments([(0, 3, [(4, 7), (0, 5)]), (3, 5, []), (5, 5, [(1, 2)]), (5, 9, [(7, 7)])])
    assert (plan.num_queries, plan.num_keys, plan.num_pairs()) == (9, 7, 24)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator, dtype=torch.float64) for n in (9, 7, 7))
    out, lse = ma.attention(q, k, v, plan, return_lse=True)
    expected, expected_lse = ma.reference.attention(q, k, v, plan, return_lse=True)
    torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=1e-12, atol=1e-13)
    assert not out[:, 3:].any() and lse[:, :, 3:].isneginf().all()
    assert out[:, :3].ne(0).all()


def test_plans_of_row_ranges_are_values_and_explain_themselves():
    segments = [(0, 3, [(0, 2)]), (3, 5, [(0, 2), (4, 6)])]
    plan = ma.AttentionPlan.from_segments(segments, num_keys=8)
    again = ma.AttentionPlan.from_segments([(s, e, tuple(keys)) for s, e, keys in segments], 8)
    assert plan == again and hash(plan) == hash(again) == hash(pickle.loads(pickle.dumps(plan)))
    assert plan != ma.AttentionPlan.from_segments(segments)
    assert plan.explain().splitlines() == [
        "2 segments: 5 queries, 8 keys, 14 attended pairs",
        "  queries [0, 3) -> keys [0, 2)",
        "  queries [3, 5) -> keys [0, 2) + [4, 6)",
        "  keys that nobody attends to: [2, 4), [6, 8)",
    ]
    with pytest.raises(ValueError, match=r"no token groups to draw; plan.mask\(\)"):
        plan.plot("never.png")
    assert ma.AttentionPlan.from_segments([]) == ma.AttentionPlan.compile([], [])


SEGMENT_ERRORS = {
    "gap": ([(0, 3, [(0, 3)]), (4, 6, [])], None, ValueError, r"segments\[1\]: queries \[4, 6\) do not begin at row 3"),
    "overlap": ([(0, 3, []), (2, 6, [])], None, ValueError, "do not begin at row 3; segments must cover the queries"),
    "late": ([(1, 3, [])], None, ValueError, "do not begin at row 0"),
    "backwards": ([(0, 3, [(2, 1)])], None, ValueError, r"segments\[0\]: the range \[2, 1\) ends before it begins"),
    "queries backwards": ([(0, -1, [])], None, ValueError, "row numbers of at least 0, got -1"),
    "outside": ([(0, 3, [(0, 9)])], 8, ValueError, r"key range \[0, 9\) is not within the 8 keys"),
    "negative": ([(0, 3, [(-1, 2)])], None, ValueError, "row numbers of at least 0, got -1"),
    "float": ([(0, 3.0, [])], None, ValueError, "expected integers, got 3.0"),
    "bool": ([(0, True, [])], None, ValueError, "expected integers, got True"),
    "num_keys": ([(0, 3, [])], 3.0, ValueError, "num_keys: expected integers, got 3.0"),
    "one range for a list": ([(0, 3, (0, 3))], None, TypeError, r"expected \(q_start, q_end, \[\(k_start"),
    "pair": ([(0, 3)], None, TypeError, r"segments\[0\]: expected \(q_start"),
    "triple of keys": ([(0, 3, [(0, 1, 2)])], None, TypeError, r"segments\[0\]: expected \(q_start"),
    "number": ([7], None, TypeError, r"segments\[0\]: expected \(q_start"),
    "no list": (7, None, TypeError, "segments: expected a list or a tuple, got int"),
}


@pytest.mark.parametrize("name", SEGMENT_ERRORS)
def test_errors_of_row_ranges(name):
    segments, num_keys, kind, message = SEGMENT_ERRORS[name]
    with pytest.raises(kind, match=message):
        ma.AttentionPlan.from_segments(segments, num_keys)


def test_row_numbers_of_any_integer_class():
    numpy = pytest.importorskip("numpy")
    ends = numpy.array([0, 3, 7])
    plan = ma.AttentionPlan.from_segments([(a, b, [(a, b)]) for a, b in zip(ends, ends[1:])], torch.tensor(9))
    assert plan == ma.AttentionPlan.from_segments([(0, 3, [(0, 3)]), (3, 7, [(3, 7)])], 9)
    assert {type(number) for number in plan.flat()} == {int}


ERRORS = {
    "asks twice": ([A, B], ["ab>a", "b>a"], "'b' cannot be a query in multiple"),
    "named twice in one pattern": ([A, B], ["abb>a"], "'b' cannot be a query in multiple"),
    "asks nowhere": ([A, B, C], ["ab>a"], r"set of query tokens must exactly match .* in no pattern: \['c'\]"),
    "no patterns": ([A], [], r"set of query tokens must exactly match .* in no pattern: \['a'\]"),
    "unknown query": ([A], ["ab>a"], r"set of query tokens must exactly match .* not in token_specs: \['b'\]"),
    "unknown key": ([A], ["a>ab"], "'b' is not defined in `token_specs`"),
    "no keys": ([A], ["a>"], "attention pattern 0 has no key_value_tokens"),
    "no queries": ([A], ["a>a", ">a"], "attention pattern 1 has no query_tokens"),
    "a name twice": ([A, A], ["a>a"], "'a' stands more than once"),
    "no size": ([ma.TokenSpec("a", None), B], ["ab>a"], "'a' has size None and no entry in `cached`"),
    "twice and unknown": ([A], ["aa>b"], "cannot be a query in multiple"),
    "missing and unknown key": ([A, B], ["a>z"], "set of query tokens must exactly match"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    specs, patterns, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        ma.AttentionPlan.compile(specs, [pattern(*p.split(">")) for p in patterns])


def test_specs_and_plans_need_no_compiled_part():
    code = (
        "import sys; sys.modules['mixed_attention._C'] = None\n"
        "import mixed_attention as ma\n"
        "plan = ma.AttentionPlan.compile([ma.TokenSpec('a', 2)], [ma.AttentionPattern(['a'], ['a'])])\n"
        "assert plan.flat() == [0, 2, 1, 0, 2] and not ma.ops.is_compiled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_mean_what_their_patterns_say(name):
    """Guards the tables of the operator's tests: no case is another one by mistake."""
    case = EDGE_CASES[name]
    assert torch.equal(multiplicities(case.plan), counts(case))
    assert len(case.sizes) <= len(NAMES)
