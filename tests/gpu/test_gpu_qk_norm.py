"""Queries and keys that one kernel normalises and rotates, on a GPU, against the modules that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import CROSS, GROUPS, JOINT, Scene, gradients, make_freqs
from torch import Tensor, nn

import mixed_attention as ma
from mixed_attention.layers import mixed as module

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIZES = dict(zip(GROUPS, (150, 210, 97, 130)))
SCENES = {"joint": Scene(SIZES, JOINT.attends), "in parts": Scene(SIZES, CROSS.attends)}


def make(scene: Scene, head_dim: int, dtype: torch.dtype, device: torch.device, *, use_rope: bool):
    """A layer, the same with norms that are called, tokens, and frequencies of magnitudes around one."""
    torch.manual_seed(0)
    config = ma.MixedAttentionConfig(dim=3 * head_dim, num_heads=3, qk_norm=True, use_rope=use_rope)
    layer = ma.MixedAttention(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=(3 * head_dim) ** -0.5)
    layer = layer.to(device, dtype)
    by_modules = copy.deepcopy(layer)
    for norm in (by_modules.q_norm, by_modules.k_norm):
        norm.register_forward_hook(lambda *_: None)
    x = torch.randn(2, scene.num_tokens, 3 * head_dim, device=device).to(dtype).requires_grad_()
    freqs = make_freqs(scene.num_tokens, head_dim=head_dim).to(device) if use_rope else None
    return layer, by_modules, x, freqs if dtype == torch.float64 or freqs is None else freqs.to(torch.complex64)


def results(layer: nn.Module, scene: Scene, x: Tensor, freqs: Tensor | None) -> list[Tensor]:
    out = layer(x, scene.specs, scene.patterns, freqs=freqs)
    return [out.detach(), *gradients(out, [x, *layer.parameters()])]


# Rows of whole vectors and of pairs alone, of less than a warp, of a whole one and of several loads a thread.
@pytest.mark.parametrize("head_dim", [2, 20, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("use_rope", [True, False], ids=["rope", "plain"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_kernels_are_as_exact_as_the_modules(scene, dtype, use_rope, head_dim, device, monkeypatch):
    monkeypatch.setitem(module.LEAST_SKIPPED, "cuda", 0)
    layer, by_modules, x, freqs = make(scene, head_dim, dtype, device, use_rope=use_rope)
    exact_x = x.detach().double().requires_grad_()
    exact_freqs = None if freqs is None else freqs.to(torch.complex128)
    exact = results(copy.deepcopy(by_modules).double(), scene, exact_x, exact_freqs)
    theirs = results(by_modules, scene, x, freqs)
    if dtype != torch.float64:  # which the reference computes on GPUs
        monkeypatch.setattr("mixed_attention.layers.norm.rms_norm", None)
    for ours, yardstick, truth in zip(results(layer, scene, x, freqs), theirs, exact):
        errors = [(t.double() - truth).norm() / truth.norm() for t in (ours, yardstick)]
        # In fp64 the truth is no better than what it judges.
        assert errors[0] <= 1.5 * errors[1] + (1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps)


def test_a_graph_normalises_what_it_is_given(device):
    scene = SCENES["joint"]
    layer, by_modules, x, freqs = make(scene, 64, torch.bfloat16, device, use_rope=True)
    given = x.detach()
    with torch.no_grad():
        layer(given, scene.specs, scene.patterns, freqs=freqs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = layer(given, scene.specs, scene.patterns, freqs=freqs)
        given.normal_()
        graph.replay()
        expected = by_modules(given, scene.specs, scene.patterns, freqs=freqs)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
