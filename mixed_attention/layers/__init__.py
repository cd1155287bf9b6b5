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
from mixed_attention.layers.base import ProjectedAttention
from mixed_attention.layers.checks import check_tokens
from mixed_attention.layers.dense import DotProductAttention
from mixed_attention.layers.mixed import LEAST_SKIPPED, MixedAttention
from mixed_attention.layers.perceiver import PerceiverAttention

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
