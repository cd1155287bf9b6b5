"""The code in README.md and in docs/derivatives.md runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


BLOCKS = blocks_of("README.md")


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


def test_recipes_of_derivatives_run():
    namespace = {"__name__": "derivatives"}
    blocks = blocks_of("docs/derivatives.md")
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        exec(compile(block, f"docs/derivatives.md, block {index}", "exec"), namespace)
    assert namespace["u"].shape == (1, 10_000, 3)
    assert namespace["loss"].requires_grad
    assert namespace["product"].shape == namespace["q"].shape
