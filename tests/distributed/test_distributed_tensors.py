"""DTensors and tensor parallelism against one process."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from layers import DIM, Scene, make_freqs, make_layer, make_x, tensor_of
from shares import cut
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mixed_attention as ma

SCENE = Scene({"a": 7, "b": 6, "c": 5}, [(["a", "b"], ["a"]), (["c"], ["c", "a", "c"])])
BOUNDS = {"rtol": 0, "atol": 1e-11}


def message_of(function, *arguments, **more) -> tuple[str, str]:
    try:
        function(*arguments, **more)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def distributed(tensor, mesh, placement):
    return (
        None
        if tensor is None
        else distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_(tensor.requires_grad)
    )


def operator_on_placements(mesh) -> None:
    plan = ma.AttentionPlan.compile(SCENE.specs, SCENE.patterns)
    generator = torch.Generator().manual_seed(1)
    count = SCENE.num_tokens
    for batch_size, keys_batch, masked, placement in itertools.product(
        (1, 4), (1, 4), (False, True), (Replicate(), Shard(0), Shard(1), Shard(2), Shard(3))
    ):
        keys_batch = min(batch_size, keys_batch)
        q = torch.randn(batch_size, count, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        k, v = (
            torch.randn(keys_batch, count, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for _ in range(2)
        )
        mask = torch.rand(keys_batch, count, generator=generator) > 0.3 if masked else None
        dout = torch.randn(q.shape, generator=generator, dtype=torch.float64)
        dlse = torch.randn(batch_size, 3, count, generator=generator, dtype=torch.float64)
        out, lse = ma.attention(q, k, v, plan, key_padding_mask=mask, return_lse=True)
        finite = torch.where(lse.isinf(), 0, dlse)
        expected = torch.autograd.grad((out, lse), (q, k, v), (dout, finite))
        of_keys = Replicate() if placement == Shard(0) and keys_batch < batch_size else placement
        here = [distributed(q, mesh, placement), *(distributed(t, mesh, of_keys) for t in (k, v))]
        mask_here = distributed(mask, mesh, Replicate())
        out_here, lse_here = ma.attention(*here, plan, key_padding_mask=mask_here, return_lse=True)
        directions = [
            distributed(t, mesh, Replicate()).redistribute(mesh, like.placements)
            for t, like in ((dout, out_here), (finite, lse_here))
        ]
        got = torch.autograd.grad((out_here, lse_here), here, directions)
        for actual, wanted in zip((out_here, lse_here, *got), (out, lse, *expected)):
            torch.testing.assert_close(actual.full_tensor(), wanted, **BOUNDS)
        shardable = {Shard(2): 3, Shard(0): batch_size}.get(placement, 0)
        if shardable >= mesh.size():
            assert tuple(out_here.placements) == (placement,), "computed where it is"
            if placement == Shard(0) and keys_batch < batch_size:
                assert tuple(got[1].placements) == (Partial(),)


@pytest.mark.parametrize("size", [2, 4])
def test_operator_on_distributed_tensors(ranks, size):
    """Three heads over two ranks are no equal shares."""
    ranks.run(size, operator_on_placements)


def second_derivatives_on_placements(mesh) -> None:
    plan = ma.AttentionPlan.compile(SCENE.specs, SCENE.patterns)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, SCENE.num_tokens, generator=generator) > 0.3

    def second(tensors, mask):
        out, lse = ma.attention(*tensors, plan, key_padding_mask=mask, return_lse=True)
        grads = torch.autograd.grad((out.pow(3).sum(), lse.exp().sum()), tensors, create_graph=True)
        return torch.autograd.grad([grad.square().sum() for grad in grads], tensors)

    for keys_batch, placement in itertools.product((1, 2), (Replicate(), Shard(0), Shard(2))):
        leaves = [
            torch.randn(size, SCENE.num_tokens, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for size in (2, keys_batch, keys_batch)
        ]
        of_keys = Replicate() if placement == Shard(0) and keys_batch == 1 else placement
        here = [distributed(t, mesh, p) for t, p in zip(leaves, (placement, of_keys, of_keys))]
        seen = mask[:keys_batch] if keys_batch == 1 else mask
        got = second(here, distributed(seen, mesh, Replicate()))
        for actual, wanted in zip(got, second(leaves, seen)):
            torch.testing.assert_close(actual.full_tensor(), wanted, rtol=1e-9, atol=1e-9)


def test_second_derivatives_on_distributed_tensors(ranks):
    ranks.run(2, second_derivatives_on_placements)


def more_of_the_operator(mesh) -> None:
    plan = ma.AttentionPlan.compile(SCENE.specs, SCENE.patterns)
    q, k, v = torch.randn(3, 2, SCENE.num_tokens, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    here = [distributed(t, mesh, Shard(2)) for t in leaves]
    (grad,) = torch.autograd.grad(ma.attention(*leaves, plan).pow(3).sum(), leaves[1], create_graph=True)
    expected = torch.autograd.grad(grad.square().sum(), leaves)
    (grad,) = torch.autograd.grad(ma.attention(*here, plan).pow(3).sum(), here[1], create_graph=True)
    for actual, wanted in zip(torch.autograd.grad(grad.square().sum(), here), expected):
        torch.testing.assert_close(actual.full_tensor(), wanted, **BOUNDS)

    # Dropout: the same weights on all ranks, whatever their generators are, and those of one process with that seed.
    torch.manual_seed(mesh.get_local_rank())
    dropped = ma.attention(*here, plan, dropout_p=0.4)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped.full_tensor(), ma.attention(q, k, v, plan, dropout_p=0.4), **BOUNDS)

    freqs = make_freqs(SCENE.num_tokens)
    rotated = ma.apply_rope(distributed(q, mesh, Shard(2)), distributed(freqs, mesh, Replicate()))
    torch.testing.assert_close(rotated.full_tensor(), ma.apply_rope(q, freqs), **BOUNDS)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: ma.attention(*tensors, plan), backend="aot_eager", fullgraph=True)
    out = compiled(*here)
    torch.testing.assert_close(out.full_tensor(), ma.attention(q, k, v, plan), **BOUNDS)
    got = torch.autograd.grad(out.sum(), here)
    wanted = torch.autograd.grad(ma.attention(*leaves, plan).sum(), leaves)
    for actual, expected in zip(got, wanted):
        torch.testing.assert_close(actual.full_tensor(), expected, **BOUNDS)


def test_more_of_the_operator_on_distributed_tensors(ranks):
    ranks.run(2, more_of_the_operator)


# ------------------------------------------------------------------------------------------ tokens as a DTensor


def tokens_as_a_dtensor(mesh) -> None:
    for rope, batch_size in itertools.product((False, True), (1, 2)):
        whole = make_layer(ma.MixedAttention, use_rope=rope)
        layer = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
        x, freqs = make_x(SCENE, batch_size), make_freqs(SCENE.num_tokens) if rope else None
        mask = torch.rand(batch_size, SCENE.num_tokens, generator=torch.Generator().manual_seed(5)) > 0.3
        expected = whole(x, SCENE.specs, SCENE.patterns, freqs=freqs, key_padding_mask=mask)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        (grad,) = torch.autograd.grad(expected, x, direction)
        here = distributed(x, mesh, Shard(1))
        arguments = {"freqs": distributed(freqs, mesh, Shard(1)), "key_padding_mask": distributed(mask, mesh, Shard(1))}
        out = layer(here, SCENE.specs, SCENE.patterns, **arguments)
        assert isinstance(out, DTensor) and out.shape == expected.shape and tuple(out.placements) == (Shard(1),)
        torch.testing.assert_close(out.full_tensor(), expected, **BOUNDS)
        (got,) = torch.autograd.grad(out, here, distributed(direction, mesh, Shard(1)))
        torch.testing.assert_close(got.full_tensor(), grad, **BOUNDS)
    for cls in (ma.DotProductAttention, ma.PerceiverAttention):
        whole = make_layer(cls)
        layer = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
        x = make_x(SCENE)
        tokens = (x,) if cls is ma.DotProductAttention else (x, make_x(SCENE, seed=2))
        out = layer(*(distributed(t, mesh, Shard(1)) for t in tokens))
        torch.testing.assert_close(out.full_tensor(), whole(*tokens), **BOUNDS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tokens_as_a_distributed_tensor(ranks, size):
    ranks.run(size, tokens_as_a_dtensor)


def tokens_that_are_refused(mesh) -> list[tuple[str, str]]:
    layer = parallelize_module(make_layer(ma.MixedAttention), mesh, ma.distributed.ContextParallel())
    held = parallelize_module(make_layer(ma.MixedAttention), mesh, ma.distributed.ContextParallel(replicated=["a"]))
    x = make_x(SCENE)
    sharded = cut(SCENE, mesh, "chunks").sharded
    here = distributed(x, mesh, Shard(1))
    return [
        message_of(layer, distributed(x, mesh, Replicate()), SCENE.specs, SCENE.patterns),
        message_of(layer, distributed(x, mesh, Shard(0)), SCENE.specs, SCENE.patterns),
        message_of(layer, here, sharded, SCENE.patterns),
        message_of(layer, here, SCENE.specs[:2], SCENE.patterns),
        message_of(held, here, SCENE.specs, SCENE.patterns),
    ]


def test_tokens_that_are_refused(ranks):
    for raised in ranks.run(2, tokens_that_are_refused):
        assert [kind for kind, _ in raised] == ["ValueError"] * 5, raised


# ------------------------------------------------------------------------------------------ heads


STYLES = {"q": ColwiseParallel, "k": ColwiseParallel, "v": ColwiseParallel, "proj": RowwiseParallel}


def heads_over_ranks(mesh) -> None:
    for cls, how, rope in itertools.product(
        (ma.MixedAttention, ma.noether.MixedAttention), ("ours", "torch's", "DTensors"), (False, True)
    ):
        if how != "ours" and cls is ma.MixedAttention:
            continue
        whole = make_layer(cls, num_heads=4, use_rope=rope, qk_norm=how == "ours")
        layer = copy.deepcopy(whole)
        if how == "ours":
            parallelize_module(layer, mesh, ma.distributed.HeadParallel())
            assert layer.projections == ("q", "k", "v")
        else:
            keep = {"use_local_output": False} if how == "DTensors" else {}
            plan = {name: style(**keep if name != "proj" else {}) for name, style in STYLES.items()}
            parallelize_module(layer, mesh, plan)
        x, freqs = make_x(SCENE), make_freqs(SCENE.num_tokens, head_dim=DIM // 4) if rope else None
        expected = tensor_of(whole(x, SCENE.specs, SCENE.patterns, freqs=freqs))
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        expected.backward(direction)
        here = x.detach().clone().requires_grad_()
        if how == "DTensors" and rope:
            freqs = distributed(freqs, mesh, Replicate())
        out = tensor_of(layer(here, SCENE.specs, SCENE.patterns, freqs=freqs))
        torch.testing.assert_close(out, expected, **BOUNDS)
        out.backward(direction)
        torch.testing.assert_close(here.grad, x.grad, **BOUNDS)
        grads = {
            name: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for name, p in layer.named_parameters()
        }
        fused = ma.checkpoint.convert_state_dict(grads, "fused")
        wanted = ma.checkpoint.convert_state_dict({n: p.grad for n, p in whole.named_parameters()}, "fused")
        assert fused.keys() == wanted.keys()
        for name, gradient in fused.items():
            torch.testing.assert_close(gradient, wanted[name], **BOUNDS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_heads_over_ranks(ranks, size):
    ranks.run(size, heads_over_ranks)


def heads_of_other_layers(mesh) -> None:
    for cls in (ma.PerceiverAttention, ma.DotProductAttention, ma.SelfAnchorAttention):
        scene = Scene(
            {"surface_anchors": 5, "volume_anchors": 4}, [(["surface_anchors", "volume_anchors"], ["surface_anchors"])]
        )
        whole = make_layer(cls, num_heads=4)
        layer = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.HeadParallel())
        x = make_x(scene)
        more = {ma.PerceiverAttention: (x,), ma.SelfAnchorAttention: (scene.specs,)}.get(cls, ())
        torch.testing.assert_close(layer(x, *more), whole(x, *more), **BOUNDS)


def test_heads_of_other_layers(ranks):
    ranks.run(2, heads_of_other_layers)


def heads_that_are_refused(mesh) -> list[tuple[str, str]]:
    x = make_x(SCENE)

    def apply(layer, plan):
        parallelize_module(layer, mesh, plan)
        return layer

    def call(layer):
        return layer(x, SCENE.specs, SCENE.patterns)

    def styles(**options):
        return {name: style(**options) for name, style in STYLES.items() if name != "proj"} | {
            "proj": RowwiseParallel()
        }

    packed = {"qkv": ColwiseParallel(), "proj": RowwiseParallel()}
    kept = {"qkv": ColwiseParallel(use_local_output=False), "proj": RowwiseParallel()}
    divided = apply(make_layer(ma.MixedAttention, num_heads=4), packed)
    divided.num_heads //= mesh.size()
    affine = apply(
        make_layer(ma.noether.MixedAttention, num_heads=4, qk_norm="affine"),
        {name: style() for name, style in STYLES.items()},
    )
    hooked = make_layer(ma.MixedAttention, num_heads=4)
    hooked.qkv.register_forward_hook(lambda *_: None)
    ours = ma.distributed.HeadParallel()
    return [
        message_of(call, apply(make_layer(ma.MixedAttention, num_heads=4), packed)),
        message_of(call, divided),
        message_of(call, apply(make_layer(ma.MixedAttention, num_heads=4), kept)),
        message_of(
            call,
            apply(
                make_layer(ma.noether.MixedAttention, num_heads=3), {name: style() for name, style in STYLES.items()}
            ),
        ),
        message_of(apply, make_layer(ma.MixedAttention, num_heads=3), ours),
        message_of(apply, torch.nn.Linear(2, 2), ours),
        message_of(apply, hooked, ours),
        message_of(apply, make_layer(ma.MixedAttention, num_heads=4, qk_norm="affine"), ours),
        message_of(call, affine),
    ]


def test_heads_that_are_refused(ranks):
    for raised in ranks.run(2, heads_that_are_refused):
        kinds = [kind for kind, _ in raised]
        assert kinds == ["ValueError"] * 7 + ["NotImplementedError"] * 2, raised
        assert all("HeadParallel()" in text for _, text in raised[:3]), raised
        assert "cuts through a head" in raised[3][1]


def heads_and_tokens_at_once(_) -> None:
    """A mesh of two dimensions: tokens over one, heads over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "heads"))
    whole = make_layer(ma.MixedAttention, num_heads=4, use_rope=True)
    layer = copy.deepcopy(whole)
    parallelize_module(layer, mesh["tokens"], ma.distributed.ContextParallel())
    parallelize_module(layer, mesh["heads"], ma.distributed.HeadParallel())
    share = cut(SCENE, mesh["tokens"], "random")
    x, freqs = make_x(SCENE), make_freqs(SCENE.num_tokens, head_dim=DIM // 4)
    expected = whole(x, SCENE.specs, SCENE.patterns, freqs=freqs)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    (grad,) = torch.autograd.grad(expected, x, direction)
    (here,) = share.of(x)
    out = layer(here, share.specs, SCENE.patterns, freqs=freqs[:, share.rows])
    torch.testing.assert_close(out, expected[:, share.rows], **BOUNDS)
    (got,) = torch.autograd.grad(out, here, direction[:, share.rows])
    torch.testing.assert_close(got, grad[:, share.rows], **BOUNDS)


def test_heads_and_tokens_at_once(ranks):
    ranks.run(4, heads_and_tokens_at_once)
