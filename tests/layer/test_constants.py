"""The frequencies of RoPE are those of their definition, whatever happens to the module; initial weights likewise."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from layers import DIM, NUM_HEADS
from torch import nn

import mixed_attention as ma

WIDTH = 10  # of an axis, with 64 channels and 3 axes


def exact():
    return 10_000 ** -(torch.arange(0, 2 * WIDTH, 2, dtype=torch.float32) / (2 * WIDTH))


def make_model():
    return nn.ModuleDict({"rope": ma.RopeFrequency(64, 3), "head": nn.Linear(2, 2)})


def load(dtypes, **options):
    """A model that has loaded what was saved in one dtype after the other."""
    state = make_model().state_dict()
    for dtype in dtypes:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model = make_model()
    if options.get("assign"):
        model = model.to("meta")
    model.load_state_dict(torch.load(file), **options)
    return model


def deferred():
    with torch.device("meta"):
        model = make_model()
    return model


def to_empty(model, **options):
    """Deferred initialisation as trainers do it, with memory that holds anything."""
    model.to_empty(device="cpu", **options)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def module_by_module():
    model = deferred()
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    return model


def behind_its_back():
    model = make_model()
    for buffer in model.buffers():
        buffer.data = buffer.data.bfloat16()
    return model


def swapping(convert):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return convert()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MODELS = {
    "made": make_model,
    "half": lambda: make_model().half(),
    "bfloat16": lambda: make_model().bfloat16(),
    "double": lambda: make_model().double(),
    "to": lambda: make_model().to(BF16).to(FP32),
    "applied": lambda: make_model()._apply(lambda tensor: tensor.to(FP16)),
    "default dtype": lambda: make_model().to(dtype=FP16).to("cpu", FP32),
    "deep copy of a cast": lambda: copy.deepcopy(make_model().half()),
    "cast of a deep copy": lambda: copy.deepcopy(make_model()).half(),
    "pickled": lambda: pickle.loads(pickle.dumps(make_model().half())).bfloat16(),
    "shared memory": lambda: make_model().share_memory().half(),
    "swapped": lambda: swapping(lambda: make_model().half()),
    "loaded and swapped": lambda: swapping(lambda: load([BF16])),
    "assigned and swapped": lambda: swapping(lambda: load([BF16], assign=True)),
    **{
        f"loaded {' '.join(map(str, dtypes))}, {options}": lambda dtypes=dtypes, options=options: load(
            dtypes, **options
        )
        for dtypes in ([FP32], [FP64], [BF16], [FP16], [BF16, FP32], [FP16, FP64], [BF16, FP16], [FP16, BF16, FP32])
        for options in ({}, {"assign": True}, {"strict": False})
    },
    "deferred": lambda: to_empty(deferred()),
    "deferred in 16 bits": lambda: to_empty(deferred().half()),
    "deferred, nothing reset": lambda: deferred().to_empty(device="cpu"),
    "module by module": module_by_module,
    "emptied": lambda: make_model().to_empty(device="cpu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_stay_exact(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rope = MODELS[name]()["rope"]
    assert rope.omega.dtype == torch.float32
    assert torch.equal(rope.omega, exact())
    assert list(rope.state_dict()) == ["omega"]


COORDS = 1000 * torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0))


def test_frequencies_cast_behind_the_back_of_the_module():
    expected = make_model()["rope"](COORDS)
    assert torch.equal(behind_its_back()["rope"](COORDS), expected)
    rope = make_model()["rope"]
    assert torch.equal(torch.func.functional_call(rope, {"omega": rope.omega.half()}, COORDS), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_frequencies_of_another_wavelength_are_loaded_with_a_warning(dtype, assign):
    others = ma.RopeFrequency(64, 3, max_wavelength=1000)
    given = {name: tensor.to(dtype) for name, tensor in others.state_dict().items()}
    model = nn.ModuleDict({"rope": ma.RopeFrequency(64, 3)})
    with pytest.warns(UserWarning, match=r"rope.omega: .* from 1 to 0.0019.* max_wavelength=10000, from 1 to 0.00025"):
        model.load_state_dict({"rope.omega": given["omega"]}, assign=assign)
    kept = copy.deepcopy(model).half().to(FP32)["rope"].omega
    assert torch.equal(kept, given["omega"].float())
    model["rope"].reset_parameters()
    assert torch.equal(model["rope"].omega, exact())


def test_nearly_equal_wavelengths_are_told_apart():
    with pytest.warns(UserWarning, match="max_wavelength=10000"):
        ma.RopeFrequency(64, 3).load_state_dict(ma.RopeFrequency(64, 3, max_wavelength=10_010).state_dict())


def test_a_file_of_other_shapes_is_reported_by_the_framework():
    with pytest.raises(RuntimeError, match="size mismatch for omega"):
        ma.RopeFrequency(64, 3).load_state_dict(ma.RopeFrequency(32, 3).state_dict())


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["complex", "real"])
def test_coordinates_in_16_bits_warn(form, dtype):
    rope = ma.RopeFrequency(64, 3, implementation=form)
    with pytest.warns(UserWarning, match="coords in .*cast_forward_inputs=False") as caught:
        rope(COORDS.to(dtype))
    assert caught[0].filename == __file__


def test_angles_in_16_bits_warn():
    x = torch.randn(1, 50, 2, 64)
    angles = ma.RopeFrequency(64, 3, implementation="real")(COORDS)
    with pytest.warns(UserWarning, match="angles in torch.bfloat16 .*cast_forward_inputs=False") as caught:
        ma.apply_rope(x, tuple(axis.bfloat16() for axis in angles))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("dtype", [FP32, FP64, torch.int16], ids=str)
def test_other_coordinates_do_not_warn(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        angles = ma.RopeFrequency(64, 3, implementation="real")(COORDS.to(dtype))
        ma.apply_rope(torch.randn(1, 50, 2, 64).half(), angles)


def test_the_warning_breaks_no_graph():
    torch._dynamo.reset()
    rope = ma.RopeFrequency(64, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(rope, backend="eager", fullgraph=True)
        assert torch.equal(compiled(COORDS.bfloat16()), rope(COORDS.bfloat16()))


LAYERS = {
    "fused": (ma.MixedAttention, {}),
    "separate": (ma.noether.MixedAttention, {}),
    "perceiver": (ma.PerceiverAttention, {"kv_dim": 48}),
    "anchors": (ma.SelfAnchorAttention, {"branches": ["a"]}),
    "per domain": (ma.noether.UntiedMixedAttention, {"num_types": 2}),
}


@pytest.mark.parametrize("mode", ["torch", "truncnormal002", "truncnormal002-identity"])
@pytest.mark.parametrize("how", ["every module", "module by module", "the layer", "copied", "pickled"])
@pytest.mark.parametrize("name", LAYERS)
def test_deferred_layers_are_initialised_as_configured(name, how, mode):
    cls, config = LAYERS[name]
    if name == "per domain" and (mode == "truncnormal002-identity" or how == "module by module"):
        pytest.skip("there is no such mode; lists of parameters are no modules that can be reset")
    with torch.device("meta"):
        layer = cls({"dim": 96, "num_heads": NUM_HEADS, "init_weights": mode, **config})
    if how == "module by module":
        for module in layer.modules():
            if [*module.parameters(recurse=False)]:
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()
    elif how == "the layer":
        layer.to_empty(device="cpu")
        getattr(layer, "mixed_attention", layer).reset_parameters()
    else:
        layer = {"every module": lambda x: x, "copied": copy.deepcopy, "pickled": pickle_again}[how](layer)
        to_empty(layer)
    for key, parameter in layer.named_parameters():
        # A uniform distribution up to 1 / sqrt(in_features), or a normal one; thousands of numbers.
        in_features = 48 if name == "perceiver" and key.startswith("kv") else 96
        if mode == "torch":
            std = (3 * in_features) ** -0.5
        else:
            std = 0.02 if parameter.ndim > 1 and not (mode.endswith("identity") and "proj" in key) else 0
        tolerance = 0.1 if parameter.ndim > 1 else 0.3
        assert abs(parameter.std().item() - std) <= tolerance * std, key


def pickle_again(layer):
    return pickle.loads(pickle.dumps(layer))


def test_projections_stay_linear_layers():
    layer = ma.MixedAttention({"dim": DIM, "num_heads": NUM_HEADS})
    assert type(layer.qkv) is type(layer.proj) is nn.Linear
    assert list(layer.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
