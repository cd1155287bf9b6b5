"""The layers of upstream's newest release, and the exchange of modules inside a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import cache, checkpoint, foreign, layers, rope, spec
from mixed_attention.cache import KVCache, KVEntry
from mixed_attention.eager import packed
from mixed_attention.eager.packed import Freqs
from mixed_attention.layers.anchor import MissingAnchorTokenError, MissingBranchTokensError, UnexpectedTokenError
from mixed_attention.plan import AttentionPatternLike, AttentionPlan, Group, TokenSpecLike
from mixed_attention.spec import AttentionPattern, TokenSpec

__all__ = [
    "AttentionPattern",
    "CrossAnchorAttention",
    "DotProductAttention",
    "JointAnchorAttention",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MultiBranchAnchorAttention",
    "PerceiverAttention",
    "RopeFrequency",
    "SelfAnchorAttention",
    "TokenSpec",
    "UnexpectedTokenError",
    "UntiedMixedAttention",
    "swap",
]


class DotProductAttention(layers.DotProductAttention):
    """:class:`mixed_attention.DotProductAttention` with separate ``q``, ``k`` and ``v`` layers."""

    projections = ("q", "k", "v")


class _RecordsAlways(layers.ProjectedAttention):
    """Every call returns a cache, although training throws it away: there it shall cost nothing."""

    @property
    def _records_copies(self) -> bool:
        return not (self.training and torch.is_grad_enabled())


class MixedAttention(_RecordsAlways, DotProductAttention, layers.MixedAttention):
    """:class:`mixed_attention.MixedAttention` with separate ``q``, ``k`` and ``v`` layers; always returns a pair.

    The cache is compact, but for calls in training mode that record a graph: there it is views of what the graph holds.
    """

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """Applies the patterns. Arguments and errors: :meth:`mixed_attention.MixedAttention.forward`.

        Returns:
            The output ``(B, N, dim)``, and the cache of all groups whose name contains ``_anchor``; ``None`` instead
            of it if a group has size ``None``.
        """
        return self._attend(x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, record=True)


class MultiBranchAnchorAttention(layers.MultiBranchAnchorAttention):
    """:class:`mixed_attention.MultiBranchAnchorAttention` over :class:`MixedAttention`; always returns a pair."""

    mixed_attention_class = MixedAttention

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """Attends from the tokens to anchors. Errors: :meth:`mixed_attention.MultiBranchAnchorAttention.forward`.

        Returns:
            See :meth:`MixedAttention.forward`.
        """
        return self.mixed_attention(x, token_specs, self._patterns(token_specs), key_padding_mask, freqs, kv_cache)


class SelfAnchorAttention(MultiBranchAnchorAttention, layers.SelfAnchorAttention):
    """Every branch attends to its own anchors."""


class CrossAnchorAttention(MultiBranchAnchorAttention, layers.CrossAnchorAttention):
    """Every branch attends to the anchors of all other branches."""


class JointAnchorAttention(MultiBranchAnchorAttention, layers.JointAnchorAttention):
    """All tokens attend to the anchors of all branches."""


class PerceiverAttention(_RecordsAlways, layers.PerceiverAttention):
    """:class:`mixed_attention.PerceiverAttention` with separate ``k`` and ``v`` layers; always returns a pair.

    The cache: see :class:`MixedAttention`.
    """

    projections = ("k", "v", "q")

    def forward(
        self,
        q: Tensor,
        kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_freqs: Freqs | None = None,
        k_freqs: Freqs | None = None,
        kv_cache: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, KVEntry | None]:
        """Attends from ``q`` to ``kv``. Arguments and errors: :meth:`mixed_attention.PerceiverAttention.forward`.

        Frequencies are ignored without ``use_rope``.

        Returns:
            The output ``(B, Nq, dim)``, and the keys and values as a cache; ``None`` instead of it if one was given.
        """
        if not self.use_rope:
            q_freqs = k_freqs = None
        return self._attend(q, kv, attn_mask, q_freqs, k_freqs, kv_cache, record=True)


class _PerDomainLinear(nn.Module):
    """One linear layer per domain, its matrices kept apart: ``weight.0``, ``weight.1``, ..."""

    def __init__(self, in_features: int, out_features: int, num_types: int, bias: bool) -> None:
        super().__init__()
        layers = [nn.Linear(in_features, out_features, bias=bias) for _ in range(num_types)]
        self.weight = nn.ParameterList(layer.weight for layer in layers)
        self.bias = nn.ParameterList(layer.bias for layer in layers) if bias else None

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Projects tokens ``(B, N, in_features)`` by the weights of their domains, which have some sizes each."""
        biases = [None] * len(sizes) if self.bias is None else self.bias
        return torch.cat([F.linear(*each) for each in zip(x.split(sizes, 1), self.weight, biases)], 1)

    def reset_parameters(self) -> None:
        """Draws new weights and biases as ``nn.Linear`` does."""
        for weight in self.weight:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        for bias in self.bias or ():
            bound = self.weight[0].shape[1] ** -0.5
            nn.init.uniform_(bias, -bound, bound)


