"""What the package asks of torch that has no public name: one file to mend when torch changes.

Most are torch's own functions by other names, so that asking costs nothing and the compiler knows them. Each has a test
(`tests/tools/test_torch_internals.py`), which fails where a release of torch answers otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext as DeviceContext

P = ParamSpec("P")
R = TypeVar("R")

private_backend_name = torch._C._get_privateuse1_backend_name
"""What the type of device is called that torch leaves to others."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators are called without their derivatives."""

is_function_mode_enabled = torch._C._is_torch_function_mode_enabled
"""Whether a mode intercepts torch's functions here."""

num_function_modes = torch._C._len_torch_function_stack
"""How many modes intercept torch's functions, those that are switched off here included."""

function_modes = torch.overrides._get_current_function_mode_stack
"""These modes. A :class:`DeviceContext` among them is a default device."""

current_transform = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of functorch, None outside of any."""

is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor is a batch of such, as ``is_grads_batched`` makes them."""

without_transforms = torch._C._DisableFuncTorch
"""A context in which functorch transforms nothing."""

functional_collectives = torch.ops._c10d_functional
"""Collectives that return new tensors, which the compiler knows; they are named alike in all releases we support."""

has_global_hooks = nn.modules.module._has_any_global_hook
"""Whether there are hooks on all modules."""


forward_mode = forward_ad._set_fwd_grad_enabled
"""A context in which framework operators follow tangents, or not."""

without_function_modes = torch._C.DisableTorchFunction
"""A context in which no mode intercepts torch's functions."""


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function that the compiler calls while it traces, and whose result it then takes for a constant.

    :func:`torch.compiler.assume_constant_result` does the same, and imports the compiler for it, which takes longer
    than all of this package: in every program that imports it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def process_group(name: Any) -> Any:
    """The process group of a name."""
    return torch._C._distributed_c10d._resolve_process_group(name)


def store_of(group: Any) -> Any:
    """The store that the ranks of a process group share."""
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def is_forward_mode() -> bool:
    """Whether tensors may have tangents here."""
    return forward_ad._current_level >= 0


def is_within_gradient() -> bool:
    """Whether ``torch.func.grad``, ``vjp`` or the like is among the transforms of functorch that are active."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Grad for transform in stack)


def has_operator_kernel(operator: str, device_type: str) -> bool:
    """Whether an operator, ``"namespace::name"``, has a kernel of its own for a type of device."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _torchs_own(function: Any, module: ModuleType) -> Any:
    """The function if its module defines it, else None: somebody may have patched it before we were imported."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_FORWARD = _torchs_own(nn.Linear.forward, nn.modules.linear)
_CALL = _torchs_own(nn.Linear.__call__, nn.modules.module)
_CALL_IMPL = _torchs_own(nn.Linear._call_impl, nn.modules.module)
_LINEAR = torch._C._nn.linear


def is_linear_torchs() -> bool:
    """Whether nobody has changed what calling a linear layer runs, for all of them at once."""
    return (
        nn.Linear.forward is _FORWARD and is_call_torchs(nn.Linear) and F.linear is _LINEAR and not has_global_hooks()
    )


def is_call_torchs(module_class: type[nn.Module]) -> bool:
    """Whether calling a module of a class is what torch has it be."""
    return module_class.__call__ is _CALL and module_class._call_impl is _CALL_IMPL


def has_nothing_beside(module: nn.Module) -> bool:
    """Whether a module runs what its class says: no hooks, no forward set on the object, not compiled."""
    # NOTE: dicts instead of attributes, which take several times as long of a module.
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return False
    return not ("forward" in own or "_call_impl" in own or "_compiled_call_impl" in own)


_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""Those that are no more than their numbers; the last two are what tracers put in the place of such."""


def plain_parameters(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer whose call is their product and sum and nothing else; None for others.

    Others are those with hooks, of another class (subclasses, parametrizations), another module in its place
    (adapters), with a forward set on the object, after ``module.compile()``, and those whose weight or bias is missing
    or a tensor subclass (quantised, distributed).
    """
    if type(layer) is not nn.Linear or not has_nothing_beside(layer):
        return None
    # NOTE: dicts instead of attributes, which take several times as long of a module.
    own = layer.__dict__
    if "weight" in own or "bias" in own:
        return None
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias", "missing")
    if type(weight) not in _PLAIN_TENSORS or not (bias is None or type(bias) in _PLAIN_TENSORS):
        return None
    return weight, bias
