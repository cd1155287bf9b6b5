"""Several GPUs of one host over NCCL against one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from layers import DIM, Scene, make_freqs, make_layer, make_x
from ranks import Ranks
from shares import CUTS, cut
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import mixed_attention as ma
from mixed_attention import ops

NUM_GPUS = torch.cuda.device_count()
SIZE = 2 ** (NUM_GPUS.bit_length() - 1) if NUM_GPUS else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SIZE < 2, reason="torch finds fewer than two GPUs"),
    pytest.mark.skipif(not ops.has_kernels("cuda", torch.float32), reason="built without CUDA kernels"),
]

SIZES = {"a": 700, "b": 900, "c": 512, "d": 1300}
SCENES = {
    "anchors": Scene(SIZES, [(["a", "b"], ["a"]), (["c", "d"], ["c", "a"])]),
    "self": Scene(SIZES, [([name], [name]) for name in SIZES]),
    "twice": Scene(SIZES, [(["a", "b"], ["a", "a"]), (["c", "d"], ["d", "b"])]),
}
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", UNIT, ids=str)


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    """A process for each GPU."""
    ranks = Ranks(SIZE, "cuda")
    yield ranks
    ranks.stop()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Twice the error of one process, and roundings of the parts that the ranks add up."""
    assert actual.shape == expected.shape == exact.shape
    if not exact.numel():  # a rank without tokens
        return
    error, alone = ((t.double() - exact).abs().max() for t in (actual, expected))
    assert error <= 2 * alone + 4 * UNIT[dtype] * exact.abs().max(), (
        error.item(),
        alone.item(),
        exact.abs().max().item(),
    )


def operator(mesh, scene_name: str, how: str, dtype: torch.dtype, masked: bool) -> None:
    scene = SCENES[scene_name]
    share = cut(scene, mesh, how)
    generator = torch.Generator().manual_seed(1)
    tensors = torch.randn(4, 1, scene.num_tokens, 3, 64, generator=generator).cuda().to(dtype)
    q, k, v, dout = tensors
    mask = (torch.rand(1, scene.num_tokens, generator=generator) > 0.3).cuda() if masked else None
    plan = ma.AttentionPlan.compile(scene.specs, scene.patterns)

    def run(*leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        out = ma.attention(*leaves, plan, key_padding_mask=mask)
        return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    exact, one = run(q.double(), k.double(), v.double()), run(q, k, v)
    here = [t.requires_grad_() for t in share.of(q, k, v)]
    specs = share.sharded
    sharded_plan = ma.AttentionPlan.compile(specs, scene.patterns)
    keys = ma.distributed.gather_keys(*here[1:], specs, mesh)
    their_mask = None if mask is None else ma.distributed.gather(*share.of(mask), specs, mesh=mesh)
    out = ma.attention(here[0], *keys, sharded_plan, key_padding_mask=their_mask)
    got = out, *torch.autograd.grad(out, here, dout[:, share.rows])
    for actual, alone, truth in zip(got, one, exact):
        assert_near(actual, alone[:, share.rows], truth[:, share.rows], dtype)


@DTYPES
@pytest.mark.parametrize("scene", SCENES)
def test_operator(gpus, scene, dtype):
    for how in CUTS:
        gpus.run(SIZE, operator, scene, how, dtype, how == "random")


def layer(mesh, how: str, knows: bool, mode: str) -> None:
    scene = SCENES["anchors"]
    share = cut(scene, mesh, how)
    whole = make_layer(ma.MixedAttention, use_rope=True, dtype=torch.float32).cuda()
    marked = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
    x, freqs = make_x(scene, dtype=torch.float32).detach().cuda(), make_freqs(scene.num_tokens).cuda()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).cuda()
    torch.use_deterministic_algorithms(mode == "deterministic")
    cast = torch.autocast("cuda", torch.bfloat16) if mode == "autocast" else nullcontext()
    try:
        results = []
        for module, rows, specs in ((whole, slice(None), scene.specs), (marked, share.rows, None)):
            specs = specs or (share.sharded if knows else share.specs)
            leaf = x[:, rows].clone().requires_grad_()
            with cast:
                out = module(leaf, specs, scene.patterns, freqs=freqs[:, rows])
            out.backward(direction[:, rows].to(out.dtype))
            results.append((out, leaf.grad))
        exact = copy.deepcopy(whole).double()
        leaf = x.double().requires_grad_()
        truth = exact(leaf, scene.specs, scene.patterns, freqs=freqs.to(torch.complex128))
        truth.backward(direction.double())
    finally:
        torch.use_deterministic_algorithms(False)
    dtype = torch.bfloat16 if mode == "autocast" else torch.float32
    for actual, alone, wanted in zip(results[1], results[0], (truth, leaf.grad)):
        assert_near(actual, alone[:, share.rows], wanted[:, share.rows], dtype)
    for name, parameter in marked.named_parameters():
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        assert_near(parameter.grad, whole.get_parameter(name).grad, exact.get_parameter(name).grad, dtype)


@pytest.mark.parametrize("mode", ["plain", "autocast", "deterministic"])
@pytest.mark.parametrize("knows", [False, True])
def test_layer(gpus, knows, mode):
    for how in CUTS:
        gpus.run(SIZE, layer, how, knows, mode)


