"""Several ranks against one process."""

from __future__ import annotations

import copy
import datetime
import itertools
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from layers import CROSS, DENSE, DIM, JOINT, NUM_HEADS, SELF, Scene, make_freqs, make_layer, make_x, tensor_of
from shares import CUTS, cut, cuts
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import mixed_attention as ma

SIZES = {"a": 11, "b": 6, "c": 9, "d": 13}
SCENES = {
    "anchors": Scene(SIZES, [(["a", "b"], ["a"]), (["c", "d"], ["c", "a"])]),
    "self": Scene(SIZES, [([name], [name]) for name in SIZES]),
    "joint": Scene(SIZES, [(list(SIZES), list(SIZES))]),
    "twice": Scene(SIZES, [(["a", "b"], ["a", "a"]), (["c", "d"], ["d", "b"])]),
    "empty": Scene({**SIZES, "a": 0, "c": 1}, [(["a", "b"], ["a", "b"]), (["c", "d"], ["a"])]),
}
WORLDS = (1, 2, 4)


def closeness(dtype: torch.dtype, **more: float) -> dict[str, float]:
    """Bounds for sums of some dozens of numbers of order one in another order."""
    return {"rtol": 0, "atol": {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype]} | more


def ranks_of(mesh) -> range:
    return range(mesh.size())


# ------------------------------------------------------------------------------------------ the operator


def operator_like_one_process(mesh, scene_name: str, how: str, dtype: torch.dtype, masked: bool) -> None:
    scene = SCENES[scene_name]
    share = cut(scene, mesh, how)
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = torch.randn(4, 2, scene.num_tokens, 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    dlse = torch.randn(2, 3, scene.num_tokens, generator=generator).to(torch.promote_types(dtype, torch.float32))
    mask = torch.rand(2, scene.num_tokens, generator=generator) > 0.4 if masked else None
    if masked:
        mask[0, : scene.sizes["a"]] = False  # rows without keys
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plan = ma.AttentionPlan.compile(scene.specs, scene.patterns)
    out, lse = ma.attention(*leaves, plan, key_padding_mask=mask, return_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.where(lse.isinf(), 0, dlse)))

    specs = share.sharded
    here = share.of(*leaves)
    sharded_plan = ma.AttentionPlan.compile(specs, scene.patterns)
    keys, values = ma.distributed.gather_keys(*here[1:], specs, mesh)
    their_mask = None if mask is None else ma.distributed.gather(*share.of(mask), specs, mesh=mesh)
    out_here, lse_here = ma.attention(here[0], keys, values, sharded_plan, key_padding_mask=their_mask, return_lse=True)
    assert torch.equal(out_here, out[:, share.rows])
    assert torch.equal(lse_here, lse[:, :, share.rows])
    (dlse_here,) = share.of(torch.where(lse.isinf(), 0, dlse).transpose(1, 2))
    got = torch.autograd.grad((out_here, lse_here), here, (*share.of(dout), dlse_here.transpose(1, 2)))
    for actual, expected in zip(got, grads):
        torch.testing.assert_close(actual, expected[:, share.rows], **closeness(dtype))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("scene", SCENES)
def test_operator_over_shards_is_that_of_one_process(ranks, size, scene):
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for how, dtype, masked in itertools.product(cuts(size), dtypes, (False, True)):
        ranks.run(size, operator_like_one_process, scene, how, dtype, masked)


# ------------------------------------------------------------------------------------------ layers

LAYERS = {
    "fused": ma.MixedAttention,
    "separate": ma.noether.MixedAttention,
}


def marked(layer: nn.Module, mesh, **how) -> nn.Module:
    return parallelize_module(copy.deepcopy(layer), mesh, ma.distributed.ContextParallel(**how))


