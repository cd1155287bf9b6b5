"""What a newcomer's machine sees: import without the compiled part, pure modules, metadata."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

WITHOUT_COMPILED_PART = """
import sys
sys.modules["mixed_attention._C"] = None  # what an import of a missing module runs into
import torch
import mixed_attention as ma

specs, patterns = [ma.TokenSpec("a", 4)], [ma.AttentionPattern(["a"], ["a"])]
plan = ma.AttentionPlan.compile(specs, patterns)
q = torch.randn(1, 4, 2, 8)
assert ma.reference.attention(q, q, q, plan).shape == q.shape
try:
    ma.attention(q, q, q, plan)
except ImportError as error:
    assert "make build" in str(error), error
else:
    raise AssertionError("attention answered without its kernels")
"""


def test_import_without_the_compiled_part_says_on_use_what_to_do():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILED_PART], check=True, cwd=ROOT)


def test_every_module_is_in_the_package():
    # setuptools is told the packages by name: a new folder would be left out of the wheel without a word.
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "mixed_attention").rglob("*.py")
    }
    assert all(f'"{folder}"' in (ROOT / "pyproject.toml").read_text() for folder in folders)