def a_mesh_of_one(mesh) -> None:
    scene = SCENES["anchors"]
    whole = make_layer(ma.MixedAttention, dtype=torch.bfloat16).cuda()
    marked = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
    x = make_x(scene, dtype=torch.bfloat16).detach().cuda()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for module in (whole, marked):
            leaf = x.clone().requires_grad_()
            out = module(leaf, scene.specs, scene.patterns)
            out.sum().backward()
            results.append((out, leaf.grad, *(p.grad for p in module.parameters())))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_mesh_of_one_is_the_plain_path(gpus):
    gpus.run(1, a_mesh_of_one)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_layer(ma.MixedAttention, dtype=torch.float32) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))

    def forward(self, x, specs, patterns):
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x), specs, patterns)
        return x


def wrapped_model(mesh, wrapper: str, deterministic: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    scene = SCENES["anchors"]
    share = cut(scene, mesh, "random")
    whole = Model().cuda()
    model = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    x = make_x(scene, dtype=torch.float32).detach().cuda()
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(5):  # in the middle of a run, collectives of both kinds are in flight at once
            model.zero_grad()
            out = wrapped(x[:, share.rows], share.sharded, scene.patterns)
            (out.square().sum() * mesh.size()).backward()
        whole(x, scene.specs, scene.patterns).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        wanted = whole.get_parameter(name).grad
        bound = 1e-3 * max(wanted.abs().max().item(), 1.0)  # of three layers in a row, in fp32
        torch.testing.assert_close(grad, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrappers(gpus, wrapper, deterministic):
    gpus.run(SIZE, wrapped_model, wrapper, deterministic)


def captured_step(mesh) -> None:
    scene = SCENES["anchors"]
    share = cut(scene, mesh, "random")
    layer = make_layer(ma.MixedAttention, dtype=torch.bfloat16).cuda()
    parallelize_module(layer, mesh, ma.distributed.ContextParallel())
    x = make_x(scene, dtype=torch.bfloat16).detach().cuda()[:, share.rows].clone().requires_grad_()
    specs = share.sharded

    def step():
        out = layer(x, specs, scene.patterns)
        return out, *torch.autograd.grad(out.sum(), [x, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(2 * torch.randn(x.shape, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, step()):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * max(1.0, wanted.abs().max().item()))
    # Sizes that have to be asked for cannot be captured, which is said before anything waits.
    graph = torch.cuda.CUDAGraph()
    message = ""
    try:
        with torch.cuda.graph(graph):
            layer(x, share.specs, scene.patterns)
    except ValueError as error:
        message = str(error)
    assert "exchange_specs" in message
    torch.cuda.synchronize()


def test_a_step_in_a_cuda_graph(gpus):
    gpus.run(SIZE, captured_step)


def streamed(mesh) -> None:
    scene = Scene({"anchors": 1000}, [(["anchors"], ["anchors"])])
    share = cut(scene, mesh, "random")
    whole = make_layer(ma.MixedAttention, dtype=torch.bfloat16).cuda().eval()
    whole.cached_groups = frozenset(["anchors"])
    marked = parallelize_module(copy.deepcopy(whole), mesh, ma.distributed.ContextParallel())
    x = make_x(scene, batch_size=1, dtype=torch.bfloat16).detach().cuda()
    queries = torch.randn(1, 30_001, DIM, generator=torch.Generator().manual_seed(4)).bfloat16().cuda()
    with torch.no_grad():
        _, expected = whole(x, scene.specs, scene.patterns, return_kv_cache=True)
        _, shards = marked(x[:, share.rows], share.specs, scene.patterns, return_kv_cache=True)
    cache = ma.distributed.gather_cache(shards, mesh=mesh)
    patterns = [ma.AttentionPattern(["anchors", "queries"], ["anchors"])]

    def predict(chunk, layer=marked, cache=cache):
        groups = [ma.TokenSpec("anchors", None), ma.TokenSpec("queries", chunk.shape[1])]
        return layer(chunk, groups, patterns, kv_cache=cache)

    part = ma.distributed.share_of(queries.shape[1], mesh)
    got = ma.stream(predict, queries[:, part], chunk_size=5000 + 100 * mesh.get_local_rank())
    wanted = ma.stream(lambda chunk: predict(chunk, whole, expected), queries, chunk_size=7000)[:, part]
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.05 * wanted.abs().max().item())


def test_stream(gpus):
    gpus.run(SIZE, streamed)


def disagreement(mesh) -> tuple[str, str]:
    scene = SCENES["anchors"]
    share = cut(scene, mesh, "chunks")
    layer = make_layer(ma.MixedAttention, dtype=torch.float32).cuda()
    parallelize_module(layer, mesh, ma.distributed.ContextParallel())
    (x,) = share.of(make_x(scene, dtype=torch.float32).cuda())
    specs = share.specs if mesh.get_local_rank() else share.specs[::-1]
    try:
        layer(x, specs, scene.patterns)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_ranks_that_disagree(gpus):
    raised = gpus.run(SIZE, disagreement)
    assert len(set(raised)) == 1 and raised[0][0] == "ValueError", raised
