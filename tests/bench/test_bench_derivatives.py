"""The benchmark of derivatives: every pass is there, and the peer computes the same."""

import pytest
import torch

from bench import derivatives, facts, rotation, streamed, tables
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


def test_a_layer_with_and_without_tangents(monkeypatch):
    monkeypatch.setitem(streamed.SIZES, "cpu", (20, 50, 16))
    rows = list(streamed.measure(torch.device("cpu"), "float32", 2))
    assert [row["pass"] for row in rows] == [streamed.INFERENCE, streamed.TANGENTS]
    assert rows[0]["ratio"] == 1


def test_a_rotation_with_and_without_tangents(monkeypatch):
    monkeypatch.setitem(rotation.SHAPES, "cpu", (1, 9, 2, 8))
    for precision in ("float32", "bfloat16"):
        rows = list(rotation.measure(torch.device("cpu"), precision, 2))
        both = {row["pass"] for row in rows if row["who"] == rotation.CALLS}
        assert both == {row["pass"] for row in rows if row["who"] == rotation.ONE_PASS} - {"rotation"}


def test_the_largest_cases_are_for_gpus():
    sizes = {device: [case.num_tokens for case in derivatives.cases(device)] for device in ("cpu", "cuda")}
    assert sizes == {"cpu": [4096], "cuda": [16384, 65536]}
