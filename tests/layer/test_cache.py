import pytest
import torch
from layers import (
    CROSS,
    GROUPS,
    JOINT,
    NUM_HEADS,
    SELF,
    SIZES,
    Scene,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
)

import mixed_attention as ma

ANCHORS = [GROUPS[0], GROUPS[2]]
FREQS = make_freqs(SELF.num_tokens)


def without(scene, *cached):
    """Specs of a call in which some groups come from the cache, and the rows of x that are left."""
    specs = [ma.TokenSpec(name, None if name in cached else size) for name, size in scene.sizes.items()]
    return specs, scene.rows(*(name for name in scene.sizes if name not in cached))


def record(layer, x, scene, **arguments):
    return layer(x, scene.specs, scene.patterns, freqs=FREQS, return_kv_cache=True, **arguments)


@pytest.mark.parametrize("scene", [SELF, CROSS, JOINT], ids=["self", "cross", "joint"])
@pytest.mark.parametrize("cached", [ANCHORS, GROUPS[:1], GROUPS[2:3]], ids=["all anchors", "surface", "volume"])
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_cached_groups_give_the_rows_of_the_uncached_call(scene, cached, parallel):
    layer, x = make_layer(use_rope=True, parallel=parallel), make_x(scene)
    expected, cache = record(layer, x, scene)
    specs, rows = without(scene, *cached)
    out, none = layer(x[:, rows], specs, scene.patterns, freqs=FREQS[:, rows], kv_cache=cache, return_kv_cache=True)
    assert none is None
    assert_equal_in_fp64(out, expected[:, rows])


def test_queries_in_chunks_give_the_rows_of_the_whole_call():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    expected, cache = record(layer, x, SELF)
    rows = SELF.rows("volume_queries")
    for start in range(0, len(rows), 3):
        chunk = rows[start : start + 3]
        sizes = [None, 0, None, len(chunk)]
        specs = [ma.TokenSpec(name, size) for name, size in zip(GROUPS, sizes)]
        out = layer(x[:, chunk], specs, SELF.patterns, freqs=FREQS[:, chunk], kv_cache=cache)
        assert_equal_in_fp64(out, expected[:, chunk])


def test_a_cache_holds_the_anchors_and_nothing_else():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    assert list(cache) == ANCHORS
    for name, entry in cache.items():
        assert list(entry) == ["k", "v"]
        for tensor in entry.values():
            assert tensor.shape == (2, NUM_HEADS, SIZES[name], 8)
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_keys_are_recorded_after_rotation():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    _, k, v = (
        torch.nn.functional.linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, NUM_HEADS, -1)).unbind(2)
    )
    rows = SELF.rows("volume_anchors")
    rotated = ma.apply_rope(k[:, rows], FREQS[:, rows])
    assert_equal_in_fp64(cache["volume_anchors"]["k"], rotated.transpose(1, 2))
    assert_equal_in_fp64(cache["volume_anchors"]["v"], v[:, rows].transpose(1, 2))


def test_which_groups_are_recorded():
    sizes = {"my_anchor_points": 2, "anchors": 3, "wing_anchors": 4}
    scene = Scene(sizes, [(list(sizes), ["anchors"])])
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    layer = make_layer()
    _, cache = layer(x, scene.specs, scene.patterns, return_kv_cache=True)
    assert list(cache) == ["my_anchor_points", "wing_anchors"]  # also those that nobody attends to
    specs = [ma.TokenSpec(name, size if name == "anchors" else None) for name, size in sizes.items()]
    patterns = [ma.AttentionPattern(["anchors"], list(sizes)), ma.AttentionPattern(list(cache), ["anchors"])]
    expected = layer(x, scene.specs, patterns)[:, 2:5]
    assert_equal_in_fp64(layer(x[:, 2:5], specs, patterns, kv_cache=cache), expected)
    _, nothing = layer(x[:, :3], [ma.TokenSpec("a", 3)], [ma.AttentionPattern(["a"], ["a"])], return_kv_cache=True)
    assert nothing == {}


def test_a_given_cache_is_ignored_where_nothing_comes_from_it():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    expected, cache = record(layer, x, SELF)
    out, again = record(layer, x, SELF, kv_cache={"surface_anchors": "nonsense"})
    assert torch.equal(out, expected)
    assert list(again) == list(cache)


