"""The attention layers: projections, rotation and attention, one path for all devices and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import cache, checkpoint
from mixed_attention.autocast import cat
from mixed_attention.cache import KVCache, KVEntry
from mixed_attention.config import DotProductAttentionConfig, MixedAttentionConfig, PerceiverAttentionConfig
from mixed_attention.eager import at_once, packed
from mixed_attention.eager.packed import Freqs, Packed, Rotated
from mixed_attention.eager.projection import Part, Runs, calls_are_torchs, is_plain, linear, project, take
from mixed_attention.layers.init import init_weights
from mixed_attention.layers.norm import RMSNorm
from mixed_attention.plan import AttentionPatternLike, AttentionPlan, Group, TokenSpecLike, read_patterns, read_specs
from mixed_attention.rope import check_freqs
from mixed_attention.spec import AttentionPattern, TokenSpec
from mixed_attention.torch_internals import plain_parameters


class ProjectedAttention(nn.Module):
    """What the layers share: heads, an output projection, and linear layers that make q, k and v.

    The layers that make q, k and v are named by what they make: ``qkv`` makes all three, its rows laid out as
    (which, head, channel); ``k`` makes keys alone. Which of them a class has is its parameter layout.

    Args:
        settings: The configuration.
        kv_dim: Width of the tokens that keys and values are made of.
    """

    projections: tuple[str, ...] = ("qkv",)  # in the order of construction, which fixes the random initial weights
    token_sharding: Any = None
    """How the tokens are spread over ranks, where :class:`mixed_attention.distributed.ContextParallel` has said so."""

    def __init__(self, settings: DotProductAttentionConfig, kv_dim: int) -> None:
        super().__init__()
        self._dim = settings.dim
        self.num_heads = settings.num_heads
        self.head_dim = settings.head_dim
        self.init_weights = settings.init_weights
        self.use_rope = settings.use_rope
        self.dropout = settings.dropout
        for name in self.projections:
            in_features = settings.dim if name.startswith("q") else kv_dim
            self.add_module(name, self._linear(in_features, len(name) * settings.dim, settings))
        self.proj = self._linear(settings.dim, settings.dim, settings)
        self.proj_dropout = nn.Dropout(settings.dropout)
        init_weights(self, settings.init_weights)
        self.qk_norm = settings.qk_norm
        if settings.qk_norm:
            self.q_norm = RMSNorm(settings.head_dim, affine=settings.qk_norm == "affine")
            self.k_norm = RMSNorm(settings.head_dim, affine=settings.qk_norm == "affine")
        self.register_load_state_dict_pre_hook(checkpoint.adapt_layout)

    def reset_parameters(self) -> None:
        """Draws new weights by ``init_weights``, one projection after the other, as calling theirs does."""
        for name in (*self.projections, "proj", *(("q_norm", "k_norm") if self.qk_norm else ())):
            getattr(self, name).reset_parameters()

    def _linear(self, in_features: int, out_features: int, settings: DotProductAttentionConfig) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=settings.bias)

    def _project(self, x: Tensor, *wanted: tuple[str, Runs | None, Freqs | None]) -> list[Packed]:
        """Makes parts, some neighbouring slots out of "qkv" each, whatever the parameter layout.

        Args:
            x: Tokens ``(B, N, C)``.
            wanted: For every part its slots, in the order of "qkv", which of the tokens it is made of, and the
                frequencies of all tokens, which rotate q and k.
        """
        names = [name for name in self.projections if any(slot in slots for slot in name for slots, _, _ in wanted)]
        layers = [getattr(self, name) for name in names]
        if is_plain(*layers):
            for name, layer in zip(names, layers):
                self._check_rows(name, len(layer.weight), layer)
            weight, bias = _joined(layers)
            made = "".join(names)
            rows = self.num_heads * self.head_dim
            begins = [made.index(slots[0]) for slots, _, _ in wanted]
            parts = [
                Part(rows * begin, rows * (begin + len(slots)), runs) for begin, (slots, runs, _) in zip(begins, wanted)
            ]
            buffers = project(x, weight, bias, parts)
        else:
            buffers = self._call(dict(zip(names, layers)), x, wanted)
        return [self._pack(buffer, x, *each) for buffer, each in zip(buffers, wanted)]

    def _call(
        self, layers: Mapping[str, Any], x: Tensor, wanted: Sequence[tuple[str, Runs | None, Freqs | None]]
    ) -> list[Tensor]:
        """Parts of what the layers make where each is called as it is: once, and on all tokens.

        They are copies, because a hook may hold on to what it saw.
        """
        made: dict[str, Tensor] = {}
        for name, layer in layers.items():
            columns = layer(x)
            # A packed projection that stays a DTensor is whole to look at, but its shards would cut across its slots.
            here = columns.to_local() if len(name) > 1 and hasattr(columns, "to_local") else columns
            self._check_rows(name, here.shape[-1], layer)
            made.update(zip(name, columns.chunk(len(name), -1)))
        return [cat([take(made[slot], runs) for slot in slots], -1) for slots, runs, _ in wanted]

    def _check_rows(self, name: str, num_rows: int, layer: Any) -> None:
        """Checks what a projection makes against the heads.

        Tensor parallelism shards rows. Of a separate projection they are those of some heads. Of a packed one they
        would be read as q, k and v of fewer heads, and are not.
        """
        heads = f"{self.num_heads} heads of {self.head_dim} channels"
        if len(name) == 1 and num_rows != self.num_heads * self.head_dim:
            if not _are_shard(num_rows, self.num_heads * self.head_dim, layer):
                raise ValueError(
                    f"{name}: expected {self.num_heads * self.head_dim} output features for {heads}, got {num_rows}; "
                    "where its rows are sharded, divide num_heads likewise"
                )
            if num_rows % self.head_dim:
                raise ValueError(
                    f"{name}: {num_rows} of {heads} are on this rank, which cuts through a head; shard them over a "
                    "number of ranks that divides the heads"
                )
            if self.qk_norm == "affine":
                raise NotImplementedError(
                    f"{name}: sharded heads with qk_norm='affine', whose weights all heads share: no rank has their "
                    "whole gradients; use qk_norm=True, or spread tokens with ma.distributed.ContextParallel"
                )
        if len(name) > 1 and (num_rows != len(name) * self._dim or self.num_heads * self.head_dim != self._dim):
            raise ValueError(
                f"{name}: expected {len(name) * self._dim} output features for {self._dim} channels in all heads, got "
                f"{num_rows} for {heads}; it packs {', '.join(name)} and cannot be sharded by rows or heads: use the "
                "layers of ma.noether, whose q, k and v are separate, or ma.distributed.HeadParallel(), which splits "
                "them; either layout loads the checkpoints of the other"
            )

    def _pack(self, buffer: Tensor, x: Tensor, slots: str, runs: Runs | None, freqs: Freqs | None) -> Packed:
        """What was projected from tokens ``x``, and how it is to be normalised and rotated."""
        num_tokens = x.shape[1] if runs is None else sum(size for size, is_taken in runs if is_taken)
        num_heads = buffer.shape[-1] // (len(slots) * self.head_dim)  # those of this rank where they are sharded
        shape = (x.shape[0], num_tokens, len(slots), num_heads, self.head_dim)
        heads = slots.replace("v", "")
        norms = tuple([getattr(self, f"{slot}_norm") for slot in heads]) if self.qk_norm else ()
        if freqs is None:
            return Packed(buffer, shape, norms=norms)
        self._check_freqs(freqs, (x.shape[0], x.shape[1]))
        return Packed(buffer, shape, len(heads), freqs, runs, norms)

    def _check_freqs(self, freqs: Freqs | None, tokens: tuple[int, int]) -> None:
        if freqs is not None and not isinstance(freqs, tuple):
            check_freqs(freqs, *tokens, self.head_dim)

    @property
    def token_mesh(self) -> Any:
        """The mesh that the tokens are spread over, None if there is none."""
        return None if self.token_sharding is None else self.token_sharding.mesh

    def _asks_ranks(self, x: Any) -> bool:
        """Whether the tokens are some of those that are spread over several ranks."""
        return self.token_sharding is not None and self.token_sharding.applies_to(x)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def _records_copies(self) -> bool:
        """Whether caches are copies, which keep nothing else alive, or views of what the graph holds anyway."""
        return True

    def _attend_dense(self, parts: list[Packed], attn_mask: Tensor | None) -> tuple[Tensor, Rotated]:
        """Every query attends to every key, but for what the framework's attention makes of the mask."""
        if attn_mask is None:
            plan = _dense_plan(parts[0].shape[1], parts[-1].shape[1])
            return packed.attend(parts, plan, dropout_p=self._dropout_p)
        if not isinstance(attn_mask, Tensor) or (type(attn_mask) is Tensor and attn_mask.ndim < 2):
            got = f"shape {tuple(attn_mask.shape)}" if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
            raise ValueError(f"attn_mask: expected a tensor of rank 2 or more, as (B, H, Nq, Nk), got {got}")
        slots = [slot for part in parts for slot in packed.rotated_slots(part)]
        q, k, v = (slot.transpose(1, 2) for slot in slots)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=self._dropout_p)
        return out.transpose(1, 2).flatten(2), lambda: slots

    def extra_repr(self) -> str:
        """What a printed model says of this module."""
        names = ("num_heads", "head_dim", "use_rope", "dropout", "qk_norm")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _are_shard(num_rows: int, of: int, layer: Any) -> bool:
    """Whether these are the rows that a layer with a distributed weight of so many rows has here."""
    weight: Any = getattr(layer, "weight", None)
    return hasattr(weight, "to_local") and len(weight) == of and len(weight.to_local()) == num_rows


