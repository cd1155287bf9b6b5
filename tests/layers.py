"""Inputs for the tests of the layers, and what the layers mean, written without plan and kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import mixed_attention as ma

DIM, NUM_HEADS = 24, 3


@dataclass(frozen=True)
class Scene:
    """Token groups and who attends to whom."""

    sizes: dict[str, int]
    attends: list[tuple[list[str], list[str]]]
    specs: list[ma.TokenSpec] = field(init=False)
    patterns: list[ma.AttentionPattern] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", [ma.TokenSpec(name, size) for name, size in self.sizes.items()])
        object.__setattr__(self, "patterns", [ma.AttentionPattern(*names) for names in self.attends])

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes.values())

    def rows(self, *names: str) -> list[int]:
        """Where the tokens of some groups lie in the sequence."""
        starts = dict(zip(self.sizes, torch.tensor([0, *self.sizes.values()]).cumsum(0).tolist()))
        return [starts[name] + i for name in self.sizes if name in names for i in range(self.sizes[name])]

    def counts(self) -> Tensor:
        """How often each query (row) counts each key (column)."""
        counts = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.float64)
        for queries, keys in self.attends:
            for key in keys:
                counts[torch.tensor(self.rows(*queries), dtype=torch.long)[:, None], self.rows(key)] += 1
        return counts


SIZES = {"surface_anchors": 6, "surface_queries": 5, "volume_anchors": 4, "volume_queries": 7}
GROUPS = list(SIZES)
SELF = Scene(SIZES, [(GROUPS[:2], GROUPS[:1]), (GROUPS[2:], GROUPS[2:3])])
CROSS = Scene(SIZES, [(GROUPS[:2], GROUPS[2:3]), (GROUPS[2:], GROUPS[:1])])
JOINT = Scene(SIZES, [(GROUPS, [GROUPS[0], GROUPS[2]])])
DENSE = Scene(SIZES, [(GROUPS, GROUPS)])
SCENES = {"self": SELF, "cross": CROSS, "joint": JOINT, "dense": DENSE}


def make_layer(cls: type[nn.Module] = ma.MixedAttention, *, dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    """A layer whose weights and biases are all of order one, so that no mistake hides in a small number."""
    torch.manual_seed(0)
    config = {"dim": DIM, "num_heads": NUM_HEADS, "branches": ["surface", "volume"], **config}
    layer = cls({**config, "init_weights": "torch"})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5)
    return layer.to(dtype)


def make_x(scene: Scene, batch_size: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Tokens ``(B, N, DIM)`` that require grad."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, scene.num_tokens, DIM, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def make_freqs(num_tokens: int, batch_size: int = 1, head_dim: int = DIM // NUM_HEADS) -> Tensor:
    """Complex128 frequencies of magnitudes around one."""
    generator = torch.Generator().manual_seed(2)
    magnitude, angle = torch.rand(2, batch_size, num_tokens, head_dim // 2, generator=generator, dtype=torch.float64)
    return torch.polar(0.5 + magnitude, 6 * angle)


def num_products(out: Tensor) -> int:
    """How many products q, k and v were made by, of the output of a layer in plain eager mode."""
    attention = out.grad_fn.next_functions[0][0]
    return sum(node is not None for node, _ in attention.next_functions)


def tensor_of(result: Tensor | tuple[Tensor, object]) -> Tensor:
    """The output of a layer of any of the published signatures."""
    return result[0] if isinstance(result, tuple) else result


def oracle(
    layer: nn.Module, x: Tensor, counts: Tensor, freqs: Tensor | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The layer as dense attention over all pairs, by its own parameters. ``counts`` as in :meth:`Scene.counts`."""
    core = getattr(layer, "mixed_attention", layer)
    if hasattr(core, "qkv"):
        weight, bias = core.qkv.weight, core.qkv.bias
    else:
        weight = torch.cat([core.q.weight, core.k.weight, core.v.weight])
        bias = None if core.q.bias is None else torch.cat([core.q.bias, core.k.bias, core.v.bias])
    projected = torch.nn.functional.linear(x, weight, bias)
    q, k, v = (t.unflatten(-1, (core.num_heads, -1)).transpose(1, 2) for t in projected.chunk(3, -1))
    if core.qk_norm:
        norms = core.q_norm.weight, core.k_norm.weight
        q, k = (torch.nn.functional.rms_norm(t, t.shape[-1:], weight) for t, weight in zip((q, k), norms))
    if freqs is not None:
        q, k = (_rotate(t, freqs) for t in (q, k))
    weights = counts.expand(x.shape[0], 1, -1, -1)
    if key_padding_mask is not None:
        weights = weights * key_padding_mask[:, None, None, :]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    p = weights * torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    total = p.sum(-1, keepdim=True)
    out = p / torch.where(total > 0, total, 1) @ v
    return core.proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Heads ``(B, H, N, D)`` times frequencies, in fp32 at least."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * freqs[:, None]).flatten(-2).to(x.dtype)


def gradients(out: Tensor, wanted: Sequence[Tensor], *, retain_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a fixed random functional of an output; zeros for what it does not depend on."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return torch.autograd.grad(out, wanted, direction, retain_graph=retain_graph, materialize_grads=True)


def assert_equal_in_fp64(actual, expected) -> None:
    """Equal up to what reordering a few hundred fp64 additions of numbers of order one may change."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
