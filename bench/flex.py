"""FlexAttention as a peer: one compiled call over a block mask that says which blocks are read whole or in part."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import mixed_attention as ma

BLOCK = 128


class FlexAttention:
    """Attention of a whole plan in one call."""

    def __init__(self) -> None:
        self._plan: ma.AttentionPlan | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> tuple[Tensor]:
        if plan is not self._plan:
            # The compiler gives up on a function of too many shapes: every plan begins anew.
            torch._dynamo.reset()
            self._plan, self._mask = plan, block_mask(plan, q.device)
            self._attend = torch.compile(flex_attention, dynamic=False)
        return (self._attend(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=self._mask).transpose(1, 2),)


def for_many_backwards() -> AbstractContextManager[object]:
    """Around calls whose graph is kept: otherwise the compiled backward takes the log-sum-exp's memory for its own."""
    return torch._functorch.config.patch(donated_buffer=False)


def block_mask(plan: ma.AttentionPlan, device: torch.device) -> BlockMask:
    """The plan as a block mask.

    Made from the groups: FlexAttention's own ``create_block_mask`` evaluates every pair of tokens.
    """
    sizes = torch.tensor([group.size for group in plan.groups])
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    reads = torch.tensor([[group.pattern in keys.readers for keys in plan.groups] for group in plan.groups])
    num_blocks = -(-len(group_of) // BLOCK)
    within = torch.zeros(num_blocks, len(sizes))  # whether a group has tokens in a block
    within[torch.arange(len(group_of)) // BLOCK, group_of] = 1
    is_read = within @ reads.float() @ within.T > 0
    has_gaps = within @ (~reads).float() @ within.T > 0
    if len(group_of) % BLOCK:  # the last block ends beyond the last token
        has_gaps[-1] = has_gaps[:, -1] = True
    group_of, reads = group_of.to(device), reads.to(device)
    return BlockMask.from_kv_blocks(
        *_ordered(is_read & has_gaps, device),
        *_ordered(is_read & ~has_gaps, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, i, j: reads[group_of[i], group_of[j]],
        seq_lengths=(len(group_of), len(group_of)),
    )


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of blocks, how many are set, and the indices of all with those that are set first."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None].to(device), indices[None, None].to(device)
