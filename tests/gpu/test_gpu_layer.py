"""The layer on a GPU: scenes, caches, mixed precision, the compiler, graphs, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from compare import deterministic
from layers import (
    CROSS,
    DENSE,
    GROUPS,
    JOINT,
    SCENES,
    SELF,
    Scene,
    assert_equal_in_fp64,
    gradients,
    make_freqs,
    make_layer,
    make_x,
    num_products,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixed_attention as ma
from mixed_attention.layers import mixed as module

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["cuda"], indirect=True, scope="session")]

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Anchors and queries of two domains, over several tiles, with the heads of real models.
REAL = Scene(dict(zip(GROUPS, (150, 210, 97, 130))), SELF.attends)
REAL_CROSS = Scene(REAL.sizes, CROSS.attends)
REAL_SHAPE = {"dim": 192, "num_heads": 3}


@pytest.fixture(autouse=True)
def skips_whatever_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tokens are too few for the layers to make no keys of those that nobody attends to: here they do."""
    monkeypatch.setitem(module.LEAST_SKIPPED, "cuda", 0)


def dense(layer: nn.Module, x: Tensor, scene: Scene, freqs: Tensor | None = None) -> Tensor:
    """The layer by torch's own attention under a mask; its error is the yardstick."""
    qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    if freqs is not None:
        q, k = (ma.apply_rope(t.transpose(1, 2), freqs).transpose(1, 2) for t in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=scene.counts().to(x.device) > 0)
    return layer.proj(out.transpose(1, 2).flatten(2))


def make_tokens(scene: Scene, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, scene.num_tokens, dim, generator=generator)
    return x.to(device, dtype).requires_grad_()


def results(out: Tensor, x: Tensor, layer: nn.Module, *more: Tensor) -> list[Tensor]:
    wanted = [x, *more, *layer.parameters()]
    return [out.detach(), *gradients(out, wanted)]


