import copy
import pickle

import pytest
import torch
from layers import (
    CROSS,
    DENSE,
    DIM,
    GROUPS,
    JOINT,
    NUM_HEADS,
    SCENES,
    SELF,
    SIZES,
    Scene,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
    num_products,
    oracle,
    tensor_of,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mixed_attention as ma
from mixed_attention.layers import mixed as module

LAYERS = {"fused": ma.MixedAttention, "separate": ma.noether.MixedAttention}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_output_and_gradients_are_those_of_dense_attention(scene, cls, use_rope, parallel):
    layer = make_layer(cls, use_rope=use_rope, parallel=parallel)
    x = make_x(scene)
    freqs = make_freqs(scene.num_tokens) if use_rope else None
    expected = oracle(layer, x, scene.counts(), freqs)
    wanted = [x, *layer.parameters()]
    expected_grads = gradients(expected, wanted)
    out = tensor_of(layer(x, scene.specs, scene.patterns, freqs=freqs))
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), expected_grads)


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "padding mask"])
def test_keys_that_nobody_attends_to_are_made_where_that_is_quicker(masked, use_rope, monkeypatch):
    layer, x = make_layer(use_rope=use_rope), make_x(SELF)
    options = {"freqs": make_freqs(SELF.num_tokens)} if use_rope else {}
    mask = torch.rand(2, SELF.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    expected = oracle(layer, x, SELF.counts(), key_padding_mask=mask, **options)
    wanted = [x, *layer.parameters()]
    expected_grads = gradients(expected, wanted)
    num_unread_of_run = 2 * (5 + 7) * DIM // 2  # of two sequences, in two runs
    for least, products in ((num_unread_of_run, 2), (num_unread_of_run + 1, 1)):
        monkeypatch.setitem(module.LEAST_SKIPPED, "cpu", least)
        out = layer(x, SELF.specs, SELF.patterns, key_padding_mask=mask, **options)
        assert num_products(out) == products
        assert_equal_in_fp64(out, expected)
        assert_equal_in_fp64(gradients(out, wanted), expected_grads)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_gradients_of_a_single_sequence(scene):
    layer, x, freqs = make_layer(use_rope=True), make_x(scene, batch_size=1), make_freqs(scene.num_tokens)
    wanted = [x, *layer.parameters()]
    expected = gradients(oracle(layer, x, scene.counts(), freqs), wanted)
    assert_equal_in_fp64(gradients(layer(x, scene.specs, scene.patterns, freqs=freqs), wanted), expected)


@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_gradient_of_the_frequencies(parallel):
    layer = make_layer(use_rope=True, parallel=parallel)
    x, freqs = make_x(CROSS), make_freqs(CROSS.num_tokens).requires_grad_()
    wanted = [freqs, x, *layer.parameters()]
    expected = gradients(oracle(layer, x, CROSS.counts(), freqs), wanted)
    assert_equal_in_fp64(gradients(layer(x, CROSS.specs, CROSS.patterns, freqs=freqs), wanted), expected)


def test_tuple_frequencies_are_the_complex_ones_of_permuted_heads():
    layer, x = make_layer(use_rope=True), make_x(JOINT)
    coords = torch.rand(1, JOINT.num_tokens, 2) * 10
    freqs = ma.RopeFrequency(DIM // NUM_HEADS, 2)(coords)
    angles = ma.RopeFrequency(DIM // NUM_HEADS, 2, implementation="real")(coords)
    expected = layer(x, JOINT.specs, JOINT.patterns, freqs=freqs)
    # Complex channel 2i of a slice is channel i of the tuple form, 2i + 1 is i + m/2.
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).argsort()
    rows = (torch.arange(2 * NUM_HEADS)[:, None] * len(order) + order).flatten()
    with torch.no_grad():
        for parameter in (layer.qkv.weight, layer.qkv.bias):
            parameter[: 2 * DIM] = parameter[rows]
    out = layer(x, JOINT.specs, JOINT.patterns, freqs=angles)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # the sines are fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scene", [SELF, JOINT], ids=["self", "joint"])
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
@pytest.mark.parametrize("learns_freqs", [True, False], ids=["gradient of freqs", "constant freqs"])
def test_errors_in_low_precision_are_those_of_the_framework(dtype, scene, parallel, learns_freqs):
    """The output and all gradients have at most twice the framework's error, plus one rounding of the result."""
    low = make_layer(use_rope=True, parallel=parallel).to(dtype)
    x, freqs = make_x(scene, dtype=dtype), make_freqs(scene.num_tokens).to(torch.complex64).requires_grad_(learns_freqs)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(out, layer, x, freqs):
        named = {"x": x, **dict(layer.named_parameters()), **({"freqs": freqs} if learns_freqs else {})}
        return {"out": out, **dict(zip(named, torch.autograd.grad(out, list(named.values()), direction.to(out))))}

    wide = (
        copy.deepcopy(low).double(),
        *(t.detach().to(w).requires_grad_(t.requires_grad) for t, w in ((x, torch.float64), (freqs, torch.complex128))),
    )
    exact = results(oracle(wide[0], wide[1], scene.counts(), wide[2]), *wide)
    theirs = results(oracle(low, x, scene.counts().to(dtype), freqs), low, x, freqs)
    ours = results(low(x, scene.specs, scene.patterns, freqs=freqs), low, x, freqs)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        error, yardstick = ((each[name].to(value) - value).abs().max() for each in (ours, theirs))
        assert error <= 2 * yardstick + torch.finfo(dtype).eps * value.abs().max(), name


def test_dot_product_attention_is_one_group_that_attends_to_itself():
    for use_rope in (False, True):
        dense, mixed = make_layer(ma.DotProductAttention, use_rope=use_rope), make_layer(use_rope=use_rope)
        x, freqs = make_x(DENSE), make_freqs(DENSE.num_tokens) if use_rope else None
        expected = oracle(dense, x, DENSE.counts(), freqs)
        assert_equal_in_fp64(dense(x, freqs=freqs), expected)
        assert_equal_in_fp64(mixed(x, DENSE.specs, DENSE.patterns, freqs=freqs), expected)


def test_dot_product_attention_with_a_mask_is_the_frameworks():
    layer, x = make_layer(ma.DotProductAttention), make_x(DENSE)
    mask = torch.rand(DENSE.num_tokens, DENSE.num_tokens) < 0.7
    mask.fill_diagonal_(True)
    assert_equal_in_fp64(layer(x, mask), oracle(layer, x, mask.double()))
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert_equal_in_fp64(layer(x, attn_mask=additive), oracle(layer, x, mask.double()))


def test_dot_product_attention_asserts_that_frequencies_are_wanted():
    x, freqs = make_x(DENSE), make_freqs(DENSE.num_tokens)
    with pytest.raises(AssertionError, match="use_rope is False, but freqs were given"):
        make_layer(ma.DotProductAttention)(x, freqs=freqs)
    with pytest.raises(AssertionError, match="use_rope is True, but freqs were not given"):
        make_layer(ma.DotProductAttention, use_rope=True)(x)


# What upstream lists as edge cases.


def run(scene, x=None, **config):
    layer = make_layer(**config)
    x = make_x(scene) if x is None else x
    return layer, x, layer(x, scene.specs, scene.patterns)


def test_order_of_names_and_patterns_does_not_matter():
    _, _, out = run(JOINT)
    _, _, permuted_queries = run(Scene(SIZES, [(GROUPS[::-1], [GROUPS[0], GROUPS[2]])]))
    _, _, permuted_keys = run(Scene(SIZES, [(GROUPS, [GROUPS[2], GROUPS[0]])]))
    assert torch.equal(permuted_queries, out)
    assert_equal_in_fp64(permuted_keys, out)
    _, _, out = run(SELF)
    _, _, permuted_patterns = run(Scene(SIZES, SELF.attends[::-1]))
    assert torch.equal(permuted_patterns, out)


def test_keys_listed_twice_count_twice():
    scene = Scene(SIZES, [(GROUPS[:2], [GROUPS[0], GROUPS[2], GROUPS[0]]), (GROUPS[2:], [GROUPS[2], GROUPS[2]])])
    layer, x, out = run(scene)
    wanted = [x, *layer.parameters()]
    expected = oracle(layer, x, scene.counts())
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


def test_interleaved_patterns_and_keys_of_several_patterns():
    attends = [([GROUPS[0], GROUPS[2]], [GROUPS[3], GROUPS[0]]), ([GROUPS[1], GROUPS[3]], [GROUPS[0], GROUPS[1]])]
    scene = Scene(SIZES, attends)
    layer, x, out = run(scene)
    expected = oracle(layer, x, scene.counts())
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, [x]), gradients(expected, [x]))


