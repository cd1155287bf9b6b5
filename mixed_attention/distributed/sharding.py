"""How the tokens of a layer are spread over ranks: what ``ContextParallel`` leaves on the layers that it marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mixed_attention.distributed import attend, failures
from mixed_attention.distributed.ranks import Ranks
from mixed_attention.distributed.specs import bounds_of, shares_of
from mixed_attention.plan import read_specs
from mixed_attention.spec import ShardedTokenSpec, TokenSpec


@dataclass(frozen=True, eq=False)
class TokenSharding:
    """What a marked layer knows.

    Attributes:
        mesh: The mesh that the tokens are spread over.
        ranks: Its ranks.
        replicated: Names of the groups that every rank holds whole.
        even: Whether every rank is promised to hold as many tokens of every group.
        kept: What was derived from the arguments of calls, to look it up again.
    """

    mesh: DeviceMesh
    ranks: Ranks
    replicated: frozenset[str]
    even: bool
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: Any) -> TokenSharding:
        return self

    def applies_to(self, x: Any) -> bool:
        """Whether a layer called with these tokens has to ask other ranks, or to unwrap them."""
        # NOTE: whether it is torch's own class is asked first, because to ask for another takes longer.
        return self.ranks.size > 1 or (type(x) is not Tensor and isinstance(x, DTensor))

    def attend_groups(
        self, layer: Any, x: Tensor, token_specs: Any, attention_patterns: Any, *others: Any, **how: Any
    ) -> tuple[Tensor, Any]:
        """:meth:`mixed_attention.MixedAttention._attend` over ranks."""
        if not isinstance(x, DTensor):
            return self._named(attend.attend_groups, layer, x, token_specs, attention_patterns, *others, **how)
        mask, freqs, kv_cache = others
        specs = self._cut(read_specs(token_specs), x)
        local, mask, freqs = self._local("x", x), self._local("key_padding_mask", mask), self._local("freqs", freqs)
        out, recorded = self._named(
            attend.attend_groups, layer, local, specs, attention_patterns, mask, freqs, kv_cache, **how
        )
        return self._wrapped(out, x), recorded

    def attend_to_all(self, layer: Any, x: Tensor, attn_mask: Any, freqs: Any) -> Tensor:
        """:meth:`mixed_attention.DotProductAttention.forward` over ranks, but for what follows the attention."""
        local, sizes = self._local("x", x), self._sizes(x)
        out = self._named(attend.attend_to_all, layer, local, attn_mask, self._local("freqs", freqs), sizes)
        return self._wrapped(out, x)

    def attend_across(
        self, layer: Any, q: Tensor, kv: Any, attn_mask: Any, q_freqs: Any, k_freqs: Any, kv_cache: Any, *, record: bool
    ) -> tuple[Tensor, Any]:
        """:meth:`mixed_attention.PerceiverAttention._attend` over ranks, but for its checks."""
        locals_ = (self._local("q", q), self._local("kv", kv), attn_mask)
        freqs = self._local("q_freqs", q_freqs), self._local("k_freqs", k_freqs)
        out, recorded = self._named(
            attend.attend_across, layer, *locals_, *freqs, kv_cache, sizes=self._sizes(kv), record=record
        )
        return self._wrapped(out, q), recorded

    def _named(self, attend_with: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        return failures.named("ContextParallel", self.ranks, attend_with, self, *arguments, **how)

    def _local(self, name: str, tensor: Any) -> Any:
        """The rows of this rank out of what is a DTensor; all else is theirs already."""
        if isinstance(tensor, tuple):
            return tuple(self._local(name, each) for each in tensor)
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.device_mesh != self.mesh or tuple(tensor.placements) != (Shard(1),):
            raise ValueError(
                f"{name}: expected tokens sharded over the mesh of the layer, {self.mesh} with (Shard(1),), "
                f"got {tensor.device_mesh} with {tuple(tensor.placements)}; redistribute it, or pass the local rows"
            )
        return tensor.to_local()

    def _sizes(self, tensor: Any) -> tuple[int, ...] | None:
        """Rows of a DTensor on every rank, known without asking."""
        if not isinstance(tensor, DTensor):
            return None
        return shares_of(tensor.shape[1], self.ranks.size)

    def _cut(self, specs: Sequence[TokenSpec], x: DTensor) -> list[TokenSpec]:
        """Groups of a whole sequence as they lie on ranks that hold equal shares of it, whatever is in them."""
        sized = [spec.name for spec in specs if isinstance(spec, ShardedTokenSpec)]
        whole = [spec.name for spec in specs if spec.name in self.replicated and spec.size is not None]
        if sized or whole:
            raise ValueError(
                "token_specs: where x is a DTensor they are those of the whole sequence, every group sharded as x is, "
                f"got {'sizes of ranks' if sized else 'replicated groups'} for {sized or whole}"
            )
        total = sum(spec.size for spec in specs if spec.size is not None)
        if x.ndim != 3 or total != x.shape[1]:
            raise ValueError(
                f"Token specs total size {total} does not match x of shape {tuple(x.shape)}, "
                f"expected (batch_size, {total}, dim)"
            )
        bounds = bounds_of(total, self.ranks.size)
        cut: list[TokenSpec] = []
        start = 0
        for spec in specs:
            if spec.size is None:
                cut.append(spec)
                continue
            end = start + spec.size
            sizes = tuple(max(0, min(end, high) - max(start, low)) for low, high in zip(bounds, bounds[1:]))
            cut.append(ShardedTokenSpec(spec.name, sizes[self.ranks.rank], sizes))
            start = end
        return cut

    def _wrapped(self, out: Tensor, like: Any) -> Tensor:
        if not isinstance(like, DTensor):
            return out
        shape = torch.Size((like.shape[0], like.shape[1], out.shape[2]))
        stride = (shape[1] * shape[2], shape[2], 1)
        return DTensor.from_local(out, self.mesh, (Shard(1),), run_check=False, shape=shape, stride=stride)
