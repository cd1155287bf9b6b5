"""Every token attends to every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixed_attention.config import DotProductAttentionConfig
from mixed_attention.eager.packed import Freqs
from mixed_attention.eager.projection import linear
from mixed_attention.layers.base import ProjectedAttention
from mixed_attention.layers.checks import check_rank, rope_mismatch


class DotProductAttention(ProjectedAttention):
    """Dense multi-head self-attention.

    Args:
        config: A :class:`mixed_attention.DotProductAttentionConfig`, or whatever describes one: a mapping, an object
            with ``model_dump()``, or an object with its attributes.

    Attributes:
        qkv: Linear layer to q, k and v, whose weight ``(3 * dim, dim)`` is laid out as (which, head, channel).
        proj: Output projection.

    Raises:
        ValueError: If the configuration is not allowed.
        NotImplementedError: If ``init_weights`` is a mode that nobody implements.
    """

    def __init__(self, config: Any) -> None:
        settings = DotProductAttentionConfig.of(config)
        super().__init__(settings, settings.dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, freqs: Freqs | None = None) -> Tensor:
        """Every token attends to every token.

        Args:
            x: Tokens ``(B, N, dim)``.
            attn_mask: Boolean (True = attend) or additive, broadcastable to ``(B, H, N, N)``; passed to
                ``F.scaled_dot_product_attention``, which then computes the attention.
            freqs: Frequencies of the tokens, see :func:`mixed_attention.apply_rope`; exactly with ``use_rope``.

        Returns:
            ``(B, N, dim)``.

        Raises:
            AssertionError: If ``freqs`` is given without ``use_rope``, or missing with it.
        """
        if self.use_rope != (freqs is not None):
            raise AssertionError(rope_mismatch(self.use_rope))
        if self._asks_ranks(x):
            return self.proj_dropout(self.token_sharding.attend_to_all(self, x, attn_mask, freqs))
        check_rank("x", x)
        out, _ = self._attend_dense(self._project(x, ("qkv", None, freqs)), attn_mask)
        return self.proj_dropout(linear(out, self.proj))
