"""Where modules lay up to version 0.1.0, so that imports and pickled models of then keep working."""

from __future__ import annotations

import sys
from types import ModuleType

from mixed_attention import explain, layers
from mixed_attention.eager import packed, projection
from mixed_attention.layers import anchor, init, norm

_MODULES = {
    "anchor": anchor,
    "init": init,
    "kernels": explain,
    "module": layers,
    "norm": norm,
    "packed": packed,
    "projection": projection,
}


def keep_old_paths(package: ModuleType) -> None:
    """Makes modules importable by their old names, as the very objects that they are by the new ones."""
    for name, module in _MODULES.items():
        sys.modules[f"{package.__name__}.{name}"] = module
        setattr(package, name, module)
