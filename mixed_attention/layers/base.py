"""What the layers share: heads, projections whatever their parameter layout, and dense attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import checkpoint
from mixed_attention.autocast import cat
from mixed_attention.config import DotProductAttentionConfig
from mixed_attention.eager import packed
from mixed_attention.eager.packed import Freqs, Packed, Rotated
from mixed_attention.eager.projection import Part, Runs, is_plain, project, take
from mixed_attention.layers.init import init_weights
from mixed_attention.layers.norm import RMSNorm, are_plain
from mixed_attention.plan import AttentionPlan
from mixed_attention.rope import check_freqs
from mixed_attention.spec import AttentionPattern, TokenSpec


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

        Tensor parallelism shards rows. Those of a separate projection belong to some heads. Those of a packed one
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
        plain_norms = bool(norms) and are_plain(norms)
        if freqs is None:
            return Packed(buffer, shape, norms=norms, plain_norms=plain_norms)
        self._check_freqs(freqs, (x.shape[0], x.shape[1]))
        return Packed(buffer, shape, len(heads), freqs, runs, norms, plain_norms)

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
