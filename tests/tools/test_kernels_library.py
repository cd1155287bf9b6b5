"""The library of CUDA kernels: how it is found and opened, what is said where it does not fit, what its wheel needs."""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from mixed_attention import cuda_library, ops

ROOT = Path(__file__).parents[2]


def load(name, path):
    spec = util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_library():
    return load("check_library", "tools/check_library.py")


STUB = """
#include "cuda/interface.h"
#include <cstring>
using namespace mixed_attention;
using namespace mixed_attention::cuda;
namespace {
template <class Params>
Pass<Params> pass{.choose = [](const Problem* problem, Message* family, Message* why) {
  if (problem->device > 7) return std::strcpy(why->text, "there is no such device"), Status::kFailed;
  return std::strcpy(family->text, "stub"), std::strcpy(why->text, "it is one"), Status::kOk;
}};
Interface table{
    .id = kInterfaceId,
    .make_schedule = [](const int64_t*, size_t, int64_t, int64_t, Schedule**,
                        Message* why) { return std::strcpy(why->text, "plan: odd"), Status::kInvalidArgument; },
    .fwd = pass<FwdParams>,
    .bwd = pass<BwdParams>,
};
}
const Interface* mixed_attention_kernels() { return &table; }
"""

REPORT = """
import torch
from mixed_attention import _C, ops
print(ops.has_kernels("cuda", torch.float32))
print(ops.where_cuda_kernels_are())
print(*_C.cuda_kernel(torch.float16, 64, 64, 0, False), sep=": ")
for call in (
    lambda: _C.cuda_kernel(torch.float16, 64, 64, 8, True),
    lambda: _C.cuda_launch(torch.float16, (1, 1, 4, 4, 64, 64), [0, 4, 1, 0, 4], 0, False),
):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0], sep=": ")
"""


def run(folder, *arguments):
    """Runs Python with the packages of a folder, and the checkout's."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "MIXED_ATTENTION_GPU": ""}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def install(tmp_path):
    """Puts a package mixed_attention_kernels into a folder, with a library of this source; returns the folder."""
    if ops.where_cuda_kernels_are() and ops._opened_kernels is None:
        pytest.skip("the kernels of this build are linked in: it opens no library")
    package = tmp_path / "mixed_attention_kernels"
    package.mkdir()
    (package / "__init__.py").write_bytes((ROOT / "kernels" / package.name / "__init__.py").read_bytes())

    def install_source(source, *flags):
        (tmp_path / "stub.cpp").write_text(source)
        library = package / "libmixed_attention_kernels.so"
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'csrc'}",
            *flags,
            tmp_path / "stub.cpp",
            "-o",
            library,
        ]
        subprocess.run(command, check=True)
        return tmp_path

    return install_source


def test_a_library_of_the_same_interface_is_opened(install):
    folder = install(STUB, load("mixed_attention_setup", "setup.py").interface_flag())
    assert run(folder, "-c", REPORT) == [
        "True",
        str(folder / "mixed_attention_kernels" / "libmixed_attention_kernels.so"),
        "stub: it is one",
        "RuntimeError: there is no such device",
        "ValueError: plan: odd",
    ]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (STUB, "has another interface than this package, both must come from one build: "),
        ("", "has no kernels: "),
        ("int missing(); int found = missing();", "cannot be opened: "),
    ],
    ids=["of other headers", "empty", "broken"],
)
def test_a_library_that_does_not_fit_is_not_used_and_the_report_says_why(install, source, why):
    folder = install(source, "-DMIXED_ATTENTION_INTERFACE=1")
    has_kernels, path, family, *_, error = run(folder, "-c", REPORT)
    assert (has_kernels, path) == ("False", "None")
    expected = f"the library of mixed-attention-kernels {why}"
    assert family.startswith(f"none: {expected}")
    assert error.startswith(f"NotImplementedError: {expected}")
    (line,) = (line for line in run(folder, "-m", "mixed_attention") if line.startswith("CUDA kernels"))
    assert line.startswith(f"CUDA kernels     none: {expected}") and str(folder) in line


def test_without_a_library_the_words_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mixed_attention_kernels", None)
    versions = {"mixed_attention": "1.2.3"}
    monkeypatch.setattr(cuda_library, "_version", versions.get)
    sentence = (
        "built without CUDA kernels; install mixed-attention-kernels==1.2.3, or rebuild with MIXED_ATTENTION_CUDA=1"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(sentence)}$"):
        cuda_library.path()
    versions.clear()  # a checkout
    with pytest.raises(ImportError, match="; install mixed-attention-kernels, or"):
        cuda_library.path()


def test_a_library_of_another_version_is_refused_before_it_is_opened(monkeypatch):
    versions = {"mixed_attention": "1.2.3", "mixed-attention-kernels": "1.2.4"}
    monkeypatch.setattr(cuda_library, "_version", versions.get)
    sentence = (
        "mixed-attention-kernels 1.2.4 does not fit mixed_attention 1.2.3; `pip install mixed-attention-kernels==1.2.3`"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(sentence)}$"):
        cuda_library.path()


HEADERS = "  NEEDED               libc.so.6\n  NEEDED               ld-linux-x86-64.so.2\n"
SYMBOLS = """
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.34) pthread_create
0000000000000000  w   DF *UND*\t0000000000000000 (GLIBC_2.2.5) __cxa_finalize
000000000002a440 g    DF .text\t0000000000000008  Base        mixed_attention_kernels
"""


def test_tags_of_wheels_are_the_oldest_systems_that_libraries_run_on(check_library):
    needs = check_library.Needs.told(HEADERS, SYMBOLS)
    assert needs.platform().startswith("manylinux_2_34_")
    assert check_library.failures(needs) == []
    old = check_library.Needs.told(HEADERS, SYMBOLS.replace("GLIBC_2.34", "GLIBC_2.3.4"))
    assert old.platform().startswith("manylinux_2_28_")


def test_libraries_that_need_or_show_too_much_fail(check_library):
    needs = check_library.Needs.told(
        HEADERS + "  NEEDED               libstdc++.so.6\n",
        SYMBOLS + "000000000002a450 g    DF .text\t0000000000000008  Base        cudaMalloc\n",
    )
    assert check_library.failures(needs) == [
        "needs libstdc++.so.6, which a machine may lack",
        "shows cudaMalloc, mixed_attention_kernels, expected mixed_attention_kernels",
    ]


def test_the_extra_asks_for_kernels_of_this_version():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1]
    assert f'cuda = ["mixed-attention-kernels=={version}"]' in text


def test_every_file_of_the_part_for_torch_is_compiled():
    folder = ROOT / "csrc" / "torch"
    included = re.findall(r'#include "torch/(\w+\.cpp)"', (folder / "all.cpp").read_text())
    assert sorted([*included, "all.cpp"]) == sorted(path.name for path in folder.glob("*.cpp"))


def test_the_interface_is_of_headers_that_include_no_others_of_ours():
    # What is not hashed could change on one side of the interface alone.
    setup = load("mixed_attention_setup", "setup.py")
    included = {
        name for header in setup.INTERFACE for name in re.findall(r'#include "(.*)"', (ROOT / header).read_text())
    }
    assert {f"csrc/{name}" for name in included} <= set(setup.INTERFACE)
