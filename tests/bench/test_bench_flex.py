"""The block mask for FlexAttention says what the plan says; the compiled call itself is compared in every run."""

import pytest
import torch

from bench.cases import CPU_SUITE, Case
from bench.flex import BLOCK, block_mask

EVEN = Case("whole blocks", 1, 1, 64, {"a": 2 * BLOCK, "b": BLOCK}, ((("a",), ("b",)), (("b",), ("a", "b"))))


@pytest.mark.parametrize("case", [*CPU_SUITE, EVEN], ids=lambda case: case.name)
def test_blocks_are_read_whole_in_part_or_not_at_all(case):
    size = case.num_tokens
    num_blocks = -(-size // BLOCK)
    reads = torch.zeros(num_blocks * BLOCK, num_blocks * BLOCK, dtype=torch.bool)
    for segment in case.plan.query_segments:
        for start, end in segment.key_ranges:
            reads[segment.start : segment.end, start:end] = True
    counts = reads.view(num_blocks, BLOCK, num_blocks, BLOCK).sum((1, 3))
    mask = block_mask(case.plan, torch.device("cpu"))
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    in_part = listed(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(whole, counts == BLOCK**2)
    assert torch.equal(in_part, (counts > 0) & ~whole)
    rows = torch.arange(size)
    assert torch.equal(mask.mask_mod(0, 0, rows[:, None], rows), reads[:size, :size])


def listed(num_blocks, indices):
    """Which blocks are among the first of each row's indices."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (number, columns) in enumerate(zip(num_blocks[0, 0], indices[0, 0])):
        found[row, columns[:number].long()] = True
    return found