def assert_as_exact_as_torch(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Twice the error of torch's own layer, plus one rounding of the result."""
    for index, (got, yardstick, expected) in enumerate(zip(ours, theirs, exact)):
        assert got.dtype == yardstick.dtype
        rounding = torch.finfo(got.dtype).eps * expected.abs().max()
        bound = 2 * (yardstick - expected).abs().max() + rounding
        assert (got - expected).abs().max() <= bound, f"result {index}"


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("scene", [*SCENES.values(), REAL], ids=[*SCENES, "real"])
def test_output_and_gradients(scene, use_rope, dtype, device):
    shape = REAL_SHAPE if scene is REAL else {}
    layer = make_layer(dtype=dtype, use_rope=use_rope, **shape).to(device)
    x = make_tokens(scene, layer.qkv.in_features, dtype, device)
    freqs = make_freqs(scene.num_tokens, head_dim=layer.head_dim).to(device, torch.complex64) if use_rope else None
    ours = results(layer(x, scene.specs, scene.patterns, freqs=freqs), x, layer)
    theirs = results(dense(layer, x, scene, freqs), x, layer)
    layer64, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    freqs64 = None if freqs is None else freqs.to(torch.complex128)
    exact = results(dense(layer64, x64, scene, freqs64), x64, layer64)
    assert_as_exact_as_torch(ours, theirs, exact)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_keys_of_few_tokens_are_made_whether_read_or_not(dtype, device, monkeypatch):
    layer = make_layer(dtype=dtype, use_rope=True, **REAL_SHAPE).to(device)
    x = make_tokens(REAL, 192, dtype, device)
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)
    layer64, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact = results(dense(layer64, x64, REAL, freqs.to(torch.complex128)), x64, layer64)
    theirs = results(dense(layer, x, REAL, freqs), x, layer)
    monkeypatch.undo()  # as users have it
    out = layer(x, REAL.specs, REAL.patterns, freqs=freqs)
    assert num_products(out) == 1
    assert_as_exact_as_torch(results(out, x, layer), theirs, exact)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_gradient_of_the_frequencies(parallel, dtype, device):
    layer = make_layer(dtype=dtype, use_rope=True, parallel=parallel, **REAL_SHAPE).to(device)
    x = make_tokens(REAL, 192, dtype, device)
    every = []
    for layer_, x_, complex_dtype, forward in (
        (layer, x, torch.complex64, lambda layer, x, freqs: layer(x, REAL.specs, REAL.patterns, freqs=freqs)),
        (layer, x, torch.complex64, lambda layer, x, freqs: dense(layer, x, REAL, freqs)),
        (copy.deepcopy(layer).double(), x.double(), torch.complex128, lambda *a: dense(*a[:2], REAL, a[2])),
    ):
        freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64).to(complex_dtype).requires_grad_()
        (grad,) = gradients(forward(layer_, x_, freqs), [freqs])
        every.append([torch.view_as_real(grad)])
    assert_as_exact_as_torch(*every)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_double_precision_is_that_of_the_cpu(scene, device):
    layer, x, freqs = make_layer(use_rope=True), make_x(scene), make_freqs(scene.num_tokens)
    mask = torch.rand(2, scene.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    expected = results(layer(x, scene.specs, scene.patterns, freqs=freqs, key_padding_mask=mask), x, layer)
    there, x_there = copy.deepcopy(layer).to(device), x.detach().to(device).requires_grad_()
    options = {"freqs": freqs.to(device), "key_padding_mask": mask.to(device)}
    got = results(there(x_there, scene.specs, scene.patterns, **options), x_there, there)
    assert_equal_in_fp64([t.cpu() for t in got], expected)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_cached_groups_give_the_rows_of_the_uncached_call(dtype, device):
    layer = make_layer(dtype=dtype, use_rope=True, **REAL_SHAPE).to(device).eval()
    x = make_tokens(REAL, 192, dtype, device).detach()
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)
    expected, cache = layer(x, REAL.specs, REAL.patterns, freqs=freqs, return_kv_cache=True)
    rows = REAL.rows(GROUPS[1], GROUPS[3])
    specs = [ma.TokenSpec(name, None if "anchors" in name else size) for name, size in REAL.sizes.items()]
    out = layer(x[:, rows], specs, REAL.patterns, freqs=freqs[:, rows], kv_cache=cache)
    exact = dense(copy.deepcopy(layer).double(), x.double(), REAL, freqs.to(torch.complex128))[:, rows]
    assert_as_exact_as_torch([out], [expected[:, rows]], [exact])


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_masked_tokens_do_not_matter(dtype, device):
    layer = make_layer(dtype=dtype, **REAL_SHAPE).to(device)
    x = make_tokens(REAL, 192, dtype, device).detach()
    mask = torch.rand(2, REAL.num_tokens, device=device) < 0.7
    other = torch.where(mask[..., None], x, 7.0)
    outs = [layer(tokens, REAL.specs, REAL.patterns, key_padding_mask=mask) for tokens in (x, other)]
    assert torch.equal(outs[0][mask], outs[1][mask])


