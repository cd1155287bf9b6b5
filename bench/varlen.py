"""Peers that take sequences of different lengths: all patterns of a plan in one call, each as a sequence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

import mixed_attention as ma


@dataclass(frozen=True)
class Sequences:
    """Which rows are which sequence's; a sequence is a pattern of a sample.

    Attributes:
        queries: Where sequences begin among the rows of queries, and where the last one ends: int32 ``(S + 1,)``.
        keys: The same of keys.
        max_queries: Rows of the longest sequence.
        max_keys: The same of keys.
        num_keys_read: How many keys of each sequence are read, int32 ``(S,)``; ``None`` for all.
        gathered_keys: Rows of keys to bring together first, int64; ``None`` where they are read in place.
        unread_keys: Rows of keys that no sequence reads, int64; ``None`` where there are none.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    num_keys_read: Tensor | None
    gathered_keys: Tensor | None
    unread_keys: Tensor | None


Attend = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]


class Varlen:
    """Attention of a whole plan in one call.

    Keys stay where they are if each pattern reads one range, and these come in the order of the patterns, as anchors in
    front of their queries do. Others are gathered by ``index_select``, as a user of such a function has to.

    Args:
        attend: Takes q, k, v ``(rows, heads, head_dim)`` and the sequences.
        reads_a_part: Whether it can read fewer keys of a sequence than lie between its beginning and the next one's.
    """

    def __init__(self, attend: Attend, *, reads_a_part: bool) -> None:
        self._attend = attend
        self._reads_a_part = reads_a_part
        self._plan: ma.AttentionPlan | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: ma.AttentionPlan) -> tuple[Tensor]:
        if plan is not self._plan:
            self._plan = plan
            self._sequences = _sequences(plan, q.shape[0], k.shape[1], self._reads_a_part, q.device)
        out = self._attend(q.flatten(0, 1), self._keys(k), self._keys(v), self._sequences)
        return (out.unflatten(0, q.shape[:2]),)

    def _keys(self, rows: Tensor) -> Tensor:
        rows, unread = rows.flatten(0, 1), self._sequences.unread_keys
        if self._sequences.gathered_keys is not None:
            return rows.index_select(0, self._sequences.gathered_keys)
        if unread is None or not rows.requires_grad:
            return rows
        rows = rows.view_as(rows)  # a node of its own for the hook
        rows.register_hook(lambda grad: grad.index_fill_(0, unread, 0))  # left unwritten by the peer
        return rows


def _sequences(
    plan: ma.AttentionPlan, batch_size: int, num_keys: int, reads_a_part: bool, device: torch.device
) -> Sequences:
    ends, ranges = _patterns(plan)
    firsts, lasts = [pairs[0][0] for pairs in ranges], [pairs[-1][1] for pairs in ranges]
    bounds = [*firsts[1:], num_keys]  # where the next pattern's keys begin
    in_place = (
        all(len(pairs) == 1 for pairs in ranges)
        and firsts[0] == 0
        and all(last <= bound if reads_a_part else last == bound for last, bound in zip(lasts, bounds))
    )
    lengths = [sum(end - begin for begin, end in pairs) for pairs in ranges]
    rows = torch.cat([torch.arange(begin, end) for pairs in ranges for begin, end in pairs])
    unread = torch.ones(num_keys, dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
    samples = torch.arange(batch_size)[:, None]

    def offsets(starts: list[int], step: int) -> Tensor:
        of_samples = (samples * step + torch.tensor(starts)).flatten()
        return torch.cat([of_samples, torch.tensor([batch_size * step])]).int().to(device)

    def of_samples(rows: Tensor) -> Tensor:
        return (samples * num_keys + rows).flatten().to(device)

    gathered = [0, *accumulate(lengths)]
    return Sequences(
        queries=offsets([0, *ends[:-1]], ends[-1]),
        keys=offsets(firsts, num_keys) if in_place else offsets(gathered[:-1], gathered[-1]),
        max_queries=max(end - begin for begin, end in pairwise([0, *ends])),
        max_keys=max(lengths),
        num_keys_read=torch.tensor(lengths * batch_size).int().to(device) if in_place and lasts != bounds else None,
        gathered_keys=None if in_place else of_samples(rows),
        unread_keys=of_samples(unread) if in_place and len(unread) else None,
    )


def _patterns(plan: ma.AttentionPlan) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Where the queries of each pattern end, and the ranges of keys that they read.

    Raises:
        ValueError: Queries of a pattern do not lie together, or segments are not in the order of queries.
    """
    ends, ranges, patterns = [0], [], []
    for segment in plan.query_segments:
        if segment.start != ends[-1] or segment.pattern in patterns[:-1]:
            raise ValueError("queries of a pattern do not lie together")
        if patterns and segment.pattern == patterns[-1]:
            ends[-1] = segment.end
        else:
            patterns.append(segment.pattern)
            ends.append(segment.end)
            ranges.append(_joined(segment.key_ranges))
    return ends[1:], ranges


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows by as few ranges as can be."""
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def of_torch() -> Varlen:
    """Torch's ``varlen_attn``."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, at: Sequences) -> Tensor:
        return first_of(varlen_attn(q, k, v, at.queries, at.keys, at.max_queries, at.max_keys))

    return Varlen(attend, reads_a_part=False)


def of_flash_attention(module: str) -> Varlen:
    """``flash_attn_varlen_func`` of FA3 or FA4."""
    function = importlib.import_module(module).flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, at: Sequences) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=at.queries,
            cu_seqlens_k=at.keys,
            max_seqlen_q=at.max_queries,
            max_seqlen_k=at.max_keys,
            seqused_k=at.num_keys_read,
        )
        return first_of(out)

    return Varlen(attend, reads_a_part=True)


def first_of(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of those functions that return more beside it."""
    return found[0] if isinstance(found, tuple) else found
