"""Releases of torch and Python that the tests were run with; docs/install.md says when, and which tests."""

from __future__ import annotations

TESTED = (("2.11", "3.12"), ("2.12", "3.10"), ("2.13", "3.11"), ("2.14", "3.14"), ("2.15", "3.13"))
"""Pairs of torch and Python, as major and minor numbers."""


def is_tested(torch_version: str, python_version: str) -> bool:
    """Whether the tests were run with these releases, but for the last number.

    Args:
        torch_version: As ``torch.__version__`` has it, such as ``"2.13.0+cpu"``.
        python_version: As ``platform.python_version()`` has it, such as ``"3.11.7"``.
    """
    return (_minor(torch_version), _minor(python_version)) in TESTED


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
