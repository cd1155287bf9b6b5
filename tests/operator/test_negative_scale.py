"""A negative softmax_scale is the positive one with -q for q, for every operator and bit by bit.

What is made of q, or in its place, changes its sign with it: dq, tangents of q, and gradients of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import DTYPES

import mixed_attention as ma
from mixed_attention import ops as package_ops

operators = torch.ops.mixed_attention
PLAN = ma.AttentionPlan.compile(
    [ma.TokenSpec("a", 33), ma.TokenSpec("b", 40), ma.TokenSpec("c", 5), ma.TokenSpec("empty", 0)],
    [
        ma.AttentionPattern(["a"], ["b", "c"]),
        ma.AttentionPattern(["b", "empty"], ["empty"]),
        ma.AttentionPattern(["c"], ["a"]),
    ],
)
SCALES = (0.3, 2.0, 1e-30)
OPTIONS = {"plain": (False, 0.0), "masked": (True, 0.0), "dropout": (False, 0.25), "masked, dropout": (True, 0.25)}
DIRECTIONS = 4  # more than kernels take at a time


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Otherwise gradients are added up in whatever order the blocks of a GPU come."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(got, expected, negated=()):
    """Compares two series of tensors by bits. negated: indices of those that have the other sign."""
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        other = -other if i in negated else other
        differing = (bits(one) != bits(other)).nonzero()
        assert not len(differing), f"result {i}: {one[tuple(differing[0])]} at {differing[0].tolist()}, not as expected"


class Problem:
    """Fresh inputs, and the calls of operators with -scale and with -q."""

    def __init__(self, device, dtype, scale, options, layout="dense", head_dim=16):
        masked, self.dropout_p = OPTIONS[options]
        make = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
        n = PLAN.num_queries
        qkv = make(2, n, 3, 2, head_dim)
        self.q, self.k, self.v = qkv.unbind(2) if layout == "packed" else (t.contiguous() for t in qkv.unbind(2))
        if layout == "one head for all":
            self.q = make(2, n, 1, head_dim).expand(2, n, 2, head_dim)
        if layout == "heads before rows":
            self.q = make(2, 2, n, head_dim).transpose(1, 2)
        self.dots = [make(DIRECTIONS, 2, n, 2, head_dim) for _ in range(3)]
        self.dout, self.dout_dot = make(2, n, 2, head_dim), make(DIRECTIONS, 2, n, 2, head_dim)
        self.dlse = make(2, 2, n).to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.scale = scale
        self.mask = torch.rand(2, n, device=device) < 0.8 if masked else None
        self.seed = torch.tensor([7], device=device) if self.dropout_p else None

    def rest(self, negates_q):
        """The arguments behind the tensors."""
        return PLAN.flat(), self.scale if negates_q else -self.scale, self.mask, self.dropout_p, self.seed

    def inputs(self, negates_q):
        return -self.q if negates_q else self.q, self.k, self.v

    def tangents(self, negates_q):
        q_dot, k_dot, v_dot = self.dots
        return -q_dot if negates_q else q_dot, k_dot, v_dot

    def forward(self, negates_q):
        return operators.forward(*self.inputs(negates_q), *self.rest(negates_q))

    def backward(self, negates_q):
        saved = *self.inputs(negates_q), *self.forward(True)
        return operators.backward(self.dout, self.dlse, *saved, *self.rest(negates_q))

    def backward_out(self, negates_q):
        saved = *self.inputs(negates_q), *self.forward(True)
        grads = torch.full((*self.q.shape[:2], 3, *self.q.shape[2:]), torch.nan).to(self.q).unbind(2)
        operators.backward_out(self.dout, self.dlse, *saved, *self.rest(negates_q), *grads)
        return grads

    def forward_jvp(self, negates_q):
        return operators.forward_jvp(*self.inputs(negates_q), *self.tangents(negates_q), *self.rest(negates_q))

    def jvp(self, negates_q):
        given = *self.inputs(negates_q), *self.forward(True), *self.tangents(negates_q)
        return operators.jvp(*given, *self.rest(negates_q))

    def backward_jvp(self, negates_q):
        out, lse, out_dot, lse_dot = self.forward_jvp(True)
        dlse_dot = torch.ones_like(lse_dot)
        given = *self.inputs(negates_q), out, lse, *self.tangents(negates_q), out_dot, lse_dot
        grads = self.dout_dot, dlse_dot, self.dout, self.dlse
        return operators.backward_jvp(*grads, *given, *self.rest(negates_q), True)


# Operators, and which of their results have the sign of q.
CALLS = {
    "forward": (),
    "backward": (0,),
    "backward_out": (0,),
    "forward_jvp": (),
    "jvp": (),
    "backward_jvp": (0, 3),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_operators(device, operator, dtype, scale, options):
    if device.type == "cuda" and "jvp" in operator:
        pytest.skip("composed out of the forward and of framework operators")
    if device.type == "cuda" and DTYPES[dtype] == torch.float64:
        pytest.skip("no GPU kernel serves fp64")
    call = getattr(Problem(device, DTYPES[dtype], scale, options), operator)
    assert_same(call(False), call(True), CALLS[operator])


@pytest.mark.parametrize("operator", ["forward", "backward", "backward_jvp"])
def test_minus_zero_is_zero(device, operator):
    if device.type == "cuda" and operator == "backward_jvp":
        pytest.skip("composed out of the forward and of framework operators")
    problem = Problem(device, torch.float32, 0.0, "plain")
    problem.inputs, problem.tangents = lambda _: (problem.q, problem.k, problem.v), lambda _: problem.dots
    call = getattr(problem, operator)
    assert_same(call(False), call(True))


@pytest.mark.parametrize("layout", ["packed", "one head for all", "heads before rows"])
@pytest.mark.parametrize("operator", ["forward", "backward", "backward_out"])
def test_layouts(device, operator, layout):
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 64):
            problem = Problem(device, dtype, 0.3, "plain", layout, head_dim)
            before = problem.q.clone()
            call = getattr(problem, operator)
            assert_same(call(False), call(True), CALLS[operator])
            assert torch.equal(problem.q, before)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_autograd(device, mode):
    def run(q, k, v, scale):
        return ma.attention(q, k, v, PLAN, softmax_scale=scale, return_lse=True)

    if mode == "compiled":
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    problem = Problem(device, torch.float32, 0.3, "plain")
    results = []
    for negates_q in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in problem.inputs(negates_q)]
        outputs = run(*leaves, 0.3 if negates_q else -0.3)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, (problem.dout, problem.dlse))])
    assert_same(*results, negated=(2,))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_packed_buffers(device, dtype):
    """The layer's step in eager mode, which rotates q where it lies and may put dq in its place."""
    n, head_dim = PLAN.num_queries, 64
    buffer = torch.randn(2, n, 3, 2, head_dim, device=device).to(DTYPES[dtype])
    freqs = torch.polar(torch.ones(1, n, head_dim // 2), torch.randn(1, n, head_dim // 2)).to(device)
    dout = torch.randn(2, n, 2 * head_dim, device=device).to(DTYPES[dtype])
    sign = torch.tensor([-1, 1, 1], device=device, dtype=DTYPES[dtype])[:, None, None]
    results = []
    for negates_q in (False, True):
        leaf = (buffer * sign if negates_q else buffer.clone()).requires_grad_()
        call = package_ops.packed_call([leaf.shape], [2], [None], PLAN, 0.3 if negates_q else -0.3, 0.0)
        out = package_ops.attend_in_place([leaf * 1], [torch.view_as_real(freqs)], None, None, call)[0]
        (grad,) = torch.autograd.grad(out, leaf, dout)
        results.append([out, *(grad * sign).unbind(2)] if negates_q else [out, *grad.unbind(2)])
    for got, expected in zip(*results, strict=True):  # by value: a zero loses its sign where it is rotated back
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [float("nan"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(device, scale):
    problem = Problem(device, torch.float32, scale, "plain")
    for operator in ("forward", "backward_out", "forward_jvp"):
        with pytest.raises(ValueError, match="softmax_scale: expected a finite number"):
            getattr(problem, operator)(True)
