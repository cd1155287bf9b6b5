"""Queries in chunks: the same results as all at once, whatever the chunks, and no more than one chunk at a time."""

import sys
from collections import OrderedDict

import numpy as np
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


# Results are joined by their names, and those of every chunk are held against the first.


def by_turns(*functions):
    """Calls one function after the other, the last one again and again."""
    remaining = list(functions)
    return lambda chunk: (remaining.pop(0) if len(remaining) > 1 else remaining[0])(chunk)


def test_names_come_in_any_order():
    x = torch.randn(1, 8, 3)
    predict = by_turns(lambda t: {"p": t, "u": 2 * t}, lambda t: OrderedDict(u=2 * t, p=t))
    made = ma.stream(predict, x, chunk_size=3)
    assert list(made) == ["p", "u"]
    assert torch.equal(made["p"], x) and torch.equal(made["u"], 2 * x)


@pytest.mark.parametrize("name", [None, 0, ("a", 1)])
def test_any_name_will_do(name):
    x = torch.randn(1, 5, 3)
    assert torch.equal(ma.stream(lambda t: {name: t[name]}, {name: x}, chunk_size=2)[name], x)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda t: {"p": t}, r"expected a mapping with \['p', 'u'\], as for the first chunk, got .* \['p'\]"),
        (lambda t: {"p": t, "u": t, "v": t}, r"\['p', 'u'\], .* got a mapping with \['p', 'u', 'v'\]"),
        (lambda t: {"p": t, "v": t}, r"\['p', 'u'\], .* got a mapping with \['p', 'v'\]"),
        (lambda t: t, r"expected a mapping with \['p', 'u'\], as for the first chunk, got a tensor"),
        (lambda t: {"p": t, "u": t[..., :1]}, r"\['u'\]: expected shape \(1, \*, 2\), .* got \(1, \*, 1\)"),
        (lambda t: {"p": t, "u": t[:0]}, r"\['u'\]: expected shape \(1, \*, 2\), .* got \(0, \*, 2\)"),
        (lambda t: {"p": t, "u": t[..., 0]}, r"\['u'\]: expected shape \(1, \*, 2\), .* got \(1, \*\)"),
        (lambda t: {"p": t.double(), "u": t}, r"\['p'\]: expected dtype torch.float32, .* got torch.float64"),
        (lambda t: {"p": t.long(), "u": t}, r"\['p'\]: expected dtype torch.float32, .* got torch.int64"),
        (lambda t: {"p": t.to("meta"), "u": t}, r"\['p'\]: expected device cpu, .* got meta"),
        (lambda t: {"p": t[:, 1:], "u": t}, r"\['p'\]: expected 2 results along dim 1 for a chunk, got \(1, 1, 2\)"),
        (lambda t: {"p": t.sum(), "u": t}, r"\['p'\]: expected 2 results along dim 1 for a chunk, got \(\)"),
        (lambda t: {"p": t[0, 0], "u": t}, r"\['p'\]: expected a tensor with dim 1, got shape \(2,\)"),
        (lambda t: {"p": t.to_sparse(), "u": t}, r"\['p'\]: expected a dense tensor, got layout torch.sparse_coo"),
        (lambda t: {}, "got an empty mapping"),
    ],
)
@pytest.mark.parametrize("output_device", ["cpu", None])
def test_every_chunk_is_held_against_the_first(second, message, output_device):
    predict = by_turns(lambda t: {"p": t, "u": t}, second)
    with pytest.raises(ValueError, match="predict's result.*" + message):
        ma.stream(predict, torch.randn(1, 6, 2), chunk_size=2, output_device=output_device)


def test_a_mapping_after_a_tensor():
    with pytest.raises(ValueError, match=r"expected a tensor, as for the first chunk, got a mapping with \['p'\]"):
        ma.stream(by_turns(lambda t: t, lambda t: {"p": t}), torch.randn(1, 4, 2), chunk_size=2)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda t: (t, None), "got tuple of Tensor, NoneType; a function around the model may leave the rest out"),
        (lambda t: [t, t], "got list of Tensor, Tensor"),
        (lambda t: (), "got tuple of nothing"),
        (lambda t: None, "got NoneType"),
        (lambda t: t.numpy(), "got ndarray"),
        (lambda t: {"p": {"u": t}}, r"\['p'\]: expected a tensor, got dict"),
        (lambda t: {"p": t, "cache": None}, r"\['cache'\]: expected a tensor, got NoneType"),
    ],
)
def test_what_cannot_be_joined_is_refused(predict, message):
    with pytest.raises(TypeError, match="predict's result.*" + message):
        ma.stream(predict, torch.randn(1, 4, 2), chunk_size=2)


