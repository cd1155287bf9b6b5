"""The layers of upstream's newest release."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixed_attention import layers, rope
from mixed_attention.cache import KVCache, KVEntry
from mixed_attention.config import RopeFrequencyConfig
from mixed_attention.eager.packed import Freqs
from mixed_attention.plan import AttentionPatternLike, TokenSpecLike


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
        return self.mixed_attention(x, token_specs, self.patterns(token_specs), key_padding_mask, freqs, kv_cache)


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


class _RealRopeFrequencyConfig(RopeFrequencyConfig):
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
