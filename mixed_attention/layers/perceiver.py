"""Some tokens attend to all tokens of another sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixed_attention import cache
from mixed_attention.cache import KVEntry
from mixed_attention.config import PerceiverAttentionConfig
from mixed_attention.eager.packed import Freqs, Packed
from mixed_attention.eager.projection import linear
from mixed_attention.layers.base import ProjectedAttention
from mixed_attention.layers.checks import check_batch, check_rank, rope_mismatch


class PerceiverAttention(ProjectedAttention):
    """Dense multi-head cross-attention.

    Args:
        config: A :class:`mixed_attention.PerceiverAttentionConfig`, or whatever describes one.

    Attributes:
        kv: Linear layer to k and v, whose weight ``(2 * dim, kv_dim)`` is laid out as (which, head, channel).
        q: Linear layer to q.
        proj: Output projection.

    Raises:
        ValueError: If the configuration is not allowed.
        NotImplementedError: If ``init_weights`` is a mode that nobody implements.
    """

    projections: tuple[str, ...] = ("kv", "q")

    def __init__(self, config: Any) -> None:
        settings = PerceiverAttentionConfig.of(config)
        super().__init__(settings, settings.kv_dim)

    def forward(
        self,
        q: Tensor,
        kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
        q_freqs: Freqs | None = None,
        k_freqs: Freqs | None = None,
        *,
        kv_cache: Mapping[str, Tensor] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVEntry | None]:
        """Every token of ``q`` attends to every token of ``kv``.

        Args:
            q: Tokens that ask, ``(B, Nq, dim)``.
            kv: Tokens that are attended to, ``(B or 1, Nk, kv_dim)``; not needed with ``kv_cache``.
            attn_mask: Boolean (True = attend) or additive, broadcastable to ``(B, H, Nq, Nk)``; passed to
                ``F.scaled_dot_product_attention``, which then computes the attention.
            q_freqs: Frequencies of the tokens of ``q``; exactly with ``use_rope``.
            k_freqs: Frequencies of the tokens of ``kv``; likewise, but not needed with ``kv_cache``.
            kv_cache: ``{"k": (B or 1, H, Nk, D), "v": likewise}`` of an earlier call, used instead of ``kv``.
            return_kv_cache: Whether to return the keys and values as well.

        Returns:
            ``(B, Nq, dim)``. With ``return_kv_cache`` a pair of it and the cache; ``None`` if the call read one.

        Raises:
            AssertionError: If frequencies are given without ``use_rope``, or missing with it.
            ValueError: If neither ``kv`` nor ``kv_cache`` is given, or the cache does not fit.
        """
        if not self.use_rope and (q_freqs is not None or k_freqs is not None):
            raise AssertionError(rope_mismatch(self.use_rope))
        out, recorded = self._attend(q, kv, attn_mask, q_freqs, k_freqs, kv_cache, record=return_kv_cache)
        return (out, recorded) if return_kv_cache else out

    def _attend(
        self,
        q: Tensor,
        kv: Tensor | None,
        attn_mask: Tensor | None,
        q_freqs: Freqs | None,
        k_freqs: Freqs | None,
        kv_cache: Mapping[str, Tensor] | None,
        *,
        record: bool,
    ) -> tuple[Tensor, KVEntry | None]:
        """The layer, but for what the published signatures disagree about."""
        if kv is None and kv_cache is None:
            raise ValueError("Either kv or kv_cache must be provided")
        if self.use_rope and (q_freqs is None or (k_freqs is None and kv_cache is None)):
            raise AssertionError(rope_mismatch(self.use_rope))
        if self._asks_ranks(q):
            attend = self.token_sharding.attend_across
            out, recorded = attend(self, q, kv, attn_mask, q_freqs, k_freqs, kv_cache, record=record)
            return self.proj_dropout(out), recorded
        check_rank("q", q)
        if kv_cache is None:
            assert kv is not None
            check_rank("kv", kv)
            check_batch(q, kv)
            parts = [*self._project(q, ("q", None, q_freqs)), *self._project(kv, ("kv", None, k_freqs))]
        else:
            (queries,) = self._project(q, ("q", None, q_freqs))
            keys = cache.read_entry("kv_cache", kv_cache, queries.buffer.view(queries.shape).squeeze(2))
            parts = [queries, *map(Packed.of, keys)]
        out, rotated = self._attend_dense(parts, attn_mask)
        recorded = None
        if record and kv_cache is None:
            _, k, v = rotated()
            recorded = cache.record_entry(k, v, compact=self._records_copies)
        return self.proj_dropout(linear(out, self.proj)), recorded
