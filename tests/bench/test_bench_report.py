"""Result files: what they say of their run, where they lie, and the tables and the page made of them."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import facts, files, picture, report, tables

MILLISECONDS = {"lower": 9.0, "upper": 11.0, "rounds": 5}


def row(kind, who, median=10.0, **more):
    times = {"milliseconds": {"median": median, **MILLISECONDS}}
    return {"kind": kind, "case": "some case", "who": who, "dtype": "float16", **times, **more}


def lines_of(rows, title):
    """The table under a title, a list of cells each line."""
    result = facts.of_run("bench", torch.device("cpu"), "0123456789abcdef") | {"rows": rows}
    section = next(part for part in tables.tables(result).split("### ") if part.startswith(title))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]


def test_a_file_says_what_was_run_but_not_where_it_was_put(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--out", "somewhere.json", "--rounds", "3", "--commit", "abc"])
    device = torch.device("cpu")
    result = facts.of_run("bench.noether", device, "abc")
    assert result["command"] == "python -m bench.noether --rounds 3"
    assert result["commit"] == "abc"
    assert result["versions"]["torch"] == torch.__version__
    facts.save(result, device, "operator", tmp_path / "made" / "result.json")
    assert json.loads((tmp_path / "made" / "result.json").read_text()) == result
    assert "commit abc" in capsys.readouterr().out


def test_the_layer_is_compared_with_everybody_and_with_its_attention():
    rows = [
        row("layer", who, median, **{"pass": "forward", "gflops_per_second": 1e6 / median, "peak_bytes": peak})
        for who, median, peak in (("ours", 10.0, 2**20), ("noether", 15.0, 2**22), ("noether, compiled", 13.0, 2**21))
    ]
    rows.append(row("layer", "ours, without the skip", 12.0, **{"pass": "forward", "gflops_per_second": 8e4}))
    rows.append(row("layer", "ours, attention alone", 8.0, **{"pass": "forward", "gflops_per_second": 1e5}))
    head, _, cells = lines_of(rows, "The layer, fp16, forward")
    assert head[-2:] == ["ours is faster", "beside attention"]
    assert cells[-2:] == ["1.50 × noether, 1.30 × noether, compiled, 1.20 × ours, without the skip", "25 %"]
    _, _, cells = lines_of(rows, "Peak memory of the layer")
    assert cells == ["some case", "1", "4", "2", "0.25 × noether, 0.50 × noether, compiled"]


def test_columns_without_a_word_are_left_out():
    head, *_ = lines_of([row("layer", "ours", **{"pass": "forward", "gflops_per_second": 1e5})], "The layer")
    assert head == ["case", "ours"]


def test_the_model():
    rows = [
        row("difference", who, errors={"predictions": {"relative": error}, "gradients": {"relative": 2 * error}})
        for who, error in (("noether", 1e-3), ("ours", 2e-3))
    ]
    rows.append(row("losses", "ours", losses=[3 - i / 8 for i in range(12)], distance=4e-4))
    rows += [row("model", "noether", 20.0), row("model", "ours", 10.0)]
    assert lines_of(rows, "AB-UPT, fp16, relative difference")[2:] == [
        ["predictions", "1.0e-03", "2.0e-03"],
        ["gradients", "2.0e-03", "4.0e-03"],
    ]
    assert lines_of(rows, "AB-UPT, fp16, losses")[2:] == [
        ["step 1", "3.00000"],
        ["step 10", "1.87500"],
        ["step 12", "1.62500"],
        ["distance from fp32", "4.0e-04"],
    ]
    assert lines_of(rows, "AB-UPT, fp16, milliseconds")[2] == [
        "some case",
        "20 (9 – 11)",
        "10 (9 – 11)",
        "2.00 × noether",
    ]
    for each in rows:
        assert each["who"] in tables.line(each)


def test_repetitions():
    facts = {"repeats": 100, "pass": "backward"}
    rows = [
        row("repeats", "ours", unequal=7, largest_difference=1.3e-3, **facts),
        row("repeats", "ours, deterministic", unequal=0, largest_difference=0.0, **facts),
    ]
    head, _, cells = lines_of(rows, "Repetitions with other bits than the first, fp16")
    assert head == ["case", "backward", "backward, deterministic"]
    assert cells == ["some case", "7 of 100, 1.3e-03", "0 of 100"]
    assert "7 of 100" in tables.line(rows[0])


def test_the_time_of_a_training_step():
    buckets = {"rotation": 1.5, "idle": 0.25}
    rows = [row("timeline", who, time, buckets=buckets) for who, time in (("ours", 10), ("noether", 11))]
    head, _, *cells = lines_of(rows, "The GPU's time of a training step, fp16, milliseconds")
    assert head == ["case", "rotation", "idle", "in all"]
    assert cells == [
        ["some case, ours", "1.500", "0.250", "10.000"],
        ["some case, noether", "1.500", "0.250", "11.000"],
    ]
    assert "rotation 1.500" in tables.line(rows[0])


NAMES = [
    ("NVIDIA H200", True, "h200"),
    ("NVIDIA H100 80GB HBM3", True, "h100"),
    ("NVIDIA GeForce RTX 4090", True, "geforce-rtx-4090"),
    ("Intel(R) Xeon(R) Processor", False, "xeon-amx"),
    ("Intel(R) Core(TM) i7-9700 CPU @ 3.00GHz", False, "core-i7-9700-amx"),
    ("AMD EPYC", False, "epyc-amx"),
]


@pytest.mark.parametrize(("device", "is_gpu", "folder"), NAMES, ids=[folder for *_, folder in NAMES])
def test_a_file_lies_in_the_folder_of_its_machine(device, is_gpu, folder):
    versions = {"CUDA": "13.0"} if is_gpu else {}
    result = {"device": device, "cpu_instruction_set": "AMX", "versions": versions}
    assert files.place(result, "operator-bf16") == files.RESULTS / folder / "operator-bf16.json"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--what", "operator", "--dtype", "float32", "tf32"], "operator-fp32-tf32"),
        (["--what", "operator", "layer", "--dtype", "bfloat16"], "operator-layer-bf16"),
        (["--what", "layer", "--dtype", "float16", "--compiled"], "layer-fp16-compiled"),
        (["--what", "host", "repeats"], "host-repeats"),
        (["--quick"], "operator-bf16-quick"),
        (["--what", "operator", "--dtype", "float16", "--case", "abupt-self"], "operator-fp16-selected"),
    ],
)
def test_the_name_of_a_file_says_what_was_measured(arguments, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *arguments])
    monkeypatch.delenv("MIXED_ATTENTION_GPU", raising=False)
    assert command._name(command._arguments()) == name


def test_other_kernels_have_files_of_their_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--what", "operator", "--dtype", "bfloat16"])
    monkeypatch.setenv("MIXED_ATTENTION_GPU", "portable")
    assert command._name(command._arguments()) == "operator-bf16-portable"


@pytest.mark.parametrize("number_of_rows", [0, 1, 3])
def test_a_file_has_a_line_for_each_row_and_keeps_every_digit(number_of_rows, tmp_path):
    result = facts.of_run("bench", torch.device("cpu"), "abc")
    result["rows"] = [row("layer", "ours", 1 / 3 + i, note='a "×" [, ]') for i in range(number_of_rows)]
    files.save(result, tmp_path / "machine" / "what.json")
    lines = (tmp_path / "machine" / "what.json").read_text().splitlines()
    assert files.load(tmp_path / "machine" / "what.json") == result
    assert [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"kind"')] == result["rows"]


RESULTS = sorted(files.RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_results_lie_where_they_belong_in_the_form_that_is_written(path):
    result = files.load(path)
    assert files.place(result, path.stem) == path
    assert files.text(result) == path.read_text()


def some_results():
    rates = {"pass": "forward", "gflops_per_second": 1e5}
    rows = [row("operator", who, median, **rates) for who, median in (("ours", 10), ("fa4", 15), ("cudnn", 20))]
    rows += [row("operator", "ours", 8, mode="graph", **rates | {"gflops_per_second": 2e5})]
    rows += [row("operator", "fa4 varlen", 12, mode="graph", **rates)]
    result = facts.of_run("bench", torch.device("cpu"), "0123456789abcdef") | {"rows": rows}
    return {Path("a/operator-bf16.json"): result | {"date": "2026-01-01"}, Path("b/unasked.json"): result}


def test_the_page_answers_a_question_with_its_source():
    page = report.page(some_results())
    section = next(part for part in page.split("\n## ") if part.startswith("How fast is the operator in bf16?"))
    assert "| case | ours | cuDNN | FA4 | ours, graph | FA4 varlen, graph | ours / best other | by graph |" in section
    assert "| some case | 100 | 100 | 100 | 200 | 100 | 1.50 × FA4 | 1.50 × FA4 varlen |" in section
    assert "2026-01-01, commit 0123456789ab; [all numbers](performance/a-operator-bf16.md)" in section
    assert some_results()[Path("a/operator-bf16.json")]["command"] in section


def test_the_page_links_to_what_it_does_not_show():
    assert "- [b, unasked](performance/b-unasked.md)" in report.page(some_results())


def test_the_newest_machine_comes_first():
    older, newer = (some_results()[Path("a/operator-bf16.json")] | {"date": f"2026-01-0{day}"} for day in (1, 2))
    page = report.page({Path("a/operator-bf16.json"): older, Path("b/operator-bf16.json"): newer})
    assert page.index("b-operator-bf16.md") < page.index("a-operator-bf16.md")


def test_pages_that_were_written_are_those_of_the_results():
    results = {path: files.load(path) for path in RESULTS}
    assert (report.DOCS / report.PAGE).read_text() == report.page(results)
    details = {path.name for path in (report.DOCS / report.DETAILS).glob("*.md")}
    assert details == {f"{path.parent.name}-{path.stem}.md" for path in RESULTS}


def test_the_picture_has_the_ratios_of_eager_calls():
    rows = some_results()[Path("a/operator-bf16.json")]["rows"]
    assert list(picture.ratios(rows, ("cudnn", "fa3", "fa4"))) == [
        ("some case", "cudnn", 2.0),
        ("some case", "fa4", 1.5),
    ]


def test_the_same_numbers_give_the_same_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        picture.draw(some_results(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
