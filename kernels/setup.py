"""Builds the wheel mixed-attention-kernels, with neither torch nor Python's headers.

The kernels are compiled as for mixed_attention itself, by the setup.py of the folder above, whose variables of the
environment hold here as well; the objects are shared. All else stands in pyproject.toml.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path("mixed_attention_kernels", "libmixed_attention_kernels.so")
HOST_OBJECTS = ROOT / "build" / "host"  # the same for every torch and Python, as the kernels themselves
# The C++ library goes inside as the CUDA runtime does, and nothing of either shows: a process may have others of both.
LINK_FLAGS = [
    "-static-libstdc++",
    "-static-libgcc",
    f"-Wl,--version-script={ROOT / 'csrc' / 'cuda' / 'interface.map'}",
    "-Wl,--no-undefined",
    "-Wl,--strip-all",
]
CUDA_LIBRARIES = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


package = load("mixed_attention_setup", ROOT / "setup.py")
check_library = load("check_library", ROOT / "tools" / "check_library.py")


def host_sources() -> list[str]:
    """All C++ that the kernels need on the host."""
    return ["csrc/environment.cpp", "csrc/schedule.cpp", *package.sources("cuda/**/*.cpp")]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compile_host(cuda: Path) -> list[str]:
    """Compiles what changed, and returns all the objects."""
    flags = [*package.COMPILE_FLAGS, "-fPIC", "-DNDEBUG", package.interface_flag(), *package.head_dims_flag()]
    flags.append(f"-ffile-prefix-map={ROOT}/=")  # errors name the places in csrc
    flags += [f"-I{ROOT / 'csrc'}", f"-isystem{cuda / 'include'}"]
    lines = ["rule cxx", f"  command = {compiler()} {' '.join(flags)} -MD -MF $out.d -c $in -o $out"]
    lines += ["  description = cxx $out", "  depfile = $out.d", "  deps = gcc"]
    objects = [f"{source}.o" for source in host_sources()]
    lines += [f"build {target}: cxx {ROOT / source}" for target, source in zip(objects, host_sources())]
    HOST_OBJECTS.mkdir(parents=True, exist_ok=True)
    (HOST_OBJECTS / "build.ninja").write_text("\n".join([*lines, ""]))
    package.run_ninja(HOST_OBJECTS, quiet=True)
    return [str(HOST_OBJECTS / target) for target in objects]


def link(library: Path, objects: list[str], cuda: Path) -> None:
    """Links the library, and ends the build if it needs what machines may lack."""
    library.parent.mkdir(parents=True, exist_ok=True)
    folders = [f"-L{cuda / folder}" for folder in ("lib64", "lib") if (cuda / folder).exists()]
    command = [*compiler().split(), "-shared", "-o", str(library), *objects, *LINK_FLAGS, *folders, *CUDA_LIBRARIES]
    subprocess.run(command, check=True)
    if failures := check_library.failures(check_library.Needs.of(library)):
        package.fail("; ".join(failures))


class BuildLibrary(build_py):
    """Copies the package, and puts the library there."""

    def run(self) -> None:
        super().run()
        cuda = package.find_cuda()
        if cuda is None:
            package.fail("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME to where it is")
        package.check_cuda_version(package.nvcc_version(cuda))
        objects = package.compile_kernels(cuda, quiet=self.verbose < 1) + compile_host(cuda)
        link(Path(self.build_lib) / LIBRARY, objects, cuda)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform is that of the oldest C library that the kernels run with."""
        return "py3", "none", check_library.Needs.of(Path(self.bdist_dir) / LIBRARY).platform()


class PlatformDistribution(Distribution):
    """What setuptools does not take for Python alone."""

    def has_ext_modules(self) -> bool:
        return True


def main() -> None:
    # The ninja that pip installs lies beside the interpreter, on the PATH only where the environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    setup(
        version=version,
        distclass=PlatformDistribution,
        cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel},
    )


if __name__ == "__main__":
    main()
