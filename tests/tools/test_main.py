"""What the package says about itself, and how it behaves without its compiled part and its extras."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers import CROSS, SELF, Scene

import mixed_attention as ma
from mixed_attention import __main__ as main
from mixed_attention import ops
from mixed_attention.tested import TESTED

ROOT = Path(__file__).parents[2]


def run(code_or_module, *, module=False, **variables):
    arguments = ["-m", code_or_module] if module else ["-c", code_or_module]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


VARIABLES = ["MIXED_ATTENTION_CPU", "MIXED_ATTENTION_GPU"]
IN_VAIN = ["typo", "Portable", " portable"]
GRANTED = ["portable", ""]

# The report of one environment after the other, each by a child that has what its parent has imported.
REPORTS = """
import json, os, sys, tempfile
from mixed_attention import __main__ as main

def report(variables):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            sys.stdout, sys.stderr = out, err
            os.environ.update(variables)
            try:
                code = main.main()
            except SystemExit as error:
                code = error.code
            out.flush(), err.flush()
            os._exit(code or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()

print(json.dumps([report(variables) for variables in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def reports():
    """What the module prints where a variable has a value: exit status, standard output and error."""
    asked = [(variable, value) for variable in VARIABLES for value in IN_VAIN + GRANTED]
    given = json.dumps([{variable: value} for variable, value in asked])
    command = [sys.executable, "-c", REPORTS, given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return dict(zip(asked, json.loads(result.stdout)))


def test_report_of_this_machine():
    result = run("mixed_attention", module=True)
    assert result.returncode == 0, result.stderr
    for fact in (torch.__version__, ops.cpu_instruction_set(), "float32", "bfloat16", "forward, backward", "CUDA"):
        assert fact in result.stdout


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", IN_VAIN)
def test_report_of_an_environment_that_asks_in_vain_is_one_line(variable, value, reports):
    code, out, err = reports[variable, value]
    assert code == 1
    assert out == ""
    assert re.fullmatch(rf"{variable}: expected one of .*portable.*, got {value}\n", err)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", GRANTED)
def test_environments_that_ask_for_what_there_is(variable, value, reports):
    code, out, err = reports[variable, value]
    assert code == 0, err
    assert "CUDA" in out  # whether or not there is a GPU whose kernels it could name
    if variable == "MIXED_ATTENTION_CPU":
        assert value in out


ON_A_CPU = """
import torch
import mixed_attention as ma
plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 3)], [ma.AttentionPattern(["a"], ["a"])])
q = torch.ones(1, 3, 1, 8)
calls = {
    "attention": lambda: ma.attention(q, q, q, plan),
    "operator": lambda: torch.ops.mixed_attention.forward(q, q, q, plan.flat(), 1.0),
    "rotation": lambda: ma.apply_rope(q, torch.ones(1, 3, 4, dtype=torch.complex64)),
}
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        print(name, "raises", error)
"""


def test_calls_in_an_environment_that_asks_in_vain():
    result = run(ON_A_CPU, MIXED_ATTENTION_CPU="typo")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["attention", "operator", "rotation"]
    assert all(" raises MIXED_ATTENTION_CPU: expected one of " in line for line in lines)
    # What no call on the CPU asks for does not stop it.
    assert run(ON_A_CPU, MIXED_ATTENTION_GPU="typo").stdout == ""


def test_report_says_why_something_is_refused(monkeypatch):
    def refuse(q, *_):
        raise NotImplementedError("no kernel for this dtype\nand more")

    monkeypatch.setattr(ops, "attention", refuse)
    assert "refused: no kernel for this dtype" in main.report()
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: False)
    assert "none: the compiled part is missing" in main.report()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "not used: torch finds no GPU" in main.report()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "rebuild with MIXED_ATTENTION_CUDA=1" in main.report()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch was built without CUDA" in main.report()


@pytest.mark.parametrize(
    ("of_torch", "python", "is_tested"),
    [
        ("2.13.0+cpu", "3.11.7", True),
        ("2.15.1", "3.13.2", True),
        ("2.15.0a0+git1234", "3.13.0rc1", True),
        ("2.13.0", "3.14.0", False),
        ("2.16.0.dev20270101+cu132", "3.13.0", False),
        ("2.1.0", "3.11.0", False),
    ],
)
def test_report_says_where_no_tests_were_run(monkeypatch, of_torch, python, is_tested):
    monkeypatch.setattr(torch, "__version__", of_torch)
    monkeypatch.setattr(main.platform, "python_version", lambda: python)
    text = "untested       the tests were not run with these releases, but with Python 3.12 with torch 2.11, "
    assert (text not in main.report()) == is_tested


def test_the_table_of_what_was_run_is_what_the_report_knows():
    rows = re.findall(r"^\| (\d+\.\d+)\.\S+ \| (\d+\.\d+)\.\S+ \|", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert set(rows) == set(TESTED)


def test_report_names_the_kernels_of_a_gpu_and_why_no_faster_ones(monkeypatch):
    def choose(dtype, head_dim, device, *, backward):
        return ("hopper", "") if head_dim == 64 and not backward else ("portable", f"head_dim is {head_dim}")

    monkeypatch.setattr(ops, "cuda_kernel", choose)
    assert list(main._cuda_kernels(torch.device("cuda", 0), torch.bfloat16)) == [
        "    forward      portable for head_dim 16, 32, 48, 96, 128, 192, 256 (head_dim is 16)",
        "    forward      hopper for head_dim 64",
        "    backward     portable for head_dim 16, 32, 48, 64, 96, 128, 192, 256 (head_dim is 16)",
    ]


def test_fp64_on_gpus_is_left_to_the_reference():
    assert ops.has_kernels("cpu", torch.float64)
    assert not ops.has_kernels("cuda", torch.float64)


WITHOUT_COMPILED_PART = """
import sys
sys.modules["mixed_attention._C"] = None
import torch
import mixed_attention as ma
specs = [ma.TokenSpec("a", 3), ma.TokenSpec("b", 2)]
patterns = [ma.AttentionPattern(["a", "b"], ["a"])]
plan = ma.AttentionPlan.compile(specs, patterns)
x, freqs = torch.randn(1, 5, 16), ma.RopeFrequency(8, 2)(torch.rand(1, 5, 2))
layer = ma.MixedAttention(dict(dim=16, num_heads=2, use_rope=True, parallel=False))
print(layer(x, specs, patterns, freqs=freqs).shape)
layer.parallel = True
q = x[:, :, None]
for call in (lambda: ma.attention(q, q, q, plan), lambda: layer(x, specs, patterns, freqs=freqs)):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_without_the_compiled_part_everything_imports_and_the_reference_runs():
    result = run(WITHOUT_COMPILED_PART)
    assert result.returncode == 0, result.stderr
    shape, *messages = result.stdout.splitlines()
    assert shape == "torch.Size([1, 5, 16])"
    assert len(messages) == 2
    for message in messages:
        assert "compiled part of mixed_attention is missing" in message
        assert "`make build`" in message


def test_import_brings_no_compiler():
    # torch imports it on first use, which takes longer than all of this package.
    code = "import sys, mixed_attention; print([n for n in ('torch._dynamo', 'torch._inductor') if n in sys.modules])"
    assert run(code).stdout == "[]\n"


def test_every_public_name_exists_and_is_documented():
    for name in ma.__all__:
        assert getattr(ma, name).__doc__, name
    for name in ma.noether.__all__:
        assert getattr(ma.noether, name).__doc__, name


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_of_a_plan(tmp_path, suffix):
    plan = ma.AttentionPlan.compile(SELF.specs, SELF.patterns)
    path = tmp_path / f"mask.{suffix}"
    plan.plot(path)
    plan.plot(str(path))
    assert path.stat().st_size > 1000


def test_picture_differs_with_the_plan(tmp_path):
    pictures = []
    for scene in (SELF, CROSS, Scene({"only": 0}, [(["only"], ["only"])])):
        path = tmp_path / "mask.png"
        ma.AttentionPlan.compile(scene.specs, scene.patterns).plot(path)
        pictures.append(path.read_bytes())
    assert len(set(pictures)) == 3


def test_picture_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"`plot` extra .* pip install 'mixed_attention\[plot\]'"):
        ma.AttentionPlan.compile(SELF.specs, SELF.patterns).plot(tmp_path / "mask.png")
