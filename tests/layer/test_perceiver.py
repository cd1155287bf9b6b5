import pytest
import torch
import torch.nn.functional as F
from layers import DIM, NUM_HEADS, assert_equal_in_fp64, gradients, make_freqs, make_layer, tensor_of
from torch.autograd import gradcheck, gradgradcheck

import mixed_attention as ma

KV_DIM, NUM_QUERIES, NUM_KEYS = 10, 5, 7
LAYERS = {"fused": ma.PerceiverAttention, "separate": ma.noether.PerceiverAttention}


def make_inputs(batch_size=2, batch_size_kv=None):
    torch.manual_seed(1)
    q = torch.randn(batch_size, NUM_QUERIES, DIM, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(batch_size_kv or batch_size, NUM_KEYS, KV_DIM, dtype=torch.float64, requires_grad=True)
    return q, kv


def make_perceiver(cls=ma.PerceiverAttention, **config):
    return make_layer(cls, kv_dim=KV_DIM, **config)


def freqs_of(use_rope):
    return {"q_freqs": make_freqs(NUM_QUERIES), "k_freqs": make_freqs(NUM_KEYS, batch_size=2)} if use_rope else {}


def dense(layer, q, kv, attn_mask=None, q_freqs=None, k_freqs=None):
    """Cross-attention by the framework's own operators."""

    def heads(x, freqs=None):
        x = x.unflatten(-1, (NUM_HEADS, -1))
        if freqs is not None:
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs[:, :, None]).flatten(-2)
        return x.transpose(1, 2)

    projected = layer.q(q)
    k, v = layer.kv(kv).chunk(2, -1) if hasattr(layer, "kv") else (layer.k(kv), layer.v(kv))
    out = F.scaled_dot_product_attention(heads(projected, q_freqs), heads(k, k_freqs), heads(v), attn_mask)
    return layer.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
def test_output_and_gradients_are_those_of_dense_attention(cls, use_rope):
    layer, (q, kv) = make_perceiver(cls, use_rope=use_rope), make_inputs()
    wanted = [q, kv, *layer.parameters()]
    expected = dense(layer, q, kv, **freqs_of(use_rope))
    expected_grads = gradients(expected, wanted)
    out = tensor_of(layer(q, kv, **freqs_of(use_rope)))
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), expected_grads)


def test_derivatives_of_second_order():
    layer = make_layer(ma.PerceiverAttention, dim=4, num_heads=1, use_rope=True)
    freqs = {"q_freqs": make_freqs(2, head_dim=4), "k_freqs": make_freqs(3, head_dim=4)}
    inputs = [torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    assert gradcheck(lambda q, kv: layer(q, kv, **freqs), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda q, kv: layer(q, kv, **freqs), inputs)


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
def test_one_sequence_of_keys_serves_a_batch(use_rope):
    layer, (q, kv) = make_perceiver(use_rope=use_rope), make_inputs(batch_size_kv=1)
    freqs = {name: f[:1] for name, f in freqs_of(use_rope).items()}
    wanted = [q, kv, *layer.parameters()]
    expected = dense(layer, q, kv.expand(2, -1, -1), **freqs)
    out = layer(q, kv, **freqs)
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_masks_are_the_frameworks(additive):
    layer, (q, kv) = make_perceiver(use_rope=True), make_inputs()
    mask = torch.rand(2, 1, NUM_QUERIES, NUM_KEYS, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 0] = True
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    expected = dense(layer, q, kv, mask, **freqs_of(True))
    out = layer(q, kv, mask, **freqs_of(True))
    assert_equal_in_fp64(out, expected)
    assert_equal_in_fp64(gradients(out, [q, kv]), gradients(expected, [q, kv]))


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
def test_cache_round_trip(use_rope):
    layer, (q, kv) = make_perceiver(use_rope=use_rope), make_inputs()
    expected, cache = layer(q, kv, **freqs_of(use_rope), return_kv_cache=True)
    assert {which: t.shape for which, t in cache.items()} == dict.fromkeys(["k", "v"], (2, NUM_HEADS, NUM_KEYS, 8))
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in cache.values())
    q_freqs = freqs_of(use_rope).get("q_freqs")
    out, none = layer(q, q_freqs=q_freqs, kv_cache=cache, return_kv_cache=True)
    assert none is None
    assert_equal_in_fp64(out, expected)
    ignored = layer(q, kv * torch.nan, q_freqs=q_freqs, kv_cache=cache)
    assert_equal_in_fp64(ignored, expected)
    wanted = [q, kv]
    through_cache = gradients(out, wanted, retain_graph=True)  # the cache belongs to the graph of the first call
    assert_equal_in_fp64(through_cache, gradients(expected, wanted))


def test_newest_signature_always_returns_a_pair():
    layer, (q, kv) = make_perceiver(ma.noether.PerceiverAttention, use_rope=True), make_inputs()
    freqs = freqs_of(True)
    out, cache = layer(q, kv, None, freqs["q_freqs"], freqs["k_freqs"])
    again, none = layer(q, None, None, freqs["q_freqs"], None, cache)
    assert none is None
    assert_equal_in_fp64(again, out)


def test_dropout_of_weights_and_output():
    (q, kv), layer = make_inputs(), make_perceiver(dropout=0.5)
    assert_equal_in_fp64(layer.eval()(q, kv), dense(layer, q, kv))
    layer.train().proj_dropout.p = 1.0
    assert torch.equal(layer(q, kv), torch.zeros_like(q))
    layer.dropout, layer.proj_dropout.p = 1.0, 0.0
    out = layer(q, kv)
    assert torch.equal(out, layer.proj.bias.expand_as(out))


def test_neither_tokens_nor_cache():
    q, _ = make_inputs()
    for cls in LAYERS.values():
        with pytest.raises(ValueError, match="Either kv or kv_cache must be provided"):
            make_perceiver(cls)(q)


def test_cache_that_does_not_fit():
    (q, kv), layer = make_inputs(), make_perceiver()
    _, cache = layer(q, kv, return_kv_cache=True)
    with pytest.raises(ValueError, match="kv_cache entry 'kv_cache': expected k of shape"):
        layer(q, kv_cache={which: t[:, :1] for which, t in cache.items()})


@pytest.mark.parametrize("cls", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("missing", ["q_freqs", "k_freqs"])
def test_missing_frequencies(cls, missing):
    (q, kv), freqs = make_inputs(), freqs_of(True)
    del freqs[missing]
    with pytest.raises(AssertionError, match="freqs were not given"):
        make_perceiver(cls, use_rope=True)(q, kv, **freqs)


def test_frequencies_that_are_not_wanted():
    q, kv = make_inputs()
    with pytest.raises(AssertionError, match="use_rope is False, but freqs were given"):
        make_perceiver()(q, kv, **freqs_of(True))
    newest = make_perceiver(ma.noether.PerceiverAttention)
    assert torch.equal(newest(q, kv, **freqs_of(True))[0], newest(q, kv)[0])


@pytest.mark.parametrize("num_queries, num_keys", [(0, NUM_KEYS), (NUM_QUERIES, 0), (0, 0)])
def test_nothing_to_attend(num_queries, num_keys):
    layer, (q, kv) = make_perceiver(), make_inputs()
    out = layer(q[:, :num_queries], kv[:, :num_keys])
    assert out.shape == (2, num_queries, DIM)
    if num_keys == 0:
        assert torch.equal(out, layer.proj.bias.expand_as(out))
