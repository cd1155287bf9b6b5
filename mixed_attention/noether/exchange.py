"""The exchange of upstream's modules inside a model for this package's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mixed_attention import checkpoint, foreign, layers
from mixed_attention.noether import layers as separate

_PACKAGES = ("noether", "emmi")
_FUSED_CLASSES: dict[str, type[nn.Module]] = {
    "DotProductAttention": layers.DotProductAttention,
    "MixedAttention": layers.MixedAttention,
    "PerceiverAttention": layers.PerceiverAttention,
    "SelfAnchorAttention": layers.SelfAnchorAttention,
    "CrossAnchorAttention": layers.CrossAnchorAttention,
    "JointAnchorAttention": layers.JointAnchorAttention,
}
_SEPARATE_CLASSES: dict[str, type[nn.Module]] = {
    "DotProductAttention": separate.DotProductAttention,
    "MixedAttention": separate.MixedAttention,
    "PerceiverAttention": separate.PerceiverAttention,
    "SelfAnchorAttention": separate.SelfAnchorAttention,
    "CrossAnchorAttention": separate.CrossAnchorAttention,
    "JointAnchorAttention": separate.JointAnchorAttention,
}


def swap(model: nn.Module) -> int:
    """Turns upstream's attention modules inside a model into this package's, in place.

    A module is recognised by the name of its class and the package that defines it (``noether`` or ``emmi``). One with
    a fused projection becomes an instance of the class of the same name at the top of this package, one with separate
    projections of that of :mod:`mixed_attention.noether`; so signatures, return types and state dicts stay as they are.

    It is the class of a module that changes; the module remains the object it was. So whatever hangs on it stays where
    it is: parameters with all that is true of them, so that an optimiser made before keeps working, projections with
    their hooks, adapters and parametrizations, hooks of every kind with their handles, buffers, attributes, the mode of
    every submodule, and references to it from anywhere.

    Left alone, with a warning that names them, are modules that may compute something else: subclasses defined
    elsewhere (which parametrizations and FSDP make, too), objects on which ``forward`` or another method was set, or
    that were compiled by themselves, and ``UntiedMixedAttention``, because what upstream computes with its weights
    depends on the sizes of the groups. All is planned before anything is changed: after an error the model is the one
    it was.

    Args:
        model: A model that contains upstream's modules.

    Returns:
        How many modules became this package's; one within another counts with that.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If ``model`` is itself such a module, or one has parameters, or lacks projections or attributes,
            other than the published ones.

    Warns:
        UserWarning: If modules were left alone; with the reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if _has_counterpart(model):
        raise ValueError(f"swap replaces modules inside a model, but the model itself is a {type(model).__name__}")
    templates: dict[nn.Module, nn.Module] = {}
    inner: set[nn.Module] = set()
    left_alone = []
    for path, old in model.named_modules():
        reason = _reason_against(old)
        if reason:
            left_alone.append(f"{path} ({type(old).__name__}): {reason}")
        if reason != "" or old in inner:
            continue
        templates[old] = template = _template_of(path, old)
        if "mixed_attention" in old._modules:
            inner.add(_core(old))
            templates[_core(old)] = _core(template)
    for old, template in templates.items():
        _become(old, template)
    if left_alone:
        warnings.warn("swap left these modules alone: " + "; ".join(left_alone), stacklevel=2)
    return len(templates.keys() - inner)


def _is_upstreams(cls: type) -> bool:
    return cls.__module__.split(".")[0] in _PACKAGES


def _has_counterpart(old: nn.Module) -> bool:
    """Whether a module is upstream's own and of a class that this package has, too."""
    return _is_upstreams(type(old)) and type(old).__name__ in _SEPARATE_CLASSES


def _core(old: nn.Module) -> nn.Module:
    """The module that has the projections."""
    core = old._modules.get("mixed_attention")
    return old if core is None else core


def _replacement(old: nn.Module) -> type[nn.Module]:
    fused = any(name in _core(old)._modules for name in ("qkv", "kv"))
    return (_FUSED_CLASSES if fused else _SEPARATE_CLASSES)[type(old).__name__]


