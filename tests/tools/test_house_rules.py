"""What CONTRIBUTING.md asks of sources that no linter looks at: comments, assertions, lengths."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("csrc", "mixed_attention", "kernels", "bench", "tools", "examples", "tests")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for pattern in ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    for path in (ROOT / folder).rglob(pattern)
    if "build" not in path.parts
)
NATIVE = [path for path in SOURCES if path.suffix != ".py"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = 100  # of a function outside kernels

STARTS_WITH_OF = re.compile(r"(?:^|[.!?:;] )Of (?=\S)", re.MULTILINE)


def place(path: Path, text: str, offset: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, offset) + 1}"


def comments(path: Path) -> Iterator[str]:
    """The comments of a file, a block of lines each, without their marks."""
    mark = r"#:?" if path.suffix == ".py" else "//"
    text = path.read_text()
    for block in re.finditer(rf"(?:^[ \t]*{mark} .*\n)+|(?<=\S)[ \t]+{mark} .*$", text, re.MULTILINE):
        yield re.sub(rf"\s*\n\s*{mark} ", " ", re.sub(rf"^\s*{mark} ", "", block[0].rstrip("\n")))
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield " ".join((ast.get_docstring(node) or "").split())


def long_functions(path: Path, most: int) -> Iterator[str]:
    """Functions with more lines; those of C++ begin and end at the margin, as clang-format sets them."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= most:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        return
    begin = 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("}"):
            is_function = re.match(r"(?!struct|class|enum|union|namespace).*\(", lines[begin])
            if is_function and number - begin >= most:
                yield f"{path.relative_to(ROOT)}:{begin + 1}"
            begin = number
        elif re.match(r"[A-Za-z]", line) and not line.startswith("template"):
            begin = number


def test_no_comment_opens_with_of():
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in SOURCES
        for text in comments(path)
        if STARTS_WITH_OF.search(text)
    ]
    assert not found, "\n".join(found)


def test_no_sentence_of_a_page_opens_with_of():
    found = []
    for path in PAGES:
        paragraphs = re.split(r"\n\s*\n|\n(?=- )", path.read_text())
        found += [f"{path.name}: {text}" for text in paragraphs if STARTS_WITH_OF.search(" ".join(text.split()))]
    assert not found, "\n".join(found)


def test_every_static_assertion_says_what_went_wrong():
    found = []
    for path in NATIVE:
        text = path.read_text()
        for match in re.finditer(r"\bstatic_assert\((.*?)\);", text, re.DOTALL):
            if '"' not in match[1]:
                found.append(place(path, text, match.start()))
    assert not found, "without a message: " + ", ".join(found)


def test_functions_outside_kernels_are_short():
    sources = [path for path in SOURCES if path.suffix not in (".cu", ".cuh") and not path.stem.endswith("_kernel")]
    found = [each for path in sources for each in long_functions(path, MOST_LINES)]
    assert not found, f"longer than {MOST_LINES} lines: " + ", ".join(found)


@pytest.mark.parametrize("suffix", [".py", ".cpp"])
def test_a_long_function_is_found(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("test_house_rules.ROOT", tmp_path)
    body = "  int x = 0;\n" * 98
    lines = (
        "def long():\n" + "    x = 0\n" * 100
        if suffix == ".py"
        else f"int longest(int a,\n            int b) {{\n{body}}}\n"
    )
    path = tmp_path / f"file{suffix}"
    path.write_text(lines)
    assert list(long_functions(path, 101)) == []
    assert len(list(long_functions(path, 100))) == 1


@pytest.mark.parametrize(
    "text, is_found",
    [
        ("// Of a row.\n", True),
        ("int x;  // Of a row\n", True),
        ("// Rows.\n// Of a row\n", True),
        ("// Office\n", False),
    ],
)
def test_a_comment_that_opens_with_of_is_found(tmp_path, text, is_found):
    path = tmp_path / "file.cpp"
    path.write_text(text)
    assert any(STARTS_WITH_OF.search(comment) for comment in comments(path)) == is_found