def test_everything_may_come_from_the_cache():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    specs = [ma.TokenSpec(name, None) for name in ANCHORS]
    patterns = [ma.AttentionPattern(ANCHORS, ANCHORS)]
    assert layer(x[:, :0], specs, patterns, freqs=FREQS[:, :0], kv_cache=cache).shape == (2, 0, 24)


def test_gradients_flow_through_a_cache():
    layer, x = make_layer(use_rope=True), make_x(JOINT)
    wanted = [x, *layer.parameters()]
    specs, rows = without(JOINT, *ANCHORS)
    whole = layer(x, JOINT.specs, JOINT.patterns, freqs=FREQS)[:, rows]
    anchors = Scene({name: SIZES[name] for name in ANCHORS}, [(ANCHORS, ANCHORS)])
    anchor_rows = JOINT.rows(*ANCHORS)
    _, cache = layer(
        x[:, anchor_rows], anchors.specs, anchors.patterns, freqs=FREQS[:, anchor_rows], return_kv_cache=True
    )
    out = layer(x[:, rows], specs, JOINT.patterns, freqs=FREQS[:, rows], kv_cache=cache)
    assert_equal_in_fp64(out, whole)
    assert_equal_in_fp64(gradients(out, wanted), gradients(whole, wanted))


def test_gradients_of_the_output_and_of_its_own_cache_add_up():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    out, cache = record(layer, x, SELF)
    entries = [tensor for entry in cache.values() for tensor in entry.values()]
    wanted = [x, *layer.parameters()]
    directions = [torch.randn_like(tensor) for tensor in (out, *entries)]
    together = torch.autograd.grad((out, *entries), wanted, directions, retain_graph=True)
    alone = [
        torch.autograd.grad(tensor, wanted, direction, retain_graph=True, materialize_grads=True)
        for tensor, direction in zip((out, *entries), directions)
    ]
    assert_equal_in_fp64(together, tuple(sum(grads) for grads in zip(*alone)))


@pytest.mark.parametrize("with_output", [True, False], ids=["with the output", "the cache alone"])
@pytest.mark.parametrize("use_rope", [True, False], ids=["rotated", "without RoPE"])
def test_second_derivatives_of_a_recorded_cache(use_rope, with_output):
    """Those of the kernels' node against those of the reference, which autograd differentiates by itself."""
    x, results = make_x(SELF), []
    for parallel in (True, False):
        layer = make_layer(use_rope=use_rope, parallel=parallel)
        out, cache = layer(x, SELF.specs, SELF.patterns, freqs=FREQS if use_rope else None, return_kv_cache=True)
        values = [out] * with_output + [tensor for entry in cache.values() for tensor in entry.values()]
        wanted = [x, *layer.qkv.parameters()]
        first = torch.autograd.grad(sum(tensor.sin().sum() for tensor in values), wanted, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)
        results.append((*first, *second))
    assert_equal_in_fp64(*results)


def test_detached_caches():
    x = make_x(SELF)
    _, attached = record(make_layer(use_rope=True), x, SELF)
    out, detached = record(make_layer(use_rope=True, detach_kv_cache=True), x, SELF)
    assert out.requires_grad
    for name in ANCHORS:
        for which in ("k", "v"):
            assert attached[name][which].requires_grad
            assert not detached[name][which].requires_grad
            assert torch.equal(attached[name][which], detached[name][which])
    with torch.no_grad():
        _, cache = record(make_layer(use_rope=True), x, SELF)
    assert not cache[ANCHORS[0]]["k"].requires_grad


def test_one_cached_sequence_serves_a_batch():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x[:1], SELF)
    specs, rows = without(SELF, *ANCHORS)
    many = layer(x[:, rows], specs, SELF.patterns, freqs=FREQS[:, rows], kv_cache=cache)
    repeated = {name: {which: t.expand(2, -1, -1, -1) for which, t in entry.items()} for name, entry in cache.items()}
    expected = layer(x[:, rows], specs, SELF.patterns, freqs=FREQS[:, rows], kv_cache=repeated)
    assert torch.equal(many, expected)
    entries = [tensor for entry in cache.values() for tensor in entry.values()]
    assert_equal_in_fp64(gradients(many, entries), gradients(expected, entries))


