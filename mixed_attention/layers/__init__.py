"""The attention layers: projections, rotation and attention, one path for all devices and dtypes."""

from mixed_attention.layers.anchor import (
    CrossAnchorAttention,
    JointAnchorAttention,
    MissingAnchorTokenError,
    MissingBranchTokensError,
    MultiBranchAnchorAttention,
    SelfAnchorAttention,
    UnexpectedTokenError,
)
from mixed_attention.layers.mixed import (
    LEAST_SKIPPED,
    DotProductAttention,
    MixedAttention,
    PerceiverAttention,
    ProjectedAttention,
    check_tokens,
)

__all__ = [
    "LEAST_SKIPPED",
    "CrossAnchorAttention",
    "DotProductAttention",
    "JointAnchorAttention",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MultiBranchAnchorAttention",
    "PerceiverAttention",
    "ProjectedAttention",
    "SelfAnchorAttention",
    "UnexpectedTokenError",
    "check_tokens",
]
