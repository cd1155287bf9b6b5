"""The tool that reads the compiler's report on the CUDA kernels."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("check_ptxas", Path(__file__).parents[2] / "tools" / "check_ptxas.py")
check_ptxas = sys.modules["check_ptxas"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_ptxas)

MANGLED = "_ZN15mixed_attention4cuda8portable10fwd_kernelILi64EEEvNS1_4ArgsE"
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_80'
ptxas info    : Function properties for {MANGLED}
    {{stack}} bytes stack frame, {{stores}} bytes spill stores, {{loads}} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 3568 bytes cmem[0]
"""
ADMISSION = "fwd_kernel  fwd_*16_d64  sm_80  20  a reason\n"


@pytest.fixture
def status(tmp_path, monkeypatch):
    """What the tool returns for one object with a log, given the rows of the list."""

    def run(log, admitted=""):
        (tmp_path / "spills.txt").write_text("# kernel, object, architecture, bytes, reason\n" + admitted)
        (tmp_path / "build.ninja").write_text("build fwd_bf16_d64.o: nvcc kernel.cu\n")
        (tmp_path / "fwd_bf16_d64.o.log").write_text(log)
        (tmp_path / "left_over.o.log").write_text(LOG.format(stack=8, stores=8, loads=8))
        monkeypatch.setattr(check_ptxas, "ADMITTED", tmp_path / "spills.txt")
        return check_ptxas.main(tmp_path)

    return run


def test_kernel_without_spills_passes(status, capsys):
    assert status(LOG.format(stack=0, stores=0, loads=0)) == 0
    assert "fwd_bf16_d64 fwd_kernel sm_80: 255 registers\n1 kernels in 1 objects, 0 failures" in capsys.readouterr().out


@pytest.mark.parametrize("spill", [{"stack": 8}, {"stores": 4}, {"loads": 4}], ids=["stack", "stores", "loads"])
def test_spills_fail_unless_the_list_admits_them(status, capsys, spill):
    log = LOG.format(**{"stack": 0, "stores": 0, "loads": 0, **spill})
    assert status(log) == 1
    assert "bytes spilled: spills.txt does not admit that" in capsys.readouterr().out


def test_admitted_spills_pass(status):
    assert status(LOG.format(stack=8, stores=8, loads=20), ADMISSION) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("fwd_kernel", "bwd_kernel"), ("d64", "d128"), ("sm_80", "sm_90"), ("20", "16")],
)
def test_what_is_admitted_is_no_other_kernel_and_no_more_bytes(status, old, new):
    assert status(LOG.format(stack=8, stores=8, loads=20), ADMISSION.replace(old, new)) == 1


@pytest.mark.parametrize(("old", "new"), [("a reason", ""), ("sm_80", ""), ("20", "few")])
def test_a_row_without_reason_or_number_is_refused(status, old, new):
    with pytest.raises(ValueError, match="expected kernel, object, architecture, bytes, reason"):
        status(
            LOG.format(stack=0, stores=0, loads=0),
            ADMISSION.replace("a reason", "reason").replace(old.split()[-1], new),
        )


def test_the_list_of_the_project_can_be_read():
    assert len(check_ptxas.admissions(check_ptxas.ADMITTED.read_text())) > 10


@pytest.mark.parametrize("warning", ["ptxas info : (C7510) Potential Performance Loss: wgmma", "ptxas warning : odd"])
def test_warnings_of_ptxas_fail(status, capsys, warning):
    assert status(LOG.format(stack=0, stores=0, loads=0) + warning) == 1
    assert f"FAILED fwd_bf16_d64: {warning}" in capsys.readouterr().out


def test_build_without_any_report_fails(status):
    assert status("") == 1