def summed(mesh, layer: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of parameters, added up over the ranks."""
    for parameter in layer.parameters():
        dist.all_reduce(parameter.grad, group=mesh.get_group())
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def layer_like_one_process(mesh, layout: str, scene_name: str, how: str, options: dict) -> None:
    options = {"knows": False, "rope": None, "masked": False, "dtype": torch.float64, "autocast": False, **options}
    scene, dtype = SCENES[scene_name], options["dtype"]
    share = cut(scene, mesh, how)
    config = {key: options[key] for key in ("qk_norm", "parallel", "bias") if key in options}
    whole = make_layer(LAYERS[layout], use_rope=options["rope"] is not None, dtype=dtype, **config)
    x = make_x(scene, dtype=dtype)
    freqs = rotations(options["rope"], scene)
    mask = torch.rand(2, scene.num_tokens, generator=torch.Generator().manual_seed(5)) > 0.3
    mask = mask if options["masked"] else None
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=options["autocast"])

    with autocast():
        expected = tensor_of(whole(x, scene.specs, scene.patterns, freqs=freqs, key_padding_mask=mask))
    expected.backward(direction.to(expected.dtype))

    layer = marked(whole, mesh, even=options.get("even", False))
    layer.zero_grad()
    (x_here,) = share.of(x)
    freqs_here = tuple(f[:, share.rows] for f in freqs) if isinstance(freqs, tuple) else freqs
    freqs_here = freqs[:, share.rows] if isinstance(freqs, torch.Tensor) else freqs_here
    mask_here = None if mask is None else mask[:, share.rows]
    specs = share.sharded if options["knows"] else share.specs
    with autocast():
        out = tensor_of(layer(x_here, specs, scene.patterns, freqs=freqs_here, key_padding_mask=mask_here))
    out.backward(direction[:, share.rows].to(out.dtype))
    bounds = closeness(torch.bfloat16 if options["autocast"] else dtype)
    largest = max(1.0, x.grad.abs().max().item())
    torch.testing.assert_close(out, expected[:, share.rows], **bounds)
    torch.testing.assert_close(x_here.grad, x.grad[:, share.rows], rtol=0, atol=bounds["atol"] * largest)
    for name, gradient in summed(mesh, layer).items():
        wanted = whole.get_parameter(name).grad
        largest = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=bounds["atol"] * largest)


def rotations(kind: str | None, scene: Scene):
    if kind is None:
        return None
    coords = 100 * torch.rand(1, scene.num_tokens, 2, generator=torch.Generator().manual_seed(2))
    if kind == "complex":
        return make_freqs(scene.num_tokens)
    return ma.RopeFrequency(DIM // NUM_HEADS, 2, implementation="real")(coords)


OPTIONS = {
    "plain": {},
    "sizes known": {"knows": True},
    "rope": {"rope": "complex"},
    "real rope": {"rope": "real", "knows": True},
    "mask": {"masked": True},
    "norms": {"qk_norm": "affine", "rope": "complex"},
    "reference": {"parallel": False, "rope": "complex"},
    "fp32": {"dtype": torch.float32, "rope": "complex", "masked": True},
    "autocast": {"dtype": torch.float32, "autocast": True, "rope": "complex", "knows": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", WORLDS)
def test_layer_over_shards_is_that_of_one_process(ranks, size, options):
    for layout, scene, how in itertools.product(LAYERS, ("anchors", "twice", "empty"), cuts(size)):
        ranks.run(size, layer_like_one_process, layout, scene, how, options)


def other_layers_like_one_process(mesh) -> None:
    scenes = {"self": SELF, "cross": CROSS, "joint": JOINT}
    for namespace, how in itertools.product((ma, ma.noether), cuts(mesh.size(), ("random", "one rank"))):
        for kind, scene in scenes.items():
            whole = make_layer(getattr(namespace, f"{kind.title()}AnchorAttention"), use_rope=True)
            share, x, freqs = cut(scene, mesh, how), make_x(scene), make_freqs(scene.num_tokens)
            layer = marked(whole, mesh)
            agree_with_one_process(mesh, whole, layer, x, share, lambda m, t, specs, f: m(t, specs, freqs=f), freqs)
    untied = make_layer(ma.noether.UntiedMixedAttention, num_types=2, use_rope=True)
    for scene, how in itertools.product((SELF, CROSS, DENSE), cuts(mesh.size())):
        share, x, freqs = cut(scene, mesh, how), make_x(scene), make_freqs(scene.num_tokens)
        agree_with_one_process(
            mesh,
            untied,
            marked(untied, mesh),
            x,
            share,
            lambda m, t, s, f, p=scene.patterns: m(t, s, p, freqs=f),
            freqs,
        )


def agree_with_one_process(mesh, whole, layer, x, share, call, freqs=None) -> None:
    """Outputs, gradients of tokens and of parameters; ``call(layer, tokens, specs, freqs)``."""
    whole.zero_grad()
    layer.zero_grad()
    x = x.detach().requires_grad_()
    expected = tensor_of(call(whole, x, share.scene.specs, freqs))
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    expected.backward(direction)
    (x_here,) = share.of(x)
    freqs_here = None if freqs is None else freqs[:, share.rows]
    out = tensor_of(call(layer, x_here, share.specs, freqs_here))
    out.backward(direction[:, share.rows])
    bounds = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected[:, share.rows], **bounds)
    torch.testing.assert_close(x_here.grad, x.grad[:, share.rows], **bounds)
    for name, gradient in summed(mesh, layer).items():
        torch.testing.assert_close(gradient, whole.get_parameter(name).grad, **bounds)


@pytest.mark.parametrize("size", WORLDS)
def test_siblings_and_layers_of_noether(ranks, size):
    ranks.run(size, other_layers_like_one_process)


def dense_layers_like_one_process(mesh) -> None:
    scene = Scene({"x": 13}, [(["x"], ["x"])])
    for cls, how, rope in itertools.product(
        (ma.DotProductAttention, ma.noether.DotProductAttention), cuts(mesh.size()), (False, True)
    ):
        whole, share, x = make_layer(cls, use_rope=rope), cut(scene, mesh, how), make_x(scene)
        freqs = make_freqs(13) if rope else None
        agree_with_one_process(mesh, whole, marked(whole, mesh), x, share, lambda m, t, _, f: m(t, freqs=f), freqs)
        mask = torch.randn(2, 1, 13, 13, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        masks = {id(whole): mask}
        layer = marked(whole, mesh)
        masks[id(layer)] = mask[:, :, share.rows]
        agree_with_one_process(
            mesh, whole, layer, x, share, lambda m, t, _, f, given=masks: m(t, given[id(m)], freqs=f), freqs
        )
    for cls, how, rope in itertools.product(
        (ma.PerceiverAttention, ma.noether.PerceiverAttention), CUTS, (False, True)
    ):
        perceiver_like_one_process(mesh, cls, how, rope, shared=how == "random")
    layer = marked(make_layer(ma.PerceiverAttention), mesh, replicated=["kv"])
    q, kv = make_x(scene, seed=1), make_x(scene, seed=2)
    share = cut(scene, mesh, "random")
    expected = make_layer(ma.PerceiverAttention)(q, kv)
    torch.testing.assert_close(layer(q[:, share.rows], kv), expected[:, share.rows], rtol=0, atol=1e-12)


def perceiver_like_one_process(mesh, cls, how: str, rope: bool, shared: bool) -> None:
    queries, keys = Scene({"q": 9}, [(["q"], ["q"])]), Scene({"kv": 14}, [(["kv"], ["kv"])])
    q_share, k_share = cut(queries, mesh, how, seed=1), cut(keys, mesh, how, seed=2)
    q, kv = make_x(queries, seed=1), make_x(keys, batch_size=1 if shared else 2, seed=2)
    freqs = (make_freqs(9), make_freqs(14)) if rope else (None, None)
    whole = make_layer(cls, use_rope=rope)
    layer = marked(whole, mesh)
    expected = tensor_of(whole(q, kv, None, *freqs))
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    expected.backward(direction)
    q_here, kv_here = *q_share.of(q), *k_share.of(kv)
    here = [None if f is None else f[:, share.rows] for f, share in zip(freqs, (q_share, k_share))]
    result = layer(
        q_here, kv_here, None, *here, **({} if cls is ma.noether.PerceiverAttention else {"return_kv_cache": True})
    )
    out, recorded = result
    out.backward(direction[:, q_share.rows])
    bounds = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, expected[:, q_share.rows], **bounds)
    torch.testing.assert_close(q_here.grad, q.grad[:, q_share.rows], **bounds)
    torch.testing.assert_close(kv_here.grad, kv.grad[:, k_share.rows], **bounds)
    for name, gradient in summed(mesh, layer).items():
        torch.testing.assert_close(gradient, whole.get_parameter(name).grad, **bounds)
    cache = ma.distributed.gather_cache(recorded, mesh=mesh)
    again = tensor_of(layer(q_here, None, None, here[0], kv_cache=cache))
    torch.testing.assert_close(again, out, **bounds)


@pytest.mark.parametrize("size", WORLDS)
def test_dense_and_perceiver_layers(ranks, size):
    ranks.run(size, dense_layers_like_one_process)


def replicated_groups(mesh) -> None:
    """Gradients of what every rank holds whole are parts: those of queries whole on every rank, of keys parts."""
    scene = SCENES["twice"]
    whole = make_layer(ma.MixedAttention)
    whole_groups = (["b"], ["d", "b"], ["a", "b", "c", "d"])
    for held, how, knows in itertools.product(whole_groups, cuts(mesh.size()), (False, True)):
        share = cut(scene, mesh, how, whole=held)
        x, layer = make_x(scene), marked(whole, mesh, replicated=held)
        expected = whole(x, scene.specs, scene.patterns)
        # Only rows that one rank alone holds count, so that no query counts twice.
        counted = [row for name in SIZES if name not in held for row in scene.rows(name)]
        direction = torch.zeros_like(expected)
        direction[:, counted] = torch.randn(2, len(counted), DIM, generator=torch.Generator().manual_seed(3)).double()
        (expected_grad,) = torch.autograd.grad(expected, x, direction)
        (x_here,) = share.of(x)
        out = layer(x_here, share.sharded if knows else share.specs, scene.patterns)
        torch.testing.assert_close(out, expected[:, share.rows], rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(out, x_here, direction[:, share.rows])
        total = torch.zeros_like(x)
        total.index_add_(1, torch.tensor(share.rows), grad)
        dist.all_reduce(total, group=mesh.get_group())
        torch.testing.assert_close(total, expected_grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", WORLDS)
def test_groups_that_every_rank_holds_whole(ranks, size):
    ranks.run(size, replicated_groups)


# ------------------------------------------------------------------------------------------ caches


def caches_and_streams(mesh, cls_name: str) -> None:
    namespace = ma.noether if cls_name == "separate" else ma
    whole = make_layer(namespace.MixedAttention, use_rope=True).eval()
    layer = marked(whole, mesh)
    more = {} if cls_name == "separate" else {"return_kv_cache": True}
    for how, masked in itertools.product(cuts(mesh.size()), (False, True)):
        share, x, freqs = cut(SELF, mesh, how), make_x(SELF), make_freqs(SELF.num_tokens)
        mask = torch.rand(2, SELF.num_tokens, generator=torch.Generator().manual_seed(5)) > 0.3 if masked else None
        _, expected = whole(x, SELF.specs, SELF.patterns, freqs=freqs, key_padding_mask=mask, **more)
        mask_here = None if mask is None else mask[:, share.rows]
        arguments = {"freqs": freqs[:, share.rows], "key_padding_mask": mask_here}
        _, recorded = layer(*share.of(x), share.specs, SELF.patterns, **arguments, **more)
        gathered = ma.distributed.gather_cache([None, recorded], mesh=mesh)[1]
        by_specs = ma.distributed.gather_cache(recorded, share.sharded, mesh=mesh)
        for cache in (gathered, by_specs):
            assert cache.keys() == expected.keys()
            for name, entry in expected.items():
                assert cache[name].keys() == entry.keys()
                for which, tensor in entry.items():
                    torch.testing.assert_close(cache[name][which], tensor, rtol=0, atol=1e-12)

        specs = [ma.TokenSpec("surface_anchors", None), ma.TokenSpec("surface_queries", 0)]
        queries, positions = make_x(SELF, seed=9).detach(), make_freqs(SELF.num_tokens)

        def predict(chunk, attend=layer, cache=gathered, specs=specs):
            groups = [specs[0], ma.TokenSpec("surface_queries", chunk["x"].shape[1])]
            return tensor_of(attend(chunk["x"], groups, SELF.patterns[:1], freqs=chunk["f"], kv_cache=cache))

        part = ma.distributed.share_of(SELF.num_tokens, mesh)
        mine = {"x": queries[:, part], "f": positions[:, part]}
        # Other chunks on every rank: nothing waits for the others.
        got = ma.stream(predict, mine, chunk_size=2 + mesh.get_local_rank())
        wanted = predict({"x": queries, "f": positions}, whole, expected)
        torch.testing.assert_close(got, wanted[:, part], rtol=0, atol=1e-12)
        if mesh.size() > 1:
            with pytest.raises(ValueError, match="shard of a cache.*gather_cache"):
                predict(mine, layer, recorded)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("layout", LAYERS)
def test_caches_are_gathered_and_queries_streamed(ranks, size, layout):
    ranks.run(size, caches_and_streams, layout)


def cached_and_fresh_keys(mesh) -> None:
    """Some keys out of a whole cache, some fresh and spread over the ranks; gradients through a gathered cache."""
    whole = make_layer(ma.MixedAttention)
    layer = marked(whole, mesh)
    x = make_x(JOINT)
    _, cache = whole(x, JOINT.specs, JOINT.patterns, return_kv_cache=True)
    names = ["surface_anchors", "volume_anchors", "volume_queries"]
    scene = Scene({name: JOINT.sizes[name] for name in names}, [(names, names[:2])])
    cached = [ma.TokenSpec("surface_anchors", None)]
    share = cut(Scene({name: JOINT.sizes[name] for name in names[1:]}, [(names, names)]), mesh, "random")
    fresh = make_x(share.scene)
    expected = whole(fresh, cached + share.scene.specs, scene.patterns, kv_cache=cache)
    got = layer(*share.of(fresh), cached + share.specs, scene.patterns, kv_cache=cache)
    torch.testing.assert_close(got, expected[:, share.rows], rtol=0, atol=1e-12)

    share = cut(JOINT, mesh, "random")
    direction = torch.randn(2, JOINT.num_tokens, DIM, generator=torch.Generator().manual_seed(3)).double()
    groups = [ma.TokenSpec("surface_anchors", None), ma.TokenSpec("volume_anchors", None)]
    query = [ma.TokenSpec("volume_queries", JOINT.num_tokens)]
    patterns = [ma.AttentionPattern([*names], names[:2])]
    (wanted,) = torch.autograd.grad(whole(x.detach(), groups + query, patterns, kv_cache=cache), x, direction)
    (x_here,) = share.of(x)
    _, recorded = layer(x_here, share.specs, JOINT.patterns, return_kv_cache=True)
    gathered = ma.distributed.gather_cache(recorded, mesh=mesh)
    part = [ma.TokenSpec("volume_queries", len(share.rows))]
    out = layer(x.detach()[:, share.rows], groups + part, patterns, kv_cache=gathered)
    (grad,) = torch.autograd.grad(out, x_here, direction[:, share.rows])
    torch.testing.assert_close(grad, wanted[:, share.rows], rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", WORLDS)
def test_cached_and_fresh_keys_of_all_ranks(ranks, size):
    ranks.run(size, cached_and_fresh_keys)


# ------------------------------------------------------------------------------------------ disagreement


def message_of(function, *arguments, **more) -> tuple[str, str]:
    try:
        function(*arguments, **more)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


Call = namedtuple("Call", "specs patterns x more layer")
MISTAKES = {
    # What a rank changes in a call.
    "names": lambda c: c._replace(specs=[ma.TokenSpec(_renamed(s.name), s.size) for s in c.specs], patterns=ANEW),
    "order": lambda c: c._replace(specs=c.specs[::-1]),
    "patterns": lambda c: c._replace(patterns=[ma.AttentionPattern(list(SIZES), ["a"])]),
    "counts": lambda c: c._replace(patterns=[c.patterns[0], ma.AttentionPattern(["c", "d"], ["c", "a", "a"])]),
    "missing group": lambda c: c._replace(
        specs=c.specs[:3],
        patterns=[c.patterns[0], ma.AttentionPattern(["c"], ["c", "a"])],
        x=c.x[:, : sum(spec.size for spec in c.specs[:3])],
    ),
    "dtype": lambda c: c._replace(x=c.x.float(), layer=c.layer.float()),
    "batch": lambda c: c._replace(x=c.x[:1]),
    "mask": lambda c: c._replace(more={"key_padding_mask": torch.ones(c.x.shape[:2], dtype=torch.bool)}),
    "gradients": lambda c: c._replace(x=c.x.detach(), layer=c.layer.requires_grad_(False)),
    "caches": lambda c: c._replace(more={"return_kv_cache": True}),
}
BROKEN = {
    # What is wrong with a call on one rank alone.
    "sizes": lambda c: c._replace(x=c.x[:, :-1]),
    "freqs": lambda c: c._replace(more={"freqs": torch.ones(1, 3, 4, dtype=torch.complex128)}),
    "width": lambda c: c._replace(x=c.x[..., :-1]),
    "no tensor": lambda c: c._replace(x="x"),
    "no specs": lambda c: c._replace(specs=5),
    "no patterns": lambda c: c._replace(patterns=[5]),
    "mask of another size": lambda c: c._replace(more={"key_padding_mask": torch.ones(2, 50, dtype=torch.bool)}),
    "weights": lambda c: c._replace(layer=c.layer.bfloat16()),
}


def _renamed(name: str) -> str:
    return name.replace("d", "e")


ANEW = [
    ma.AttentionPattern([*map(_renamed, p.query_tokens)], [*map(_renamed, p.key_value_tokens)])
    for p in SCENES["anchors"].patterns
]


def call_with_mistake(mesh, mistake: str) -> tuple[str, str]:
    scene = SCENES["anchors"]
    share = cut(scene, mesh, "chunks")
    layer = marked(make_layer(ma.MixedAttention), mesh)
    # Keys are recorded in the caches of groups whose name says so.
    layer.cached_groups = frozenset("a")
    call = Call(share.specs, scene.patterns, share.of(make_x(scene))[0], {}, layer)
    if mesh.get_local_rank() == mesh.size() - 1:
        call = {**MISTAKES, **BROKEN}[mistake](call)
    raised = message_of(call.layer, call.x, call.specs, call.patterns, **call.more)
    dist.barrier(group=mesh.get_group())  # the ranks are still in step
    return raised


@pytest.mark.parametrize("size", WORLDS[1:])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_ranks_that_disagree_raise_the_same_error(ranks, size, mistake):
    raised = ranks.run(size, call_with_mistake, mistake)
    assert len(set(raised)) == 1, raised
    kind, text = raised[0]
    assert kind == "ValueError"
    assert f"on rank {size - 1}" in text and "on rank 0" in text, text


@pytest.mark.parametrize("size", WORLDS[1:])
@pytest.mark.parametrize("mistake", BROKEN)
def test_a_rank_that_fails_takes_the_others_down(ranks, size, mistake):
    *others, (kind, text) = ranks.run(size, call_with_mistake, mistake)
    assert kind != "nothing"
    for other_kind, other_text in others:
        assert other_kind in ("ValueError", "RuntimeError")
        assert (other_kind == "ValueError") == (kind in ("ValueError", "UnexpectedTokenError"))
        assert f"rank {size - 1} raised {kind}: {text}" in other_text


def exchange_with_mistake(mesh, mistake: str) -> tuple[str, str]:
    scene = SCENES["anchors"]
    specs, patterns = cut(scene, mesh, "random").specs, scene.patterns
    if mesh.get_local_rank() == 1:
        specs = {"names": specs[::-1], "sizes": [ma.TokenSpec("a", 3)], "kinds": [3]}.get(mistake, specs)
        patterns = patterns[:1] if mistake == "patterns" else patterns
    raised = message_of(ma.distributed.exchange_specs, specs, mesh, patterns)
    dist.barrier(group=mesh.get_group())
    return raised


@pytest.mark.parametrize("mistake", ["names", "sizes", "kinds", "patterns"])
def test_exchange_of_specs_that_disagree(ranks, mistake):
    raised = ranks.run(4, exchange_with_mistake, mistake)
    if mistake == "kinds":
        assert raised[1][0] == "TypeError"
        assert all(kind == "RuntimeError" and "rank 1 raised TypeError" in text for kind, text in raised[::2])
    else:
        assert len(set(raised)) == 1 and raised[0][0] == "ValueError", raised


def exchanged_specs(mesh) -> None:
    for how in cuts(mesh.size()):
        share = cut(SCENES["anchors"], mesh, how)
        assert ma.distributed.exchange_specs(share.specs, mesh, share.scene.patterns) == share.sharded
        cached = [ma.TokenSpec("z", None)]
        assert ma.distributed.exchange_specs(cached + share.specs, mesh) == cached + share.sharded
    assert ma.distributed.shard_specs(SCENES["anchors"].specs, mesh) == cut(SCENES["anchors"], mesh, "chunks").sharded
    # More groups than the first exchange has place for.
    many = [ma.TokenSpec(f"g{index}", index * mesh.get_local_rank()) for index in range(150)]
    for index, spec in enumerate(ma.distributed.exchange_specs(many, mesh)):
        assert spec.sizes == tuple(index * rank for rank in ranks_of(mesh))
    bounds = [ma.distributed.share_of(n, mesh) for n in (0, 1, 3, 10)]
    for n, part in zip((0, 1, 3, 10), bounds):
        pieces = torch.arange(n).chunk(mesh.size())
        here = pieces[mesh.get_local_rank()] if mesh.get_local_rank() < len(pieces) else torch.arange(0)
        assert torch.equal(torch.arange(n)[part], here)


@pytest.mark.parametrize("size", WORLDS)
def test_specs_of_all_ranks(ranks, size):
    ranks.run(size, exchanged_specs)


def known_sizes_that_are_wrong(mesh) -> list[tuple[str, str]]:
    scene = SCENES["anchors"]
    share = cut(scene, mesh, "chunks")
    layer = marked(make_layer(ma.MixedAttention), mesh)
    (x,) = share.of(make_x(scene))
    sharded = share.sharded
    unlike = [ma.distributed.ShardedTokenSpec(s.name, s.size, (s.size + 1,) * mesh.size()) for s in sharded]
    fewer = [ma.distributed.ShardedTokenSpec(s.name, s.size, s.sizes[:1]) for s in sharded]
    raised = [message_of(layer, x, specs, scene.patterns) for specs in (unlike, fewer)]
    raised += [message_of(ma.distributed.shard, x, specs, mesh=mesh) for specs in (unlike, fewer, sharded)]
    raised += [message_of(ma.distributed.gather, x, specs, mesh=mesh) for specs in (unlike, fewer)]
    raised.append(message_of(ma.distributed.gather, x[:, 1:], sharded, mesh=mesh))
    raised.append(message_of(marked(layer, mesh, replicated=["a"]), x, sharded, scene.patterns))
    # A layer that was not marked cannot know the keys of others.
    raised.append(message_of(make_layer(ma.MixedAttention), x, sharded, scene.patterns))
    return raised


def test_known_sizes_that_are_wrong(ranks):
    for raised in ranks.run(2, known_sizes_that_are_wrong):
        assert [kind for kind, _ in raised] == ["ValueError"] * len(raised), raised


def failure_where_nobody_asks(mesh) -> tuple[tuple[str, str], bool, tuple[str, str]]:
    from mixed_attention import torch_internals

    group = dist.new_group(timeout=datetime.timedelta(seconds=8))  # instead of the end of the process that has failed
    mesh = DeviceMesh.from_group(group, "cpu")
    share = cut(SCENES["anchors"], mesh, "chunks")
    layer = marked(make_layer(ma.MixedAttention), mesh)
    (x,) = share.of(make_x(share.scene))
    everywhere = message_of(layer, x[:, 1:], share.sharded, share.scene.patterns)
    layer(x, share.sharded, share.scene.patterns).sum().backward()
    is_last = mesh.get_local_rank() == mesh.size() - 1
    keys = [f"mixed_attention/failed/{rank}" for rank in ranks_of(mesh)]
    dist.barrier(group=group)
    remains = any(torch_internals.store_of(group).check([key]) for key in keys)
    return everywhere, remains, message_of(layer, x[:, 1:] if is_last else x, share.sharded, share.scene.patterns)


def test_a_rank_that_fails_is_named_where_sizes_are_known(ranks):
    """And an error that all ranks have survived is not taken for the cause of another."""
    *others, (everywhere, remains, raised) = ranks.run(4, failure_where_nobody_asks)
    assert everywhere[0] == "ValueError" and not remains and raised == everywhere
    for *_, (kind, text) in others:
        assert kind == "RuntimeError" and text == f"ContextParallel: rank 3 raised {raised[0]}: {raised[1]}", text


@pytest.mark.parametrize("sizes", [(), (3, -1), (3, None), (3, 1.5), "33", 6])
def test_sizes_of_ranks_that_are_none(sizes):
    with pytest.raises(ValueError, match="ShardedTokenSpec 'a'|TokenSpec 'a'"):
        ma.distributed.ShardedTokenSpec("a", 3, sizes)


def test_cached_groups_have_no_sizes_of_ranks():
    with pytest.raises(ValueError, match="gather_cache"):
        ma.distributed.ShardedTokenSpec("a", None, (3, 3))


def marks_that_are_refused(mesh) -> list[tuple[str, str]]:
    def apply(module, **how):
        return parallelize_module(module, mesh, ma.distributed.ContextParallel(**how))

    rank = mesh.get_local_rank()
    layers = [make_layer(ma.MixedAttention) for _ in range(2)]
    return [
        message_of(apply, nn.Linear(2, 2)),
        message_of(apply, layers[0], even=rank == 0),
        message_of(apply, layers[0], replicated=["a"] if rank == 0 else []),
        message_of(apply, nn.Sequential(*layers[: 1 + rank % 2])),
        message_of(apply, layers[0], replicated="ab"),
    ]


def test_marks_that_are_refused(ranks):
    everywhere = ranks.run(2, marks_that_are_refused)
    assert everywhere[0] == everywhere[1]
    assert [kind for kind, _ in everywhere[0]] == ["ValueError"] * 5, everywhere[0]


# ------------------------------------------------------------------------------------------ rows of all ranks


def rows_there_and_back(mesh) -> None:
    for how, dtype in itertools.product(
        cuts(mesh.size()), (torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int64)
    ):
        share = cut(SCENES["anchors"], mesh, how)
        whole = torch.randint(0, 2, (2, 3, share.scene.num_tokens, 2), generator=torch.Generator().manual_seed(1)).to(
            dtype
        )
        here = ma.distributed.shard(whole, share.sharded, 2, mesh=mesh)
        assert torch.equal(here, whole[:, :, share.rows])
        assert torch.equal(ma.distributed.gather(here, share.sharded, 2, mesh=mesh), whole)
        assert torch.equal(ma.distributed.gather(here, share.sharded, dim=-2, mesh=mesh), whole)


def gradients_of_rows(mesh) -> None:
    """Where every rank has another function of all rows: the derivative of their sum."""
    for how in cuts(mesh.size()):
        share = cut(SCENES["anchors"], mesh, how)
        count = share.scene.num_tokens
        weights = torch.randn(mesh.size(), count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x, t = torch.randn(2, 1, count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (x_here,), (t_here,) = share.of(x), share.of(t)

        own = weights[mesh.get_local_rank()]

        def value(rows, own=own, specs=share.sharded):
            return (own * ma.distributed.gather(rows, specs, mesh=mesh) ** 3).sum()

        total = weights.sum(0)
        bounds = {"rtol": 1e-12, "atol": 1e-12}
        first, second = (3 * total * x**2)[:, share.rows], (6 * total * x)[:, share.rows]
        leaf = x_here.clone().requires_grad_()
        (grad,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        torch.testing.assert_close(grad, first, **bounds)
        # Every rank's sum of gradients squared: the ranks' own sums are parts of one.
        (again,) = torch.autograd.grad(grad.square().sum(), leaf)
        torch.testing.assert_close(again, 2 * first * second, **bounds)
        tangent = torch.func.jvp(value, (x_here,), (t_here,))[1]
        torch.testing.assert_close(tangent, (3 * own * x**2 * t).sum(), **bounds)
        torch.testing.assert_close(torch.func.grad(value)(x_here), first, **bounds)
        batch = torch.func.vmap(torch.func.grad(value))(torch.stack([x_here, 2 * x_here]))
        torch.testing.assert_close(batch, torch.stack([first, 4 * first]), **bounds)
        over = torch.func.jvp(torch.func.grad(value), (x_here,), (t_here,))[1]
        torch.testing.assert_close(over, (6 * total * x * t)[:, share.rows], **bounds)
        gathered = ma.distributed.gather(leaf, share.sharded, mesh=mesh)
        (many,) = torch.autograd.grad(gathered, leaf, torch.stack([weights, weights])[:, :1], is_grads_batched=True)
        alone = (mesh.size() * weights[0])[share.rows].expand(2, 1, -1)
        torch.testing.assert_close(many, alone, **bounds)


@pytest.mark.parametrize("size", WORLDS)
def test_rows_of_all_ranks(ranks, size):
    ranks.run(size, rows_there_and_back, everywhere=True)
    ranks.run(size, gradients_of_rows)


def across_hosts(mesh) -> None:
    """The sums that ranks of several hosts take, against those of one."""
    from mixed_attention.distributed import ranks as module

    group = mesh.get_group()
    before = module._SHARE_A_HOST.get(group)
    module._SHARE_A_HOST[group] = False
    try:
        gradients_of_rows(mesh)
        for how in CUTS:
            layer_like_one_process(mesh, "fused", "anchors", how, {"dtype": torch.float32})
    finally:
        module._SHARE_A_HOST[group] = bool(before)


@pytest.mark.parametrize("size", WORLDS[1:])
def test_sums_over_several_hosts(ranks, size):
    ranks.run(size, across_hosts)


def errors_of_sums(mesh) -> list[float]:
    """Squared errors of dk and dv in 16 bits over what they may be.

    They may be those of one process, and what one more rounding of each rank's part adds: on average over a binade the
    square of a rounding is at most eps² / 12 of that of the number.
    """
    scene = Scene({"a": 256}, [(["a"], ["a"])])
    share, ratios = cut(scene, mesh, "chunks"), []
    q, k, v, dout = torch.randn(4, 1, 256, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    plan = ma.AttentionPlan.compile(scene.specs, scene.patterns)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    one = torch.autograd.grad(ma.attention(*leaves, plan), leaves[1:], dout)
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    out = ma.attention(*doubles, plan)
    exact = torch.autograd.grad(out, doubles[1:], dout.double(), retain_graph=True)
    own_rows = torch.zeros(256, dtype=torch.bool).index_fill_(0, torch.tensor(share.rows), True)
    parts = torch.autograd.grad(out, doubles[1:], dout.double() * own_rows[:, None, None])
    here = share.of(*leaves)
    keys = ma.distributed.gather_keys(*here[1:], share.sharded, mesh)
    out = ma.attention(here[0], *keys, ma.AttentionPlan.compile(share.sharded, scene.patterns))
    got = torch.autograd.grad(out, here[1:], dout[:, share.rows])
    for actual, alone, truth, part in zip(got, one, exact, parts):
        error = (actual - truth[:, share.rows]).square().sum()
        allowed = (alone - truth)[:, share.rows].square().sum()
        allowed = allowed + part.square().sum() * torch.finfo(torch.bfloat16).eps ** 2 / 12
        both = torch.stack([error, allowed])
        dist.all_reduce(both, group=mesh.get_group())
        ratios.append((both[0] / both[1]).item())
    return ratios


@pytest.mark.parametrize("size", WORLDS[1:])
def test_sums_of_16_bits_are_made_in_fp32(ranks, size):
    for ratio in ranks.run(size, errors_of_sums)[0]:
        assert ratio < 1.1, ratio  # of thousands of numbers: their average hardly differs from the expected one


def order_of_steps(mesh) -> list[str]:
    from mixed_attention.distributed import collectives

    steps: list[str] = []
    names = {"start_gather": "gather", "start_sums": "sums"}
    before = {name: getattr(collectives, name) for name in names}

    def recorded(name):
        def start(*arguments):
            finish = before[name](*arguments)
            steps.append(f"start {names[name]}")

            def wait():
                steps.append(f"wait for {names[name]}")
                return finish()

            return wait

        return start

    for name in names:
        setattr(collectives, name, recorded(name))
    try:
        layer = marked(make_layer(ma.noether.MixedAttention), mesh)
        for name in ("q", "k"):
            projection = layer.get_submodule(name)
            projection.register_forward_hook(lambda *_, name=name: steps.append(f"make {name}"))
            projection.weight.register_hook(lambda _, name=name: steps.append(f"gradient of {name}"))
        share = cut(SCENES["anchors"], mesh, "chunks")
        (x,) = share.of(make_x(share.scene))
        layer(x, share.sharded, share.scene.patterns)[0].sum().backward()
    finally:
        for name in names:
            setattr(collectives, name, before[name])
    return steps


def test_queries_are_made_while_keys_travel(ranks):
    for steps in ranks.run(2, order_of_steps):
        assert steps == [
            "make k",
            "start gather",
            "make q",
            "wait for gather",
            "start sums",
            "gradient of q",
            "wait for sums",
            "gradient of k",
        ]


# ------------------------------------------------------------------------------------------ derivatives of the layer


def derivatives_of_the_layer(mesh) -> None:
    bounds = {"rtol": 1e-10, "atol": 1e-10}
    for how, rope in itertools.product(cuts(mesh.size(), ("random", "one rank")), (False, True)):
        scene = SCENES["anchors"]
        share = cut(scene, mesh, how)
        whole = make_layer(ma.MixedAttention, use_rope=rope)
        layer = marked(whole, mesh)
        x, t = make_x(scene, batch_size=1), make_x(scene, batch_size=1, seed=4).detach()
        freqs = make_freqs(scene.num_tokens) if rope else None
        (x_here,), (t_here,) = share.of(x), share.of(t)
        freqs_here = None if freqs is None else freqs[:, share.rows]

        def call(y, layer=whole, specs=scene.specs, patterns=scene.patterns, freqs=freqs):
            return layer(y, specs, patterns, freqs=freqs)

        def call_here(y, layer=layer, specs=share.specs, patterns=scene.patterns, freqs=freqs_here):
            return layer(y, specs, patterns, freqs=freqs)

        def of_rank(tensor, rows=share.rows):
            return tensor[..., rows, :]

        detached, detached_here = x.detach(), x_here.detach()
        expected = torch.func.jvp(call, (detached,), (t,))[1]
        got = torch.func.jvp(call_here, (detached_here,), (t_here,))[1]
        torch.testing.assert_close(got, of_rank(expected), **bounds)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(detached_here, t_here)
            tangent = torch.autograd.forward_ad.unpack_dual(call_here(dual)).tangent
        torch.testing.assert_close(tangent, of_rank(expected), **bounds)
        # The sum of all ranks' losses is the loss of one process, and so are its derivatives of any order.
        (grad,) = torch.autograd.grad((call(x) ** 3).sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad((grad * t).sum(), x)
        (grad_here,) = torch.autograd.grad((call_here(x_here) ** 3).sum(), x_here, create_graph=True)
        (twice_here,) = torch.autograd.grad((grad_here * t_here).sum(), x_here)
        torch.testing.assert_close(grad_here, of_rank(grad), **bounds)
        torch.testing.assert_close(twice_here, of_rank(twice), **bounds)
        got = torch.func.grad(lambda y, f=call_here: (f(y) ** 3).sum())(detached_here)
        torch.testing.assert_close(got, of_rank(grad), **bounds)
        got = torch.func.jvp(torch.func.grad(lambda y, f=call_here: (f(y) ** 3).sum()), (detached_here,), (t_here,))[1]
        torch.testing.assert_close(got, of_rank(twice), **bounds)
        many = torch.stack([detached_here, t_here])
        got = torch.func.vmap(call_here)(many)
        torch.testing.assert_close(got, torch.stack([of_rank(call(detached)), of_rank(call(t))]), **bounds)
        out, out_here = call(x), call_here(x_here)
        directions = torch.stack([detached, t])
        (expected,) = torch.autograd.grad(out, x, directions, is_grads_batched=True)
        (got,) = torch.autograd.grad(out_here, x_here, of_rank(directions), is_grads_batched=True)
        torch.testing.assert_close(got, of_rank(expected), **bounds)


@pytest.mark.parametrize("size", WORLDS)
def test_derivatives_of_any_order(ranks, size):
    ranks.run(size, derivatives_of_the_layer)


# ------------------------------------------------------------------------------------------ together with others


class Blocks(nn.Module):
    """Half blocks as transformers have them, one layer after the other."""

    def __init__(self, layers, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM, dtype=torch.float64) for _ in layers)
        self.checkpointed = checkpointed

    def forward(self, x, specs, patterns, freqs):
        for layer, norm in zip(self.layers, self.norms):

            def half(x, layer=layer, norm=norm):
                return x + layer(norm(x), specs, patterns, freqs=freqs)

            x = checkpoint(half, x, use_reentrant=False) if self.checkpointed else half(x)
        return x


WRAPPERS = {
    "nothing": lambda model, mesh: model,
    "ddp": lambda model, mesh: nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group()),
    "fsdp": lambda model, mesh: fully_sharded(model, mesh),
}


def fully_sharded(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def model_like_one_process(mesh, wrapper: str, checkpointed: bool) -> None:
    scene = SCENES["anchors"]
    whole = Blocks([make_layer(ma.MixedAttention, use_rope=True) for _ in range(2)])
    x, freqs = make_x(scene), make_freqs(scene.num_tokens)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = whole(x, scene.specs, scene.patterns, freqs)
    expected.backward(direction)
    for how in ("random", "one rank"):
        share = cut(scene, mesh, how)
        model = Blocks([copy.deepcopy(layer) for layer in whole.layers], checkpointed)
        before = list(model.state_dict())
        parallelize_module(model, mesh, ma.distributed.ContextParallel())
        assert list(model.state_dict()) == before
        model.zero_grad()
        wrapped = WRAPPERS[wrapper](model, mesh)
        (here,) = share.of(x)
        specs = ma.distributed.exchange_specs(share.specs, mesh, scene.patterns) if checkpointed else share.specs
        out = wrapped(here, specs, scene.patterns, freqs[:, share.rows])
        times = 1 if wrapper == "nothing" else mesh.size()  # wrappers take means
        (out * direction[:, share.rows] * times).sum().backward()
        torch.testing.assert_close(out, expected[:, share.rows], rtol=0, atol=1e-11)
        torch.testing.assert_close(here.grad / times, x.grad[:, share.rows], rtol=0, atol=1e-9)
        if wrapper == "nothing":
            summed(mesh, model)
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(grad, whole.get_parameter(name).grad, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_models_in_wrappers(ranks, wrapper, checkpointed):
    ranks.run(2, model_like_one_process, wrapper, checkpointed)
    ranks.run(4, model_like_one_process, wrapper, checkpointed)


# Otherwise a graph is traced once more for its constants of floats, and half of the time goes into a cache of shapes.
@torch._dynamo.config.patch(specialize_float=True, fake_tensor_cache_enabled=False)
def compiled_layers(mesh, even: bool) -> list[int]:
    """How many graphs were compiled after each of some calls of one layer with other sizes."""
    torch._dynamo.reset()
    counter, counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), []
    whole = make_layer(ma.MixedAttention, use_rope=True)
    layer = marked(whole, mesh, even=even)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def call(x, sizes, everywhere, freqs):
        if even:
            specs = [ma.TokenSpec("a", sizes[0]), ma.TokenSpec("b", sizes[1])]
        else:
            of_groups = zip("ab", sizes, everywhere)
            specs = [ma.distributed.ShardedTokenSpec(name, size, every) for name, size, every in of_groups]
        return layer(x, specs, [ma.AttentionPattern(["a", "b"], ["a", "b"])], freqs=freqs)

    # Sizes that are 0, 1 or equal by chance would be code of their own.
    scenes = [Scene({"a": 4 * n, "b": 4 * n + 8}, [(["a", "b"], ["a", "b"])]) for n in (3, 5, 8)]
    for index, scene in enumerate(scenes):
        share = cut(scene, mesh, "chunks")
        if not even:
            sizes = {name: uneven(size, mesh.size(), index) for name, size in scene.sizes.items()}
            share = replace(share, sizes=sizes)
        x, freqs = make_x(scene), make_freqs(scene.num_tokens)
        (here,) = share.of(x)
        sizes = [spec.size for spec in share.specs]
        out = call(here, sizes, [share.sizes["a"], share.sizes["b"]], freqs[:, share.rows])
        expected = whole(x, scene.specs, scene.patterns, freqs=freqs)
        torch.testing.assert_close(out, expected[:, share.rows], rtol=0, atol=1e-11)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (grad,) = torch.autograd.grad(expected, x, direction)
        (got,) = torch.autograd.grad(out, here, direction[:, share.rows])
        torch.testing.assert_close(got, grad[:, share.rows], rtol=0, atol=1e-10)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


def uneven(count: int, size: int, seed: int) -> tuple[int, ...]:
    """Shares of at least two rows, no two alike on ranks that follow each other."""
    share = count // size
    sizes = [share + (1 if rank % 2 else -1) for rank in range(size)]
    sizes[-1] += count - sum(sizes)
    return tuple(sizes)


@pytest.mark.parametrize(("size", "even"), [(2, True), (2, False)])
def test_compiled_layers_take_new_sizes_without_a_new_compilation(ranks, size, even):
    """One graph serves all sizes."""
    for counts in ranks.run(size, compiled_layers, even):
        assert counts == [1, 1, 1], counts


def unsized_compiled_layer(mesh) -> tuple[str, str]:
    share = cut(SCENES["joint"], mesh, "chunks")
    (x,) = share.of(make_x(share.scene))
    compiled = torch.compile(marked(make_layer(ma.MixedAttention), mesh), backend="eager", fullgraph=True)
    raised = message_of(compiled, x, share.specs, share.scene.patterns)
    torch._dynamo.reset()
    return raised


def test_compiled_layers_say_which_sizes_they_want(ranks):
    for kind, text in ranks.run(2, unsized_compiled_layer):
        assert "exchange_specs" in text and "even=True" in text, (kind, text)


def dropout_in_shares(mesh) -> None:
    layer = marked(make_layer(ma.MixedAttention, dropout=0.4), mesh)
    share = cut(SCENES["anchors"], mesh, "random")
    (x,) = share.of(make_x(share.scene))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 100 * mesh.get_local_rank())
        outs.append(layer(x, share.specs, share.scene.patterns))
        outs[-1].sum().backward()
    assert torch.equal(outs[0], outs[1])
    assert not len(share.rows) or not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(layer.eval()(x, share.specs, share.scene.patterns), marked_eval(layer, x, share))


def marked_eval(layer, x, share):
    """The same layer without dropout."""
    same = copy.deepcopy(layer)
    same.dropout = 0.0
    return same.train()(x, share.specs, share.scene.patterns)


def test_dropout_in_shares(ranks):
    ranks.run(2, dropout_in_shares)


def equal_bits(mesh) -> None:
    layer = marked(make_layer(ma.MixedAttention, dtype=torch.float32), mesh)
    share = cut(SCENES["twice"], mesh, "random")
    (x,) = share.of(make_x(share.scene, dtype=torch.float32))
    first = None
    for _ in range(20):
        layer.zero_grad()
        x.grad = None
        out = layer(x, share.specs, share.scene.patterns)
        out.sum().backward()
        results = [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first))


def test_repeats_give_equal_bits(ranks):
    ranks.run(4, equal_bits)
