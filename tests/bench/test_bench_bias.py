"""The benchmark of a bias of squared distances: every row is there, and values filled up give the same."""

import pytest
import torch

from bench import bias, facts, tables
from bench.cases import Case
from bench.peers import BACKWARD, FORWARD

CASE = Case("self", 2, 3, 16, {"sa": 20, "va": 10}, ((("sa",), ("sa", "va")), (("va",), ("va",))))


def test_rows():
    rows = list(bias.measure(CASE, torch.device("cpu"), "float32", 2))
    who = ["ours", "ours, bias", "ours, bias, values as wide"]
    assert [(row["pass"], row["who"]) for row in rows] == [(p, name) for p in (FORWARD, BACKWARD) for name in who]
    assert all(row["ratio"] == pytest.approx(1) for row in rows if row["who"] == "ours")
    table = tables.tables({**facts.of_run("bench", torch.device("cpu"), "a commit"), "rows": rows})
    assert "### A bias of squared distances, fp32, forward" in table
    assert "of the same without" in tables.line(rows[0])


def test_values_filled_up_give_the_same():
    plain, biased, filled = (
        call.passes()[FORWARD]() for call in bias.calls_of(CASE, torch.device("cpu"), torch.float32).values()
    )
    torch.testing.assert_close(filled[..., :16], biased)
    assert not torch.allclose(plain, biased)
