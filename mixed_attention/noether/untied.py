"""The mixed layer whose projections have weights of their own for every domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixed_attention import cache, layers
from mixed_attention.config import UntiedMixedAttentionConfig
from mixed_attention.eager import packed
from mixed_attention.eager.packed import Freqs, Packed
from mixed_attention.eager.projection import Runs, take
from mixed_attention.noether.layers import MixedAttention
from mixed_attention.plan import AttentionPatternLike, AttentionPlan, Group, TokenSpecLike
from mixed_attention.spec import TokenSpec


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
        settings = UntiedMixedAttentionConfig.of(config)
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
        if self._asks_ranks(x):
            arguments = x, token_specs, attention_patterns, key_padding_mask, freqs, kv_cache
            return self.token_sharding.attend_groups(self, *arguments, record=False, projections=self._per_domain)[0]
        self._check_rope(freqs)
        layers.check_tokens(x, token_specs, key_padding_mask)
        cache.check_names(kv_cache, [group.name for group in token_specs if group.size is None])
        plan = AttentionPlan.compile(token_specs, attention_patterns)
        project, project_out = self._per_domain(x, plan.groups, freqs)
        out, _ = packed.attend(
            [project("qkv", None)],
            plan,
            key_padding_mask=key_padding_mask,
            dropout_p=self._dropout_p,
            parallel=self.parallel,
        )
        return project_out(out)

    def _per_domain(
        self, x: Tensor, groups: Sequence[Group | TokenSpec], freqs: Freqs | None
    ) -> tuple[Callable[[str, Runs | None], Packed], Callable[[Tensor], Tensor]]:
        """The projections for some groups: to slots out of "qkv" of the tokens that runs take, and of the output."""
        sizes = self._domain_sizes(groups)

        def project(slots: str, runs: Runs | None) -> Packed:
            made = torch.cat([getattr(self, slot)(x, sizes) for slot in slots], -1)
            return self._pack(take(made, runs), x, slots, runs, freqs)

        return project, lambda out: self.proj(out, sizes)

    def _domain_sizes(self, groups: Sequence[Group | TokenSpec]) -> list[int]:
        domains: dict[str, int] = {}
        previous = None
        for group in groups:
            domain = group.name.split("_", 1)[0]
            if domain in domains and domain != previous:
                raise ValueError(f"the token groups of domain {domain!r} are not consecutive in token_specs")
            domains[domain] = domains.get(domain, 0) + (group.size or 0)  # none is cached
            previous = domain
        if len(domains) > self.num_types:
            raise RuntimeError(f"sizes do not match: {len(domains)} domains {list(domains)}, {self.num_types} weights")
        return list(domains.values())
