"""Result files: what they say of their run, and the tables made of them."""

import json
import sys

import torch

from bench import facts, report

MILLISECONDS = {"lower": 9.0, "upper": 11.0, "rounds": 5}


def row(kind, who, median=10.0, **more):
    times = {"milliseconds": {"median": median, **MILLISECONDS}}
    return {"kind": kind, "case": "some case", "who": who, "dtype": "float16", **times, **more}


def lines_of(rows, title):
    """The table under a title, a list of cells each line."""
    result = facts.of_run("bench", torch.device("cpu"), "0123456789abcdef") | {"rows": rows}
    section = next(part for part in report.tables(result).split("### ") if part.startswith(title))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]


def test_a_file_says_what_was_run_but_not_where_it_was_put(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--out", "somewhere.json", "--rounds", "3", "--commit", "abc"])
    device = torch.device("cpu")
    result = facts.of_run("bench.noether", device, "abc")
    assert result["command"] == "python -m bench.noether --rounds 3"
    assert result["commit"] == "abc"
    assert result["versions"]["torch"] == torch.__version__
    facts.save(result, device, tmp_path / "made" / "result.json")
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
        assert each["who"] in report.line(each)


def test_repetitions():
    facts = {"repeats": 100, "pass": "backward"}
    rows = [
        row("repeats", "ours", unequal=7, largest_difference=1.3e-3, **facts),
        row("repeats", "ours, deterministic", unequal=0, largest_difference=0.0, **facts),
    ]
    head, _, cells = lines_of(rows, "Repetitions with other bits than the first, fp16")
    assert head == ["case", "backward", "backward, deterministic"]
    assert cells == ["some case", "7 of 100, 1.3e-03", "0 of 100"]
    assert "7 of 100" in report.line(rows[0])


def test_the_time_of_a_training_step():
    buckets = {"rotation": 1.5, "idle": 0.25}
    rows = [row("timeline", who, time, buckets=buckets) for who, time in (("ours", 10), ("noether", 11))]
    head, _, *cells = lines_of(rows, "The GPU's time of a training step, fp16, milliseconds")
    assert head == ["case", "rotation", "idle", "in all"]
    assert cells == [
        ["some case, ours", "1.500", "0.250", "10.000"],
        ["some case, noether", "1.500", "0.250", "11.000"],
    ]
    assert "rotation 1.500" in report.line(rows[0])
