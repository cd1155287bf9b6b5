"""The benchmark of repetitions: what it counts, and that ours repeats itself on a CPU."""

import pytest
import torch

from bench import __main__ as command
from bench import repeats


def test_it_counts_other_bits_and_measures_how_far_they_are_off():
    first = [torch.tensor([1.0, -4.0]), torch.tensor([0.0, 0.5], dtype=torch.bfloat16)]
    off = [first[0] + torch.tensor([0.0, 1.0]), first[1]]
    minus_zero = [first[0], -first[1] + torch.tensor([-0.0, 1.0], dtype=torch.bfloat16)]
    calls = iter([first, first, off, first, minus_zero, first])
    assert repeats.compare(lambda: next(calls), 5) == (2, 0.25)


def test_nan_is_equal_to_itself_but_not_to_a_number():
    nan, number = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])
    assert repeats.compare(lambda: [nan], 3)[0] == 0
    calls = iter([[number], [nan]])
    unequal, difference = repeats.compare(lambda: next(calls), 1)
    assert unequal == 1 and difference != difference


def test_rows():
    rows = list(repeats.measure(torch.device("cpu"), 3))
    assert [(row["who"], row["pass"]) for row in rows[:3]] == [
        ("ours", "forward"),
        ("ours", "backward"),
        ("ours, deterministic", "backward"),
    ]
    assert len(rows) == 3 * len(repeats.KERNELS)
    assert all(row["repeats"] == 3 and row["unequal"] == 0 and row["largest_difference"] == 0 for row in rows)


@pytest.mark.parametrize(("promised", "unequal", "fails"), [(True, 1, True), (True, 0, False), (False, 1, False)])
def test_the_command_fails_where_a_promise_is_broken(promised, unequal, fails):
    row = {"kind": "repeats", "who": "ours", "promised": promised, "unequal": unequal}
    assert command._is_a_failure(row) == fails
