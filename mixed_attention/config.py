"""What the user says of a module: the configurations, one class for each kind of module. No tensors here."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Literal, TypeVar

from mixed_attention import foreign

INIT_MODES = ("torch", "truncnormal", "truncnormal002", "truncnormal002-identity", "zeros", "torchs")

ConfigT = TypeVar("ConfigT", bound="Config")


def _as_int(field: str, value: Any, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{field}: expected an integer, got {value!r}") from error
    if number < minimum:
        raise ValueError(f"{field}: expected an integer of at least {minimum}, got {number}")
    return number


class Config:
    """Base of the configurations: plain attributes, equality by value, tolerant of fields it does not know.

    A transformer block may hand everything it knows to every attention module. Unknown fields are therefore kept in
    ``extra`` and can be read as attributes, so that one configuration serves several modules.
    """

    extra: dict[str, Any]

    @classmethod
    def of(cls: type[ConfigT], config: Any) -> ConfigT:
        """Reads a configuration of this class out of whatever describes one.

        Args:
            config: A configuration of this package, a mapping, an object with ``model_dump()`` (pydantic), or any
                object with the right attributes.

        Returns:
            A new configuration of this class.

        Raises:
            ValueError: If a value is missing or not allowed.
        """
        if isinstance(config, Mapping):
            return cls(**config)
        if callable(getattr(config, "model_dump", None)):
            return cls(**config.model_dump())
        if isinstance(config, Config):
            return cls(**config.to_dict())
        known = cls._field_names()
        made = cls(**{name: getattr(config, name) for name in known if hasattr(config, name)})
        others = [name for name in dir(config) if name not in known and foreign.may_matter(name)]
        made._refuse({name: getattr(config, name) for name in others})
        return made

    def _refuse(self, fields: Mapping[str, Any]) -> None:
        """Refuses unknown fields that would change what is computed."""

    @classmethod
    def _field_names(cls) -> set[str]:
        variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        constructors = [signature(base) for base in cls.__mro__ if issubclass(base, Config) and base is not Config]
        return {
            p.name for constructor in constructors for p in constructor.parameters.values() if p.kind not in variadic
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns every field, the unknown ones included, as the constructor takes them."""
        values = dict(vars(self))
        return {**values.pop("extra"), **values}

    def __getattr__(self, name: str) -> Any:  # only called for what is not a field
        try:
            return self.__dict__["extra"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}") from None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


