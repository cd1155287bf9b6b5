"""Where modules lay up to version 0.1.0, so that imports and pickled models of then keep working."""

from __future__ import annotations

import sys
from types import ModuleType

from mixed_attention import config, layers, spec
from mixed_attention.eager import packed, projection
from mixed_attention.layers import anchor, init, norm

_MODULES = {
    "anchor": anchor,
    "init": init,
    "module": layers,
    "norm": norm,
    "packed": packed,
    "projection": projection,
}


_CONFIGURATIONS = (
    "AnchorAttentionConfig",
    "Config",
    "DotProductAttentionConfig",
    "MixedAttentionConfig",
    "PerceiverAttentionConfig",
    "RopeFrequencyConfig",
    "UntiedMixedAttentionConfig",
)
"""What lay in ``spec`` together with groups and patterns."""


def keep_old_paths(package: ModuleType) -> None:
    """Makes modules and classes importable by their old names, as the very objects that they are by the new ones."""
    for name in _CONFIGURATIONS:
        setattr(spec, name, getattr(config, name))
    for name, module in _MODULES.items():
        sys.modules[f"{package.__name__}.{name}"] = module
        setattr(package, name, module)
