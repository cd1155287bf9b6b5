"""Structured attention between named token groups, as one fused and differentiable PyTorch operator."""

import sys as _sys
from importlib import import_module as _import_module
from importlib import metadata as _metadata
from typing import Any as _Any

from mixed_attention import cache, checkpoint, explain, func, moved, noether, plot, ragged, reference
from mixed_attention.config import (
    AnchorAttentionConfig,
    DotProductAttentionConfig,
    MixedAttentionConfig,
    PerceiverAttentionConfig,
    RopeFrequencyConfig,
)
from mixed_attention.distance import coordinate_bias
from mixed_attention.layers import (
    CrossAnchorAttention,
    DotProductAttention,
    JointAnchorAttention,
    MissingAnchorTokenError,
    MissingBranchTokensError,
    MixedAttention,
    MultiBranchAnchorAttention,
    PerceiverAttention,
    SelfAnchorAttention,
    UnexpectedTokenError,
)
from mixed_attention.ops import attention
from mixed_attention.plan import AttentionPlan
from mixed_attention.rope import RopeFrequency, apply_rope
from mixed_attention.spec import AttentionPattern, TokenSpec
from mixed_attention.streaming import stream

try:
    __version__ = _metadata.version("mixed_attention")
except _metadata.PackageNotFoundError:  # a checkout that was built in place and never installed
    __version__ = "0.0.0+unknown"

# Plans explain and draw themselves by what stands above them: the kernels that compute plans know what a plan is.
AttentionPlan.explain = explain.explain  # type: ignore[assignment, method-assign]
AttentionPlan.plot = plot.plot  # type: ignore[assignment, method-assign]

moved.keep_old_paths(_sys.modules[__name__])


def __getattr__(name: str) -> _Any:
    # On first use: torch's distributed tensors take most of a second to import, which few need.
    if name == "distributed":
        return _import_module("mixed_attention.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AnchorAttentionConfig",
    "AttentionPattern",
    "AttentionPlan",
    "CrossAnchorAttention",
    "DotProductAttention",
    "DotProductAttentionConfig",
    "JointAnchorAttention",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MixedAttentionConfig",
    "MultiBranchAnchorAttention",
    "PerceiverAttention",
    "PerceiverAttentionConfig",
    "RopeFrequency",
    "RopeFrequencyConfig",
    "SelfAnchorAttention",
    "TokenSpec",
    "UnexpectedTokenError",
    "apply_rope",
    "attention",
    "cache",
    "checkpoint",
    "coordinate_bias",
    "func",
    "noether",
    "ragged",
    "reference",
    "stream",
]
