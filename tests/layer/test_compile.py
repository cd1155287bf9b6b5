"""The compiler, export, autocast and checkpointing."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mixed_attention as ma

NAMES = ("sa", "sq", "va", "vq")
PATTERNS = [ma.AttentionPattern(["sa", "sq"], ["sa", "va"]), ma.AttentionPattern(["va", "vq"], ["va"])]


def specs_of(sizes):
    return [ma.TokenSpec(name, size) for name, size in zip(NAMES, sizes)]


def attend(x, specs, **options):
    return ma.attention(x.sin(), x.cos(), x, ma.AttentionPlan.compile(specs, PATTERNS), **options).square()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_new_sizes_compile_once_more_and_never_again(grad):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    # Every size and the total differ between the first two calls: that is when sizes become symbolic.
    for sizes in [(5, 7, 4, 3), (6, 9, 8, 2), (9, 10, 11, 12), (13, 2, 2, 5), (40, 3, 20, 31)]:
        x = torch.randn(2, sum(sizes), 2, 8, requires_grad=grad)
        out, expected = compiled(x, specs_of(sizes)), attend(x, specs_of(sizes))
        assert torch.equal(out, expected)
        if grad:
            dout = torch.randn_like(out)
            torch.testing.assert_close(*(torch.autograd.grad(y, x, dout)[0] for y in (out, expected)))
    assert counter.frame_count == 2


def test_row_ranges_compile_once_for_all_sizes():
    def attend_rows(x, first):
        rows = [(0, first, [(0, first)]), (first, x.shape[1], [(first, x.shape[1]), (0, 2)])]
        return ma.attention(x.sin(), x.cos(), x, ma.AttentionPlan.from_segments(rows, x.shape[1]))

    counter = CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(attend_rows, backend=counter, fullgraph=True, dynamic=True), []
    for first, second in [(5, 7), (6, 9), (13, 4), (40, 31)]:
        x = torch.randn(2, first + second, 2, 8)
        assert torch.equal(compiled(x, first), attend_rows(x, first))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_inductor():
    compiled = torch.compile(attend, fullgraph=True)
    x = torch.randn(2, 19, 2, 8, requires_grad=True)
    out, expected = compiled(x, specs_of((5, 7, 4, 3))), attend(x, specs_of((5, 7, 4, 3)))
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dout)[0] for y in (out, expected)))


def test_dropout_under_the_compiler_is_that_of_eager():
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 19, 2, 8, requires_grad=True)
    results = []
    for function in (compiled, attend):
        torch.manual_seed(3)
        out = function(x, specs_of((5, 7, 4, 3)), dropout_p=0.5)
        results.append((out, torch.autograd.grad(out.sum(), x)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_inside_the_compiler_are_right_or_raise(transform):
    specs = specs_of((5, 7, 4, 3))

    def transformed(x):
        def attention(t):
            return attend(t, specs)

        if transform == "vmap":
            return torch.vmap(attention)(torch.stack([x, x.sin()]))
        if transform == "grad":
            return torch.func.grad(lambda t: attention(t).sum())(x)
        return torch.func.jvp(attention, (x,), (x.cos(),))[1]

    x = torch.randn(2, 19, 2, 8, dtype=torch.float64)
    try:
        got = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x)
    except (RuntimeError, NotImplementedError):  # the compiler's own errors among them
        return
    torch.testing.assert_close(got, transformed(x))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return attend(x, specs_of((5, 7, 4, 3)))

    x = torch.randn(2, 19, 2, 8)
    exported = torch.export.export(Module(), (x,))
    torch.testing.assert_close(exported.module()(x), attend(x, specs_of((5, 7, 4, 3))))


def test_autocast_casts_once():
    x = torch.randn(2, 19, 2, 8)
    plan = ma.AttentionPlan.compile(specs_of((5, 7, 4, 3)), PATTERNS)
    with torch.autocast("cpu", torch.bfloat16):
        out = ma.attention(x, x, x, plan)
    assert out.dtype == torch.bfloat16
    half = x.bfloat16()
    assert torch.equal(out, ma.attention(half, half, half, plan))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(dropout_p, use_reentrant):
    x = torch.randn(2, 19, 2, 8, requires_grad=True)
    specs = specs_of((5, 7, 4, 3))
    results = []
    for through in (False, True):
        torch.manual_seed(1)
        function = partial(attend, specs=specs, dropout_p=dropout_p)
        out = checkpoint(function, x, use_reentrant=use_reentrant) if through else function(x)
        x.grad = None
        out.sum().backward()  # reentrant checkpoints refuse autograd.grad
        results.append((out, x.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
