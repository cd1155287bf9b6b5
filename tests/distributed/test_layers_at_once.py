"""Layers over ranks go at once in plain eager mode, by one call of C++, as those of one process do."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from contextlib import nullcontext

import pytest
import torch
from layers import Scene, make_freqs, make_layer, make_x, tensor_of
from shares import cut
from test_distributed import LAYERS, SCENES, marked

import mixed_attention as ma

WAYS = {"known": (True, {}), "asked": (False, {}), "promised": (False, {"even": True})}
EVEN = Scene({"a": 8, "b": 4, "c": 12}, [(["a", "b"], ["a"]), (["c"], ["c", "a"])])


def names_of_nodes(out: torch.Tensor) -> set[str]:
    """Classes of all nodes of the graph."""
    names, ahead, seen = set(), [out.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(type(node).__name__)
            ahead += [following for following, _ in node.next_functions]
    return names


def at_once_like_in_steps(mesh, way: str, layout: str, options: dict) -> None:
    from mixed_attention.distributed import at_once

    knows, how = WAYS[way]
    scene = EVEN if way == "promised" else SCENES["anchors"]
    share = cut(scene, mesh, "chunks" if way == "promised" else "random")
    dtype = options.get("dtype", torch.float64)
    layer = marked(make_layer(LAYERS[layout], use_rope=options["rope"], dtype=dtype), mesh, **how)
    layer.cached_groups = frozenset("a")
    (x,) = share.of(make_x(scene, dtype=dtype))
    freqs = make_freqs(scene.num_tokens)[:, share.rows] if options["rope"] else None
    specs = share.sharded if knows else share.specs
    more = {"return_kv_cache": True} if layout == "fused" and options["records"] else {}

    def run(layer=layer, x=x, autocast="autocast" in options):
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            result = layer(leaves[0], specs, scene.patterns, freqs=freqs, **more)
            with torch.no_grad():
                without_graph = tensor_of(layer(leaves[0], specs, scene.patterns, freqs=freqs))
        out, cache = result if isinstance(result, tuple) else (result, {})
        loss = out.square().sum()
        for entry in cache.values() if options["records"] else ():
            loss = loss + entry["k"].sin().sum() + entry["v"].sum()
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(once, again))
        assert torch.equal(without_graph, out)
        return out, names_of_nodes(out), once, cache

    of_ours = run()
    before, at_once.maps_of = at_once.maps_of, lambda *_: None
    try:
        in_steps = run()
    finally:
        at_once.maps_of = before
    assert "_WaitBackward" in in_steps[1] and not any(name.startswith("_") for name in of_ours[1]), of_ours[1]
    if dtype != torch.float64:  # where steps round what this adds up: it is as near to the truth at least
        exact = run(copy.deepcopy(layer).double(), x.double(), autocast=False)
        # In steps it takes eight roundings, of half an eps each: tokens and weight, their product, its rotation, the
        # output, and on the way back the gradients of output, rotated rows and rows.
        roundings = 8 * torch.finfo(torch.bfloat16).eps / 2
        for ours, theirs, truth in zip((of_ours[0], *of_ours[2]), (in_steps[0], *in_steps[2]), (exact[0], *exact[2])):
            assert (theirs - truth).norm() <= roundings * truth.norm()
            # The norm of n errors is random by 1 / sqrt(2 n) of itself, and so is the other: three times that of both.
            chance = 3 / math.sqrt(truth.numel())
            assert (ours - truth).norm() <= (1 + chance) * (theirs - truth).norm()
        return
    bounds = {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(of_ours[0], in_steps[0], **bounds)
    for ours, theirs in zip(of_ours[2], in_steps[2]):
        torch.testing.assert_close(ours, theirs, **bounds)
    assert of_ours[3].keys() == in_steps[3].keys()
    for name, entry in of_ours[3].items():
        torch.testing.assert_close(entry, in_steps[3][name], **bounds)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_layers_go_at_once(ranks, way, layout):
    for size, rope, records in itertools.product((2, 4), (False, True), (False, True)):
        ranks.run(size, at_once_like_in_steps, way, layout, {"rope": rope, "records": records})
    cast = {"rope": True, "records": False, "dtype": torch.float32, "autocast": True}
    ranks.run(2, at_once_like_in_steps, way, layout, cast)


def keys_of_the_operator(mesh) -> set[str]:
    share = cut(SCENES["anchors"], mesh, "random")
    plan = ma.AttentionPlan.compile(share.sharded, share.scene.patterns, skip_unread_keys=True)
    x = torch.randn(2, share.scene.num_tokens, 3, 8, generator=torch.Generator().manual_seed(1)).double()
    k, v = (t.requires_grad_() for t in share.of(x, 2 * x))
    keys, values = ma.distributed.gather_keys(k, v, share.sharded, mesh, plan=plan)
    read = torch.tensor(sorted([*share.scene.rows("a"), *share.scene.rows("c")]))
    assert torch.equal(keys, x[:, read]) and torch.equal(values, 2 * x[:, read])
    (3 * keys.sum() + values.square().sum()).backward()
    is_read = torch.isin(torch.tensor(share.rows), read)[None, :, None, None]
    torch.testing.assert_close(k.grad, torch.where(is_read, 3.0 * mesh.size(), 0).double().expand_as(k))
    torch.testing.assert_close(v.grad, torch.where(is_read, 2.0 * mesh.size() * v.detach(), 0))
    with torch.autocast("cpu", torch.bfloat16):  # which knows nothing of numbers that are there already
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            of_dtype = [t.detach().to(dtype).requires_grad_() for t in (k, v)]
            gathered = ma.distributed.gather_keys(*of_dtype, share.sharded, mesh, plan=plan)
            assert all(torch.equal(t, whole[:, read].to(dtype)) for t, whole in zip(gathered, (x, 2 * x)))
            for grad in torch.autograd.grad(gathered, of_dtype, [torch.ones_like(t) for t in gathered]):
                assert torch.equal(grad, torch.where(is_read, mesh.size(), 0).to(dtype).expand_as(k))
    return names_of_nodes(keys)


@pytest.mark.parametrize("size", [2, 4])
def test_keys_of_the_operator_are_gathered_at_once(ranks, size):
    for names in ranks.run(size, keys_of_the_operator):
        assert len(names) == 2, names  # the gather, and where gradients are accumulated


def some_groups_know_their_sizes(mesh) -> None:
    """What they know is not believed where the ranks are asked anyway, be it wrong on one rank alone."""
    share = cut(SCENES["anchors"], mesh, "chunks")
    known = next(spec for spec in share.sharded if spec.name == "a")
    wrong = ma.distributed.ShardedTokenSpec("a", known.size, (*known.sizes, 3))
    is_last = mesh.get_local_rank() == mesh.size() - 1
    specs = [wrong if is_last else known, *share.specs[1:]]
    layer = marked(make_layer(ma.MixedAttention), mesh)
    (x,) = share.of(make_x(share.scene))
    expected = layer(x, share.sharded, share.scene.patterns)
    torch.testing.assert_close(layer(x, specs, share.scene.patterns), expected, rtol=0, atol=1e-12)


def test_groups_that_know_their_sizes_beside_others(ranks):
    ranks.run(2, some_groups_know_their_sizes)


def group_of_a_name(mesh) -> bool:
    from mixed_attention import torch_internals

    group = mesh.get_group()
    torch_internals.store_of(group).set(f"here/{group.rank()}", "yes")
    found = [torch_internals.store_of(group).get(f"here/{rank}") for rank in range(group.size())]  # waits for it
    return torch_internals.process_group(group.group_name).rank() == group.rank() and found == [b"yes"] * group.size()


def test_groups_are_found_by_name(ranks):
    assert all(ranks.run(2, group_of_a_name, everywhere=True))


def calls_of(function) -> int:
    """How many functions Python calls in a call of one that has been called before."""
    count = 0

    def see(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    function()
    function()
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def calls_of_layers(mesh) -> dict[str, int]:
    layer = make_layer(ma.MixedAttention, use_rope=True)
    share = cut(EVEN, mesh, "chunks")
    (x,), freqs = share.of(make_x(EVEN)), make_freqs(EVEN.num_tokens)[:, share.rows]

    def call(layer, specs):
        return lambda: layer(x, specs, EVEN.patterns, freqs=freqs)

    return {
        "plain": calls_of(call(layer, share.specs)),
        "known": calls_of(call(marked(layer, mesh), share.sharded)),
        "promised": calls_of(call(marked(layer, mesh, even=True), share.specs)),
    }


def test_marked_layers_call_few_functions_of_python(ranks):
    """Which is what their host time is made of."""
    (alone,) = ranks.run(1, calls_of_layers)
    assert max(alone.values()) <= alone["plain"] + 4, alone  # one question, whether there are other ranks
    for found in ranks.run(2, calls_of_layers):
        assert max(found.values()) <= 2.5 * found["plain"], found
