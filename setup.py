"""Builds mixed_attention._C. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
sources = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])

setup(
    ext_modules=[
        CppExtension(
            "mixed_attention._C",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=["-O3", "-std=c++20"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