# Mixed precision and recomputation.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_training_step_in_mixed_precision(dtype, device):
    """Autocast, loss scaling, gradients, one step of the optimiser: against the same step in fp64."""
    layer = make_layer(dtype=torch.float32, use_rope=True, **REAL_SHAPE).to(device)
    x = make_tokens(REAL, 192, torch.float32, device).detach()
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)

    def train(layer: nn.Module, forward, autocast: bool) -> list[Tensor]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=autocast)
        with torch.autocast("cuda", dtype, enabled=autocast):
            loss = forward(layer).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [parameter.grad.clone() for parameter in layer.parameters()]
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(not torch.equal(p, b) for p, b in zip(layer.parameters(), before))
        return [loss.detach(), *grads]

    ours = train(copy.deepcopy(layer), lambda layer: layer(x, REAL.specs, REAL.patterns, freqs=freqs), True)
    theirs = train(copy.deepcopy(layer), lambda layer: dense(layer, x, REAL, freqs), True)
    layer64, freqs64 = copy.deepcopy(layer).double(), freqs.to(torch.complex128)
    exact = train(layer64, lambda layer: dense(layer, x.double(), REAL, freqs64), False)
    for name, got, yardstick, expected in zip(("loss", *dict(layer.named_parameters())), ours, theirs, exact):
        bound = 2 * (yardstick - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
        assert (got - expected).abs().max() <= bound, name


@pytest.mark.parametrize("scene", [REAL, REAL_CROSS], ids=["keys of anchors", "keys of others"])
def test_gradients_under_autocast_are_those_of_fp32_sums(scene, device):
    """Products of 16-bit numbers leave the tensor cores in fp32: nothing rounds them to 16 bits on their way."""
    layer = make_layer(dtype=torch.float32, use_rope=True, **REAL_SHAPE).to(device)
    x = make_tokens(scene, layer.qkv.in_features, torch.float32, device)
    freqs = make_freqs(scene.num_tokens, head_dim=layer.head_dim).to(device, torch.complex64)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(x, scene.specs, scene.patterns, freqs=freqs)
    for grad in gradients(out, [x, *layer.parameters()]):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@pytest.mark.parametrize("scene", [REAL, REAL_CROSS], ids=["keys of anchors", "keys of others"])
def test_gradients_of_a_single_sequence_are_those_in_a_batch(scene, dtype, device):
    layer = make_layer(dtype=dtype, use_rope=True, **REAL_SHAPE).to(device)
    batch = make_tokens(scene, layer.qkv.in_features, dtype, device)
    freqs = make_freqs(scene.num_tokens, head_dim=layer.head_dim).to(device, torch.complex64)

    def gradient(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            out = layer(x, scene.specs, scene.patterns, freqs=freqs)
        return torch.autograd.grad(out.float().square().sum(), x)[0]

    got, expected = gradient(batch[:1].detach().requires_grad_()), gradient(batch)[:1]
    assert (got - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scene", [REAL, JOINT], ids=["real", "joint"])
def test_activation_checkpointing(scene, use_reentrant, device):
    shape = REAL_SHAPE if scene is REAL else {}
    layer = make_layer(dtype=torch.float32, use_rope=True, dropout=0.2, **shape).to(device)
    x = make_tokens(scene, layer.qkv.in_features, torch.float32, device)
    freqs = make_freqs(scene.num_tokens, head_dim=layer.head_dim).to(device, torch.complex64)
    arguments = (x, scene.specs, scene.patterns, None, freqs)
    every = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        x.grad = None
        with deterministic(), torch.autocast("cuda", torch.float16):
            out = checkpoint(layer, *arguments, use_reentrant=use_reentrant) if recompute else layer(*arguments)
            out.float().square().sum().backward()  # reentrant checkpoints refuse autograd.grad
        every.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*every))


# The compiler and graphs.


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layers_compute_what_eager_ones_do(mode, device):
    """Several steps with new data, among them the ones in which the compiler records and replays CUDA graphs."""
    torch._dynamo.reset()
    layer = make_layer(dtype=torch.float32, use_rope=True, **REAL_SHAPE).to(device)
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)
    compiled = torch.compile(layer, fullgraph=True, mode=None if mode == "default" else mode)
    layer64, freqs64 = copy.deepcopy(layer).double(), freqs.to(torch.complex128)
    for seed in range(4):
        x = make_tokens(REAL, 192, torch.float32, device, seed)
        every = []
        for function in (compiled, layer):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16):
                out = function(x, REAL.specs, REAL.patterns, freqs=freqs)
            every.append([t.clone() for t in results(out, x, layer)])
        x64 = x.detach().double().requires_grad_()
        exact = results(dense(layer64, x64, REAL, freqs64), x64, layer64)
        for got, eager, expected in zip(*every, exact):
            bound = 2 * (eager - expected).abs().max() + torch.finfo(torch.bfloat16).eps * expected.abs().max()
            assert (got - expected).abs().max() <= bound
    torch._dynamo.reset()


