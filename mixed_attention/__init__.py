"""Structured attention between named token groups, as one fused and differentiable PyTorch operator."""

from mixed_attention import reference
from mixed_attention.ops import attention
from mixed_attention.plan import AttentionPlan
from mixed_attention.spec import AttentionPattern, TokenSpec

__all__ = ["AttentionPattern", "AttentionPlan", "TokenSpec", "attention", "reference"]
