"""The benchmark of derivatives: every pass is there, and the peer computes the same."""

import pytest
import torch

from bench import derivatives, facts, tables
from bench.cases import Case
from bench.operator import make_inputs

CASE = Case("self", 2, 3, 16, {"sa": 20, "va": 10}, (((("sa",), ("sa", "va"))), ((("va",), ("va",)))))


def test_rows():
    rows = list(derivatives.measure(CASE, torch.device("cpu"), "float32", 2))
    found = {(row["who"], row["pass"]): row["ratio"] for row in rows}
    assert set(found) == {(who, name) for who in ("ours", "torch, math") for name in derivatives.UNITS}
    doubled = {(row["who"], row["pass"]) for row in rows if "backwards" in row}
    assert doubled == {key for key in found if key[1].startswith("double backward")}
    table = tables.tables({**facts.of_run("bench", torch.device("cpu"), "a commit"), "rows": rows})
    for name in derivatives.UNITS:
        assert f"| self, {name} |" in table
    assert found["ours", "forward"] == found["ours", "training"] == pytest.approx(1)


def test_the_peer_computes_the_same():
    q, k, v = (leaf.detach() for leaf in make_inputs(CASE, torch.device("cpu"), torch.float32).leaves)
    ours = derivatives.ma.attention(q, k, v, CASE.plan)
    torch.testing.assert_close(derivatives._by_torch(CASE, q, k, v), ours, rtol=1e-4, atol=1e-5)
