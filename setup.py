"""Builds mixed_attention._C out of csrc/. Everything else about the package stands in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("building mixed_attention needs torch in the environment that builds: `pip install torch pybind11 ninja`")

ROOT = Path(__file__).parent
COMPILE_FLAGS = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]

# NOTE: at::parallel_for is inline code of torch's headers: without OpenMP here it runs serially, without a word. The
# runtime is the one that torch has loaded by then, as both go by the same name.
THREAD_FLAGS = ["-fopenmp"] if torch.backends.openmp.is_available() else []


def sanitizer_flags() -> list[str]:
    """``MIXED_ATTENTION_SANITIZE=address,undefined`` builds with these sanitizers."""
    sanitizers = os.environ.get("MIXED_ATTENTION_SANITIZE")
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitizers else []


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"mixed_attention needs torch 2.11 or later, found {torch.__version__}")
if os.environ.get("MIXED_ATTENTION_CUDA") == "1" and not sources("cuda/**/*.cu"):
    sys.exit("MIXED_ATTENTION_CUDA=1 asks for CUDA kernels, and this version has none yet; unset it to build for CPUs")

setup(
    ext_modules=[
        CppExtension(
            "mixed_attention._C",
            sources("*.cpp", "cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=COMPILE_FLAGS + THREAD_FLAGS + sanitizer_flags(),
            extra_link_args=THREAD_FLAGS + sanitizer_flags(),
        )
    ],
    # Ninja compiles only what changed, and in parallel; without it everything is compiled in turn.
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)},
)
