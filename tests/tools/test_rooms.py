"""The rooms of the package: imports go one way, and what lay elsewhere is found by its old path, too."""

from __future__ import annotations

import ast
import importlib
import pickle
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mixed_attention as ma

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "mixed_attention").rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The package's own modules that a module takes something of, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                if alias.name == "_C":  # the compiled module, which is no file here
                    continue
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
    return found & FILES.keys()


def test_arrows_never_turn_back():
    TopologicalSorter({name: imported(name) for name in FILES}).prepare()


def test_nothing_below_the_operators_knows_them():
    for name in ("spec", "config", "foreign", "plan", "reference", "autocast"):
        assert "mixed_attention.ops" not in imported(f"mixed_attention.{name}")


OLD = [
    *(("anchor", name) for name in ("SelfAnchorAttention", "MultiBranchAnchorAttention", "UnexpectedTokenError")),
    *(("module", name) for name in ("MixedAttention", "DotProductAttention", "PerceiverAttention")),
    *(("noether", name) for name in ("MixedAttention", "UntiedMixedAttention", "RopeFrequency", "swap")),
    *(("norm", name) for name in ("RMSNorm", "rms_norm")),
    *(("packed", name) for name in ("attend", "Packed")),
    *(("projection", name) for name in ("linear", "project")),
    *(("spec", name) for name in ma.__all__ if name.endswith("Config")),
    ("spec", "UntiedMixedAttentionConfig"),
    ("spec", "TokenSpec"),
    ("init", "init_weights"),
]


@pytest.mark.parametrize("module, name", OLD)
def test_old_paths_lead_to_the_same_objects(module, name):
    # As pickles do it: by import, then by attribute.
    found = getattr(importlib.import_module(f"mixed_attention.{module}"), name)
    assert getattr(getattr(ma, module), name) is found
    if name in ma.__all__ and module != "noether":
        assert found is getattr(ma, name)


def test_models_and_configurations_pickled_by_old_paths_load():
    by_old_paths = b"cmixed_attention.module\nMixedAttention\n.", b"cmixed_attention.spec\nMixedAttentionConfig\n."
    assert [pickle.loads(old) for old in by_old_paths] == [ma.MixedAttention, ma.MixedAttentionConfig]
