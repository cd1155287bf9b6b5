"""Queries in chunks: the same results as all at once, whatever the chunks, and no more than one chunk at a time."""

import sys

import pytest
import torch
from layers import NUM_HEADS, make_layer

import mixed_attention as ma

ANCHORS, QUERIES = 12, 37
SPECS = [ma.TokenSpec("surface_anchors", ANCHORS), ma.TokenSpec("surface_queries", QUERIES)]
PATTERNS = [ma.AttentionPattern(["surface_anchors", "surface_queries"], ["surface_anchors"])]


def layer_and_tokens():
    torch.manual_seed(0)
    layer = make_layer()
    return layer, torch.randn(2, ANCHORS + QUERIES, layer.proj.in_features, dtype=torch.float64)


def past_the_cache(layer, cache):
    def predict(tokens):
        specs = [ma.TokenSpec("surface_anchors", None), ma.TokenSpec("surface_queries", tokens.shape[1])]
        return layer(tokens, specs, PATTERNS, kv_cache=cache)

    return predict


@pytest.mark.parametrize("chunk_size", [1, 10, QUERIES - 1, QUERIES, 1000])
def test_chunks_past_a_cache_are_what_all_tokens_give(chunk_size):
    layer, x = layer_and_tokens()
    whole, cache = layer(x, SPECS, PATTERNS, return_kv_cache=True)
    streamed = ma.stream(past_the_cache(layer, cache), x[:, ANCHORS:], chunk_size=chunk_size)
    torch.testing.assert_close(streamed, whole[:, ANCHORS:].detach(), rtol=1e-12, atol=1e-12)
    assert not streamed.requires_grad


def test_a_stack_of_blocks_with_mappings_of_tokens():
    tokens = {"points": torch.randn(3, 20), "normals": torch.randn(3, 20)}
    blocks = [lambda t: {name: 2 * each for name, each in t.items()}] * 3

    def model(chunk):
        for block in blocks:
            chunk = block(chunk)
        return chunk

    streamed = ma.stream(model, tokens, chunk_size=6)
    assert streamed.keys() == tokens.keys()
    assert all(torch.equal(streamed[name], 8 * tokens[name]) for name in tokens)


def test_no_call_sees_more_than_a_chunk():
    sizes = []

    def model(chunk):
        sizes.append(chunk.shape[0])
        return chunk[:, :1]

    assert torch.equal(
        ma.stream(model, torch.arange(20.0).view(10, 2), chunk_size=4, dim=0)[:, 0], torch.arange(10) * 2.0
    )
    assert sizes == [4, 4, 2]


def test_no_queries_have_no_results():
    assert ma.stream(lambda t: t[..., :2], torch.empty(1, 0, 3)).shape == (1, 0, 2)


def test_results_go_where_they_are_wanted():
    made = ma.stream(lambda t: t, torch.randn(1, 3, 2), device="meta", output_device=None)
    assert made.device.type == "meta"


def test_a_bar_counts_the_queries(capsys):
    ma.stream(lambda t: t, torch.randn(1, 7, 2), chunk_size=3, progress="evaluating")
    shown = capsys.readouterr().err
    assert "evaluating: 100%" in shown and "7.00/7.00" in shown


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        ma.stream(lambda t: t, torch.randn(1, 7, 2), progress=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda t: t, torch.randn(1, 3, 2), {"chunk_size": 0}), "chunk_size: expected at least 1, got 0"),
        (
            (lambda t: t, {"a": torch.randn(1, 3), "b": torch.randn(1, 4)}, {}),
            "one size along dim 1, got {'a': 3, 'b': 4}",
        ),
        ((lambda t: t[:, 1:], torch.randn(1, 3, 2), {}), "expected 3 results along dim 1 for a chunk, got .1, 2, 2."),
    ],
    ids=["chunk size", "sizes", "results"],
)
def test_errors(arguments, message):
    predict, queries, settings = arguments
    with pytest.raises(ValueError, match=message):
        ma.stream(predict, queries, **settings)


def test_caches_move():
    layer, x = layer_and_tokens()
    mask = torch.arange(ANCHORS + QUERIES)[None] > 1
    whole, cache = layer(x, SPECS, PATTERNS, key_padding_mask=mask, return_kv_cache=True)
    stack = ma.cache.to([cache, None], dtype=torch.float32)
    assert stack[1] is None
    entry = stack[0]["surface_anchors"]
    assert entry["k"].dtype == torch.float32 and entry["v"].shape == (2, NUM_HEADS, ANCHORS, layer.head_dim)
    assert entry["key_padding_mask"].dtype == torch.bool
    back = ma.cache.to(stack[0], "cpu", torch.float64)
    streamed = ma.stream(past_the_cache(layer, back), x[:, ANCHORS:], chunk_size=8)
    torch.testing.assert_close(streamed, whole[:, ANCHORS:].detach(), rtol=1e-5, atol=1e-6)
    assert ma.cache.to(cache, "meta")["surface_anchors"]["k"].device.type == "meta"


def test_what_is_no_cache_does_not_move():
    with pytest.raises(TypeError, match="got int"):
        ma.cache.to({"surface_anchors": {"k": 1}}, "cpu")