@pytest.mark.parametrize("cached", [ANCHORS, GROUPS[:1]], ids=["all anchors", "surface"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_masks_work_with_caches(cached, batch_size):
    """What was masked when the cache was recorded stays masked, and fresh groups may be masked as well."""
    layer, x = make_layer(use_rope=True), make_x(JOINT)
    mask = torch.rand(batch_size, JOINT.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    expected, cache = record(layer, x, JOINT, key_padding_mask=mask)
    specs, rows = without(JOINT, *cached)
    out = layer(x[:, rows], specs, JOINT.patterns, freqs=FREQS[:, rows], kv_cache=cache, key_padding_mask=mask[:, rows])
    assert_equal_in_fp64(out, expected[:, rows])


def test_a_mask_of_fresh_groups_leaves_the_cached_ones_alone():
    layer, x = make_layer(use_rope=True), make_x(JOINT)
    mask = torch.ones(1, JOINT.num_tokens, dtype=torch.bool)
    mask[:, JOINT.rows("volume_anchors")[1:]] = False
    expected = layer(x, JOINT.specs, JOINT.patterns, freqs=FREQS, key_padding_mask=mask)
    _, cache = record(layer, x, JOINT)
    specs, rows = without(JOINT, "surface_anchors")
    out = layer(x[:, rows], specs, JOINT.patterns, freqs=FREQS[:, rows], kv_cache=cache, key_padding_mask=mask[:, rows])
    assert_equal_in_fp64(out, expected[:, rows])


def test_upstreams_caches_are_read():
    """Upstream's entries are views of larger activations, with the same names and shapes."""
    layer, x = make_layer(use_rope=True), make_x(SELF)
    expected, cache = record(layer, x, SELF)
    views = {
        name: {
            which: torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
            .transpose(1, 2)
            .contiguous()
            .transpose(1, 2)
            for which, tensor in entry.items()
        }
        for name, entry in {**cache, "unused_anchors": cache[ANCHORS[0]]}.items()
    }
    specs, rows = without(SELF, *ANCHORS)
    out = layer(x[:, rows], specs, SELF.patterns, freqs=FREQS[:, rows], kv_cache=views)
    assert_equal_in_fp64(out, expected[:, rows])


def test_compiled_calls_write_and_read_caches():
    torch._dynamo.reset()
    layer, x = make_layer(use_rope=True), make_x(SELF).detach()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, cache = record(compiled, x, SELF)
    specs, rows = without(SELF, *GROUPS[:1])
    out = compiled(x[:, rows], specs, SELF.patterns, freqs=FREQS[:, rows], kv_cache=cache)
    assert_equal_in_fp64(out, expected[:, rows])


def read_with(change):
    """Reads a cache whose entry of the volume anchors was changed."""
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    cache["volume_anchors"] = change(cache["volume_anchors"])
    specs, rows = without(SELF, *ANCHORS)
    return layer(x[:, rows], specs, SELF.patterns, freqs=FREQS[:, rows], kv_cache=cache)


MISFITS = {
    "batch": (lambda t: t.repeat(2, 1, 1, 1), r"expected k of shape \(2, 3, 4, 8\) to match x, got \(4, 3, 4, 8\)"),
    "heads": (lambda t: t[:, :2], r"expected k of shape \(2, 3, 4, 8\) to match x, got \(2, 2, 4, 8\)"),
    "head dim": (lambda t: t[..., :4], r"expected k of shape \(2, 3, 4, 8\) to match x, got \(2, 3, 4, 4\)"),
    "rank": (lambda t: t[0], r"expected k of shape \(batch_size, num_heads, seqlen, head_dim\), got \(3, 4, 8\)"),
    "dtype": (lambda t: t.float(), "expected k of dtype torch.float64 to match x, got torch.float32"),
    "device": (lambda t: t.to("meta"), "expected k of device cpu to match x, got meta"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_entries_that_do_not_fit(name):
    change, message = MISFITS[name]
    with pytest.raises(ValueError, match=f"kv_cache entry 'volume_anchors': {message}"):
        read_with(lambda entry: {which: change(tensor) for which, tensor in entry.items()})


def test_keys_and_values_of_different_length():
    with pytest.raises(ValueError, match="kv_cache entry 'volume_anchors': expected v of shape"):
        read_with(lambda entry: {"k": entry["k"], "v": entry["v"][:, :, 1:]})


BAD_MASKS = {
    "a key more": (torch.ones(2, 5).bool(), r"of shape \(2 or 1, 4\) to match x and its keys, got \(2, 5\)"),
    "another batch": (torch.ones(3, 4).bool(), r"of shape \(2 or 1, 4\) to match x and its keys, got \(3, 4\)"),
    "a rank less": (torch.ones(4).bool(), r"of shape \(2 or 1, 4\) to match x and its keys, got \(4,\)"),
    "a rank more": (torch.ones(2, 1, 4).bool(), r"of shape \(2 or 1, 4\) to match x and its keys, got \(2, 1, 4\)"),
    "numbers": (torch.ones(2, 4), "to be a bool tensor, True = real token, got torch.float32"),
    "a list": ([[True] * 4], "to be a bool tensor, True = real token, got list"),
    "elsewhere": (torch.ones(2, 4, device="meta").bool(), "of device cpu to match x, got meta"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks_of_entries_that_do_not_fit(name):
    mask, message = BAD_MASKS[name]
    with pytest.raises(ValueError, match=f"kv_cache entry 'volume_anchors': expected key_padding_mask {message}"):
        read_with(lambda entry: {**entry, "key_padding_mask": mask})


def test_masks_of_entries_that_are_wrong_in_sum_alone():
    """As many in all as there are keys, but those of one group would mask a key of the other."""
    layer, x = make_layer(use_rope=True), make_x(JOINT)
    _, cache = record(layer, x, JOINT)
    for name, num_keys in {"surface_anchors": 5, "volume_anchors": 5}.items():
        cache[name]["key_padding_mask"] = torch.ones(2, num_keys, dtype=torch.bool)
    specs, rows = without(JOINT, *ANCHORS)
    with pytest.raises(ValueError, match="kv_cache entry 'surface_anchors': expected key_padding_mask of shape"):
        layer(x[:, rows], specs, JOINT.patterns, freqs=FREQS[:, rows], kv_cache=cache)


@pytest.mark.parametrize("entry", [None, {}, {"k": torch.ones(2, 3, 4, 8)}, {"k": 1, "v": 2}], ids=str)
def test_entries_that_are_none(entry):
    with pytest.raises(
        ValueError, match="kv_cache entry 'volume_anchors': expected a dict with the tensors 'k' and 'v'"
    ):
        read_with(lambda _: entry)


@pytest.mark.parametrize("cache", [None, {}], ids=str)
def test_no_cache(cache):
    specs, rows = without(SELF, *ANCHORS)
    with pytest.raises(ValueError, match="kv_cache is empty"):
        make_layer()(make_x(SELF)[:, rows], specs, SELF.patterns, kv_cache=cache)


def test_a_missing_entry_also_of_a_group_that_nobody_reads():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    del cache["volume_anchors"]
    specs, rows = without(SELF, *ANCHORS)
    patterns = [ma.AttentionPattern(GROUPS, GROUPS[:1])]
    with pytest.raises(ValueError, match="'volume_anchors' not found in kv_cache, which holds .'surface_anchors'"):
        layer(x[:, rows], specs, patterns, freqs=FREQS[:, rows], kv_cache=cache)


def test_cached_groups_must_be_queries_of_a_pattern():
    layer, x = make_layer(use_rope=True), make_x(SELF)
    _, cache = record(layer, x, SELF)
    specs, rows = without(SELF, *ANCHORS)
    patterns = [ma.AttentionPattern([GROUPS[1], GROUPS[3]], ANCHORS)]
    with pytest.raises(ValueError, match="set of query tokens must exactly match"):
        layer(x[:, rows], specs, patterns, freqs=FREQS[:, rows], kv_cache=cache)


def test_single_precision_caches_are_read_under_autocast():
    layer = make_layer(dtype=torch.float32, parallel=False)
    x = make_x(SELF, dtype=torch.float32)
    _, cache = layer(x, SELF.specs, SELF.patterns, return_kv_cache=True)
    specs, rows = without(SELF, *ANCHORS)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x[:, rows], specs, SELF.patterns, kv_cache=cache)
    assert out.dtype == torch.bfloat16
