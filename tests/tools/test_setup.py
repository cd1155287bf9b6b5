"""What setup.py decides: whether there are CUDA kernels, for which chips, of which sources, and what it says if not."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
VARIABLES = ("MIXED_ATTENTION_CUDA", "MIXED_ATTENTION_HEAD_DIMS", "TORCH_CUDA_ARCH_LIST", "CXX")
HOPPER, PORTABLE = "csrc/cuda/instantiate_hopper_fwd.cu", "csrc/cuda/common/rope.cu"


@pytest.fixture(scope="module")
def setup():
    """The script as a module, which builds nothing."""
    spec = importlib.util.spec_from_file_location("mixed_attention_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No variable that a build reads is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def toolkit(setup, environment, tmp_path):
    """A CUDA toolkit of version 13.0, and ninja, whatever this machine has."""
    environment.setattr(setup, "find_cuda", lambda: tmp_path)
    environment.setattr(setup, "nvcc_version", lambda cuda: (13, 0))
    environment.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "torch_cuda", "built"),
    [(None, None, False), (None, "13.0", True), ("0", "13.0", False), ("1", None, True), ("1", "13.0", True)],
)
def test_kernels_are_built_where_torch_has_cuda_or_they_are_asked_for(
    setup, toolkit, environment, asked, torch_cuda, built
):
    environment.setattr(torch.version, "cuda", torch_cuda)
    if asked is not None:
        environment.setenv("MIXED_ATTENTION_CUDA", asked)
    assert setup.cuda_to_build_with() == (toolkit if built else None)


def test_without_nvcc_kernels_are_left_out_with_a_word_unless_asked_for(setup, environment, capsys):
    environment.setattr(setup, "find_cuda", lambda: None)
    environment.setattr(torch.version, "cuda", "13.0")
    assert setup.cuda_to_build_with() is None
    assert "built without CUDA kernels, for nvcc is not found" in capsys.readouterr().out
    environment.setenv("MIXED_ATTENTION_CUDA", "1")
    with pytest.raises(SystemExit, match="asks for CUDA kernels, but nvcc is not found"):
        setup.cuda_to_build_with()


@pytest.mark.parametrize(
    ("version", "torch_cuda", "sentence"),
    [
        ((12, 4), None, "need CUDA 12.8 or later, nvcc is of 12.4"),
        ((13, 0), "12.9", "torch is built for CUDA 12.9, nvcc is of 13.0: set CUDA_HOME"),
    ],
)
def test_toolkits_that_do_not_fit(setup, toolkit, environment, version, torch_cuda, sentence):
    environment.setenv("MIXED_ATTENTION_CUDA", "1")
    environment.setattr(setup, "nvcc_version", lambda cuda: version)
    environment.setattr(torch.version, "cuda", torch_cuda)
    with pytest.raises(SystemExit, match=sentence):
        setup.cuda_to_build_with()


def test_kernels_need_ninja(setup, toolkit, environment):
    environment.setenv("MIXED_ATTENTION_CUDA", "1")
    environment.setattr(torch.version, "cuda", None)
    environment.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="pip install ninja"):
        setup.cuda_to_build_with()


def test_other_values_are_refused(setup, environment):
    environment.setenv("MIXED_ATTENTION_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected 0, 1 or nothing, got 'yes'"):
        setup.cuda_to_build_with()


@pytest.mark.parametrize(
    ("arch_list", "targets"),
    [
        (None, ["compute_80,code=[compute_80,sm_80]", "compute_90,code=[sm_90]"]),
        ("9.0a", ["compute_90,code=[sm_90]"]),
        ("7.5;8.6 12.0+PTX", ["compute_80,code=[compute_80,sm_86]", "compute_90,code=[sm_120]"]),
    ],
)
def test_architectures(setup, environment, arch_list, targets):
    if arch_list is not None:
        environment.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    assert setup.arch_flags(PORTABLE) == [f"-gencode=arch={target}" for target in targets]
    assert setup.arch_flags(HOPPER) == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize(
    ("arch_list", "sentence"),
    [("Ampere", "entries like 8.0, .* got 'Ampere'"), ("7.0 7.5", "8.0 or later, got 7.0 7.5")],
)
def test_architectures_that_cannot_be(setup, environment, arch_list, sentence):
    environment.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    with pytest.raises(SystemExit, match=sentence):
        setup.portable_targets()


def test_head_dims_narrow_a_build(setup, environment):
    everything = setup.all_kernels()
    assert {PORTABLE, HOPPER} <= {each.source for each in everything}
    environment.setenv("MIXED_ATTENTION_HEAD_DIMS", "64,128")
    left_out = set(everything) - set(setup.all_kernels())
    assert left_out
    assert all("portable" in each.object and not each.object.endswith(("_d64.o", "_d128.o")) for each in left_out)
    assert "-DMIXED_ATTENTION_HEAD_DIMS=64,128" in setup.extension(Path("/cuda")).extra_compile_args
    environment.setenv("MIXED_ATTENTION_HEAD_DIMS", "80")
    with pytest.raises(SystemExit, match="expected some of 32, 64, .* got 80"):
        setup.all_kernels()


def test_kernels_of_the_list_have_an_object_each(setup):
    everything = setup.all_kernels()
    assert len({each.object for each in everything}) == len(everything)
    assert all((ROOT / each.source).exists() for each in everything)
    (fp32,) = (each for each in everything if each.object == "hopper_fwd_fp32_d128.o")
    assert fp32.defines == ("-DDTYPES=INSTANTIATE(fp32)", "-DHEAD_DIM=128")


def test_a_kernel_is_compiled_once_and_leaves_its_report(setup, environment):
    environment.setenv("CXX", "ccache g++-12")
    (kernels,) = (each for each in setup.all_kernels() if each.object == "hopper_fwd_bf16_fp16_d64.o")
    text = setup.ninja_file(Path("/cuda"), [kernels])
    assert "command = /cuda/bin/nvcc" in text and "-ccbin=g++-12" in text and ">$out.log 2>&1" in text
    assert f"build hopper_fwd_bf16_fp16_d64.o: nvcc {ROOT / HOPPER}\n" in text
    assert text.endswith("'-DDTYPES=INSTANTIATE(bf16) INSTANTIATE(fp16)' -DHEAD_DIM=64\n")


def test_without_cuda_nothing_of_it_is_compiled(setup):
    extension = setup.extension(None)
    assert not any("cuda" in source for source in extension.sources)
    assert "-DMIXED_ATTENTION_WITH_CUDA" not in extension.extra_compile_args


def test_a_build_finds_what_the_other_has_compiled(setup, toolkit):
    """With CUDA kernels and without: the same flags, and all sources but those of either alone."""
    without, with_cuda = setup.extension(None), setup.extension(toolkit)
    assert without.extra_compile_args == with_cuda.extra_compile_args
    assert without.include_dirs == with_cuda.include_dirs
    (stand_in,) = set(without.sources) - set(with_cuda.sources)
    assert stand_in == "csrc/cpu_only/interface.cpp"
    assert all("cuda" in source for source in set(with_cuda.sources) - set(without.sources))
    assert not any("#if" in path.read_text() for path in (ROOT / "csrc" / "torch").glob("*.cpp"))


def test_kernels_know_neither_torch_nor_python():
    """CMake's build of them alone is not compiled by every `make test`, which takes their objects from this one."""
    foreign = re.compile(r'#include [<"](ATen|c10|torch|pybind11|Python)')
    others = [p for p in (ROOT / "csrc").rglob("*.*") if (ROOT / "csrc" / "torch") not in p.parents]
    assert others
    assert [path for path in others if foreign.search(path.read_text())] == []
