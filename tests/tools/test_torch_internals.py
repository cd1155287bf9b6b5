"""What the package asks of torch without a public name: each answers what it is asked for, in this release, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

from mixed_attention import torch_internals as internals

PACKAGE = Path(internals.__file__).parent
PRIVATE = re.compile(
    r"\btorch(?:\.\w+)*\._[a-zA-Z]|\bfrom torch(?:\.\w+)*\._[a-zA-Z]|\b_current_level\b|\._call_impl\b"
)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def test_they_lie_in_one_file():
    users = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())]
    assert users == [PACKAGE / "torch_internals.py"]


def test_the_private_backend_is_a_type_of_device():
    assert torch.device(internals.private_backend_name()).type == internals.private_backend_name()


def test_functions_of_a_constant_result_are_marked_as_torch_marks_them():
    def ours():
        return 1

    def theirs():
        return 1

    assert internals.assume_constant_result(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_operators_below_autograd_have_no_graph():
    x = torch.ones(2, requires_grad=True)
    with internals.below_autograd():
        assert torch.ops.aten.mul(x, 2).grad_fn is None
    assert torch.ops.aten.mul(x, 2).grad_fn is not None


def test_function_modes_are_listed():
    assert not internals.is_function_mode_enabled() and not internals.num_function_modes()
    with Watching() as outer, torch.device("cpu"):
        assert internals.is_function_mode_enabled() and internals.num_function_modes() == 2
        first, second = internals.function_modes()
        assert first is outer and isinstance(second, internals.DeviceContext)
        with torch._C.DisableTorchFunction():
            assert not internals.is_function_mode_enabled() and internals.num_function_modes() == 2


def test_transforms_are_seen():
    seen = []
    torch.vmap(lambda x: seen.append(internals.current_transform()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(internals.current_transform()) or x.sum())(torch.ones(2))
    assert None not in seen and len(seen) == 2
    assert internals.current_transform() is None


def test_batched_gradients_are_seen():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: seen.append(internals.is_legacy_batched(grad)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True] and not internals.is_legacy_batched(x)


def test_forward_mode_is_seen():
    assert not internals.is_forward_mode()
    with forward_ad.dual_level():
        assert internals.is_forward_mode()
    assert not internals.is_forward_mode()


def test_gradient_transforms_are_seen():
    seen = []
    note = lambda x: seen.append(internals.is_within_gradient()) or x.sum()  # noqa: E731
    torch.func.grad(lambda x: torch.vmap(note)(x).sum())(torch.ones(2, 2))
    torch.func.jvp(note, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True, False]
    assert not internals.is_within_gradient()


def test_forward_mode_is_switched():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with internals.forward_mode(False):
            assert forward_ad.unpack_dual(dual * 2).tangent is None
            with internals.forward_mode(True):
                assert forward_ad.unpack_dual(dual * 2).tangent is not None


def test_function_modes_are_left_out():
    with Watching(), internals.without_function_modes():
        assert not internals.is_function_mode_enabled()


def test_kernels_of_operators_are_found():
    assert internals.has_operator_kernel("aten::mm", "cpu")
    assert not internals.has_operator_kernel("aten::mm", "hpu")


def test_hooks_on_all_modules_are_seen():
    assert internals.is_linear_torchs() and not internals.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert internals.has_global_hooks() and not internals.is_linear_torchs()
    finally:
        handle.remove()
    assert internals.is_linear_torchs()


@pytest.mark.parametrize("owner, name", [(nn.Linear, "forward"), (nn.Linear, "_call_impl"), (F, "linear")])
def test_a_patch_of_all_linear_layers_is_seen(owner, name, monkeypatch):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: original(*arguments))
    assert not internals.is_linear_torchs()


def test_parameters_of_a_plain_layer_are_found():
    layer = nn.Linear(3, 2)
    weight, bias = internals.plain_parameters(layer)
    assert weight is layer.weight and bias is layer.bias
    assert internals.plain_parameters(nn.Linear(3, 2, bias=False))[1] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: layer.compile(backend="eager"),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
        lambda layer: delattr(layer, "bias"),
    ],
    ids=["hook", "pre-hook", "backward", "pre-backward", "forward", "compile", "parametrization", "class", "no bias"],
)
def test_a_changed_layer_is_not_plain(change):
    layer = nn.Linear(3, 3)
    change(layer)
    assert internals.plain_parameters(layer) is None


def test_nothing_is_transformed_without_transforms():
    seen = []

    def call(x):
        with pytest.raises(RuntimeError, match="random"):
            torch.rand(3)
        with internals.without_transforms():
            seen.append(torch.rand(3))
        return x

    torch.func.vmap(call, randomness="error")(torch.ones(2))
    assert [t.shape for t in seen] == [(3,)]


def test_functional_collectives_are_there():
    for name in ("all_to_all_single", "wait_tensor"):
        assert getattr(internals.functional_collectives, name).default
