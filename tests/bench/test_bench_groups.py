"""The benchmark of many groups: what is called once for all of them computes the same."""

import pytest
import torch

from bench import groups


@pytest.mark.parametrize("case", groups.CPU_CASES, ids=lambda case: case.name)
def test_rows(case, monkeypatch):
    monkeypatch.setattr(groups, "CPU_CASES", (case,))
    rows = list(groups.measure(torch.device("cpu"), "float32", 2))
    errors = [row for row in rows if row["kind"] == "error"]
    is_batch = "pooled" not in case.name
    assert [row["who"] for row in errors] == ["ours", *["sdpa, one batch"] * is_batch]
    for row in errors:
        assert all(error["relative"] < 1e-5 for error in row["errors"].values())
    timed = {(row["who"], row["pass"]) for row in rows if row["kind"] == "operator"}
    assert {("ours", "forward"), ("ours", "backward")} <= timed
    assert (("sdpa, one batch", "backward") in timed) == is_batch


def test_cases_are_what_their_names_say():
    case = groups.GPU_CASES[-1]
    assert case.name == "128 x 512 + 2048 pooled, 8 x 32"
    assert case.num_tokens == 128 * 512 + 2048
    assert case.flops(backward=False) == 4 * 8 * 32 * (128 * 512 * (512 + 2048) + 2048**2)
