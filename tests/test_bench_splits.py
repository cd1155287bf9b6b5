"""The emulated products."""

import pytest
import torch

from bench.splits import ARITHMETICS, BLOCK

# Of a product: what its left-out partial products and the rests of its factors come to at most.
LEFT_OUT = {
    "TF32": 2 * 2**-11.0,
    "fp16, scaled": 2 * 2**-11.0,
    "3 products of TF32": 3 * 2**-22.0,
    "3 products of bf16": 3 * 2**-16.0,
    "6 products of bf16": 5 * 2**-24.0,
    "3 products of fp16, scaled": 3 * 2**-22.0,
}


@pytest.mark.parametrize("anew", [False, True], ids=["carried on", "begun anew"])
@pytest.mark.parametrize("name", ARITHMETICS)
def test_errors_are_those_of_what_is_left_out_and_cut_off(name, anew):
    generator = torch.Generator().manual_seed(0)
    left, right = (1e-6 * torch.randn(2, 4 * BLOCK, 4 * BLOCK, generator=generator)).unbind()
    arithmetic = ARITHMETICS[name]
    additions = len(arithmetic.products) * left.shape[-1] // arithmetic.depth
    got = arithmetic.matmul(left, right, anew=anew)
    exact, sizes = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    assert got.dtype == torch.float32
    assert ((got - exact).abs() <= (LEFT_OUT[name] + additions * 2**-23) * sizes).all()


def test_sums_begun_anew_lose_less():
    left, right = torch.rand(2, 16, 8 * BLOCK, generator=torch.Generator().manual_seed(0)).unbind()
    exact = left.double() @ right.mT.double()
    for arithmetic in ARITHMETICS.values():
        off = [(arithmetic.matmul(left, right.mT, anew=anew) - exact).norm() for anew in (True, False)]
        assert off[0] < off[1] or len(arithmetic.products) == 1
