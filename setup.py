"""Builds mixed_attention._C out of csrc/. Everything else about the package stands in pyproject.toml.

Environment variables:
    MIXED_ATTENTION_CUDA: 1 builds the CUDA kernels against any torch, one without CUDA included; 0 leaves them out. By
        default they are built where torch is a CUDA build and nvcc is found.
    TORCH_CUDA_ARCH_LIST: What the portable CUDA kernels are built for, "8.0+PTX 9.0" by default. The kernels of Hopper
        are for 9.0a always.
    MIXED_ATTENTION_HEAD_DIMS: For instance "64,128": only the portable CUDA kernels of these (padded) head_dims, for a
        quick development build.
    MIXED_ATTENTION_SANITIZE: For instance "address,undefined": builds the C++ part with these sanitizers.
    MAX_JOBS: How many files are compiled at a time.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Command, Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # which the kernels do without: kernels/setup.py
    torch = cpp_extension = None

ROOT = Path(__file__).resolve().parent
CUDA_OBJECTS = Path("build", "cuda")  # the same for every torch and Python: no kernel knows of them
# What the kernels and the C++ part must agree on, where they are built apart.
INTERFACE = ["csrc/params.h", "csrc/derivatives_params.h", "csrc/cuda/problem.h", "csrc/cuda/interface.h"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
# Python's own flags may ask for debug information, which makes the binary ten times as large.
COMPILE_FLAGS = ["-O3", "-g0", "-std=c++20", *WARNINGS, "-fvisibility=hidden"]
# ptxas tells of registers and spills, which tools/check_ptxas.py reads. Compression makes a fifth of the binary's size.
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v", "--compress-mode=size"]
NVCC_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", *WARNINGS]


def fail(sentence: str) -> NoReturn:
    sys.exit(f"mixed_attention: {sentence}")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def interface_flag() -> str:
    """By this both sides of the kernels' interface know that they were compiled from the same headers."""
    digest = hashlib.sha256(b"".join((ROOT / header).read_bytes() for header in INTERFACE)).hexdigest()
    return f"-DMIXED_ATTENTION_INTERFACE=0x{digest[:16]}"


def thread_flags() -> list[str]:
    # NOTE: at::parallel_for is inline code of torch's headers: without OpenMP here it runs serially, without a word.
    # The runtime is the one that torch has loaded by then, as both go by the same name.
    return ["-fopenmp"] if torch.backends.openmp.is_available() else []


def sanitizer_flags() -> list[str]:
    sanitizers = os.environ.get("MIXED_ATTENTION_SANITIZE")
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitizers else []


def check_torch() -> None:
    if torch is None:
        fail("building needs torch in the environment that builds: `pip install torch pybind11 ninja`")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        fail(f"torch 2.11 or later is needed, found {torch.__version__}")


def find_cuda() -> Path | None:
    """Folder of the CUDA toolkit. (Torch's own search gives up where torch is no CUDA build.)"""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    for folder in [Path(guess) for guess in guesses if guess] + [Path("/usr/local/cuda")]:
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime_api.h").exists():
            return folder
    return None


def nvcc_version(cuda: Path) -> tuple[int, int]:
    text = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def cuda_to_build_with() -> Path | None:
    """The CUDA toolkit, or None for a build without kernels. What was asked for and cannot be ends the build."""
    asked = os.environ.get("MIXED_ATTENTION_CUDA", "")
    if asked not in ("", "0", "1"):
        fail(f"MIXED_ATTENTION_CUDA: expected 0, 1 or nothing, got {asked!r}")
    if asked == "0" or (asked == "" and torch.version.cuda is None):
        return None
    cuda = find_cuda()
    if cuda is None:
        sentence = "nvcc is not found; install the CUDA toolkit, or set CUDA_HOME to where it is"
        if asked == "1":
            fail(f"MIXED_ATTENTION_CUDA=1 asks for CUDA kernels, but {sentence}")
        print(f"mixed_attention: built without CUDA kernels, for {sentence}")
        return None
    check_cuda_version(nvcc_version(cuda))
    check_cuda_of_torch(nvcc_version(cuda))
    if shutil.which("ninja") is None:
        fail("the CUDA kernels are compiled by ninja, which is not found: `pip install ninja`")
    return cuda