class DotProductAttentionConfig(Config):
    """Configuration of :class:`mixed_attention.DotProductAttention`, and what all attention modules share.

    Args:
        dim: Width of the tokens; ``hidden_dim`` is another name for it.
        num_heads: Number of heads; must divide the width.
        use_rope: Whether queries and keys are rotated by the frequencies that the forward then requires.
        bias: Whether all projections have a bias, the output projection included.
        init_weights: ``"torch"`` leaves the default of ``nn.Linear``; ``"truncnormal"`` and ``"truncnormal002"`` draw
            weights with standard deviation 0.02 and zero the biases; ``"truncnormal002-identity"`` also zeroes the
            output projection. (``"zeros"`` and ``"torchs"`` are known names that no module implements.)
        dropout: Probability with which an attention weight is dropped in training mode.
        hidden_dim: Another name for ``dim``.
        qk_norm: Whether the queries and fresh keys of every head are divided by their root mean square over its
            channels before they are rotated, see :func:`mixed_attention.layers.norm.rms_norm`. ``"affine"``: and
            multiplied by learnable weights, ``q_norm.weight`` and ``k_norm.weight``, one per channel. Keys from a
            cache are taken as they are: they went through this when it was recorded.
        **extra: Kept, not interpreted, like ``attn_impl``, which says how and not what to compute. ``head_dim`` is
            accepted and ignored: it is the width over the heads.

    Raises:
        ValueError: If a value is missing or not allowed, ``dim`` and ``hidden_dim`` differ, or an unknown field would
            change what an attention computes: norms, masks, windows, biases, scales of scores and the like, see
            :mod:`mixed_attention.foreign`.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        use_rope: bool = False,
        bias: bool = True,
        init_weights: str = "truncnormal002",
        dropout: float = 0.0,
        *,
        hidden_dim: int | None = None,
        qk_norm: bool | Literal["affine"] = False,
        **extra: Any,
    ) -> None:
        if dim is not None and hidden_dim is not None and dim != hidden_dim:
            raise ValueError(f"dim and hidden_dim are two names of one width, got {dim} and {hidden_dim}")
        extra.pop("head_dim", None)
        self.extra = extra
        self.dim = _as_int("dim", hidden_dim if dim is None else dim, 1)
        self.num_heads = _as_int("num_heads", num_heads, 1)
        self.use_rope = bool(use_rope)
        self.bias = bool(bias)
        self.init_weights = init_weights
        self.dropout = float(dropout)
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be divisible by 'num_heads', got {self.num_heads} heads")
        if init_weights not in INIT_MODES:
            raise ValueError(f"init_weights: expected one of {', '.join(INIT_MODES)}, got {init_weights!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: expected a probability, got {dropout}")
        if not isinstance(qk_norm, bool) and qk_norm != "affine":
            raise ValueError(f"qk_norm: expected True, False or 'affine', got {qk_norm!r}")
        self.qk_norm = qk_norm
        self._refuse(extra)

    def _refuse(self, fields: Mapping[str, Any]) -> None:
        foreign.refuse(fields, self)

    @property
    def hidden_dim(self) -> int:
        """Another name for ``dim``."""
        return self.dim

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads


class MixedAttentionConfig(DotProductAttentionConfig):
    """Configuration of :class:`mixed_attention.MixedAttention`.

    Args:
        dim, num_heads, use_rope, bias, init_weights: See :class:`DotProductAttentionConfig`.
        parallel: True: the fused kernels. False: the readable reference, one pattern after the other. The numbers are
            the same within rounding.
        dropout, hidden_dim, qk_norm: See :class:`DotProductAttentionConfig`.
        detach_kv_cache: Whether recorded caches are cut from the autograd graph. They stay attached by default, so
            that one can train through them.
        **extra: See :class:`DotProductAttentionConfig`.
    """

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        use_rope: bool = False,
        bias: bool = True,
        init_weights: str = "truncnormal002",
        parallel: bool = True,
        dropout: float = 0.0,
        *,
        hidden_dim: int | None = None,
        detach_kv_cache: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(dim, num_heads, use_rope, bias, init_weights, dropout, hidden_dim=hidden_dim, **extra)
        self.parallel = bool(parallel)
        self.detach_kv_cache = bool(detach_kv_cache)


class AnchorAttentionConfig(MixedAttentionConfig):
    """Configuration of the anchor siblings.

    Args:
        branches: Prefixes of group names, one a branch, e.g. ``["surface", "volume"]``.
        anchor_suffix: A branch's anchors are the group ``branch + anchor_suffix``.
        **attention: See :class:`MixedAttentionConfig`.

    Raises:
        ValueError: If no branch is named, besides what :class:`MixedAttentionConfig` raises.
    """

    def __init__(
        self, *args: Any, branches: Sequence[str] | None = None, anchor_suffix: str = "_anchors", **attention: Any
    ) -> None:
        super().__init__(*args, **attention)
        is_list = isinstance(branches, Sequence) and not isinstance(branches, (str, bytes))
        if not branches or not is_list or not all(isinstance(branch, str) for branch in branches):
            raise ValueError(f"branches: expected a list of at least one name prefix, got {branches!r}")
        self.branches = list(branches)
        self.anchor_suffix = anchor_suffix


class PerceiverAttentionConfig(DotProductAttentionConfig):
    """Configuration of :class:`mixed_attention.PerceiverAttention`.

    Args:
        kv_dim: Width of the tokens that are attended to; default ``dim``.
        **attention: See :class:`DotProductAttentionConfig`.
    """

    def __init__(self, *args: Any, kv_dim: int | None = None, **attention: Any) -> None:
        super().__init__(*args, **attention)
        self.kv_dim = self.dim if kv_dim is None else _as_int("kv_dim", kv_dim, 1)


class RopeFrequencyConfig(Config):
    """Configuration of :class:`mixed_attention.RopeFrequency`.

    Args:
        hidden_dim: Channels of a head (not the width of the tokens).
        input_dim: Number of coordinate axes.
        max_wavelength: The lowest frequency is about one over this, in radians per unit of the coordinates.
        implementation: ``"complex"`` or ``"real"``, the form of the frequencies.
        **extra: Kept, not interpreted.

    Raises:
        ValueError: If a value is missing or not allowed.
    """

    def __init__(
        self,
        hidden_dim: int | None = None,
        input_dim: int | None = None,
        max_wavelength: int = 10_000,
        implementation: str = "complex",
        **extra: Any,
    ) -> None:
        self.extra = extra
        self.hidden_dim = _as_int("hidden_dim", hidden_dim, 1)
        self.input_dim = _as_int("input_dim", input_dim, 1)
        self.max_wavelength = _as_int("max_wavelength", max_wavelength, 1)
        self.implementation = implementation
        if implementation not in ("complex", "real"):
            raise ValueError(f"implementation: expected 'complex' or 'real', got {implementation!r}")


class UntiedMixedAttentionConfig(MixedAttentionConfig):
    """Configuration of :class:`mixed_attention.noether.UntiedMixedAttention`.

    Args:
        num_types: Number of domains, each with projections of its own.
        **attention: See :class:`MixedAttentionConfig`.
    """

    def __init__(self, *args: Any, num_types: int | None = None, **attention: Any) -> None:
        super().__init__(*args, **attention)
        self.num_types = _as_int("num_types", num_types, 1)