def test_a_training_step_as_a_graph(device):
    """Forward and backward of the layer, captured once and replayed with new tokens."""
    layer = make_layer(dtype=torch.float32, use_rope=True, dropout=0.0, **REAL_SHAPE).to(device)
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)
    static = make_tokens(REAL_CROSS, 192, torch.float32, device)

    def step(x: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            out = layer(x, REAL_CROSS.specs, REAL_CROSS.patterns, freqs=freqs)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])]

    with deterministic():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(static), step(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(static)
        for seed in (2, 3):
            x = make_tokens(REAL_CROSS, 192, torch.float32, device, seed)
            with torch.no_grad():
                static.copy_(x)
            graph.replay()
            for got, expected in zip(captured, step(x)):
                assert torch.equal(got, expected)


class Fixed(nn.Module):
    """A layer with the groups and patterns of all its calls, so that only tensors are left to say."""

    def __init__(self, layer: nn.Module, scene: Scene) -> None:
        super().__init__()
        self.layer, self.specs, self.patterns = layer, scene.specs, scene.patterns

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        return self.layer(x, self.specs, self.patterns, freqs=freqs)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_graphed_callables(dtype, device):
    """Both passes as graphs of torch's own making, called as the layer is."""
    eager = Fixed(make_layer(use_rope=True, dtype=torch.float32, **REAL_SHAPE).to(device), REAL)
    freqs = make_freqs(REAL.num_tokens, head_dim=64).to(device, torch.complex64)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        sample = make_tokens(REAL, 192, torch.float32, device)
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(eager), (sample, freqs))
        for seed in (2, 3):
            x, found = make_tokens(REAL, 192, torch.float32, device, seed), []
            for module in (eager, graphed):
                out = module(x, freqs)
                grads = gradients(out, [x, *module.parameters()])
                found.append([out.detach().clone(), *(grad.clone() for grad in grads)])
            for expected, got in zip(*found):
                assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_frequencies_of_a_device(device):
    """Coordinates to rotations, where the tokens are."""
    coords = torch.rand(2, 50, 3) * 1000
    rope = ma.RopeFrequency(64, 3)
    expected = rope(coords)
    got = copy.deepcopy(rope).to(device)(coords.to(device)).cpu()
    angle = coords.abs().max() * torch.finfo(torch.float32).eps  # half an ulp each of frequency and product
    assert (got - expected).abs().max() <= 2 * angle + 1e-6


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_perceiver(dtype, device):
    layer = make_layer(ma.PerceiverAttention, kv_dim=40, dtype=dtype, **REAL_SHAPE).to(device)
    torch.manual_seed(0)
    tokens = [torch.randn(2, n, c).to(device, dtype).requires_grad_() for n, c in ((77, 192), (130, 40))]

    def attend(layer: nn.Module, q: Tensor, kv: Tensor) -> Tensor:
        q, (k, v) = layer.q(q), layer.kv(kv).chunk(2, -1)
        heads = (t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, v))
        return layer.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    ours = [(out := layer(*tokens)).detach(), *gradients(out, [*tokens, *layer.parameters()])]
    theirs = [(out := attend(layer, *tokens)).detach(), *gradients(out, [*tokens, *layer.parameters()])]
    layer64, tokens64 = copy.deepcopy(layer).double(), [t.detach().double().requires_grad_() for t in tokens]
    exact = [(out := attend(layer64, *tokens64)).detach(), *gradients(out, [*tokens64, *layer64.parameters()])]
    assert_as_exact_as_torch(ours, theirs, exact)


# Gradients over what was saved.

LARGE = Scene(dict(zip(GROUPS, (2050, 1500, 1800, 2100))), SELF.attends)


