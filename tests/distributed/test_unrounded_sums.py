"""Gradients of gathered keys are added up over ranks before anybody rounds them, where kernels have them in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layers import Scene
from shares import cut

import mixed_attention as ma

SCENE = Scene({"a": 200, "b": 56}, [(["a", "b"], ["a", "b"])])
PLAN = ma.AttentionPlan.compile(SCENE.specs, SCENE.patterns)


def tensors(dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of numbers that bf16 has."""
    made = torch.randn(4, 1, SCENE.num_tokens, 2, 32, generator=torch.Generator().manual_seed(1))
    return list((scale * made).bfloat16().to(dtype))


def squared_errors(mesh, how: str, dtype: torch.dtype) -> list[float]:
    """Those of dk and dv over those of one process, which rounds each number once."""
    share, ratios = cut(SCENE, mesh, how), []
    q, k, v, dout = tensors(dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    one = torch.autograd.grad(ma.attention(*leaves, PLAN), leaves[1:], dout)
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(ma.attention(*doubles, PLAN), doubles[1:], dout.double())
    here = share.of(*leaves)
    keys = ma.distributed.gather_keys(*here[1:], share.sharded, mesh)
    out = ma.attention(here[0], *keys, ma.AttentionPlan.compile(share.sharded, SCENE.patterns))
    got = torch.autograd.grad(out, here[1:], dout[:, share.rows])
    for actual, alone, truth in zip(got, one, exact):
        assert actual.dtype == dtype
        error, of_one = (t.double() - truth[:, share.rows] for t in (actual, alone[:, share.rows]))
        both = torch.stack([error.square().sum(), of_one.square().sum()])
        dist.all_reduce(both, group=mesh.get_group())
        ratios.append((both[0] / both[1]).item())
    return ratios


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["chunks", "random"])
def test_errors_are_those_of_one_process(ranks, how, dtype):
    for size in (2, 4):
        for ratio in ranks.run(size, squared_errors, how, dtype)[0]:
            assert ratio < 1.1, (size, ratio)  # it is 2 where each rank's part is rounded as well


def twice(grad: torch.Tensor) -> torch.Tensor:
    return 2 * grad


def twice_in_place(grad: torch.Tensor) -> None:
    grad.mul_(2)


KINDS = ("plain", "hook", "hook in place", "two readers", "a slice", "values alone", "captured", "again")


def gradients(mesh, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Those of keys and values where the first rank does with them what the others do not."""
    share = cut(SCENE, mesh, "random")
    *qkv, dout = tensors(dtype)
    q, k, v = (t.requires_grad_() for t in share.of(*qkv))
    dout = dout[:, share.rows]
    keys, values = ma.distributed.gather_keys(k, v, share.sharded, mesh)
    plan = ma.AttentionPlan.compile(share.sharded, SCENE.patterns)
    is_first = mesh.get_local_rank() == 0
    if is_first and kind == "hook":
        keys.register_hook(twice)
    if is_first and kind == "hook in place":
        values.register_hook(twice_in_place)
    read = (keys[:, :], values) if is_first and kind == "a slice" else (keys, values)
    out = ma.attention(q, keys.detach() if is_first and kind == "values alone" else read[0], read[1], plan)
    if is_first and kind == "two readers":
        out = out + ma.attention(0.5 * q, keys, values, plan)
    if is_first and kind == "captured":
        of_whole = torch.autograd.grad(out, [keys, values], dout, retain_graph=True)
        assert [t.dtype for t in of_whole] == [dtype] * 2 and all(t.isfinite().all() for t in of_whole)
    found = list(torch.autograd.grad(out, [k, v], dout, retain_graph=True))
    if kind == "again":
        assert all(map(torch.equal, found, torch.autograd.grad(out, [k, v], dout)))
    return found


def gradients_like_those_of_fp64(mesh, kind: str) -> None:
    for ours, exact in zip(gradients(mesh, kind, torch.bfloat16), gradients(mesh, kind, torch.float64)):
        largest = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.02 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_do_to_gradients_counts(ranks, kind):
    ranks.run(2, gradients_like_those_of_fp64, kind)
