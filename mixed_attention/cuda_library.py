"""Where the CUDA kernels are, if none were built into the package: in the library of ``mixed-attention-kernels``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "mixed-attention-kernels"


def path() -> str:
    """Path of the library that is installed.

    Raises:
        ImportError: None is installed, or that of another version; with the words that errors of calls on GPUs use.
    """
    own, found = _version("mixed_attention"), _version(DISTRIBUTION)
    wanted = f"{DISTRIBUTION}=={own}" if own else DISTRIBUTION
    if own and found and own != found:
        raise ImportError(f"{DISTRIBUTION} {found} does not fit mixed_attention {own}; `pip install {wanted}`")
    try:
        return import_module("mixed_attention_kernels").library
    except ModuleNotFoundError:
        sentence = f"built without CUDA kernels; install {wanted}, or rebuild with MIXED_ATTENTION_CUDA=1"
        raise ImportError(sentence) from None


def _version(distribution: str) -> str | None:
    """The version of what is installed; None in a checkout."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
