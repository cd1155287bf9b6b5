"""The examples in the package's docstrings run as they stand, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import mixed_attention as ma

# The compiled module and the command line have no examples.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ma.__path__, "mixed_attention.")
    if not module.name.endswith("._C") and not module.name.endswith(".__main__")
)


def examples(name):
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


WITH_EXAMPLES = [name for name in MODULES if examples(name)]


def test_there_are_examples():
    assert sum(len(examples(name)) for name in WITH_EXAMPLES) >= 4


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    printed = []
    for test in examples(name):
        test.globs.update(vars(ma) | {"torch": torch, "ma": ma})
        runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)
