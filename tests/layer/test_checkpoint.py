import pytest
import torch
from layers import DIM, NUM_HEADS, SELF, make_layer, make_x, tensor_of
from torch import nn

import mixed_attention as ma

CONVERTED = ma.checkpoint.convert_state_dict
PAIRS = {
    "dense": (ma.DotProductAttention, ma.noether.DotProductAttention),
    "mixed": (ma.MixedAttention, ma.noether.MixedAttention),
    "anchor": (ma.SelfAnchorAttention, ma.noether.SelfAnchorAttention),
    "perceiver": (ma.PerceiverAttention, ma.noether.PerceiverAttention),
}


class Block(nn.Module):
    """Holds an attention where upstream's transformer block does, beside other parameters."""

    def __init__(self, attention):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention_block = attention
        self.mlp = nn.Linear(DIM, DIM)


def make_model(cls, **config):
    return nn.ModuleDict({"physics": nn.ModuleList([Block(make_layer(cls, **config)) for _ in range(2)])})


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "wrap", [lambda layer: layer, Block, lambda layer: nn.Sequential(Block(layer))], ids=["bare", "block", "model"]
)
@pytest.mark.parametrize("name", PAIRS)
def test_either_layout_loads_into_either_under_any_prefix(name, wrap, bias):
    fused, separate = (wrap(make_layer(cls, bias=bias)) for cls in PAIRS[name])
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    keys = list(separate.state_dict())
    separate.load_state_dict(fused.state_dict(), strict=True)
    assert list(separate.state_dict()) == keys
    back = wrap(make_layer(PAIRS[name][0], bias=bias))
    back.load_state_dict(separate.state_dict(), strict=True)
    for key, value in fused.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["mixed", "anchor"])
def test_loaded_layers_compute_the_same(name):
    fused, separate = (make_layer(cls) for cls in PAIRS[name])
    with torch.no_grad():
        for parameter in separate.parameters():
            parameter.neg_()
    separate.load_state_dict(fused.state_dict())
    arguments = (make_x(SELF), SELF.specs, *([SELF.patterns] if name == "mixed" else []))
    assert torch.equal(tensor_of(separate(*arguments)), tensor_of(fused(*arguments)))


def test_packing_of_the_fused_weight():
    fused, separate = (make_layer(cls) for cls in PAIRS["mixed"])
    separate.load_state_dict(fused.state_dict())
    for index, name in enumerate("qkv"):
        rows = slice(index * DIM, (index + 1) * DIM)
        assert torch.equal(getattr(separate, name).weight, fused.qkv.weight[rows])
        assert torch.equal(getattr(separate, name).bias, fused.qkv.bias[rows])


def test_loading_leaves_the_checkpoint_alone():
    fused, separate = (make_layer(cls) for cls in PAIRS["mixed"])
    state = fused.state_dict()
    keys = list(state)
    separate.load_state_dict(state, assign=True)
    assert list(state) == keys
    with torch.no_grad():
        separate.q.weight.zero_()
    assert fused.qkv.weight.count_nonzero() == fused.qkv.weight.numel()


