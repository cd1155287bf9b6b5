"""What ends up in the distributions."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_module_is_in_the_package():
    # setuptools is told the packages by name: a new folder would be left out of the wheel without a word.
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "mixed_attention").rglob("*.py")
    }
    assert all(f'"{folder}"' in (ROOT / "pyproject.toml").read_text() for folder in folders)


def test_every_folder_is_in_the_source_distribution():
    # setuptools finds Python modules and sources of extensions, but no headers, and no CUDA kernels.
    listed = subprocess.run(["git", "ls-files", "*/*"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    folders = {path.split("/")[0] for path in listed.splitlines()} - {".ci", "mixed_attention"}
    grafted = {line.split()[1] for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line.startswith("graft")}
    assert folders <= grafted
