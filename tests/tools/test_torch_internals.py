"""What the package asks of torch without a public name: each answers what it is asked for, in this release, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixed_attention import _C
from mixed_attention import torch_internals as internals

native = _C.torch_internals
PACKAGE = Path(internals.__file__).parent
ROOM = PACKAGE.parent / "csrc/torch"
PRIVATE = re.compile(
    r"\btorch(?:\.\w+)*\._[a-zA-Z]|\bfrom torch(?:\.\w+)*\._[a-zA-Z]|\b_current_level\b|\._call_impl\b"
)

PRIVATE_NATIVE = re.compile(
    r"\b(?:c10|at|autograd)::(?:impl|autocast|functorch)::|\bunsafe[A-Z]|\bat::_[a-z]|[.>]_(?:fw_grad|version)\b"
    r"|\bDispatchKey::|\w_keyset\b|\buse_count\b|\bCppNode\b|\bTHP|\bSavedTensorDefaultHooks\b|_c10d"
    r"|\bget_current_\w+\(|\bERR_[A-Z]"
)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def test_they_lie_in_one_file():
    users = [path for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())]
    assert users == [PACKAGE / "torch_internals.py"]


def test_those_of_cpp_lie_in_one_file():
    users = [path for path in ROOM.iterdir() if PRIVATE_NATIVE.search(path.read_text())]
    assert users == [ROOM / "torch_internals.h"]


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


def test_autocast_is_seen_and_left_out():
    x = torch.ones(2, 2)
    assert native.autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert native.autocast_dtype(x) == torch.float16
        assert torch.mm(x, x).dtype == torch.float16
        assert native.mm_without_autocast(x, x).dtype == torch.float32
        assert torch.mm(x, x).dtype == torch.float16


def test_transforms_are_seen_in_cpp():
    seen = []
    torch.vmap(lambda x: seen.append(native.is_mapped()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(native.is_mapped()) or x.sum())(torch.ones(2))
    assert seen == [True, True] and not native.is_mapped()


def test_batched_gradients_are_seen_in_cpp():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: seen.append(native.is_transformed(grad)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True] and not native.is_transformed(x)


def test_tangents_are_seen():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert native.has_tangent(dual) and native.is_transformed(dual)
        assert not native.has_tangent(torch.ones(2))


def test_a_mode_that_sees_operations_is_seen():
    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    assert not native.is_watched()
    with Seeing():
        assert native.is_watched()


def test_hooks_of_saved_tensors_are_seen():
    assert not native.are_saved_tensors_hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert native.are_saved_tensors_hooked()


@pytest.mark.gpu
def test_the_stream_is_the_current_one():
    x = torch.ones(1, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert native.current_stream(x) == torch.cuda.current_stream().cuda_stream != 0
    assert native.current_stream(x) == torch.cuda.current_stream().cuda_stream


def test_what_stands_for_other_numbers_is_seen():
    x = torch.ones(2, dtype=torch.complex64)
    assert native.is_resolved(x) and native.is_resolved(x.conj().real)
    assert not native.is_resolved(x.conj().imag)  # a view of the negatives
    assert not native.is_resolved(torch._efficientzerotensor(2))


def test_symbolic_sizes_are_seen():
    seen = []

    def note(x):
        seen.append(native.has_symbolic_sizes(x))
        return x

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    note(mode.from_tensor(torch.ones(3, 4)))
    note(torch.ones(3, 4))
    assert seen == [True, False]


def test_tensors_of_other_classes_are_not_plain():
    assert native.is_plain(torch.ones(2)) and native.is_plain(nn.Parameter(torch.ones(2)))
    assert not native.is_plain(torch.ones(2).as_subclass(type("Other", (torch.Tensor,), {}))) and not native.is_plain(2)


def test_versions_count_writes():
    x = torch.zeros(2)
    assert native.version_of(x) == x._version == 0
    native.bump_version(x)
    assert native.version_of(x) == x._version == 1


def test_holders_of_memory_are_counted():
    x = torch.ones(3)
    alone = native.num_holders(x)
    view = x[:2]
    assert native.num_holders(x) == native.num_holders(view) == alone + 1
    del view
    assert native.num_holders(x) == alone


def test_memory_is_given_back():
    x = torch.ones(3)
    native.release_memory(x)
    assert x.data_ptr() == 0  # NOTE: nobody may print such a tensor


def test_tensors_are_copied_and_rounded():
    source = [torch.full((2,), 1 / 3), torch.full((3,), 2 / 3)]
    target = [torch.zeros(x.shape, dtype=torch.bfloat16) for x in source]
    native.copy_all(target, source)
    assert [x.tolist() for x in target] == [x.bfloat16().tolist() for x in source]


def test_collectives_are_there_in_cpp():
    for name in ("wait_tensor", "all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor"):
        assert native.has_collective(name)


def test_kernels_for_tensors_are_found():
    assert native.has_kernel("aten::mm", torch.ones(2, 2))
    assert not native.has_kernel("mixed_attention::rope", torch.ones(2, 2).to_sparse())


def test_operators_are_called_behind_derivatives_and_versions():
    x, out = torch.randn(1, 2, 1, 4, requires_grad=True), torch.empty(1, 2, 1, 4)
    freqs = torch.randn(1, 2, 2, 2)
    with torch.no_grad():
        torch.ops.mixed_attention.rope_out(x, freqs, False, out)
    assert out.grad_fn is None and out._version == 1
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.ops.mixed_attention.rope_out(x, freqs, False, out)


def test_gradients_go_where_those_of_another_tensor_go():
    x = torch.ones(2, requires_grad=True)
    y = 3 * x
    native.stand_in(y, torch.full((2,), 5.0)).square().sum().backward()
    assert x.grad.tolist() == [30, 30]
    native.stand_in(x, torch.full((2,), 5.0)).sum().backward()
    assert x.grad.tolist() == [31, 31]


def test_a_node_knows_its_last_call():
    told = []
    x = torch.ones(2, requires_grad=True)
    y = native.telling(x, told.append)
    assert native.is_telling(y) and not native.is_telling(x * 2)
    y.grad_fn(torch.ones(2))  # by hand
    for keeps in (True, False):
        torch.autograd.grad(y.sum(), x, retain_graph=keeps)
    hooked = native.telling(x, told.append)
    hooked.grad_fn.register_hook(lambda *_: None)
    hooked.sum().backward()
    before = native.telling(x, told.append)
    before.grad_fn.register_prehook(lambda *_: None)
    before.sum().backward()
    assert told == [False, False, True, False, False]


def test_the_error_of_a_second_backward_is_torchs():
    x = torch.ones(2, requires_grad=True)
    y = x.square().sum()
    y.backward()
    with pytest.raises(RuntimeError, match=re.escape(native.backward_twice())):
        y.backward()