def _reason_against(old: nn.Module) -> str | None:
    """Why a module cannot become ours, empty if it can; None if it is nothing like upstream's."""
    if not _has_counterpart(old):
        if _is_upstreams(type(old)) and type(old).__name__ == "UntiedMixedAttention":
            return "what it computes depends on the sizes of the groups"
        if any(_is_upstreams(cls) and cls.__name__ in _SEPARATE_CLASSES for cls in type(old).__mro__):
            return f"a subclass, defined in {type(old).__module__}"
        return None
    replacement = _replacement(old)
    for name in vars(old):
        # NOTE: what stands in an object hides what its class says, now in the old class, then in the new one.
        if hasattr(replacement, name) or callable(getattr(type(old), name, None)):
            return f"{name!r} was set on the object"
    core = _core(old)
    if core is old:
        return ""
    if type(core).__name__ != "MixedAttention" or not _has_counterpart(core):
        return f"its mixed_attention is a {type(core).__module__}.{type(core).__name__}"
    reason = _reason_against(core)
    return f"of its mixed_attention, {reason}" if reason else ""


def _template_of(path: str, old: nn.Module) -> nn.Module:
    """A module of ours like the old one, to be read and thrown away."""
    core: Any = _core(old)
    try:
        config = {name: getattr(core, name) for name in ("num_heads", "use_rope", "dropout")}
        config |= {name: getattr(old, name) for name in ("branches", "anchor_suffix") if hasattr(old, name)}
        config["dim"] = core.num_heads * core.head_dim
        said = _settings(old) | _settings(core)
        config |= {name: value for name, value in said.items() if name == "bias" or foreign.may_matter(name)}
        config["qk_norm"] = _qk_norm(core, said)
        with torch.device("meta"):  # neither memory nor random numbers
            template = _replacement(old)(config | {"init_weights": "torch"})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: this {type(old).__name__} is not the published one: {error}") from error
    _check_parameters(path, old, template)
    if core is not old:
        _check_parameters(f"{path}.mixed_attention", core, _core(template))
    return template


def _settings(core: nn.Module) -> dict[str, Any]:
    """What a module says of itself, by the configuration that it may keep and by its attributes."""
    kept = getattr(core, "config", None)
    fields = kept if isinstance(kept, Mapping) else getattr(kept, "__dict__", {})
    return {**fields, **{name: value for name, value in vars(core).items() if not name.startswith("_")}}


def _qk_norm(core: Any, said: Mapping[str, Any]) -> Any:
    """Which norm of queries and keys a module has. Those that are modules stay, and are called as they are."""
    norms = [name for name in ("q_norm", "k_norm") if core._modules.get(name) is not None]
    wanted = said.get("qk_norm", bool(norms))
    if wanted is not True or not norms:
        return wanted
    parameters = {f"{name}.{each}": p for name in norms for each, p in core._modules[name].named_parameters()}
    if len(norms) == 1 and parameters:
        return False  # then the check of parameters names them as unknown
    if len(norms) == 1:
        raise ValueError(f"qk_norm: expected both q_norm and k_norm, got {norms[0]} alone")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != (core.head_dim,):
            expected = f"({core.head_dim},), one number per channel of a head"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(parameter.shape)}")
    return "affine" if parameters else True


def _check_parameters(path: str, old: nn.Module, template: nn.Module) -> None:
    """Looks for parameters beside the published projections, whatever these have become, and for all of these."""
    unknown = [name for name, _ in old.named_parameters(recurse=False)]
    for name, child in old._modules.items():
        if name not in template._modules and child is not None:
            unknown += [f"{name}.{each}" for each, _ in child.named_parameters()]
    if unknown:
        raise ValueError(
            f"{path}: {type(old).__name__}: unknown parameters, expected those of {list(template._modules)} alone, "
            f"got {unknown}"
        )
    for name, child in template.named_children():
        if old._modules.get(name) is None and any(True for _ in child.parameters()):
            raise ValueError(f"{path}: {type(old).__name__}: expected a layer {name!r}, got {list(old._modules)}")


def _become(old: nn.Module, template: nn.Module) -> None:
    """Makes a module one of the template's class, with what it lacks of the template's attributes."""
    for name, value in vars(template).items():
        vars(old).setdefault(name, value)
    for name, child in template.named_children():
        if old._modules.get(name) is None:  # a dropout, which has no parameters
            old._modules[name] = child.train(old.training)
    old.__class__ = type(template)
    if isinstance(old, layers.ProjectedAttention):
        old.register_load_state_dict_pre_hook(checkpoint.adapt_layout)
    if isinstance(old, layers.MixedAttention) and isinstance(old.proj_dropout, nn.Dropout):
        old.proj_dropout.p = old.dropout  # nobody calls it there, but it says how much the layer drops
