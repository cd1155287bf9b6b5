"""What the pages tell readers to run is there: targets of make, modules, scripts, options and variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(page for page in sorted(ROOT.glob("*.md")) if page.name != "CHANGELOG.md"),  # which tells of the past, too
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "airfoil" / "README.md",
]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
SOURCES = [
    *(ROOT / "csrc").rglob("*.*"),
    *(path for folder in ("bench", "examples", "mixed_attention", "tools") for path in (ROOT / folder).rglob("*.*")),
    ROOT / "setup.py",
    ROOT / "Makefile",
    ROOT / "CMakeLists.txt",
]
OURS = ("bench", "examples", "mixed_attention")
COMMAND = re.compile(r"(?:^|\s)((?:[A-Z_]+=\S+ )*(?:\S*/)?(?:make|python3?) .*)")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in code of a page, without what the shell would take for a comment."""
    text = page.read_text()
    blocks = re.findall(r"^ *```(?:\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^    (?=\S)(.*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in lines:
        found = COMMAND.match(line)
        if found and not line.lstrip().startswith(("#", ">>>")):
            try:
                yield shlex.split(found[1], comments=True)
            except ValueError:  # prose, or a program in another language
                continue


def test_commands_are_found():
    found = [words for page in PAGES for words in commands(page)]
    assert ["make", "demo"] in found and ["python", "-m", "mixed_attention"] in found
    assert len(found) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    for words in commands(page):
        variables = [word.split("=")[0] for word in words if re.fullmatch(r"MIXED_ATTENTION_\w+=.*", word)]
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        program, *arguments = words
        if program == "make":
            targets = [word for word in arguments if "=" not in word]
            assert set(targets) <= TARGETS, words
        elif arguments[:1] == ["-m"]:
            module, *rest = arguments[1:]
            if module.split(".")[0] in OURS:
                check_module(module, rest)
            elif module == "pytest":
                paths = [word for word in rest if word.startswith("tests")]
                assert all((ROOT / path.split("::")[0]).exists() for path in paths), words
        elif arguments and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists() or "/" not in arguments[0], words
        for variable in variables:
            assert mentions(variable), variable


def check_module(module: str, rest: list[str]) -> None:
    """A module of ours can be run, and knows the options."""
    path = ROOT / module.replace(".", "/")
    files = [path / "__main__.py"] if path.is_dir() else [path.with_suffix(".py")]
    assert files[0].exists(), module
    text = files[0].read_text()
    for option in {word.split("=")[0] for word in rest if word.startswith("--")} - {"--help"}:
        assert f'"{option}"' in text, (module, option)


def mentions(variable: str) -> bool:
    """Whether some source reads a variable of the environment."""
    return any(variable.encode() in path.read_bytes() for path in SOURCES if path.is_file())


def test_every_target_of_make_is_explained():
    explained = set(re.findall(r"^\| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE))
    named = {name for cell in explained for name in re.findall(r"`([\w-]+)`", cell)}
    hidden = {"clean"}
    assert named >= TARGETS - hidden
