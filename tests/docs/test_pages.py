"""The code on pages that are recipes runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["ragged.md", "precision.md"])
def test_blocks_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    for index, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {index}", "exec"), {"__name__": "page"})