def test_a_layer_that_returns_a_cache_is_refused():
    layer, x = make_layer(ma.noether.MixedAttention).eval(), torch.randn(1, 6, 24, dtype=torch.float64)
    with pytest.raises(TypeError, match="predict's result: .* got tuple of Tensor, dict"):
        ma.stream(lambda t: layer(t, [ma.TokenSpec("a_anchors", 6)], [ma.AttentionPattern(*[["a_anchors"]] * 2)]), x)


def _quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


def _nested(t):
    return torch.nested.as_nested_tensor(list(t), layout=torch.strided)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (_quantized, "expected a dense tensor, got a quantized tensor"),
        (_nested, "expected a dense tensor, got a nested tensor"),
        (lambda t: t.to("meta"), "expected numbers to copy to cpu, got a tensor on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about both kinds
def test_results_that_hold_no_dense_numbers_are_refused(predict, message):
    with pytest.raises(ValueError, match="^predict's result: " + message):
        ma.stream(predict, torch.randn(1, 4, 2), chunk_size=2)


def test_a_device_that_this_torch_was_not_built_for():
    if torch.version.cuda is None:
        with pytest.raises(ValueError, match="^device: expected a device, .* got 'cuda'"):
            ma.stream(lambda t: t, torch.randn(1, 4, 2), device="cuda")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"predict": None}, TypeError, "predict: expected a function of a chunk, got NoneType"),
        ({"queries": np.zeros((1, 3, 2))}, TypeError, "queries: expected a tensor or a mapping .* got ndarray"),
        ({"queries": [torch.zeros(1, 3)]}, TypeError, "queries: expected a tensor or a mapping .* got list of Tensor"),
        ({"queries": {}}, ValueError, "queries: .* got an empty mapping"),
        ({"queries": {"a": {"b": torch.zeros(1, 3)}}}, TypeError, r"queries\['a'\]: expected a tensor, got dict"),
        ({"queries": torch.tensor(1.0)}, ValueError, r"queries: expected a tensor with dim 1, got shape \(\)"),
        ({"queries": {"a": torch.zeros(3)}}, ValueError, r"queries\['a'\]: .* with dim 1, got shape \(3,\)"),
        ({"dim": 3}, ValueError, r"queries: expected a tensor with dim 3, got shape \(1, 3, 2\)"),
        ({"dim": -4}, ValueError, "queries: expected a tensor with dim -4"),
        ({"dim": 1.0}, TypeError, "dim: expected an integer, got 1.0"),
        ({"dim": True}, TypeError, "dim: expected an integer, got True"),
        ({"dim": "tokens"}, TypeError, "dim: expected an integer, got 'tokens'"),
        ({"chunk_size": True}, TypeError, "chunk_size: expected an integer, got True"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size: expected an integer, got 2.0"),
        ({"chunk_size": "2"}, TypeError, "chunk_size: expected an integer, got '2'"),
        ({"chunk_size": None}, TypeError, "chunk_size: expected an integer, got None"),
        ({"chunk_size": -1}, ValueError, "chunk_size: expected at least 1, got -1"),
        ({"device": "nonsense"}, ValueError, "device: expected a device, .* got 'nonsense'"),
        ({"device": 0.5}, TypeError, "device: expected a device, .* got 0.5"),
        ({"output_device": False}, TypeError, "output_device: expected a device, .* got False"),
        ({"device": 10**30}, ValueError, "device: expected a device, .* got 1000"),
        ({"output_device": "hpu:77"}, ValueError, "output_device: expected a device, .* got 'hpu:77'"),
        ({"queries": _quantized(torch.zeros(1, 3, 2))}, ValueError, "queries: .* got a quantized tensor"),
        (
            {"queries": _nested(torch.zeros(1, 3, 2))},
            ValueError,
            "queries: .* got (a nested tensor|layout torch.jagged)",
        ),
        ({"progress": 1}, TypeError, "progress: expected a bool or a text, got int"),
        ({"progress": None}, TypeError, "progress: expected a bool or a text, got NoneType"),
    ],
)
def test_wrong_kinds_of_arguments_are_named(arguments, error, message):
    calls = []
    arguments = {"predict": lambda t: calls.append(t) or t, "queries": torch.zeros(1, 3, 2), **arguments}
    with pytest.raises(error, match="^" + message):
        ma.stream(**arguments)
    assert not calls