def _joined(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some layers as if they were one."""
    if len(layers) == 1:
        return layers[0].weight, layers[0].bias
    # NOTE: joining separate weights and multiplying once is never slower than one product each, from 64 tokens on
    # (measured on CPU, width 192, fp32 and bf16, forward and backward), and it writes the packed form directly.
    weight = cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return weight, cat(biases)


def _dense_plan(seqlen_q: int, seqlen_k: int) -> AttentionPlan:
    """One group of queries that attends to another of keys; the keys ask nothing, as those of a cache do."""
    specs = [TokenSpec("queries", seqlen_q), TokenSpec("keys", None)]
    pattern = AttentionPattern(["queries", "keys"], ["keys"])
    return AttentionPlan.compile(specs, [pattern], cached=[TokenSpec("keys", seqlen_k)], skip_unread_keys=True)


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
            raise AssertionError(_rope_mismatch(self.use_rope))
        if self._asks_ranks(x):
            return self.proj_dropout(self.token_sharding.attend_to_all(self, x, attn_mask, freqs))
        check_rank("x", x)
        out, _ = self._attend_dense(self._project(x, ("qkv", None, freqs)), attn_mask)
        return self.proj_dropout(linear(out, self.proj))


def _rope_mismatch(use_rope: bool) -> str:
    return f"RoPE usage mismatch: use_rope is {use_rope}, but freqs were {'not ' if use_rope else ''}given"


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
            key_padding_mask = _as_padding_mask(attention_mask, key_padding_mask, x)
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
        if type(x) is not Tensor or self.qk_norm or not self.parallel or self.use_rope != (freqs is not None):
            return None
        request, shape = at_once.Request.of(token_specs, attention_patterns), x.shape
        if request is None or request.has_cached or len(shape) != 3 or shape[1] != request.num_tokens:
            return None
        is_packed = len(self.projections) == 1
        if "".join(self.projections) != "qkv" or (is_packed and self.num_heads * self.head_dim != self._dim):
            return None
        layers = [getattr(self, name) for name in (*self.projections, "proj")]
        maps = [each for each in map(plain_parameters, layers) if each is not None]
        if len(maps) < len(layers) or not calls_are_torchs():
            return None
        if key_padding_mask is not None:
            check_tokens(x, token_specs, key_padding_mask)
        to_record = request.recorded(self.cached_groups) if record else frozenset()
        plan = request.plan(request.read.issuperset(to_record) and _pays_to_skip(x, request.num_unread))
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
        )
        if made is None:
            return None
        out, rotated = made
        return out, self._recorded(plan, to_record, rotated, mask) if record else None

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
        num_unread = sum(spec.size for spec in token_specs if spec.size is not None and spec.name not in read)
        plan = AttentionPlan.compile(
            token_specs,
            attention_patterns,
            cached=[TokenSpec(name, cache.cached_length(kv_cache, name)) for name in cached],
            skip_unread_keys=read.issuperset(to_record) and (bool(cached) or _pays_to_skip(x, num_unread)),
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
            raise ValueError(_rope_mismatch(self.use_rope))


def _as_padding_mask(attention_mask: Any, key_padding_mask: Tensor | None, x: Tensor) -> Tensor:
    """Reads an attention mask as one of keys alone."""
    is_padding_mask = (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.bool
        and attention_mask.ndim == 2
        and attention_mask.shape[0] in (1, x.shape[0])
        and attention_mask.shape[1] == x.shape[1]
    )
    if not is_padding_mask:
        raise NotImplementedError(
            "Attention masks are not supported: say who attends to whom with attention_patterns, and mask padding with "
            "a boolean key_padding_mask (batch_size, n_tokens), True = real token"
        )
    if key_padding_mask is not None:
        raise ValueError("attention_mask and key_padding_mask are both given; a padding mask is needed once")
    return attention_mask


def _check_kind(name: str, x: Any) -> None:
    """Checks that tokens are a tensor of numbers that have gradients.

    Raises:
        TypeError: If they are not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor (batch_size, n_tokens, dim), got {got}")


def check_rank(name: str, x: Any) -> None:
    """Checks that tokens are a tensor of rank 3, for layers without sizes to compare.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If they have another rank.
    """
    _check_kind(name, x)
    if x.ndim != 3:
        raise ValueError(f"{name}: expected tokens (batch_size, n_tokens, dim), got shape {tuple(x.shape)}")


def check_batch(q: Tensor, kv: Tensor) -> None:
    """Checks that there is one sequence of keys for each of queries, or one for all.

    Raises:
        ValueError: If there is not.
    """
    if kv.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"kv: expected batch_size {q.shape[0]} or 1 to match q, got {kv.shape[0]}")


