"""Batches of samples of different sizes as one sequence: the same as each sample alone."""

import pickle
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mixed_attention as ma
from tests.layers import (
    CROSS,
    DIM,
    GROUPS,
    JOINT,
    SCENES,
    SELF,
    assert_equal_in_fp64,
    make_freqs,
    make_layer,
    tensor_of,
)

PRESENT = [ma.TokenSpec(name, 0) for name in GROUPS]
SIZES = {
    "three samples": [[3, 5, 2, 7], [6, 1, 4, 2], [2, 2, 9, 1]],
    "one sample": [[3, 5, 2, 7]],
    "empty groups": [[3, 0, 2, 7], [2, 4, 1, 0], [5, 0, 3, 0]],
    "no keys": [[0, 4, 2, 1], [3, 1, 0, 5]],
    "empty samples": [[0, 0, 0, 0], [3, 1, 2, 2], [0, 0, 0, 0]],
    "nothing at all": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "twelve samples": [[i % 5, (3 * i) % 7, 1 + i % 4, (5 * i) % 3] for i in range(12)],
}
KINDS = {
    "plain": (ma.MixedAttention, {}),
    "rope": (ma.MixedAttention, {"use_rope": True}),
    "qk_norm": (ma.MixedAttention, {"use_rope": True, "qk_norm": "affine"}),
    "the reference": (ma.MixedAttention, {"parallel": False}),
    "noether's": (ma.noether.MixedAttention, {"use_rope": True}),
}


def make_samples(sizes, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(each), DIM, generator=generator, dtype=dtype).requires_grad_() for each in sizes]


def make_sample_freqs(samples):
    freqs = make_freqs(sum(map(len, samples)))[0]
    return list(freqs.split([len(sample) for sample in samples]))


def specs_of(sizes):
    return [ma.TokenSpec(name, size) for name, size in zip(GROUPS, sizes)]


def by_sample(layer, scene, sizes, samples, freqs=None):
    """Outputs of each sample alone."""
    outs = []
    for index, (each, x) in enumerate(zip(sizes, samples)):
        options = {} if freqs is None else {"freqs": freqs[index][None]}
        outs.append(tensor_of(layer(x[None], specs_of(each), scene.patterns, **options))[0])
    return outs


def as_batch(layer, scene, sizes, samples, freqs=None):
    """Outputs of all samples in one call."""
    batch = ma.ragged.batch(PRESENT, scene.patterns, sizes)
    options = {} if freqs is None else {"freqs": batch.pack(freqs)}
    return batch.unpack(tensor_of(layer(batch.pack(samples), batch.token_specs, batch.attention_patterns, **options)))


