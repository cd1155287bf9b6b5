"""What ours is measured against: attention called once per pattern, and the layer that upstream builds from it.

Every attention peer takes q, k, v ``(B, N, H, D)`` with a case and returns ``(B, N, H, D)``; it gathers the rows of a
pattern by slices and ``torch.cat`` where a union is not contiguous, as a user of that peer has to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixed_attention as ma
from bench.cases import Case

Attention = Callable[[Tensor, Tensor, Tensor, Case], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    return ma.attention(q, k, v, case.plan())


def _gather(tensors: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.cat([tensors[name] for name in names], 1) if len(names) > 1 else tensors[names[0]]


def _per_pattern(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, case: Case
) -> Tensor:
    sizes = list(case.groups.values())
    qs, ks, vs = (dict(zip(case.groups, t.split(sizes, 1), strict=True)) for t in (q, k, v))
    outs: dict[str, Tensor] = {}
    for queries, keys in case.patterns:
        out = attend(_gather(qs, queries), _gather(ks, keys), _gather(vs, keys))
        outs.update(zip(queries, out.split([case.groups[name] for name in queries], 1), strict=True))
    return _gather(outs, tuple(case.groups))


def _sdpa(backends: list[SDPBackend] | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backends is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    block_mask = _flex_mask(case, q.device)
    out = _compiled_flex()(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=block_mask)
    return out.transpose(1, 2)


_flex_masks: dict[tuple[Case | str, torch.device], object] = {}


def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_mask(case: Case, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    key = (case.name, device)
    if key not in _flex_masks:
        plan = case.plan()
        group = torch.repeat_interleave(torch.arange(len(plan.groups)), torch.tensor([g.size for g in plan.groups]))
        reads = torch.tensor([[g.pattern in keys.readers for keys in plan.groups] for g in plan.groups], device=device)
        group = group.to(device)
        _flex_masks[key] = create_block_mask(
            lambda b, h, i, j: reads[group[i], group[j]], None, None, case.num_tokens, case.num_tokens, device=device
        )
    return _flex_masks[key]


def _installed(module: str, name: str) -> Callable[..., object] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def attentions(device_type: str) -> dict[str, Attention]:
    """Ours and the peers that this machine has, by name."""
    if device_type == "cpu":
        return {"ours": ours, "sdpa": partial(_per_pattern, partial(_sdpa, None))}
    found: dict[str, Attention] = {"ours": ours, "flex": _flex}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("fa2", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        found[name] = partial(_per_pattern, partial(_sdpa, [backend]))
    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute.interface")):
        function = _installed(module, "flash_attn_func")
        if function is not None:
            found[name] = partial(_per_pattern, partial(_first_of, function))
    return found


def _first_of(function: Callable[..., object], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


class BaselineLayer(nn.Module):
    """Upstream's algorithm: one projection, rotation as fp32 complex numbers, rows gathered by cat for every pattern,
    patterns of equal lengths stacked into one call of the framework's attention, outputs joined by cat, projection.

    Takes the weights of our layer, so that both compute the same function.
    """

    def __init__(self, layer: ma.MixedAttention) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = layer.num_heads, layer.qkv, layer.proj

    def forward(self, x: Tensor, case: Case, freqs: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self._rotate(q, freqs), self._rotate(k, freqs)
        sizes = list(case.groups.values())
        qs, ks, vs = (dict(zip(case.groups, t.split(sizes, 2), strict=True)) for t in (q, k, v))
        stacks: dict[tuple[int, int], list[tuple[tuple[str, ...], Tensor, Tensor, Tensor]]] = {}
        for queries, keys in case.patterns:
            entry = (
                torch.cat([qs[n] for n in queries], 2),
                torch.cat([ks[n] for n in keys], 2),
                torch.cat([vs[n] for n in keys], 2),
            )
            stacks.setdefault((entry[0].shape[2], entry[1].shape[2]), []).append((queries, *entry))
        outs: dict[str, Tensor] = {}
        for entries in stacks.values():
            joined = (torch.cat([entry[i] for entry in entries], 0) for i in (1, 2, 3))
            out = F.scaled_dot_product_attention(*joined)
            for (queries, *_), part in zip(entries, out.chunk(len(entries), 0), strict=True):
                outs.update(zip(queries, part.split([case.groups[n] for n in queries], 2), strict=True))
        merged = torch.cat([outs[name] for name in case.groups], 2).transpose(1, 2).flatten(2)
        return self.proj(merged)

    @staticmethod
    def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * freqs[:, None]).flatten(-2).to(x.dtype)


class OurLayer(nn.Module):
    """Our layer behind the same call."""

    def __init__(self, layer: ma.MixedAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, case: Case, freqs: Tensor) -> Tensor:
        return self.layer(x, case.specs, case.attention_patterns, freqs=freqs)


def layers(case: Case, device: torch.device, *, compiled: bool) -> dict[str, nn.Module]:
    """Our layer and upstream's algorithm over the same weights."""
    config = ma.MixedAttentionConfig(dim=case.dim, num_heads=case.num_heads, use_rope=True)
    layer = ma.MixedAttention(config).to(device)
    for parameter in layer.parameters():  # of the size that trained weights have, so that softmax is not flat
        nn.init.normal_(parameter, std=case.dim**-0.5)
    found: dict[str, nn.Module] = {"ours": OurLayer(layer), "baseline": BaselineLayer(layer)}
    if compiled:
        found |= {f"{name}, compiled": torch.compile(module) for name, module in found.items()}
    return found
