"""The published parameter layouts and the way between them.

Attention modules were published with one fused projection, ``qkv``, or with three separate ones, ``q``, ``k`` and
``v``; Perceiver modules with ``q`` and a fused ``kv``, or likewise with three. A fused weight is the separate ones
stacked along dim 0. All else is named alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

_PROJECTIONS = ("qkv", "q", "kv", "k", "v")


def convert_state_dict(
    state_dict: Mapping[str, Any], layout: Literal["fused", "separate"], *, perceiver: Collection[str] = ()
) -> dict[str, Any]:
    """Rewrites the attention projections of a state dict, of one module or of a whole model, to a layout.

    The modules of this package load either layout as it is; this is for files that others will read.

    Args:
        state_dict: The state dict; left as it is.
        layout: ``"fused"`` (``qkv``; for Perceivers ``q`` and ``kv``) or ``"separate"`` (``q``, ``k``, ``v``).
        perceiver: Paths of the Perceiver modules, e.g. ``"encoder.blocks.0.attn"``. Only needed to fuse: the
            separate layout of a Perceiver looks like any other, unless its keys are made of tokens of another width.

    Returns:
        A new state dict. What is not an attention projection, or has the layout already, is shared with the old one.

    Raises:
        TypeError: If ``state_dict`` is no mapping, or ``perceiver`` a bare string.
        ValueError: If ``layout`` is not one of the two, or a path of ``perceiver`` holds no attention.
    """
    if layout not in ("fused", "separate"):
        raise ValueError(f"layout: expected 'fused' or 'separate', got {layout!r}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, as state_dict() returns, got {type(state_dict).__name__}")
    if isinstance(perceiver, str):
        raise TypeError(f"perceiver: expected a list of paths, got {perceiver!r}")
    converted = dict(state_dict)
    prefixes = _prefixes(state_dict)
    paths = [prefix.removesuffix(".") for prefix in prefixes]
    for path in perceiver:
        if path not in paths:
            raise ValueError(f"perceiver: no attention at {path!r}, expected some of {paths}")
    for prefix in prefixes:
        if layout == "separate":
            _convert(converted, prefix, ("q", "k", "v"))
        elif prefix.removesuffix(".") in perceiver or _has_other_keys(state_dict, prefix):
            _convert(converted, prefix, ("q", "kv"))
        else:
            _convert(converted, prefix, ("qkv",))
    return converted


def load_untied_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, transpose: bool, strict: bool = True
) -> Any:
    """Loads a checkpoint with per-domain ("untied") projections, ``q.weight.0``, ``q.weight.1``, ...

    Upstream's 2026.4.0 multiplies by such a weight or by its transpose, depending on the sizes of the groups at that
    moment: domains of about equal length (longest times count at most 1.1 of the total), and all bf16 runs that take
    the grouped path, compute ``x @ W``; others compute ``x @ W.T``. This package always computes ``x @ W.T + b``, as
    every linear layer. Pass ``transpose=True`` for weights that were trained with ``x @ W``, for instance with equal
    numbers of anchors in every domain. Nothing in the file tells the two apart; a wrong choice shows as a model that
    has learnt nothing.

    Args:
        model: An untied module, or a model that contains such modules.
        state_dict: The checkpoint; left as it is.
        transpose: Whether to transpose the per-domain matrices.
        strict: As for ``load_state_dict``.

    Returns:
        What ``load_state_dict`` returns.

    Raises:
        RuntimeError: If the keys or shapes do not fit.
    """
    per_domain = re.compile(r"(^|\.)(q|k|v|proj)\.weight\.\d+$")
    if transpose:
        state_dict = {key: value.T if per_domain.search(key) else value for key, value in state_dict.items()}
    return model.load_state_dict(state_dict, strict=strict)


def adapt_layout(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of the layers: turns whichever layout is stored into that of the module."""
    _convert(state_dict, prefix, module.projections)


def _prefixes(state_dict: Mapping[str, Any]) -> list[str]:
    """What stands before the name of a projection, for every module that may be an attention."""
    projection = re.compile(rf"(.*\.)?({'|'.join(_PROJECTIONS)})\.weight")
    matches = (projection.fullmatch(key) for key in state_dict)
    return list(dict.fromkeys(match[1] or "" for match in matches if match))


def _has_other_keys(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether keys are stored apart from queries because they are made of tokens of another width."""
    widths = [state_dict[key].shape[1] for key in (f"{prefix}q.weight", f"{prefix}k.weight") if key in state_dict]
    return len(set(widths)) == 2


def _convert(state_dict: dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Rewrites the projections of one module in place; leaves alone what does not make exactly q, k and v."""
    for kind in ("weight", "bias"):
        stored = {name: f"{prefix}{name}.{kind}" for name in _PROJECTIONS if f"{prefix}{name}.{kind}" in state_dict}
        if set(stored) == set(names) or sorted("".join(stored)) != ["k", "q", "v"]:
            continue
        if any(len(state_dict[key]) % len(name) for name, key in stored.items()):
            continue
        slots: dict[str, torch.Tensor] = {}
        for name, key in stored.items():
            slots.update(zip(name, state_dict.pop(key).chunk(len(name))))
        for name in names:
            state_dict[f"{prefix}{name}.{kind}"] = torch.cat([slots[slot] for slot in name])