def make_training_call(
    device: torch.device,
    cls: type[nn.Module] = ma.MixedAttention,
    *,
    scene: Scene = LARGE,
    batch_size: int = 2,
    head_dim: int = 64,
    use_rope: bool = True,
    dtype: torch.dtype = torch.bfloat16,
):
    dim = 384
    layer = make_layer(cls, dtype=dtype, use_rope=use_rope, dim=dim, num_heads=dim // head_dim).to(device)
    x = make_tokens(scene, dim, dtype, device).detach()[:batch_size].requires_grad_()
    freqs = make_freqs(scene.num_tokens, head_dim=head_dim).to(device, torch.complex64) if use_rope else None
    return layer, x, lambda **more: layer(x, scene.specs, scene.patterns, freqs=freqs, **more)


def assert_same_gradients(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """But for the order in which parts of dq are added up."""
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 2 * torch.finfo(ours.dtype).eps * theirs.abs().max()


def memory_of_backward(out: Tensor, wanted: Sequence[Tensor], *, retain_graph: bool = False) -> int:
    """Beside what was there before."""
    torch.cuda.reset_peak_memory_stats(out.device)
    before = torch.cuda.memory_allocated(out.device)
    gradients(out, wanted, retain_graph=retain_graph)
    return torch.cuda.max_memory_allocated(out.device) - before


def projection_bytes(x: Tensor, scene: Scene) -> int:
    """The bytes of all queries, and of the keys and values of two groups."""
    keys = scene.sizes[GROUPS[0]] + scene.sizes[GROUPS[2]]
    return x.nbytes // scene.num_tokens * (scene.num_tokens + 2 * keys)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_gradients_take_the_place_of_what_nobody_needs_any_more(head_dim, device):
    layer, x, call = make_training_call(device, head_dim=head_dim)
    wanted = [x, *layer.parameters()]
    # Half of the fp32 sums of dq take the place of the output.
    spared = projection_bytes(x, LARGE) + (x.nbytes if head_dim == 64 else 0)
    memory_of_backward(call(), wanted)  # the first one of a process takes more
    kept, last = (memory_of_backward(call(), wanted, retain_graph=keeps) for keeps in (True, False))
    assert kept - last > 0.9 * spared


@pytest.mark.parametrize("batch_size, head_dim", [(2, 64), (1, 32)], ids=["of sequences", "of heads"])
def test_sums_of_dq_in_two_shares(batch_size, head_dim, device):
    scene = Scene(dict(zip(GROUPS, (8000, 300, 7900, 211))), SELF.attends)
    layer, x, call = make_training_call(device, scene=scene, batch_size=batch_size, head_dim=head_dim)
    wanted, out = [x, *layer.parameters()], call()
    expected, got = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, False))
    assert_same_gradients(got, expected)
    kept, last = (memory_of_backward(call(), wanted, retain_graph=keeps) for keeps in (True, False))
    if torch.cuda.get_device_properties(device).multi_processor_count == 132:  # two shares take as many rounds as one
        assert kept - last > 0.9 * (projection_bytes(x, scene) + 2 * x.nbytes)


def test_memory_of_the_backward_beside_what_was_saved(device):
    """A gradient each of the output and of the attention's; that of the tokens has room where others were."""
    layer, x, call = make_training_call(device, batch_size=1, head_dim=128, dtype=torch.float32)

    def memory() -> int:
        with torch.autocast("cuda", torch.bfloat16):
            out = call()
        return memory_of_backward(out, [x, *layer.parameters()])

    memory()  # the first one of a process takes more
    assert memory() < 2.5 * x.nbytes / 2


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "padding mask"])
@pytest.mark.parametrize("is_deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128])
def test_a_graph_that_is_kept_is_not_overwritten(head_dim, is_deterministic, masked, device):
    layer, x, call = make_training_call(device, head_dim=head_dim)
    mask = torch.rand(2, LARGE.num_tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    wanted, out = [x, *layer.parameters()], call(key_padding_mask=mask.to(device) if masked else None)
    with deterministic() if is_deterministic else nullcontext():
        first, second, last = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, True, False))
    assert_same_gradients(second, first)
    assert_same_gradients(last, first)


