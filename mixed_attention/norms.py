"""Norms whose derivatives are right where torch's own are not.

In torch 2.11 to 2.15 the derivative of a forward-mode derivative of ``layer_norm`` is wrong, without an error, and so
it is of training ``batch_norm`` and of ``instance_norm`` (pytorch#196700, pytorch#198017). Reverse over reverse is
right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mixed_attention import torch_internals
from mixed_attention.autocast import autocast_dtype


class exact_norms(TorchFunctionMode):
    """Inside this context ``layer_norm``, training ``batch_norm`` and ``instance_norm`` have exact derivatives.

    They are computed from primitive operators, to rounding the same numbers; fp16 and bf16 in fp32. Needed wherever a
    forward-mode derivative (``torch.func.jvp``, ``jacfwd``, dual levels) is differentiated again, in either mode.
    :func:`mixed_attention.func.value_and_jacobian` does it by itself. Where torch was mended, it leaves torch's own.

    Example:
        >>> from torch.func import grad, jvp
        >>> x = torch.randn(4, dtype=torch.float64)
        >>> slope = lambda x: jvp(lambda x: torch.layer_norm(x, (4,)).sin().sum(), (x,), (x.cos(),))[1]
        >>> with exact_norms():
        ...     grad(slope)(x).shape
        torch.Size([4])
    """

    def __init__(self) -> None:
        super().__init__()
        # NOTE: a compiler would trace the trial.
        self._replaces = torch.compiler.is_compiling() or is_needed()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        exact = _EXACT.get(func) if self._replaces else None
        return (func if exact is None else exact)(*args, **(kwargs or {}))


@cache
def is_needed() -> bool:
    """Whether torch's ``layer_norm``, the one that models are made of, is wrong here; tried once."""
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)

    def slope(norm: Callable[..., Tensor]) -> Tensor:
        moved = lambda x: torch.func.jvp(lambda x: norm(x, (3,)).sin().sum(), (x,), (x.cos(),))[1]  # noqa: E731
        return torch.func.grad(moved)(x)

    with torch_internals.without_function_modes(), torch.enable_grad():
        return not torch.allclose(slope(F.layer_norm), slope(_layer_norm), rtol=1e-9, atol=1e-12)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x less its mean, in units of its deviation, in fp32 at least; the mean and the variance."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    variance = (centered * centered).mean(dims, keepdim=True)
    return centered * torch.rsqrt(variance + eps), mean, variance


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"layer_norm: expected last dims {shape}, got an input of shape {tuple(input.shape)}")
    out, _, _ = _standardised(input, tuple(range(-len(shape), 0)), eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(_result_dtype(input))


def _result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a norm: autocast computes them in fp32, and returns that."""
    is_cast = autocast_dtype(input.device.type) is not None
    return torch.float32 if is_cast and input.dtype in (torch.bfloat16, torch.float16) else input.dtype


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    dims = tuple(dim for dim in range(input.ndim) if dim != 1)
    out, mean, variance = _standardised(input, dims, eps)
    _update(running_mean, running_var, mean, variance, input.numel() // input.shape[1], momentum)
    return _scaled(out, weight, bias).to(input.dtype)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    out, _, _ = _standardised(input, tuple(range(2, input.ndim)), eps)
    return _scaled(out, weight, bias).to(input.dtype)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """By a factor and a summand for every channel."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float,
) -> None:
    if running_mean is None or running_var is None:
        return
    with torch.no_grad():
        unbiased = variance * (count / max(count - 1, 1))
        running_mean.lerp_(mean.detach().flatten().to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.detach().flatten().to(running_var.dtype), momentum)


# Models call the functions; hands may call torch's.
_EXACT: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
