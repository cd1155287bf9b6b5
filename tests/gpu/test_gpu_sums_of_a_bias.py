"""The gradient of a projection's bias: sums of columns, by one kernel where it can read them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mixed_attention import _C

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def project(x: Tensor, linear: nn.Linear) -> Tensor:
    return _C.project(x, linear.weight, linear.bias, [_C.ProjectedPart(0, linear.out_features, None)], x.dtype)[0]


def bias_gradient(dout: Tensor, dtype: torch.dtype) -> Tensor:
    """That of a projection of 16 channels whose parameters have this dtype."""
    x = torch.randn(*dout.shape[:2], 16, device=dout.device, dtype=dout.dtype)
    linear = nn.Linear(16, dout.shape[2], device=dout.device, dtype=dtype)
    (grad,) = torch.autograd.grad(project(x, linear), linear.bias, dout)
    assert grad.dtype == dtype
    return grad


def assert_summed(grad: Tensor, dout: Tensor) -> None:
    """To fp32: a thread adds so many rows in a row, and a hundred numbers come after; then rounded to the result's."""
    exact = dout.double().sum((0, 1))
    terms = dout.shape[0] * dout.shape[1] / 512 + 100
    bound = torch.finfo(torch.float32).eps * terms * dout.double().abs().sum((0, 1))
    if grad.dtype != torch.float32:
        bound += torch.finfo(grad.dtype).eps * exact.abs()
    assert ((grad - exact).abs() <= bound).all()


@pytest.mark.parametrize("columns", [8, 16, 24, 192, 200, 576])
@pytest.mark.parametrize("rows", [1, 2, 511, 512, 513, 4095, 4097, 10_000])
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_sums(dtype, rows, columns, device):
    dout = torch.randn(1, rows, columns, device=device, dtype=dtype) + 1
    assert_summed(bias_gradient(dout, torch.float32), dout)


@pytest.mark.parametrize("columns", [192, 20, 7])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies", ["whole", "in wider rows", "at an odd place", "as columns"])
def test_however_the_gradient_lies(lies, parameters, columns, device):
    """What lies beside it is NaN."""
    values = torch.randn(2, 300, columns, device=device, dtype=torch.bfloat16)
    if lies == "whole":
        dout = values
    elif lies == "as columns":
        dout = values.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        start = 8 if lies == "in wider rows" else 3
        around = torch.full((2, 300, columns + 16), float("nan"), device=device, dtype=torch.bfloat16)
        dout = around[..., start : start + columns].copy_(values)
    assert_summed(bias_gradient(dout, parameters), values)


@pytest.mark.parametrize("shape", [(1, 0, 16), (3, 0, 192)])
def test_no_rows(shape, device):
    grad = bias_gradient(torch.ones(shape, device=device, dtype=torch.bfloat16), torch.float32)
    assert (grad == 0).all()


def test_one_launch_and_equal_bits(device):
    dout = torch.randn(1, 5000, 192, device=device, dtype=torch.bfloat16)
    first = bias_gradient(dout, torch.float32)
    x = torch.randn(1, 5000, 16, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(16, 192, device=device)
    out = project(x, linear)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        (second,) = torch.autograd.grad(out, linear.bias, dout)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if "column_sums_kernel" in name], kernels
    assert len(kernels) == 1, kernels
    assert torch.equal(first, second)


def test_a_gradient_of_the_gradient(device):
    """Under a gradient that will be differentiated, torch's own sum is a part of the graph."""
    dout = torch.randn(1, 64, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    linear = nn.Linear(16, 16, device=device)
    x = torch.randn(1, 64, 16, device=device, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(project(x, linear), linear.bias, dout, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), dout)
    assert (second == 1).all()
