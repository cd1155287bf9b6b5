"""A small surrogate of anchored branches: surface and volume tokens that attend to anchors of either branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import mixed_attention as ma

BRANCHES = {"surface": (4, 1), "volume": (2, 2)}  # features of a token, values to predict
GROUPS = tuple(f"{branch}_{role}" for branch in BRANCHES for role in ("anchors", "queries"))
POSITION_SCALE = 100.0  # so that the shortest wavelength of RoPE, 2 pi, is about a tenth of a chord

KVCache = Mapping[str, Mapping[str, Tensor]]
KVCaches = Sequence[KVCache | None]  # of the blocks


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to its input. Both branches share the weights."""

    def __init__(self, attention_class: type[ma.MultiBranchAnchorAttention], dim: int, num_heads: int) -> None:
        super().__init__()
        config = {"dim": dim, "num_heads": num_heads, "use_rope": True, "branches": list(BRANCHES)}
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention_class(config)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, specs: Sequence[ma.TokenSpec], freqs: Tensor, kv_cache: KVCache | None, return_kv_cache: bool
    ) -> tuple[Tensor, KVCache | None]:
        """Returns the tokens ``(B, N, dim)``, and the cache of the anchors if it is asked for."""
        arguments = {"freqs": freqs, "kv_cache": kv_cache, "return_kv_cache": return_kv_cache}
        attended = self.attention(self.norm1(x), specs, **arguments)
        attended, recorded = attended if return_kv_cache else (attended, None)
        x = x + attended
        return x + self.mlp(self.norm2(x)), recorded


class Embedding(nn.Module):
    """Tokens of one branch: waves of the position in octaves, the other features, and the free stream."""

    wave_numbers: Tensor

    def __init__(self, num_features: int, dim: int, num_octaves: int = 5) -> None:
        super().__init__()
        self.register_buffer("wave_numbers", 0.5 * torch.pi * 2.0 ** torch.arange(num_octaves), persistent=False)
        num_inputs = num_features + 2 * 2 * num_octaves + 1
        self.layers = nn.Sequential(nn.Linear(num_inputs, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, features: Tensor, stream: Tensor) -> Tensor:
        """Features ``(B, n, num_features)``, position first, and free streams ``(B, 2)`` to ``(B, n, dim)``."""
        phases = (features[..., :2, None] * self.wave_numbers).flatten(-2)
        # Angles of attack are small: the factor makes their sine as large as the other inputs.
        stream = (10 * stream[:, None, 1:]).expand(-1, features.shape[1], -1)
        return self.layers(torch.cat([features, phases.sin(), phases.cos(), stream], -1))


class AirfoilSurrogate(nn.Module):
    """Predicts the pressure on a section and the velocity around it from points alone.

    Tokens of a branch attend to the anchors of their own branch in even blocks, and to those of the other branch in
    odd ones. The shape of the section reaches the volume in no other way than from the surface anchors.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads.
        num_blocks: Blocks, self and cross attention in turn.
    """

    def __init__(self, dim: int = 64, num_heads: int = 2, num_blocks: int = 3) -> None:
        super().__init__()
        self.rope = ma.RopeFrequency(hidden_dim=dim // num_heads, input_dim=2)
        self.embeddings = nn.ModuleDict({name: Embedding(features, dim) for name, (features, _) in BRANCHES.items()})
        kinds = (ma.SelfAnchorAttention, ma.CrossAnchorAttention)
        self.blocks = nn.ModuleList(Block(kinds[i % 2], dim, num_heads) for i in range(num_blocks))
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, values)) for name, (_, values) in BRANCHES.items()}
        )

    def forward(
        self,
        groups: Mapping[str, Tensor],
        stream: Tensor,
        kv_caches: KVCaches | None = None,
        return_kv_caches: bool = False,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], KVCaches]:
        """Predicts the values at all tokens.

        Args:
            groups: Tokens by the name of their group, out of ``GROUPS``: on the surface positions and outward
                normals ``(B, n, 4)``, in the volume positions ``(B, n, 2)``.
            stream: Free streams ``(B, 2)``, of speed one.
            kv_caches: What an earlier call returned, instead of anchors in ``groups``.
            return_kv_caches: Whether to return the anchors' keys and values of all blocks as well.

        Returns:
            By branch, the values at its anchors and then at its queries: pressure coefficients ``(B, n, 1)``,
            velocities less the free stream ``(B, n, 2)``. With ``return_kv_caches`` a pair of this and the caches.
        """
        present = [name for name in GROUPS if name in groups]
        cached = [name for name in GROUPS if kv_caches and name.endswith("anchors")]
        sizes = {name: groups[name].shape[1] for name in present} | dict.fromkeys(cached)
        specs = [ma.TokenSpec(name, sizes[name]) for name in GROUPS if name in sizes]

        x = torch.cat([self.embeddings[branch_of(name)](groups[name], stream) for name in present], 1)
        freqs = self.rope(torch.cat([groups[name][..., :2] for name in present], 1) * POSITION_SCALE)
        recorded = []
        for block, kv_cache in zip(self.blocks, kv_caches or [None] * len(self.blocks)):
            x, entry = block(x, specs, freqs, kv_cache, return_kv_caches)
            recorded.append(entry)

        num_surface = sum(groups[name].shape[1] for name in present if branch_of(name) == "surface")
        parts = zip(BRANCHES, x.split([num_surface, x.shape[1] - num_surface], 1))
        values = {branch: self.heads[branch](tokens) for branch, tokens in parts}
        return (values, recorded) if return_kv_caches else values


def branch_of(group: str) -> str:
    """The branch that a group belongs to: ``"surface"`` or ``"volume"``."""
    return group.split("_")[0]
