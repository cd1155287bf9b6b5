"""Upstream's newest signatures, parameter layout and return types (release 2026.4.0), over the same layers.

Import from here instead of from upstream, or let :func:`swap` replace the modules inside a model. The classes at the
top of the package have the older form: a fused ``qkv``, no cache in the arguments, a plain tensor in return.
"""

from mixed_attention.layers.anchor import MissingAnchorTokenError, MissingBranchTokensError, UnexpectedTokenError
from mixed_attention.noether.exchange import swap
from mixed_attention.noether.layers import (
    CrossAnchorAttention,
    DotProductAttention,
    JointAnchorAttention,
    MixedAttention,
    MultiBranchAnchorAttention,
    PerceiverAttention,
    RopeFrequency,
    SelfAnchorAttention,
)
from mixed_attention.noether.untied import UntiedMixedAttention
from mixed_attention.spec import AttentionPattern, TokenSpec

__all__ = [
    "AttentionPattern",
    "CrossAnchorAttention",
    "DotProductAttention",
    "JointAnchorAttention",
    "MissingAnchorTokenError",
    "MissingBranchTokensError",
    "MixedAttention",
    "MultiBranchAnchorAttention",
    "PerceiverAttention",
    "RopeFrequency",
    "SelfAnchorAttention",
    "TokenSpec",
    "UnexpectedTokenError",
    "UntiedMixedAttention",
    "swap",
]
