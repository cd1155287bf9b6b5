"""The suite: group sizes and patterns of published models, whole for a GPU and scaled for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mixed_attention as ma


@dataclass(frozen=True)
class Case:
    """A problem: batch size, heads, head dimension, token groups, and who attends to whom."""

    name: str
    batch_size: int
    num_heads: int
    head_dim: int
    groups: dict[str, int]
    patterns: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @property
    def specs(self) -> list[ma.TokenSpec]:
        return [ma.TokenSpec(name, size) for name, size in self.groups.items()]

    @property
    def attention_patterns(self) -> list[ma.AttentionPattern]:
        return [ma.AttentionPattern(queries, keys) for queries, keys in self.patterns]

    @property
    def num_tokens(self) -> int:
        return sum(self.groups.values())

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @cached_property
    def plan(self) -> ma.AttentionPlan:
        return ma.AttentionPlan.compile(self.specs, self.attention_patterns)

    def flops(self, *, backward: bool) -> int:
        """Operations of the attention alone, attended pairs only: forward, or forward and backward together."""
        forward = self.batch_size * self.plan.flops(self.num_heads, self.head_dim)
        return forward + (forward * 5 // 2 if backward else 0)


def _pattern(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    queries, keys = text.split("->")
    return tuple(queries.split("+")), tuple(keys.split("+"))


def _case(name: str, batch_size: int, num_heads: int, head_dim: int, groups: dict[str, int], patterns: str) -> Case:
    return Case(name, batch_size, num_heads, head_dim, groups, tuple(_pattern(p) for p in patterns.split("; ")))


_SELF = "sa->sa; va->va"
_ANCHOR_QUERY = "sa+sq->sa; va+vq->va"
_MANY = (777, 2500, 1300, 4100, 911, 3200, 1024, 2900, 1500, 640, 2048, 3333)

GPU_SUITE = (
    _case("abupt-self", 1, 3, 64, {"sa": 16384, "va": 16384}, _SELF),
    _case("abupt-cross", 1, 3, 64, {"sa": 16384, "va": 16384}, "sa->va; va->sa"),
    _case("abupt-joint", 1, 3, 64, {"sa": 16384, "va": 16384}, "sa+va->sa+va"),
    _case("shapenet-self", 1, 3, 64, {"sa": 3586, "va": 4096}, _SELF),
    _case("anchor+query", 1, 3, 64, {"sa": 8192, "sq": 24000, "va": 8192, "vq": 24000}, _ANCHOR_QUERY),
    _case("joint+query", 1, 3, 64, {"sa": 8192, "sq": 24000, "va": 8192, "vq": 24000}, "sa+sq+va+vq->sa+va"),
    _case(
        "many-groups",
        1,
        3,
        64,
        {f"g{i}": size for i, size in enumerate(_MANY)},
        "; ".join(f"g{i}+g{i + 1}->g{i}+g{(i + 4) % 12}" for i in range(0, 12, 2)),
    ),
    _case("wide-h12", 1, 12, 64, {"sa": 8192, "va": 8192}, _SELF),
    _case("d128-h8", 1, 8, 128, {"sa": 8192, "sq": 8192, "va": 8192, "vq": 8192}, _ANCHOR_QUERY),
    _case("small-b8", 8, 3, 64, {"sa": 1024, "sq": 1500, "va": 1024, "vq": 1500}, _ANCHOR_QUERY),
)

CPU_SUITE = (
    _case("self-2x2048", 1, 3, 64, {"sa": 2048, "va": 2048}, _SELF),
    _case("anchor+query-1024+3000", 1, 3, 64, {"sa": 1024, "sq": 3000, "va": 1024, "vq": 3000}, _ANCHOR_QUERY),
    _case("joint-2x1024", 1, 3, 64, {"sa": 1024, "va": 1024}, "sa+va->sa+va"),
    _case(
        "many-groups/8",
        1,
        3,
        64,
        {f"g{i}": size // 8 for i, size in enumerate(_MANY)},
        "; ".join(f"g{i}+g{i + 1}->g{i}+g{(i + 4) % 12}" for i in range(0, 12, 2)),
    ),
    _case("d128-h8/8", 1, 8, 128, {"sa": 1024, "sq": 1024, "va": 1024, "vq": 1024}, _ANCHOR_QUERY),
    _case("small-b8/4", 8, 3, 64, {"sa": 256, "sq": 375, "va": 256, "vq": 375}, _ANCHOR_QUERY),
)


QUICK = ("abupt-self", "anchor+query", "d128-h8", "shapenet-self")
"""The cases that tell most about a kernel in little time."""


def suite(device_type: str) -> tuple[Case, ...]:
    """The cases for a kind of device."""
    return CPU_SUITE if device_type == "cpu" else GPU_SUITE
