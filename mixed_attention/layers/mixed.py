"""Named groups of tokens attend to the groups that patterns name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from mixed_attention import cache
from mixed_attention.cache import KVCache, KVEntry
from mixed_attention.config import MixedAttentionConfig
from mixed_attention.eager import at_once, packed
from mixed_attention.eager.packed import Freqs, Packed, Rotated
from mixed_attention.eager.projection import calls_are_torchs, linear, take
from mixed_attention.layers.checks import as_padding_mask, check_tokens, rope_mismatch
from mixed_attention.layers.dense import DotProductAttention
from mixed_attention.layers.norm import are_plain
from mixed_attention.plan import AttentionPatternLike, AttentionPlan, Group, TokenSpecLike, read_patterns
from mixed_attention.spec import TokenSpec
from mixed_attention.torch_internals import plain_parameters


class MixedAttention(DotProductAttention):
    """Multi-head attention in which named groups of tokens attend to the groups that patterns name.

    Args:
        config: A :class:`mixed_attention.MixedAttentionConfig`, or whatever describes one: a mapping, an object with
            ``model_dump()``, or an object with its attributes.

    Attributes:
        qkv: Linear layer to q, k and v, whose weight ``(3 * dim, dim)`` is laid out as (which, head, channel).
        proj: Output projection.
        parallel: Whether the fused kernels run, or else the readable reference.
        proj_dropout: Unused here, as upstream; dropout acts on the attention weights alone.

    Raises:
        ValueError: If the configuration is not allowed.
        NotImplementedError: If ``init_weights`` is a mode that nobody implements.

    Example:
        >>> layer = MixedAttention(MixedAttentionConfig(dim=192, num_heads=3))
        >>> specs = [TokenSpec("anchors", 100), TokenSpec("queries", 50)]
        >>> layer(torch.randn(1, 150, 192), specs, [AttentionPattern(["anchors", "queries"], ["anchors"])]).shape
        torch.Size([1, 150, 192])
    """

    cached_groups: frozenset[str] = frozenset()
    """Names of groups that go into a cache besides those whose name contains ``_anchor``."""

    def __init__(self, config: Any) -> None:
        settings = MixedAttentionConfig.of(config)
        super().__init__(settings)
        self.parallel = settings.parallel
        self.detach_kv_cache = settings.detach_kv_cache

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        attention_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache | None]:
        """Applies the patterns.

        Args:
            x: Tokens ``(B, N, dim)``, the groups of ``token_specs`` one after the other.
            token_specs: Name and size of the groups. Those of size ``None`` are not in ``x``: they ask nothing, and
                their keys and values are those of ``kv_cache``.
            attention_patterns: Who attends to whom. Every group must be a query of exactly one pattern.
            attention_mask: A boolean ``(B or 1, N)`` means the same as ``key_padding_mask``; anything else is refused.
            freqs: Frequencies of the tokens of ``x``, see :func:`mixed_attention.apply_rope`; exactly with
                ``use_rope``.
            key_padding_mask: Boolean ``(B or 1, N)``, True = real token. Nobody attends to the others.
            kv_cache: A cache that an earlier call returned: ``{name: {"k": (B or 1, H, n, D), "v": likewise}}``. Only
                looked at if a group has size ``None``.
            return_kv_cache: Whether to return a cache as well.

        Returns:
            ``(B, N, dim)``, in the order of ``token_specs``. With ``return_kv_cache``, a pair of it and the cache of
            all groups whose name contains ``_anchor``, keys after rotation; ``None`` if the call itself read a cache.

        Raises:
            TypeError: If ``x`` is no floating-point tensor, or a group, a pattern or the cache not of the right kind.
            ValueError: If ``freqs``, the mask, the sizes, the patterns or the cache do not fit, or the projections do
                not make what the heads take; under tensor parallelism those of :mod:`mixed_attention.noether` do.
            NotImplementedError: If ``attention_mask`` is anything but a padding mask.
        """
        if attention_mask is not None:
            self._check_rope(freqs)
            key_padding_mask = as_padding_mask(attention_mask, key_padding_mask, x)
        out, recorded = self._attend(
            x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, record=return_kv_cache
        )
        return (out, recorded) if return_kv_cache else out

    def _attend(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        key_padding_mask: Tensor | None,
        freqs: Freqs | None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None,
        *,
        record: bool,
    ) -> tuple[Tensor, KVCache | None]:
        """The layer, but for what the published signatures disagree about."""
        if self._asks_ranks(x):
            attend = self.token_sharding.attend_groups
            return attend(self, x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, record=record)
        found = None
        if kv_cache is None and not torch.compiler.is_compiling():
            found = self._at_once(x, token_specs, attention_patterns, key_padding_mask, freqs, record=record)
        if found is None:
            found = self._in_steps(x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache, record=record)
        return found

    def _at_once(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        key_padding_mask: Tensor | None,
        freqs: Freqs | None,
        *,
        record: bool,
    ) -> tuple[Tensor, KVCache | None] | None:
        """The layer by one call of C++, in plain eager mode; None elsewhere, and where there is an error to raise."""
        if self.qk_norm and (self.head_dim % 2 or not are_plain((self.q_norm, self.k_norm))):
            return None
        maps = self._plain_maps(x, freqs)
        if maps is None:
            return None
        request, shape = at_once.Request.of(token_specs, attention_patterns), x.shape
        if request is None or request.has_cached or len(shape) != 3 or shape[1] != request.num_tokens:
            return None
        if key_padding_mask is not None:
            check_tokens(x, token_specs, key_padding_mask)
        to_record = request.recorded(self.cached_groups) if record else frozenset()
        plan = request.plan(request.read.issuperset(to_record) and _pays_to_skip(x, request.unread))
        mask = key_padding_mask
        if mask is not None and plan.num_keys != plan.num_queries:
            mask = take(mask, at_once.runs_with_keys(plan))
        made = at_once.run(
            x,
            maps,
            plan,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            freqs=freqs,
            key_padding_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            normalises=bool(self.qk_norm),
        )
        if made is None:
            return None
        out, rotated = made
        return out, self._recorded(plan, to_record, rotated, mask) if record else None

    def _plain_maps(self, x: Tensor, freqs: Freqs | None) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weights and biases, of the output projection at last, if the layer is these, norms, rotation and attention.

        None for tensors of other classes, the reference, and projections that are more.
        """
        if type(x) is not Tensor or not self.parallel or self.use_rope != (freqs is not None):
            return None
        is_packed = len(self.projections) == 1
        if "".join(self.projections) != "qkv" or (is_packed and self.num_heads * self.head_dim != self._dim):
            return None
        layers = [getattr(self, name) for name in (*self.projections, "proj")]
        maps = [each for each in map(plain_parameters, layers) if each is not None]
        return None if len(maps) < len(layers) or not calls_are_torchs() else maps

    def _in_steps(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        attention_patterns: Sequence[AttentionPatternLike],
        key_padding_mask: Tensor | None,
        freqs: Freqs | None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None,
        *,
        record: bool,
    ) -> tuple[Tensor, KVCache | None]:
        """The layer in any mode: projection, rotation and attention, projection."""
        self._check_rope(freqs)
        token_specs = check_tokens(x, token_specs, key_padding_mask)
        attention_patterns = read_patterns(attention_patterns)
        cached = [spec.name for spec in token_specs if spec.size is None]
        to_record = (
            set()
            if cached or not record
            else {spec.name for spec in token_specs if cache.is_recorded(spec.name, self.cached_groups)}
        )
        read = {name for pattern in attention_patterns for name in pattern.key_value_tokens}
        unread = at_once.Unread.of(token_specs, read)
        plan = AttentionPlan.compile(
            token_specs,
            attention_patterns,
            cached=[TokenSpec(name, cache.cached_length(kv_cache, name)) for name in cached],
            skip_unread_keys=read.issuperset(to_record) and (bool(cached) or _pays_to_skip(x, unread)),
        )
        cache.check_names(kv_cache, cached)
        kv_cache = kv_cache if cached else None
        parts = self._parts(x, plan, freqs, kv_cache)
        mask = None if key_padding_mask is None else take(key_padding_mask, at_once.runs_with_keys(plan))
        if kv_cache is not None:
            mask = cache.join_masks(plan, mask, kv_cache, x)
        out, rotated = packed.attend(
            parts, plan, key_padding_mask=mask, dropout_p=self._dropout_p, parallel=self.parallel
        )
        recorded = self._recorded(plan, to_record, rotated, mask) if record and not cached else None
        return linear(out, self.proj), recorded

    def _recorded(self, plan: AttentionPlan, names: Set[str], rotated: Rotated, mask: Tensor | None) -> KVCache:
        """The cache of some groups."""
        _, k, v = rotated()
        return {group.name: self._record(group, k, v, mask) for group in plan.groups if group.name in names}

    def _parts(
        self, x: Tensor, plan: AttentionPlan, freqs: Freqs | None, kv_cache: Mapping[str, Mapping[str, Tensor]] | None
    ) -> list[Packed]:
        """q, k and v of a call: q of all tokens, k and v of those that somebody attends to, or from the cache."""
        if kv_cache is None and all(group.key_start is not None for group in plan.groups):
            return self._project(x, ("qkv", None, freqs))
        if kv_cache is not None and all(g.query_start is None or g.key_start is None for g in plan.groups):
            (q,) = self._project(x, ("q", None, freqs))
            fresh = []
        else:
            q, kv = self._project(x, ("q", None, freqs), ("kv", at_once.runs_with_keys(plan), freqs))
            if kv_cache is None:
                return [q, kv]
            fresh = packed.rotated_slots(kv, parallel=self.parallel)
        keys = cache.join_keys(plan, fresh, kv_cache, q.buffer.view(q.shape).squeeze(2))
        return [q, *map(Packed.of, keys)]

    def _record(self, group: Group, k: Tensor, v: Tensor, mask: Tensor | None) -> KVEntry:
        assert group.key_start is not None  # plans of calls that record have the keys of these groups
        rows = slice(group.key_start, group.key_start + group.num_keys)
        kept = None if mask is None else mask[:, rows]
        return cache.record_entry(
            k[:, rows], v[:, rows], kept, detach=self.detach_kv_cache, compact=self._records_copies
        )

    def _check_rope(self, freqs: Freqs | None) -> None:
        if self.use_rope != (freqs is not None):
            raise ValueError(rope_mismatch(self.use_rope))


LEAST_SKIPPED = {"cuda": 3_000_000}
"""By type of device, from how many numbers of unread tokens on, for each run of them, no keys and values are made.

On a GPU a second product, and a product and a rotation for each run, cost more than they save below that. Above it they
cost hardly any time and save memory.
"""


def _pays_to_skip(x: Tensor, unread: at_once.Unread) -> bool:
    # NOTE: dropout draws by ranges of neighbouring keys, which unread ones part, be they none: every eager way through
    # a layer has to decide alike, or a recomputation by another way drops other weights.
    if torch.compiler.is_compiling():  # sizes may be symbolic: they must not be compared
        return True
    least = LEAST_SKIPPED.get(x.device.type, 0) * max(unread.num_runs, 1)
    return x.shape[0] * unread.num_tokens * x.shape[2] >= least
