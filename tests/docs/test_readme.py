"""The code in README.md runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index):
    exec(compile(BLOCKS[index], f"README.md, block {index}", "exec"), {"__name__": "readme"})


def test_its_formula_is_ours():
    import torch

    import mixed_attention as ma

    namespace = {"torch": torch}
    exec(BLOCKS[2], namespace)
    q, k, v = torch.randn(3, 2, 4, 20, 8, dtype=torch.float64)
    plan = ma.AttentionPlan.compile([ma.TokenSpec("all", 20)], [ma.AttentionPattern(["all"], ["all"])])
    ours = ma.attention(*(t.transpose(1, 2) for t in (q, k, v)), plan).transpose(1, 2)
    torch.testing.assert_close(ours, namespace["attention"](q, k, v))
