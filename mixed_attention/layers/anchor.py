"""The anchor siblings: modules that derive the patterns from the names of the groups that are present."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mixed_attention.cache import KVCache
from mixed_attention.config import AnchorAttentionConfig
from mixed_attention.eager.packed import Freqs
from mixed_attention.layers.mixed import MixedAttention
from mixed_attention.plan import AttentionPatternLike, TokenSpecLike, read_specs
from mixed_attention.spec import AttentionPattern


class UnexpectedTokenError(ValueError):
    """A token group belongs to no branch."""


class MissingBranchTokensError(ValueError):
    """A branch has no token group."""


class MissingAnchorTokenError(ValueError):
    """A branch has token groups, but not its anchors."""


class MultiBranchAnchorAttention(nn.Module, ABC):
    """Base of the siblings: groups belong to branches by the prefix of their name, and attend to anchors.

    The anchors of a branch are the group named ``branch + anchor_suffix``. Subclasses say who attends to which
    anchors, in :meth:`_create_attention_patterns`.

    Args:
        config: A :class:`mixed_attention.AnchorAttentionConfig`, or whatever describes one: a mapping, an object with
            ``model_dump()``, or an object with its attributes.

    Attributes:
        mixed_attention: The layer that attends.
        branches: The prefixes.
        anchor_suffix: What makes an anchor group's name out of a branch's.

    Raises:
        ValueError: If the configuration is not allowed, or has fewer branches than the class needs.
    """

    mixed_attention_class: type[MixedAttention] = MixedAttention
    min_branches = 1

    def __init__(self, config: Any) -> None:
        super().__init__()
        settings = AnchorAttentionConfig.of(config)
        if len(settings.branches) < self.min_branches:
            raise ValueError(f"{type(self).__name__} requires at least two branches, got {settings.branches}")
        self.branches = settings.branches
        self.anchor_suffix = settings.anchor_suffix
        self.mixed_attention = self.mixed_attention_class(settings)
        self.mixed_attention.cached_groups = frozenset(map(self._anchor, self.branches))

    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpecLike],
        freqs: Freqs | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        kv_cache: Mapping[str, Mapping[str, Tensor]] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache | None]:
        """Attends from the tokens to anchors.

        Args:
            x: Tokens ``(B, N, dim)``, the groups of ``token_specs`` one after the other.
            token_specs: Name and size of the groups; those of size ``None`` come from ``kv_cache``.
            freqs, key_padding_mask, kv_cache, return_kv_cache: See :meth:`mixed_attention.MixedAttention.forward`.

        Returns:
            See :meth:`mixed_attention.MixedAttention.forward`; the cache holds all anchors.

        Raises:
            UnexpectedTokenError: If a group belongs to no branch.
            MissingBranchTokensError: If a branch has no group.
            MissingAnchorTokenError: If a branch has no anchors.
            TypeError: If ``token_specs`` is no list of groups.
            ValueError: If groups belong to several branches, besides what
                :meth:`mixed_attention.MixedAttention.forward` raises.
        """
        return self.mixed_attention(
            x,
            token_specs,
            self.patterns(token_specs),
            freqs=freqs,
            key_padding_mask=key_padding_mask,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
        )

    @abstractmethod
    def _create_attention_patterns(self, token_specs: Sequence[TokenSpecLike]) -> Sequence[AttentionPatternLike]:
        """Says who attends to whom. Meant to be overridden.

        Args:
            token_specs: The groups that are present or cached; every branch has its anchors among them.

        Returns:
            Patterns in which every group is a query exactly once.
        """

    def patterns(self, token_specs: Sequence[TokenSpecLike]) -> Sequence[AttentionPatternLike]:
        """The patterns that :meth:`forward` applies to some groups, which are checked against the branches.

        Whoever calls :attr:`mixed_attention` by hand, as for a ragged batch, takes them from here.

        Args:
            token_specs: Name and size of the groups.

        Raises:
            ValueError: If groups and branches do not fit, see :meth:`forward`.
            TypeError: If ``token_specs`` is no list of groups.
        """
        token_specs = read_specs(token_specs)
        names = [spec.name for spec in token_specs]
        for name in names:
            if not name.startswith(tuple(self.branches)):
                raise UnexpectedTokenError(f"Unexpected token group {name!r}: it starts with none of {self.branches}")
        for branch in self.branches:
            if not self._tokens(branch, token_specs):
                raise MissingBranchTokensError(f"branch {branch!r} has no tokens present, only {names}")
        for branch in self.branches:
            if self._anchor(branch) not in names:
                raise MissingAnchorTokenError(
                    f"branch {branch!r} is missing its required anchor token group "
                    f"{self._anchor(branch)!r}, got {names}"
                )
        patterns = self._create_attention_patterns(token_specs)
        self._check_collisions(patterns, names)
        return patterns

    def _check_collisions(self, patterns: Sequence[AttentionPatternLike], names: Sequence[str]) -> None:
        """Branches that share a prefix claim groups twice; the layer would say which group, but not why."""
        asks: dict[str, int] = {}
        for pattern in patterns:
            for name in pattern.query_tokens:
                asks[name] = asks.get(name, 0) + 1
        for name in names:
            branches = [branch for branch in self.branches if name.startswith(branch)]
            if asks.get(name, 0) > 1 and len(branches) > 1:
                raise ValueError(
                    f"token group {name!r} cannot be a query in multiple patterns, but it belongs to the branches "
                    f"{branches}, whose names begin alike"
                )

    def _anchor(self, branch: str) -> str:
        return branch + self.anchor_suffix

    @staticmethod
    def _tokens(branch: str, token_specs: Sequence[TokenSpecLike]) -> list[str]:
        return [spec.name for spec in token_specs if spec.name.startswith(branch)]


class SelfAnchorAttention(MultiBranchAnchorAttention):
    """Every branch attends to its own anchors. Arguments: see :class:`MultiBranchAnchorAttention`."""

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpecLike]) -> Sequence[AttentionPatternLike]:
        return [AttentionPattern(self._tokens(branch, token_specs), [self._anchor(branch)]) for branch in self.branches]


class CrossAnchorAttention(MultiBranchAnchorAttention):
    """Every branch attends to the anchors of all other branches; at least two branches.

    Arguments: see :class:`MultiBranchAnchorAttention`.
    """

    min_branches = 2

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpecLike]) -> Sequence[AttentionPatternLike]:
        return [
            AttentionPattern(
                self._tokens(branch, token_specs), [self._anchor(other) for other in self.branches if other != branch]
            )
            for branch in self.branches
        ]


class JointAnchorAttention(MultiBranchAnchorAttention):
    """All tokens attend to the anchors of all branches; at least two branches.

    Arguments: see :class:`MultiBranchAnchorAttention`.
    """

    min_branches = 2

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpecLike]) -> Sequence[AttentionPatternLike]:
        return [
            AttentionPattern([spec.name for spec in token_specs], [self._anchor(branch) for branch in self.branches])
        ]
