"""The benchmark of ragged batches: both forms are the same batch, and how full the padded one is."""

import pytest
import torch

from bench import ragged
from bench.cases import Case

CASES = [
    Case("self", 5, 3, 16, {"sa": 20, "va": 10}, (((("sa",), ("sa",))), ((("va",), ("va",))))),
    Case("queries", 4, 3, 16, {"sa": 20, "sq": 30}, ((("sa", "sq"), ("sa",)),)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows(case, monkeypatch):
    monkeypatch.setattr(ragged, "CPU_CASES", (case,))
    rows = list(ragged.measure(torch.device("cpu"), "float32", 2))
    passes = ("forward", "forward + backward")
    assert [(row["pass"], row["who"]) for row in rows] == [(p, w) for p in passes for w in ("ours", "padded")]
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["fill"] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("case", [*ragged.GPU_CASES, *ragged.CPU_CASES], ids=lambda case: case.name)
def test_three_fifths_of_the_padded_batch_are_tokens(case):
    problem = ragged.Problem.of(case)
    assert problem.fill == pytest.approx(0.6, abs=0.002)
    assert len(set(problem.sizes)) == case.batch_size
    assert problem.mask(torch.device("cpu")).float().mean().item() == pytest.approx(problem.fill)