def check_tokens(x: Tensor, token_specs: Any, key_padding_mask: Tensor | None) -> list[TokenSpec]:
    """Checks the mask and the sizes of the groups against ``x``, in upstream's order.

    Returns:
        The groups, whatever their class was, see :func:`mixed_attention.plan.read_specs`.

    Raises:
        TypeError: If the tokens or the groups are of the wrong kind.
        ValueError: If one does not fit.
    """
    _check_kind("x", x)
    token_specs = read_specs(token_specs)
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            got = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
            raise ValueError(f"key_padding_mask: expected a bool tensor, True = real token, got {got}")
        if key_padding_mask.ndim != 2:
            raise ValueError(f"key_padding_mask: expected a 2D tensor, got shape {tuple(key_padding_mask.shape)}")
        if key_padding_mask.shape[1] != x.shape[1]:
            raise ValueError(f"key_padding_mask: n_tokens dim is {key_padding_mask.shape[1]}, but x has {x.shape[1]}")
        if key_padding_mask.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"key_padding_mask: batch_size is {key_padding_mask.shape[0]}, but x has {x.shape[0]}")
    total = sum(spec.size for spec in token_specs if spec.size is not None)
    if x.ndim != 3 or total != x.shape[1]:
        raise ValueError(
            f"Token specs total size {total} does not match x of shape {tuple(x.shape)}, "
            f"expected (batch_size, {total}, dim)"
        )
    return token_specs


LEAST_SKIPPED = {"cuda": 6_000_000}
"""By type of device, from how many numbers of unread tokens on no keys and values are made of them.

On a GPU a second product, and a rotation of its own for each run of tokens, cost more than they save below that. Above
it they cost hardly any time and save memory.
"""


def _pays_to_skip(x: Tensor, num_unread: int) -> bool:
    # NOTE: dropout draws by ranges of neighbouring keys, which unread ones part, be they none: every eager way through
    # a layer has to decide alike, or a recomputation by another way drops other weights.
    if torch.compiler.is_compiling():  # sizes may be symbolic: they must not be compared
        return True
    return x.shape[0] * num_unread * x.shape[2] >= LEAST_SKIPPED.get(x.device.type, 0)


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
            raise AssertionError(_rope_mismatch(self.use_rope))
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
            raise AssertionError(_rope_mismatch(self.use_rope))
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