def test_sizes_may_be_numbers_of_numpy():
    x = torch.randn(1, 5, 2)
    assert torch.equal(ma.stream(lambda t: t, x, chunk_size=np.int64(2), dim=np.int32(-2)), x)


@pytest.mark.parametrize("argument", ["device", "output_device"])
def test_the_first_device_has_index_0(argument):
    """It is a device like any other, although 0 is false."""
    if torch.accelerator.is_available():
        devices = []
        made = ma.stream(lambda t: devices.append(t.device) or t, torch.zeros(1, 3, 2), **{argument: 0})
        assert (devices[0] if argument == "device" else made.device).index == 0
    else:
        with pytest.raises(ValueError, match=f"^{argument}: expected a device, .* got 0"):
            ma.stream(lambda t: t, torch.zeros(1, 3, 2), **{argument: 0})


# Whatever memory the results lie in.


def written_anew(x):
    """A model that returns the same memory every time, as a captured graph does."""
    buffer = torch.empty(1, 2, 3)

    def predict(chunk):
        return buffer[:, : chunk.shape[1]].copy_(2 * chunk)

    return predict


@pytest.mark.parametrize("output_device", ["cpu", None])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (written_anew, lambda x: 2 * x),
        (lambda x: lambda t: t, lambda x: x),
        (lambda x: lambda t: t.flip(1).flip(1)[..., :1].expand(-1, -1, 4), lambda x: x[..., :1].expand(-1, -1, 4)),
        (
            lambda x: lambda t: torch.view_as_complex(t[..., :2].contiguous()).conj(),
            lambda x: torch.complex(x[..., 0], -x[..., 1]),
        ),
        (lambda x: torch.inference_mode()(lambda t: 2 * t), lambda x: 2 * x),
        (lambda x: torch.enable_grad()(lambda t: t.requires_grad_().square()), lambda x: x.square()),
        (lambda x: lambda t: torch.nn.Parameter(3 * t), lambda x: 3 * x),
    ],
    ids=["the same memory", "the input", "expanded", "conjugated", "inference tensors", "with a graph", "parameters"],
)
def test_results_may_lie_anywhere(make, expected, output_device):
    x = torch.randn(1, 5, 3)
    made = ma.stream(make(x), x.clone(), chunk_size=2, output_device=output_device)
    assert torch.equal(made, expected(x)) and not made.requires_grad and type(made) is torch.Tensor


def test_results_may_share_memory_with_one_another():
    x = torch.randn(1, 5, 3)
    made = ma.stream(lambda t: {"a": t, "b": t, "c": t[..., 1:]}, x, chunk_size=2, output_device=None)
    made["a"].zero_()
    assert torch.equal(made["b"], x) and torch.equal(made["c"], x[..., 1:])


def test_a_model_that_fails_half_way_leaves_nothing_behind(capsys):
    def fail(chunk):
        raise KeyError("no such anchor")

    x = torch.randn(1, 6, 2)
    with pytest.raises(KeyError, match="no such anchor"):
        ma.stream(by_turns(lambda t: t, fail), x, chunk_size=2, progress=True)
    assert torch.is_grad_enabled()
    assert torch.equal(ma.stream(lambda t: t, x, chunk_size=2), x)


def test_no_queries_have_no_results_of_any_name():
    made = ma.stream(lambda t: {"p": t[..., :1], "n": t.long()}, torch.empty(2, 0, 3), chunk_size=2)
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {
        "p": ((2, 0, 1), torch.float32),
        "n": ((2, 0, 3), torch.int64),
    }


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