# q, k and v in one buffer. In the ring queries read three key segments, for which deterministic mode has two kernels.
RING = Scene(LARGE.sizes, [([GROUPS[i]], [GROUPS[(i + step) % 4] for step in range(3)]) for i in range(4)])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scene", [RING, Scene(LARGE.sizes, DENSE.attends)], ids=["ring", "dense"])
def test_equal_bits_in_place(scene, head_dim, device):
    layer, x, call = make_training_call(device, scene=scene, head_dim=head_dim)
    wanted, out = [x, *layer.parameters()], call()
    with deterministic():
        expected, got = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, False))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("head_dim, dtype", [(48, torch.float32), (64, torch.float16), (128, torch.float16)])
def test_gradients_in_place_of_other_dtypes(head_dim, dtype, use_rope, device):
    layer, x, call = make_training_call(device, head_dim=head_dim, dtype=dtype, use_rope=use_rope)
    wanted, out = [x, *layer.parameters()], call()
    expected, got = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, False))
    assert_same_gradients(got, expected)


def hold_graph(out: Tensor) -> Callable[[], Tensor]:
    """An operation that saves the output for its own backward."""
    ones = torch.ones_like(out, requires_grad=True)
    product = (out.detach() * ones).sum()
    return lambda: torch.autograd.grad(product, ones)[0]


def hold_view(out: Tensor) -> Callable[[], Tensor]:
    view = out.detach()[:, :, 7:]
    return lambda: F.pad(view, (7, 0))


HOLDERS: dict[str, Callable[[Tensor], Callable[[], Tensor]]] = {
    "tensor": lambda out: lambda: out.detach(),
    "view": hold_view,
    "graph": hold_graph,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_output_that_somebody_holds_is_not_overwritten(head_dim, hold, device):
    layer, x, call = make_training_call(device, head_dim=head_dim)
    wanted, (expected, seen) = [x, *layer.parameters()], ([], [])

    def hook(proj: nn.Module, inputs: tuple[Tensor]) -> None:
        expected.append(hold(inputs[0].clone())())
        seen.append(hold(inputs[0]))

    layer.proj.register_forward_pre_hook(hook)
    out = call()
    kept, last = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, False))
    assert_same_gradients(last, kept)
    assert torch.equal(seen[0](), expected[0])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_an_output_that_is_used_twice_or_hooked(head_dim, device):
    layer, x, call = make_training_call(device, head_dim=head_dim)
    wanted = [x, *layer.parameters()]
    hooked: list[Tensor] = []

    def use_twice(proj: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        inputs[0].register_hook(hooked.append)
        inputs[0].retain_grad()
        return inputs[0] + inputs[0].sin()

    layer.proj.register_forward_pre_hook(use_twice)
    out = call()
    kept, last = (gradients(out, wanted, retain_graph=keeps) for keeps in (True, False))
    assert_same_gradients(last, kept)
    assert_same_gradients(hooked[1:], hooked[:1])


def test_a_recorded_cache_is_not_overwritten(device):
    layer, x, call = make_training_call(device, ma.noether.MixedAttention)
    out, cache = call()
    entries = [entry[name] for entry in cache.values() for name in ("k", "v")]
    expected = [entry.detach().clone() for entry in entries]
    gradients(out, [x, *layer.parameters()])
    assert all(torch.equal(*pair) for pair in zip(entries, expected))


def test_a_single_entry_of_a_cache_that_nothing_rotated_is_not_overwritten(device):
    scene = Scene(LARGE.sizes, DENSE.attends)
    layer, x, call = make_training_call(device, ma.noether.MixedAttention, scene=scene, use_rope=False)
    out, cache = call()
    keys = next(iter(cache.values()))["k"]
    del cache
    expected = keys.detach().clone()
    gradients(out, [x, *layer.parameters()])
    assert torch.equal(keys, expected)


def test_what_a_hook_on_saved_tensors_holds_is_not_overwritten(device):
    layer, x, call = make_training_call(device)
    held: list[tuple[Tensor, Tensor]] = []

    def pack(saved: Tensor) -> Tensor:
        held.append((saved, saved.clone()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        out = call()
    gradients(out, [x, *layer.parameters()])
    assert all(torch.equal(*pair) for pair in held)