def test_what_does_not_fit_is_reported_by_the_framework():
    layer = make_layer(ma.noether.MixedAttention)
    state = make_layer().state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for q.weight"):
        layer.load_state_dict({**state, "qkv.weight": torch.ones(3 * 7, DIM)})
    with pytest.raises(RuntimeError, match='Unexpected key.*"qkv.weight"'):
        layer.load_state_dict({**state, "qkv.weight": torch.ones(3 * DIM + 1, DIM)})
    del state["qkv.bias"]
    with pytest.raises(RuntimeError, match='Missing key.*"q.bias", "k.bias", "v.bias"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("name", ["dense", "mixed", "anchor"])
def test_whole_models_are_converted(name):
    fused, separate = (make_model(cls).state_dict() for cls in PAIRS[name])
    assert CONVERTED(fused, "separate").keys() == separate.keys()
    back = CONVERTED(CONVERTED(fused, "separate"), "fused")
    assert back.keys() == fused.keys()
    assert all(torch.equal(back[key], fused[key]) for key in fused)
    assert all(CONVERTED(fused, "fused")[key] is fused[key] for key in fused)


@pytest.mark.parametrize("kv_dim", [DIM, 7])
def test_perceivers_are_converted(kv_dim):
    fused, separate = (make_model(cls, kv_dim=kv_dim).state_dict() for cls in PAIRS["perceiver"])
    assert CONVERTED(fused, "separate").keys() == separate.keys()
    paths = [f"physics.{index}.attention_block" for index in range(2)]
    back = CONVERTED(CONVERTED(fused, "separate"), "fused", perceiver=paths if kv_dim == DIM else ())
    assert back.keys() == fused.keys()
    assert all(torch.equal(back[key], fused[key]) for key in fused)
    unknown = CONVERTED(CONVERTED(fused, "separate"), "fused")
    assert ("physics.0.attention_block.qkv.weight" in unknown) == (kv_dim == DIM)


def test_a_perceiver_between_layers_of_attention():
    model = nn.ModuleDict(
        {"a": make_layer(), "b": make_layer(ma.PerceiverAttention), "c": make_layer(ma.SelfAnchorAttention)}
    )
    separate = CONVERTED(model.state_dict(), "separate")
    assert not any("kv" in key for key in separate)
    assert CONVERTED(separate, "fused", perceiver=["b"]).keys() == model.state_dict().keys()


def test_conversion_leaves_other_things_alone():
    state = {
        "q.weight": torch.ones(2, 2),  # no k and v beside it
        "head.qkv.weight": torch.ones(7, 2),  # not three equal parts
        "untied.q.weight.0": torch.ones(2, 2),
        "epoch": 3,
    }
    for layout in ("fused", "separate"):
        converted = CONVERTED(state, layout)
        assert converted.keys() == state.keys()
        assert all(converted[key] is state[key] for key in state)


def test_converted_tensors_share_no_memory():
    state = make_layer().state_dict()
    separate = CONVERTED(state, "separate")
    for name in "qkv":
        assert separate[f"{name}.weight"].untyped_storage().nbytes() == separate[f"{name}.weight"].nbytes


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout: expected 'fused' or 'separate', got 'packed'"):
        CONVERTED({}, "packed")


def test_paths_of_perceivers_are_those_of_modules():
    """A path that is not there would fuse a Perceiver's projections like any other's, and so would a bare string."""
    state = nn.ModuleDict({"a": make_layer(ma.noether.PerceiverAttention), "ab": make_layer()}).state_dict()
    with pytest.raises(ValueError, match=r"perceiver: no attention at 'b', expected some of \['a', 'ab'\]"):
        CONVERTED(state, "fused", perceiver=["a", "b"])
    with pytest.raises(TypeError, match="perceiver: expected a list of paths, got 'ab'"):
        CONVERTED(state, "fused", perceiver="ab")
    with pytest.raises(TypeError, match="state_dict: expected a mapping, .* got ModuleDict"):
        CONVERTED(nn.ModuleDict(), "fused")


def make_untied():
    config = {"dim": DIM, "num_heads": NUM_HEADS, "num_types": 2, "init_weights": "torch"}
    return ma.noether.UntiedMixedAttention(config).double()


@pytest.mark.parametrize("wrap", [lambda layer: layer, Block], ids=["bare", "block"])
def test_untied_checkpoints_are_transposed_on_demand(wrap):
    source, target = wrap(make_untied()), wrap(make_untied())
    state = source.state_dict()
    ma.checkpoint.load_untied_state_dict(target, state, transpose=False)
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())
    ma.checkpoint.load_untied_state_dict(target, state, transpose=True)
    for key, value in target.state_dict().items():
        per_domain = any(f"{name}.weight." in key for name in ("q", "k", "v", "proj"))
        assert torch.equal(value, state[key].T if per_domain else state[key]), key


def test_shared_weights_do_not_load_as_untied():
    with pytest.raises(RuntimeError, match="Missing key"):
        make_untied().load_state_dict(make_layer().state_dict())