def check_cuda_version(version: tuple[int, int]) -> None:
    found = "{}.{}".format(*version)
    if version < (12, 8):
        fail(f"the CUDA kernels need CUDA 12.8 or later, nvcc is of {found}; or build without: MIXED_ATTENTION_CUDA=0")


def check_cuda_of_torch(version: tuple[int, int]) -> None:
    found = "{}.{}".format(*version)
    if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) != version[0]:
        fail(
            f"torch is built for CUDA {torch.version.cuda}, nvcc is of {found}: set CUDA_HOME to a toolkit of torch's "
            "major version, or build without CUDA kernels: MIXED_ATTENTION_CUDA=0"
        )


def portable_targets() -> list[str]:
    """What ptxas makes of the portable kernels: sm_xy for a processor, compute_80 for later ones."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or ["8.0+PTX", "9.0"]
    targets = []
    for arch in arch_list:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, got {arch!r}")
        if int(match[1]) >= 8:  # others may be meant for other extensions
            targets += [f"sm_{match[1]}{match[2]}"] + ["compute_80"] * bool(match[3])
    if not targets:
        fail(f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need 8.0 or later, got {' '.join(arch_list)}")
    return sorted(set(targets))


def arch_flags(source: str) -> list[str]:
    """Architectures of one source. The targets of the portable kernels share runs of nvcc's front end: one for 8.x and
    PTX, and one from 9.0 on, where two neighbours can be added to memory at once."""
    if not is_portable(source):
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    targets_of: dict[str, list[str]] = {"compute_80": [], "compute_90": []}
    for target in portable_targets():
        is_later = target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90
        targets_of["compute_90" if is_later else "compute_80"].append(target)
    return [f"-gencode=arch={arch},code=[{','.join(targets)}]" for arch, targets in targets_of.items() if targets]


def wanted_head_dims() -> list[str]:
    """Head_dims of a development build; empty for all."""
    return re.findall(r"\d+", os.environ.get("MIXED_ATTENTION_HEAD_DIMS", ""))


def head_dims_flag() -> list[str]:
    return [f"-DMIXED_ATTENTION_HEAD_DIMS={','.join(wanted_head_dims())}"] if wanted_head_dims() else []


class Kernels(NamedTuple):
    """What one call of nvcc compiles."""

    object: str  # below CUDA_OBJECTS; the reports that tools/check_ptxas.py reads are called after it
    source: str
    defines: tuple[str, ...] = ()


def instantiated_kernels() -> list[Kernels]:
    """What csrc/cuda/instantiations.txt lists: the same source for every dtype and head_dim."""
    found = []
    lines = (ROOT / "csrc" / "cuda" / "instantiations.txt").read_text().splitlines()
    for name, *rest in (line.split() for line in lines if not line.startswith("#")):
        head_dims = [word for word in rest if word.isdecimal()]
        for dtypes in (word.split(",") for word in rest[: -len(head_dims)]):
            each = " ".join(f"INSTANTIATE({dtype})" for dtype in dtypes)
            found += [
                Kernels(
                    f"{name}_{'_'.join(dtypes)}_d{head_dim}.o",
                    f"csrc/cuda/instantiate_{name}.cu",
                    (f"-DDTYPES={each}", f"-DHEAD_DIM={head_dim}"),
                )
                for head_dim in head_dims
            ]
    return found


def all_kernels() -> list[Kernels]:
    """Everything that nvcc compiles, narrowed to the portable kernels of the head_dims that are wanted."""
    instantiated = instantiated_kernels()
    known = {head_dim_of(each) for each in instantiated if is_portable(each.source)}
    wanted = wanted_head_dims() or known
    if not known.issuperset(wanted):
        expected = ", ".join(sorted(known, key=int))
        fail(f"MIXED_ATTENTION_HEAD_DIMS: expected some of {expected}, got {','.join(wanted)}")
    others = [source for source in sources("cuda/**/*.cu") if not Path(source).name.startswith("instantiate_")]
    return [Kernels(str(Path(source).relative_to("csrc/cuda").with_suffix(".o")), source) for source in others] + [
        each for each in instantiated if not is_portable(each.source) or head_dim_of(each) in wanted
    ]


def is_portable(source: str) -> bool:
    return "hopper" not in source


def head_dim_of(kernels: Kernels) -> str:
    return kernels.defines[-1].rpartition("=")[2]


def ninja_file(cuda: Path, kernels: Sequence[Kernels]) -> str:
    """Rules that compile the kernels; beside each object lies what nvcc and ptxas said about it."""
    host_compiler = [f"-ccbin={os.environ['CXX'].split()[-1]}"] if os.environ.get("CXX") else []
    command = [str(cuda / "bin" / "nvcc"), *NVCC_FLAGS, *host_compiler, f"-Xcompiler={','.join(NVCC_HOST_FLAGS)}"]
    command.append(f"-I{ROOT / 'csrc'}")
    outputs = "-MD -MF $out.d -c $in -o $out >$out.log 2>&1 || (cat $out.log; false)"
    lines = [
        "rule nvcc",
        f"  command = {shlex.join(command)} $arguments {outputs}",
        "  description = nvcc $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for each in kernels:
        arguments = shlex.join([*arch_flags(each.source), *each.defines])
        lines += [f"build {each.object}: nvcc {ROOT / each.source}", f"  arguments = {arguments}"]
    return "\n".join([*lines, ""])


def run_ninja(folder: Path, quiet: bool) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run(["ninja", "-C", str(folder), *jobs, *(["--quiet"] if quiet else [])]).returncode:
        fail("a CUDA kernel did not compile, see above")


def compile_kernels(cuda: Path, quiet: bool) -> list[str]:
    """Compiles what changed, and returns all the objects."""
    kernels = all_kernels()
    folder = ROOT / CUDA_OBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(cuda, kernels))
    run_ninja(folder, quiet)
    return [str(folder / each.object) for each in kernels]


def extension(cuda: Path | None) -> Extension:
    files = sources("*.cpp", "torch/all.cpp", "cpu/*.cpp")
    compile_flags = [*COMPILE_FLAGS, interface_flag(), *thread_flags(), *sanitizer_flags()]
    link_flags = [*thread_flags(), *sanitizer_flags(), "-ldl"]
    # The flags are the same with and without CUDA kernels, so that either build finds what the other has compiled.
    if toolkit := cuda or find_cuda():
        compile_flags.append(f"-isystem{toolkit / 'include'}")
    if cuda is None:
        files += sources("cpu_only/*.cpp")
    else:
        files += sources("cuda/**/*.cpp")
        compile_flags += head_dims_flag()
        link_flags += [f"-L{cuda / folder}" for folder in ("lib64", "lib") if (cuda / folder).exists()]
        # The symbols of the static runtime stay inside: torch may have another version of it in the same process.
        link_flags += ["-lcudart_static", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    return cpp_extension.CppExtension(
        "mixed_attention._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
    )


class BuildKernels(Command):
    """Compiles the CUDA kernels alone: `MIXED_ATTENTION_CUDA=1 python setup.py build_kernels`."""

    description = "compile the CUDA kernels"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        cuda = cuda_to_build_with()
        if cuda is None:
            fail("no CUDA kernels to compile: set MIXED_ATTENTION_CUDA=1")
        compile_kernels(cuda, quiet=self.verbose < 1)


class BuildExtension(cpp_extension.BuildExtension if cpp_extension else Command):
    """Compiles the kernels by nvcc without torch's headers and flags, and leaves the C++ part to torch."""

    cuda: Path | None

    def build_extensions(self) -> None:
        if self.cuda is not None:
            self.extensions[0].extra_objects += compile_kernels(self.cuda, quiet=self.verbose < 1)
        super().build_extensions()


def main() -> None:
    # The ninja that pip installs lies beside the interpreter, on the PATH only where the environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    check_torch()
    BuildExtension.cuda = cuda = cuda_to_build_with()
    # Ninja compiles only what changed, and in parallel; without it the C++ part is compiled in turn.
    build_ext = BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    setup(ext_modules=[extension(cuda)], cmdclass={"build_ext": build_ext, "build_kernels": BuildKernels})


if __name__ == "__main__":
    main()