def gradients(outs, wanted):
    loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs)
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_each_sample_alone(kind, sizes, scene):
    cls, config = KINDS[kind]
    layer, samples = make_layer(cls, **config), make_samples(sizes)
    freqs = make_sample_freqs(samples) if layer.use_rope else None
    outs, expected = (run(layer, scene, sizes, samples, freqs) for run in (as_batch, by_sample))
    assert_equal_in_fp64(outs, expected)
    wanted = [*samples, *layer.parameters()]
    assert_equal_in_fp64(gradients(outs, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_are_each_sample_alone(seed):
    draw = random.Random(seed)
    sizes = [[draw.choice((0, 1, 2, 5, 17)) for _ in GROUPS] for _ in range(draw.randint(1, 7))]
    scene, layer = draw.choice(list(SCENES.values())), make_layer(use_rope=True)
    samples = make_samples(sizes, seed)
    freqs = make_sample_freqs(samples)
    outs, expected = (run(layer, scene, sizes, samples, freqs) for run in (as_batch, by_sample))
    assert_equal_in_fp64(outs, expected)
    assert_equal_in_fp64(gradients(outs, samples), gradients(expected, samples))


@pytest.mark.parametrize("poisoned", range(3))
def test_no_sample_sees_another(poisoned):
    layer, sizes = make_layer(), SIZES["three samples"]
    samples = make_samples(sizes)
    with torch.no_grad():
        samples[poisoned].fill_(torch.nan)
    others = [i for i in range(3) if i != poisoned]
    outs, expected = (run(layer, JOINT, sizes, samples) for run in (as_batch, by_sample))
    outs, expected = [outs[i] for i in others], [expected[i] for i in others]
    assert_equal_in_fp64(outs, expected)
    wanted = [samples[i] for i in others]
    assert_equal_in_fp64(gradients(outs, wanted), gradients(expected, wanted))


def test_padding_within_samples_is_not_seen():
    layer, sizes = make_layer(), SIZES["three samples"]
    samples = make_samples(sizes)
    masks = [torch.arange(len(x)) % 3 != 1 for x in samples]
    with torch.no_grad():
        for x, mask in zip(samples, masks):
            x[~mask] = torch.nan
    batch = ma.ragged.batch(PRESENT, JOINT.patterns, sizes)
    packed = layer(batch.pack(samples), batch.token_specs, batch.attention_patterns, key_padding_mask=batch.pack(masks))
    for each, x, mask, out in zip(sizes, samples, masks, batch.unpack(packed)):
        expected = layer(x[None], specs_of(each), JOINT.patterns, key_padding_mask=mask[None])[0]
        assert_equal_in_fp64(out[mask], expected[mask])


def test_the_operator_gives_a_block_of_the_mask_to_each_sample():
    sizes = SIZES["empty groups"]
    batch = ma.ragged.batch(PRESENT, CROSS.patterns, sizes)
    mask = ma.AttentionPlan.compile(batch.token_specs, batch.attention_patterns).mask()
    blocks = [ma.AttentionPlan.compile(specs_of(each), CROSS.patterns).mask() for each in sizes]
    assert torch.equal(mask, torch.block_diag(*(block.float() for block in blocks)).bool())


SIBLINGS = ("SelfAnchorAttention", "CrossAnchorAttention", "JointAnchorAttention")


@pytest.mark.parametrize("module", [ma, ma.noether], ids=["ours", "noether's"])
@pytest.mark.parametrize("name", SIBLINGS)
def test_anchor_siblings_give_the_patterns(name, module):
    layer, sizes = make_layer(getattr(module, name)), SIZES["three samples"]
    samples = make_samples(sizes)
    batch = ma.ragged.batch(PRESENT, layer.patterns(PRESENT), sizes)
    packed = layer.mixed_attention(batch.pack(samples), batch.token_specs, batch.attention_patterns)
    expected = [tensor_of(layer(x[None], specs_of(each)))[0] for each, x in zip(sizes, samples)]
    assert_equal_in_fp64(batch.unpack(tensor_of(packed)), expected)


def test_the_samples_of_untied_projections_are_refused_by_name():
    layer = make_layer(ma.noether.UntiedMixedAttention, num_types=2)
    with pytest.raises(ValueError, match="domain 'surface' are not consecutive"):
        as_batch(layer, SELF, SIZES["three samples"], make_samples(SIZES["three samples"]))


ANCHORS, QUERIES = ("surface_anchors", "volume_anchors"), ("surface_queries", "volume_queries")


def queries_of(x, each):
    """Tokens of the two groups of queries."""
    _, first, _, second = x.split(each)
    return torch.cat([first, second])


@pytest.mark.parametrize("kind", ["plain", "rope", "noether's"])
def test_caches_of_a_batch_are_those_of_its_samples(kind):
    cls, config = KINDS[kind]
    layer, sizes = make_layer(cls, **config), SIZES["three samples"]
    samples = make_samples(sizes)
    freqs = make_sample_freqs(samples) if layer.use_rope else None
    record = {} if cls is ma.noether.MixedAttention else {"return_kv_cache": True}
    batch = ma.ragged.batch(PRESENT, JOINT.patterns, sizes)
    options = {} if freqs is None else {"freqs": batch.pack(freqs)}
    _, cache = layer(batch.pack(samples), batch.token_specs, batch.attention_patterns, **options, **record)
    alone = []
    for index, (each, x) in enumerate(zip(sizes, samples)):
        options = {} if freqs is None else {"freqs": freqs[index][None]}
        alone.append(layer(x[None], specs_of(each), JOINT.patterns, **options, **record)[1])
    assert_equal_in_fp64(batch.unpack_cache(cache), alone)
    assert_equal_in_fp64(batch.pack_cache(alone), cache)

    cached = [ma.TokenSpec(name, None if name in ANCHORS else 0) for name in GROUPS]
    later = ma.ragged.batch(cached, JOINT.patterns, [each[1::2] for each in sizes])
    queries = [queries_of(x, each) for x, each in zip(samples, sizes)]
    later_freqs = None if freqs is None else [queries_of(f, each) for f, each in zip(freqs, sizes)]
    options = {} if freqs is None else {"freqs": later.pack(later_freqs)}
    for given in (cache, later.pack_cache(alone)):
        got = layer(later.pack(queries), later.token_specs, later.attention_patterns, kv_cache=given, **options)
        whole = by_sample(layer, JOINT, sizes, samples, freqs)
        expected = [queries_of(y, each) for y, each in zip(whole, sizes)]
        assert_equal_in_fp64(later.unpack(tensor_of(got)), expected)


@pytest.mark.parametrize("cached", [False, True], ids=["in the sequence", "from a cache"])
def test_anchors_that_all_samples_share(cached):
    layer = make_layer()
    patterns = [ma.AttentionPattern(["geo_anchors"], ["geo_anchors"]), ma.AttentionPattern(["q"], ["q", "geo_anchors"])]
    specs = [ma.TokenSpec("q", 0), ma.TokenSpec("geo_anchors", None if cached else 5)]
    anchors, *samples = make_samples([[5], [3], [0], [8]])
    alone = [
        layer(torch.cat([x, anchors])[None], [ma.TokenSpec("q", len(x)), ma.TokenSpec("geo_anchors", 5)], patterns)[0]
        for x in samples
    ]
    expected = [out[: len(x)] for out, x in zip(alone, samples)]
    batch = ma.ragged.batch(specs, patterns, [[len(x)] for x in samples], shared=["geo_anchors"])
    assert [spec.name for spec in batch.token_specs] == ["geo_anchors", "q[0]", "q[1]", "q[2]"]
    if cached:
        _, cache = layer(anchors[None], [ma.TokenSpec("geo_anchors", 5)], patterns[:1], return_kv_cache=True)
        out = layer(batch.pack(samples), batch.token_specs, batch.attention_patterns, kv_cache=cache)
        assert batch.unpack_cache(cache) == [cache] * 3
        assert batch.pack_cache([{}, {}, {}], shared=cache) == cache
        assert batch.unpack_shared(out).shape == (0, DIM)
    else:
        out = layer(batch.pack(samples, shared=anchors), batch.token_specs, batch.attention_patterns)
        assert_equal_in_fp64(batch.unpack_shared(out), alone[0][len(samples[0]) :])
    assert_equal_in_fp64(batch.unpack(out), expected)
    wanted = [anchors, *samples]
    assert_equal_in_fp64(gradients(batch.unpack(out), wanted), gradients(expected, wanted))


def test_rows_and_offsets_say_where_tokens_lie():
    batch = ma.ragged.batch(PRESENT, SELF.patterns, SIZES["empty groups"])
    assert batch.offsets == (0, 12, 19, 27)
    assert batch.num_tokens == 27
    assert batch.rows(1, "surface_queries") == slice(14, 18)
    assert batch.rows(2, "volume_queries") == slice(27, 27)
    starts, place = {}, 0
    for spec in batch.token_specs:
        starts[spec.name] = slice(place, place + spec.size)
        place += spec.size
    for sample in range(3):
        for name in GROUPS:
            assert batch.rows(sample, name) == starts[ma.ragged.name_in(sample, name)]


def test_groups_that_are_left_out_have_the_size_of_their_spec():
    specs = [ma.TokenSpec("a", 4), ma.TokenSpec("b", 2)]
    batch = ma.ragged.batch(specs, [ma.AttentionPattern(["a", "b"], ["a"])], [{}, {"b": 7}, {"b": 0, "a": 1}])
    assert batch.offsets == (0, 6, 17, 18)


def test_groups_are_the_same_objects_at_every_call():
    batch = ma.ragged.batch(PRESENT, SELF.patterns, SIZES["three samples"])
    assert batch.token_specs is batch.token_specs
    assert pickle.loads(pickle.dumps(batch)) == batch


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64]
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_packing_keeps_every_bit(dtype, autocast):
    batch = ma.ragged.batch(PRESENT, SELF.patterns, SIZES["empty groups"])
    samples = [(100 * torch.randn(n, 3, 2)).to(dtype) for n in (12, 7, 8)]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        packed = batch.pack(samples)
        parts = batch.unpack(packed)
    assert packed.shape == (1, 27, 3, 2)
    assert packed.dtype == dtype
    for part, sample in zip(parts, samples):
        assert torch.equal(part, sample), (part, sample)


def test_packing_is_differentiable():
    batch = ma.ragged.batch(PRESENT, SELF.patterns, [[1, 0, 2, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    samples = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 0, 2)]

    def function(*given):
        return [piece * index for index, piece in enumerate(batch.unpack(batch.pack(given).sin()), 1)]

    assert torch.autograd.gradcheck(lambda *given: torch.cat(function(*given)), samples)
    assert torch.autograd.gradgradcheck(lambda *given: torch.cat(function(*given)), samples)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scene", [JOINT, SCENES["dense"]], ids=["unread groups", "all are read"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_new_sizes_compile_once_more_and_never_again(scene):
    layer = make_layer(use_rope=True)

    def function(samples, freqs, batch):
        x, freqs = batch.pack(samples), batch.pack(freqs)
        return batch.unpack(layer(x, batch.token_specs, batch.attention_patterns, freqs=freqs).square())

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    draw = random.Random(0)
    # Empty groups and single tokens among them: the compiler would take a size of 0 or 1 for a constant.
    table = [[[draw.choice((0, 1, 3, 8)) for _ in GROUPS[1:]] for _ in range(3)] for _ in range(8)]
    first = [[[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]], [[3, 5, 7, 9], [11, 13, 15, 2], [4, 6, 8, 10]]]
    for sizes in [*first, *([[2, *each] for each in sizes] for sizes in table)]:
        samples = make_samples(sizes)
        freqs = make_sample_freqs(samples)
        batch = ma.ragged.batch(PRESENT, scene.patterns, sizes)
        outs, expected = (run(samples, freqs, batch) for run in (compiled, function))
        assert_equal_in_fp64(outs, expected)
        assert_equal_in_fp64(gradients(outs, samples), gradients(expected, samples))
    assert counter.frame_count == 2


TWO = [[1, 2, 3, 4], [5, 6, 7, 8]]
PAIR = [ma.TokenSpec("a", 3), ma.TokenSpec("b", 2)]
PAIRS = [ma.AttentionPattern(["a"], ["a", "b"]), ma.AttentionPattern(["b"], ["b"])]
WRONG = {
    "no list of sizes": ({"sizes": 3}, TypeError, "sizes: expected a list .* got int"),
    "sizes of one sample": ({"sizes": {"a": 3}}, TypeError, "sizes: expected a list .* got dict"),
    "no sample": ({"sizes": []}, ValueError, "sizes: expected those of at least one sample"),
    "a number for a sample": ({"sizes": [[1, 2], 3]}, TypeError, r"sizes\[1\]: expected sizes by name.* got 3"),
    "text for a sample": ({"sizes": ["ab"]}, TypeError, r"sizes\[0\]: expected sizes by name"),
    "too few sizes": ({"sizes": [[1, 2], [3]]}, ValueError, r"sizes\[1\]: expected 2 sizes, of \['a', 'b'\], got 1"),
    "unknown name": ({"sizes": [{}, {"c": 1}]}, ValueError, r"sizes\[1\]: 'c' is no group of token_specs"),
    "negative": ({"sizes": [[1, 2], [3, -1]]}, ValueError, r"sizes\[1\]: the size of 'b' must be at least 0, got -1"),
    "a fraction": ({"sizes": [[1.5, 2]]}, ValueError, r"sizes\[0\]: the size of 'a' must be an integer, got 1.5"),
    "a truth": ({"sizes": [[True, 2]]}, ValueError, r"sizes\[0\]: the size of 'a' must be an integer, got True"),
    "None": ({"sizes": [{"a": None}]}, ValueError, r"sizes\[0\]: the size of 'a' must be an integer, got None"),
    "cached": (
        {"token_specs": [PAIR[0], ma.TokenSpec("b", None)], "sizes": [{"b": 2}]},
        ValueError,
        r"sizes\[0\]: 'b' comes from a cache, expected sizes of \['a'\]",
    ),
    "size of a shared group": ({"shared": ["b"], "sizes": [{"b": 2}]}, ValueError, r"sizes\[0\]: 'b' is shared"),
    "shared is text": ({"shared": "b"}, TypeError, "shared: expected a list of group names, got 'b'"),
    "unknown shared": ({"shared": ["c"]}, ValueError, "shared: no group of token_specs is called 'c'"),
    "shared sees samples": ({"shared": ["a"]}, ValueError, "shared: 'a' is there once .* attends to 'b'"),
    "a name that is taken": (
        {
            "token_specs": [ma.TokenSpec("a", 3), ma.TokenSpec("a[1]", 2)],
            "attention_patterns": [ma.AttentionPattern(["a"], ["a"]), ma.AttentionPattern(["a[1]"], ["a[1]"])],
            "shared": ["a[1]"],
            "sizes": [[1], [2]],
        },
        ValueError,
        r"shared: 'a\[1\]' is what a group of a sample is called",
    ),
    "no pattern": ({"attention_patterns": PAIRS[:1]}, ValueError, "in no pattern"),
    "no specs": ({"token_specs": [3]}, TypeError, "token_specs: expected groups"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_batch_is_refused_by_name(case):
    changes, error, message = WRONG[case]
    arguments = {"token_specs": PAIR, "attention_patterns": PAIRS, "sizes": [[1, 2], [3, 4]], **changes}
    with pytest.raises(error, match=message):
        ma.ragged.batch(**arguments)


MISFITS = {
    "no list": (torch.zeros(26, 2), TypeError, "samples: expected a list or a tuple of tensors, got Tensor"),
    "too few": ([torch.zeros(10, 2)], ValueError, "samples: expected 2 tensors, one a sample, got 1"),
    "no tensor": ([torch.zeros(10, 2), None], TypeError, r"samples\[1\]: expected a tensor, got NoneType"),
    "first is no tensor": ([None, torch.zeros(26, 2)], TypeError, r"samples\[0\]: expected a tensor, got NoneType"),
    "a size": (
        [torch.zeros(10, 2), torch.zeros(25, 2)],
        ValueError,
        r"samples\[1\]: expected shape \(26, 2\), tokens first, got \(25, 2\)",
    ),
    "batch axis": ([torch.zeros(1, 10, 2), torch.zeros(1, 26, 2)], ValueError, r"samples\[0\]: expected shape \(10, "),
    "no axis": ([torch.zeros(()), torch.zeros(26)], ValueError, r"samples\[0\]: expected shape \(10\)"),
    "width": (
        [torch.zeros(10, 2), torch.zeros(26, 3)],
        ValueError,
        r"samples\[1\]: expected shape \(26, 2\), tokens first, got \(26, 3\)",
    ),
    "dtype": (
        [torch.zeros(10, 2), torch.zeros(26, 2).half()],
        ValueError,
        r"samples\[1\]: expected dtype torch.float32 like samples\[0\], got torch.float16",
    ),
    "device": (
        [torch.zeros(10, 2), torch.zeros(26, 2, device="meta")],
        ValueError,
        r"samples\[1\]: expected device cpu like samples\[0\], got meta",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_samples_that_do_not_fit_are_refused_by_name(case):
    samples, error, message = MISFITS[case]
    with pytest.raises(error, match=message):
        ma.ragged.batch(PRESENT, SELF.patterns, TWO).pack(samples)


def test_other_misfits_are_refused_by_name():
    batch = ma.ragged.batch(PRESENT, SELF.patterns, TWO)
    shared = ma.ragged.batch(PAIR, PAIRS, [[1], [2]], shared=["b"])
    samples = [torch.zeros(10, 2), torch.zeros(26, 2)]
    for call, error, message in (
        (lambda: batch.pack(samples, shared=torch.zeros(2, 2)), ValueError, "shared: no shared group .* leave it out"),
        (
            lambda: shared.pack([torch.zeros(1), torch.zeros(2)]),
            ValueError,
            r"shared: expected the tokens of .*\['b'\]",
        ),
        (lambda: shared.pack([torch.zeros(1), torch.zeros(2)], shared=3), TypeError, "shared: expected a tensor"),
        (
            lambda: shared.pack([torch.zeros(1), torch.zeros(2)], shared=torch.zeros(3)),
            ValueError,
            r"shared: expected shape \(2\), tokens first, got \(3,\)",
        ),
        (lambda: batch.unpack(3), TypeError, "packed: expected a tensor, got int"),
        (lambda: batch.unpack(torch.zeros(1, 35, 2)), ValueError, r"packed: expected shape \(1, 36, \.\.\.\), got"),
        (lambda: batch.unpack(torch.zeros(2, 36, 2)), ValueError, r"packed: expected shape \(1, 36, \.\.\.\), got"),
        (lambda: batch.unpack(torch.zeros(36)), ValueError, r"packed: expected shape \(1, 36, \.\.\.\), got \(36,\)"),
        (lambda: batch.rows(2, "surface_anchors"), ValueError, "sample: expected a number from 0 to 1, got 2"),
        (lambda: batch.rows(0, "x"), ValueError, "name: expected a group of a sample .* got 'x'"),
        (lambda: shared.rows(0, "b"), ValueError, "name: expected a group of a sample .* got 'b'"),
        (lambda: batch.pack_cache([{}]), ValueError, "caches: expected 2, one a sample, got 1"),
        (lambda: batch.pack_cache([{}, None]), TypeError, r"caches\[1\]: expected the cache that a layer returned"),
        (lambda: batch.unpack_cache(None), TypeError, "kv_cache: expected the cache that a layer returned"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_layer_in_mixed_precision_rounds_a_batch_as_it_rounds_its_samples():
    layer, sizes = make_layer(dtype=torch.float32), SIZES["three samples"]
    samples = make_samples(sizes, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs, expected = (run(layer, JOINT, sizes, samples) for run in (as_batch, by_sample))
    for out, one in zip(outs, expected):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, one)
