"""The version that the package says is the one that is installed, or clearly none."""

import importlib
from importlib import metadata

import pytest

import mixed_attention as ma


@pytest.fixture
def reloaded(monkeypatch):
    """Runs the package's __init__ again with other metadata, and puts the version back in the end."""
    before = ma.__version__

    def run(version):
        monkeypatch.setattr(metadata, "version", version)
        importlib.reload(ma)
        return ma.__version__

    yield run
    ma.__version__ = before


def test_it_is_that_of_the_installed_distribution(reloaded):
    assert reloaded(lambda name: {"mixed_attention": "1.2.3"}[name]) == "1.2.3"


def test_a_checkout_that_is_not_installed_says_so(reloaded):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert reloaded(missing) == "0.0.0+unknown"