@pytest.mark.parametrize("empty", GROUPS)
@pytest.mark.parametrize("attends", [SELF.attends, JOINT.attends], ids=["self", "joint"])
def test_empty_groups(empty, attends):
    scene = Scene({**SIZES, empty: 0}, attends)
    layer, x, out = run(scene)
    wanted = [x, *layer.parameters()]
    expected = oracle(layer, x, scene.counts())
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


def test_rows_without_keys_are_the_output_bias():
    scene = Scene({**SIZES, "surface_anchors": 0}, SELF.attends)
    layer, _, out = run(scene)
    rows = out[:, scene.rows("surface_queries")]
    assert torch.equal(rows, layer.proj.bias.expand_as(rows))


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("batch_size", [0, 2])
@pytest.mark.parametrize("specs", [SELF.specs, [ma.TokenSpec(name, 0) for name in GROUPS]], ids=["tokens", "no tokens"])
def test_nothing_to_do(use_rope, batch_size, specs):
    layer = make_layer(use_rope=use_rope)
    num_tokens = sum(spec.size for spec in specs)
    x = torch.ones(batch_size, num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    out = layer(x, specs, SELF.patterns, freqs=make_freqs(num_tokens) if use_rope else None)
    assert out.shape == x.shape
    assert all(grad.isfinite().all() for grad in gradients(out, [x, *layer.parameters()]))


def test_no_groups_at_all():
    assert make_layer()(torch.ones(2, 0, DIM, dtype=torch.float64), [], []).shape == (2, 0, DIM)


def test_tokens_that_nobody_may_see_do_not_matter():
    layer, x = make_layer(), make_x(SELF).detach()
    expected = layer(x, SELF.specs, SELF.patterns)
    hidden = SELF.rows("surface_queries", "volume_anchors", "volume_queries")
    x[:, hidden] = torch.nan
    out = layer(x, SELF.specs, SELF.patterns)
    assert torch.equal(out[:, SELF.rows("surface_anchors")], expected[:, SELF.rows("surface_anchors")])


def test_x_may_have_any_strides():
    layer, x = make_layer(), make_x(SELF).detach()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layer(strided, SELF.specs, SELF.patterns), layer(x, SELF.specs, SELF.patterns))