class UntiedMixedAttention(MixedAttention):
    """:class:`MixedAttention` whose projections have one weight per domain; returns the output alone.

    The domain of a group is its name up to the first underscore, and the groups of a domain must be neighbours. The
    i-th domain, in order of appearance, uses the i-th weights, as ``x @ W.T + b`` whatever the sizes of the groups.
    Upstream's result depends on them; see :func:`mixed_attention.checkpoint.load_untied_state_dict`.

    Args:
        config: As for :class:`MixedAttention`, with the field ``num_types``, the number of domains.

    Raises:
        ValueError: If ``num_types`` is missing, besides what :class:`MixedAttention` raises.
        NotImplementedError: If ``init_weights`` is neither ``"torch"`` nor ``"truncnormal"``, ``"truncnormal002"``.
    """

    q: _PerDomainLinear
    k: _PerDomainLinear
    v: _PerDomainLinear
    proj: _PerDomainLinear

    def __init__(self, config: Any) -> None:
        settings = spec.UntiedMixedAttentionConfig.of(config)
        if settings.init_weights == "truncnormal002-identity":
            raise NotImplementedError("init_weights 'truncnormal002-identity' is not implemented per domain")
        super().__init__(settings)
        self.num_types = settings.num_types

    def _linear(self, in_features: int, out_features: int, settings: Any) -> nn.Module:
        return _PerDomainLinear(in_features, out_features, settings.num_types, settings.bias)

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: None = None,
    ) -> Tensor:
        """Applies the patterns. Arguments: :meth:`mixed_attention.MixedAttention.forward`.

        Returns:
            ``(B, N, dim)``.

        Raises:
            NotImplementedError: If a cache is given.
            RuntimeError: If there are more domains than weights.
            ValueError: If the groups of a domain are not neighbours, besides what :class:`MixedAttention` raises.
        """
        if kv_cache is not None:
            raise NotImplementedError("kv_cache is not supported with per-domain projections")
        self._check_rope(freqs)
        layers.check_tokens(x, token_specs, key_padding_mask)
        cache.check_names(kv_cache, [group.name for group in token_specs if group.size is None])
        plan = AttentionPlan.compile(token_specs, attention_patterns)
        sizes = self._domain_sizes(plan.groups)
        buffer = torch.cat([self.q(x, sizes), self.k(x, sizes), self.v(x, sizes)], -1)
        out, _ = packed.attend(
            [self._pack(buffer, x, "qkv", None, freqs)],
            plan,
            key_padding_mask=key_padding_mask,
            dropout_p=self._dropout_p,
            parallel=self.parallel,
        )
        return self.proj(out, sizes)

    def _domain_sizes(self, groups: Sequence[Group]) -> list[int]:
        domains: dict[str, int] = {}
        previous = None
        for group in groups:
            domain = group.name.split("_", 1)[0]
            if domain in domains and domain != previous:
                raise ValueError(f"the token groups of domain {domain!r} are not consecutive in token_specs")
            domains[domain] = domains.get(domain, 0) + group.size
            previous = domain
        if len(domains) > self.num_types:
            raise RuntimeError(f"sizes do not match: {len(domains)} domains {list(domains)}, {self.num_types} weights")
        return list(domains.values())


class _RealRopeFrequencyConfig(spec.RopeFrequencyConfig):
    def __init__(
        self,
        hidden_dim: int | None = None,
        input_dim: int | None = None,
        max_wavelength: int = 10_000,
        implementation: str = "real",
        **extra: Any,
    ) -> None:
        super().__init__(hidden_dim, input_dim, max_wavelength, implementation, **extra)


class RopeFrequency(rope.RopeFrequency):
    """:class:`mixed_attention.RopeFrequency`, whose default is the legacy form; warns where that is chosen."""

    config_class = _RealRopeFrequencyConfig

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        if self.implementation == "real":
            warnings.warn("RopeFrequency: implementation='complex' is recommended over 'real'", stacklevel=2)


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
    "DotProductAttention": DotProductAttention,
    "MixedAttention": MixedAttention,
    "PerceiverAttention": PerceiverAttention,
    "SelfAnchorAttention": SelfAnchorAttention,
    "CrossAnchorAttention": CrossAnchorAttention,
    "JointAnchorAttention": JointAnchorAttention,
}


def swap(model: nn.Module) -> int:
    """Turns upstream's attention modules inside a model into this package's, in place.

    A module is recognised by the name of its class and the package that defines it (``noether`` or ``emmi``). One with
    a fused projection becomes an instance of the class of the same name at the top of this package, one with separate
    projections of that of this module; so signatures, return types and state dicts stay as they are.

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
