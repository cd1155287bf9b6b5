"""A small model that is told a flow at anchors and asked for three numbers at other points.

Anchors carry a position and the velocity there. They are encoded once, into a KV cache for each block. Query points
attend to them and do not see each other, so that what comes out at a point depends on that point alone: its derivatives
by position are those of all points at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import mixed_attention as ma
from examples.solenoidal.flow import PERIOD
from mixed_attention import func

KVCaches = Sequence[Mapping[str, Mapping[str, Tensor]]]
ANCHORS, QUERIES = "flow_anchors", "flow_queries"
POSITION_SCALE = 4.0  # of RoPE: its shortest wave, 2 pi, is then a quarter of a period


class Block(nn.Module):
    """Attention to the anchors and an MLP, each after a norm and added to its input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ma.MixedAttention(ma.MixedAttentionConfig(dim=dim, num_heads=num_heads, use_rope=True))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class FlowModel(nn.Module):
    """Three numbers at every query point: a velocity, or a vector potential of it.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads.
        num_blocks: Blocks.
    """

    def __init__(self, dim: int = 48, num_heads: int = 2, num_blocks: int = 2) -> None:
        super().__init__()
        self.rope = ma.RopeFrequency(hidden_dim=dim // num_heads, input_dim=3)
        self.places = nn.Sequential(nn.Linear(12, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.values = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_blocks))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3))

    def encode(self, points: Tensor, velocities: Tensor) -> KVCaches:
        """What the blocks need of the anchors ``(B, n, 3)``."""
        x = self._tokens(points) + self.values(velocities)
        specs = [ma.TokenSpec(ANCHORS, points.shape[1])]
        patterns = [ma.AttentionPattern([ANCHORS], [ANCHORS])]
        return self._run(x, points, specs, patterns, None)[1]

    def decode(self, points: Tensor, caches: KVCaches) -> Tensor:
        """Three numbers ``(B, N, 3)`` at query points ``(B, N, 3)``."""
        specs = [ma.TokenSpec(ANCHORS, None), ma.TokenSpec(QUERIES, points.shape[1])]
        patterns = [ma.AttentionPattern([ANCHORS, QUERIES], [ANCHORS])]
        return self.head(self._run(self._tokens(points), points, specs, patterns, caches)[0])

    def _tokens(self, points: Tensor) -> Tensor:
        angles = 2 * torch.pi / PERIOD * points
        waves = torch.cat([angles.sin(), angles.cos(), (2 * angles).sin(), (2 * angles).cos()], -1)
        return self.places(waves)

    def _run(
        self,
        x: Tensor,
        points: Tensor,
        specs: Sequence[ma.TokenSpec],
        patterns: Sequence[ma.AttentionPattern],
        caches: KVCaches | None,
    ) -> tuple[Tensor, KVCaches]:
        freqs = self.rope(POSITION_SCALE * points)
        recorded = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            attended, entry = block.attention(
                block.norm1(x), specs, patterns, freqs=freqs, kv_cache=cache, return_kv_cache=True
            )
            x = x + attended
            x = x + block.mlp(block.norm2(x))
            recorded.append(entry)
        return x, recorded


def predicted_directly(model: FlowModel, caches: KVCaches) -> Callable[[Tensor], Tensor]:
    """Velocities at points, as the model says them."""
    return lambda points: model.decode(points, caches)


def predicted_by_potential(model: FlowModel, caches: KVCaches) -> Callable[[Tensor], Tensor]:
    """Velocities at points: the curl of what the model says. Whatever it says, they have no divergence."""

    def velocity(points: Tensor) -> Tensor:
        _, jacobian = func.value_and_jacobian(lambda x: model.decode(x, caches), points, check=False)
        return func.curl(jacobian)

    return velocity