@pytest.mark.parametrize("head_dim, num_heads", [(1, 2), (5, 3), (16, 2), (48, 2), (80, 1)])
def test_any_head_dim(head_dim, num_heads):
    dim = head_dim * num_heads
    layer = make_layer(dim=dim, num_heads=num_heads)
    x = torch.randn(2, CROSS.num_tokens, dim, dtype=torch.float64, requires_grad=True)
    expected = oracle(layer, x, CROSS.counts())
    out = layer(x, CROSS.specs, CROSS.patterns)
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, [x]), gradients(expected, [x]))


class Duck:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def test_groups_and_patterns_are_read_by_attribute():
    layer, x = make_layer(), make_x(SELF)
    specs = [Duck(name=spec.name, size=spec.size) for spec in SELF.specs]
    patterns = [Duck(query_tokens=queries, key_value_tokens=keys) for queries, keys in SELF.attends]
    assert torch.equal(layer(x, specs, patterns), layer(x, SELF.specs, SELF.patterns))


# Masks and dropout.


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_masked_keys_get_no_weight(scene, parallel):
    layer, x, freqs = make_layer(use_rope=True, parallel=parallel), make_x(scene), make_freqs(scene.num_tokens)
    mask = torch.rand(2, scene.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    wanted = [x, *layer.parameters()]
    for given in (mask, mask[:1]):
        expected = oracle(layer, x, scene.counts(), freqs, given)
        out = layer(x, scene.specs, scene.patterns, freqs=freqs, key_padding_mask=given)
        assert_equal_in_fp64(out, expected)
        assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


def test_masked_padding_is_no_padding():
    layer, x = make_layer(), make_x(SELF)
    padded = Scene({name: size + 3 for name, size in SIZES.items()}, SELF.attends)
    rows = [row for name in GROUPS for row in padded.rows(name)[: SIZES[name]]]
    x_padded = torch.full((2, padded.num_tokens, DIM), 7.0, dtype=torch.float64).index_copy(1, torch.tensor(rows), x)
    mask = torch.zeros(1, padded.num_tokens, dtype=torch.bool)
    mask[:, rows] = True
    out = layer(x_padded, padded.specs, padded.patterns, key_padding_mask=mask)
    assert_equal_in_fp64(out[:, rows], layer(x, SELF.specs, SELF.patterns))


def test_attention_mask_of_keys_is_a_padding_mask():
    layer, x = make_layer(), make_x(SELF)
    mask = torch.arange(SELF.num_tokens).expand(2, -1) % 3 > 0
    expected = layer(x, SELF.specs, SELF.patterns, key_padding_mask=mask)
    assert torch.equal(layer(x, SELF.specs, SELF.patterns, mask), expected)


def test_all_keys_masked_gives_the_output_bias():
    layer, x = make_layer(), make_x(JOINT)
    out = layer(x, JOINT.specs, JOINT.patterns, key_padding_mask=torch.zeros(1, JOINT.num_tokens, dtype=torch.bool))
    assert torch.equal(out, layer.proj.bias.expand_as(out))
    for name, grad in zip(["x", *dict(layer.named_parameters())], gradients(out, [x, *layer.parameters()])):
        assert torch.equal(grad, torch.zeros_like(grad)) or name == "proj.bias", name


@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_dropout_acts_in_training_only(parallel):
    layer, x = make_layer(dropout=0.5, parallel=parallel), make_x(JOINT)
    expected = oracle(layer, x, JOINT.counts())
    assert_equal_in_fp64(layer.eval()(x, JOINT.specs, JOINT.patterns), expected)
    layer.train()
    torch.manual_seed(0)
    out = layer(x, JOINT.specs, JOINT.patterns)
    assert not torch.allclose(out, expected)
    torch.manual_seed(0)
    assert torch.equal(layer(x, JOINT.specs, JOINT.patterns), out)
    assert not torch.equal(layer(x, JOINT.specs, JOINT.patterns), out)


def test_dropout_is_the_same_in_both_executions_and_their_gradients():
    layer, x = make_layer(dropout=0.3, use_rope=True), make_x(CROSS)
    wanted = [x, *layer.parameters()]
    results = []
    for layer.parallel in (True, False):
        torch.manual_seed(0)
        out = layer(x, CROSS.specs, CROSS.patterns, freqs=make_freqs(CROSS.num_tokens))
        results.append((out, gradients(out, wanted)))
    assert_equal_in_fp64(*results)


def test_dropping_everything_leaves_the_output_bias():
    layer, x = make_layer(dropout=1.0), make_x(SELF)
    out = layer(x, SELF.specs, SELF.patterns)
    assert torch.equal(out, layer.proj.bias.expand_as(out))


def test_output_dropout_is_unused_by_mixed_attention_and_used_by_dense_attention():
    """The table of upstream: attention-weight dropout everywhere, output dropout in dense modules alone."""
    x = make_x(DENSE)
    mixed = make_layer()
    mixed.proj_dropout.p = 1.0
    assert not torch.equal(mixed(x, DENSE.specs, DENSE.patterns), torch.zeros_like(x))
    dense = make_layer(ma.DotProductAttention)
    dense.proj_dropout.p = 1.0
    assert torch.equal(dense(x), torch.zeros_like(x))
    assert dense.eval()(x).count_nonzero() > 0


# Construction.


def refilled(names, mode, bias):
    """The published procedure: default linear layers in order of construction, then one fill each."""
    layers = {name: nn.Linear(DIM, DIM * len(name.replace("proj", "p")), bias=bias) for name in names}
    if mode != "torch":
        for layer in layers.values():
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if bias:
                nn.init.zeros_(layer.bias)
    if mode == "truncnormal002-identity":
        nn.init.zeros_(layers["proj"].weight)
    return {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer.named_parameters()}


@pytest.mark.parametrize(
    "cls, names",
    [
        (ma.DotProductAttention, ["qkv", "proj"]),
        (ma.MixedAttention, ["qkv", "proj"]),
        (ma.noether.DotProductAttention, ["q", "k", "v", "proj"]),
        (ma.noether.MixedAttention, ["q", "k", "v", "proj"]),
        (ma.PerceiverAttention, ["kv", "q", "proj"]),
        (ma.noether.PerceiverAttention, ["k", "v", "q", "proj"]),
    ],
    ids=lambda value: f"{value.__module__}.{value.__name__}" if isinstance(value, type) else "",
)
@pytest.mark.parametrize("mode", ["torch", "truncnormal", "truncnormal002", "truncnormal002-identity"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_parameters_are_bit_identical_to_upstreams(cls, names, mode, bias):
    torch.manual_seed(5)
    expected, state = refilled(names, mode, bias), torch.get_rng_state()
    torch.manual_seed(5)
    layer = cls({"dim": DIM, "num_heads": NUM_HEADS, "init_weights": mode, "bias": bias})
    assert torch.equal(torch.get_rng_state(), state)
    assert list(layer.state_dict()) == list(expected)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("mode", ["zeros", "torchs"])
def test_modes_that_nobody_implements(mode):
    with pytest.raises(NotImplementedError, match="not implemented"):
        ma.MixedAttention({"dim": DIM, "num_heads": NUM_HEADS, "init_weights": mode})


def test_identity_mode_starts_as_zero():
    layer = ma.MixedAttention(ma.MixedAttentionConfig(DIM, NUM_HEADS, init_weights="truncnormal002-identity"))
    x = torch.randn(1, SELF.num_tokens, DIM)
    assert torch.equal(layer(x, SELF.specs, SELF.patterns), torch.zeros_like(x))


def test_public_attributes():
    layer = ma.MixedAttention(hidden_layer_config := {"dim": DIM, "num_heads": NUM_HEADS, "dropout": 0.25, "eps": 1e-6})
    assert (layer.num_heads, layer.head_dim, layer.init_weights) == (NUM_HEADS, DIM // NUM_HEADS, "truncnormal002")
    assert (layer.use_rope, layer.dropout, layer.parallel) == (False, 0.25, True)
    assert isinstance(layer.proj_dropout, nn.Dropout)
    assert isinstance(layer, ma.DotProductAttention)
    assert not list(layer.buffers())
    assert hidden_layer_config["eps"] == 1e-6


# Differentiation and the framework.

TINY = Scene({"surface_anchors": 3, "surface_queries": 1, "volume_anchors": 2, "volume_queries": 2}, SELF.attends)
TINY_DENSE = Scene(TINY.sizes, DENSE.attends)


def tiny(scene):
    """A function of tokens and weights that is small enough for numerical derivatives."""
    layer = make_layer(dim=8, num_heads=2, use_rope=True)
    freqs = make_freqs(scene.num_tokens, head_dim=4)
    x = torch.randn(1, scene.num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {name: p.detach().requires_grad_() for name, p in layer.named_parameters() if name.startswith("qkv")}

    def function(x, *values):
        named = dict(zip(weights, values))
        return functional_call(layer, named, (x, scene.specs, scene.patterns), {"freqs": freqs})

    return function, (x.requires_grad_(), *weights.values())


@pytest.fixture
def one_thread():
    """Thousands of tiny calls: waking a second thread for each would take most of the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scene", [TINY, TINY_DENSE], ids=["keys of anchors", "keys of all"])
def test_derivatives_of_first_and_second_order(scene):
    function, inputs = tiny(scene)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("scene", [TINY, TINY_DENSE], ids=["keys of anchors", "keys of all"])
def test_function_transforms(scene):
    function, (x, *weights) = tiny(scene)
    x, weights = x.detach(), [weight.detach() for weight in weights]
    direction = torch.randn_like(x)

    def loss(x):
        return function(x, *weights).sin().sum()

    jacobian = torch.func.jacrev(function)(x, *weights)
    _, tangent = torch.func.jvp(lambda x: function(x, *weights), (x,), (direction,))
    assert_equal_in_fp64(torch.einsum("abcijk,ijk->abc", jacobian, direction), tangent)
    assert_equal_in_fp64(torch.func.jacfwd(function)(x, *weights), jacobian)
    forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    reverse_over_forward = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(x)
    assert_equal_in_fp64(forward_over_reverse, reverse_over_forward)
    assert forward_over_reverse.count_nonzero() == forward_over_reverse.numel()
    stacked = torch.stack([x, direction])
    mapped = torch.func.vmap(lambda x: function(x, *weights))(stacked)
    assert_equal_in_fp64(mapped, torch.stack([function(each, *weights) for each in stacked]))


def test_backward_can_be_repeated():
    """The projection is rotated where it lies, and must be so once."""
    layer, x, freqs = make_layer(use_rope=True), make_x(DENSE), make_freqs(DENSE.num_tokens)
    out = layer(x, DENSE.specs, DENSE.patterns, freqs=freqs)
    first = torch.autograd.grad(out.sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_for_the_backward_is_the_projection_and_the_output(dtype):
    """q, k and v are saved in one buffer, the rotation saves no copy, autocast one cast of the tokens."""
    layer = make_layer(use_rope=True).float()
    x = make_x(DENSE).detach().float().requires_grad_()
    freqs = make_freqs(DENSE.num_tokens).to(torch.complex64)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        out = layer(x, DENSE.specs, DENSE.patterns, freqs=freqs)
    tokens, given = out.untyped_storage().nbytes(), (*layer.parameters(), freqs)
    lse = 4 * x.shape[0] * x.shape[1] * NUM_HEADS
    casts = 0 if dtype == torch.float32 else sum(p.numel() * dtype.itemsize for p in layer.parameters())
    allowed = 5 * tokens + lse + casts + sum(t.untyped_storage().nbytes() for t in given)
    assert sum(saved.values()) <= allowed  # x, qkv, the attention's output


@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
def test_gradients_under_autocast_are_rounded_once(scene):
    """Weights and tokens get gradients of their own dtype, which are those of a layer in the lower precision."""
    layer, x, freqs = make_layer(use_rope=True).float(), make_x(scene).detach().float(), make_freqs(scene.num_tokens)
    freqs = freqs.to(torch.complex64)
    cast = copy.deepcopy(layer).bfloat16()
    tokens = [x.clone().requires_grad_(), x.bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens[0], scene.specs, scene.patterns, freqs=freqs)
    wanted = cast(tokens[1], scene.specs, scene.patterns, freqs=freqs)
    assert torch.equal(out, wanted)
    grads = gradients(out, [tokens[0], *layer.parameters()])
    expected = gradients(wanted, [tokens[1], *cast.parameters()])
    assert all(grad.dtype == torch.float32 for grad in grads)
    for grad, lower in zip(grads, expected):
        torch.testing.assert_close(grad, lower.float(), rtol=2**-7, atol=2**-7 * lower.float().abs().max().item())


@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
def test_second_derivatives_under_autocast_reach_tokens_and_weights(scene):
    """What was saved is the cast of what they came from, and stays connected to it."""
    layer, freqs = make_layer(use_rope=True).float(), make_freqs(scene.num_tokens).to(torch.complex64)
    x = make_x(scene).detach().float().requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(x, scene.specs, scene.patterns, freqs=freqs)
        (grad,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()], allow_unused=True))
    for exact, rounded in zip(*found):
        assert (exact is None) == (rounded is None)
        if exact is not None:
            torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("scene", [SELF, DENSE], ids=["keys of anchors", "keys of all"])
def test_activation_checkpointing(scene):
    layer, x, freqs = make_layer(use_rope=True, dropout=0.2), make_x(scene), make_freqs(scene.num_tokens)
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        arguments = (x, scene.specs, scene.patterns, None, freqs)
        out = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        results.append((out, *gradients(out, [x, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_autocast_computes_in_its_dtype(parallel):
    layer = make_layer(use_rope=True, dtype=torch.float32, parallel=parallel)
    x, freqs = make_x(CROSS, dtype=torch.float32), make_freqs(CROSS.num_tokens).to(torch.complex64)
    exact = oracle(copy.deepcopy(layer).double(), x.double(), CROSS.counts(), freqs.to(torch.complex128))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, CROSS.specs, CROSS.patterns, freqs=freqs)
        theirs = oracle(layer, x, CROSS.counts().float(), freqs)
    assert out.dtype == torch.bfloat16
    bound = 2 * (theirs.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= bound
    grads = gradients(out, [x, *layer.parameters()])
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "cls", [*LAYERS.values(), ma.SelfAnchorAttention, ma.DotProductAttention, ma.PerceiverAttention]
)
def test_copies_of_a_layer_compute_the_same(cls):
    layer = make_layer(cls)
    arguments = {
        ma.SelfAnchorAttention: (SELF.specs,),
        ma.DotProductAttention: (),
        ma.PerceiverAttention: (make_x(SELF, seed=2),),
    }.get(cls, (SELF.specs, SELF.patterns))
    x = make_x(SELF)
    expected = tensor_of(layer(x, *arguments))
    fresh = make_layer(cls)
    fresh.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(tensor_of(other(x, *arguments)), expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("cls", [ma.MixedAttention, ma.noether.SelfAnchorAttention], ids=["mixed", "anchor"])
def test_compile_once_for_all_sizes(cls, training):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make_layer(cls, use_rope=True)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    counts = []
    for sizes in [(5, 7, 4, 3), (6, 9, 5, 10), (9, 10, 11, 12), (4, 15, 6, 7), (13, 2, 20, 3)]:
        scene = Scene(dict(zip(GROUPS, sizes)), SELF.attends)
        x, freqs = make_x(scene), make_freqs(scene.num_tokens)
        arguments = (scene.specs,) if cls is ma.noether.SelfAnchorAttention else (scene.specs, scene.patterns)
        with torch.set_grad_enabled(training):
            out, expected = (tensor_of(f(x, *arguments, freqs=freqs)) for f in (compiled, layer))
        assert_equal_in_fp64(out, expected)
        if training:
            wanted = [x, *layer.parameters()]
            assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2  # once for the first sizes, once for all others


def test_compiled_with_mask_dropout_and_frequencies_that_need_gradients():
    torch._dynamo.reset()
    layer, x = make_layer(use_rope=True, dropout=0.5), make_x(CROSS)
    freqs = make_freqs(CROSS.num_tokens).requires_grad_()
    mask = torch.arange(CROSS.num_tokens).expand(1, -1) % 4 > 0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, layer):
        torch.manual_seed(0)
        out = f(x, CROSS.specs, CROSS.patterns, freqs=freqs, key_padding_mask=mask)
        results.append((out, *gradients(out, [x, freqs, *layer.parameters()])))
    assert_equal_in_fp64(*results)


def test_export():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make_layer(ma.SelfAnchorAttention, use_rope=True)

        def forward(self, x, freqs):
            return self.attention(x, SELF.specs, freqs)

    model, x, freqs = Model(), make_x(SELF).detach(), make_freqs(SELF.num_tokens)
    program = torch.export.export(model, (x, freqs))
    assert "mixed_attention.forward" in program.graph_module.code
    assert_equal_in_fp64(program.module()(x, freqs), model(x, freqs))
