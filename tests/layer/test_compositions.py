"""Compositions: whatever a layer is put into, together with whatever else, computes what it computes by itself.

Each factor below says one way to use a layer. Every two values of two factors meet in some row of a table, and every
row is a test: its outputs, its caches and all its gradients are those of the same model with the layers written out
over :mod:`mixed_attention.reference`, in fp64. Under autocast they may be off by twice what the written-out layers are,
and one rounding.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mixed_attention as ma

DIM, NUM_HEADS, BATCH_SIZE, NUM_RANKS = 16, 2, 2, 2
SIZES = {"s_anchors": 5, "s_queries": 4, "v_anchors": 3, "v_queries": 6}
PATTERNS = [
    ma.AttentionPattern(["s_anchors", "s_queries"], ["s_anchors", "v_anchors"]),
    ma.AttentionPattern(["v_anchors", "v_queries"], ["v_anchors"]),
]
CACHED = "s_anchors"  # by "read"; other keys are fresh

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
ATTENTION = [torch.ops.mixed_attention.forward.default]

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "plain": nullcontext,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
TRAINS = ("plain", "autocast")


def _selective(saved: list) -> Callable:
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, saved))


CHECKPOINTS: dict[str, Callable] = {
    "kept": lambda function, *arguments: function(*arguments),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "recomputed": partial(checkpoint, use_reentrant=False),
    "save_products": _selective(PRODUCTS),
    "save_attention": _selective(ATTENTION),
    "save_both": _selective(PRODUCTS + ATTENTION),
}
# Branches of modules: attention, norm, MLP; those with a plus are added to their input.
MODELS = {
    "bare": ["a"],
    "norm_attention": ["na"],
    "attention_mlp": ["am"],
    "residual": ["+na"],
    "two_attentions": ["aa"],
    "block": ["+na", "+nm"],
}
LAYOUTS = {"fused": ma.MixedAttention, "separate": ma.noether.MixedAttention}
AROUND = (
    "nothing",
    "module_hooks",
    "tensor_hooks",
    "save_on_cpu",
    "deepcopy",
    "pickle",
    "compile",
    "export",
    "ddp",
    "fsdp2",
    "fsdp2_of_wrapped",
)
ON_RANKS = ("ddp", "fsdp2", "fsdp2_of_wrapped")
WRAPPED = "_checkpoint_wrapped_module."  # in the names of parameters of modules in torch's own wrapper


@dataclass(frozen=True)
class Row:
    """One composition: a value of every factor."""

    mode: str
    kept: str
    model: str
    positions: str
    layout: str
    cache: str
    heads: str
    around: str

    def __str__(self) -> str:
        return "-".join(astuple(self))


FACTORS = (
    tuple(MODES),
    tuple(CHECKPOINTS),
    tuple(MODELS),
    ("rope", "no_rope"),
    tuple(LAYOUTS),
    ("fresh", "recorded", "read"),
    ("as_made", "normed"),
    AROUND,
)
assert len(FACTORS) == len(fields(Row))

# Pairs that say nothing, or that torch itself refuses, whatever the layers are.
MEANINGLESS = {
    *((mode, "tensor_hooks") for mode in ("no_grad", "inference_mode")),  # there are no gradients to hook
    *((kept, "export") for kept in CHECKPOINTS if kept != "kept"),  # a graph for inference keeps nothing
}

Pair = tuple[tuple[int, str], tuple[int, str]]


def _pairs(values: Sequence[str]) -> set[Pair]:
    """The pairs that a row, or the beginning of one, covers; values stand with the index of their factor."""
    return set(combinations(enumerate(values), 2))


def _is_meaningful(pair: Pair) -> bool:
    (_, first), (_, second) = pair
    return (first, second) not in MEANINGLESS


def _every_pair() -> set[Pair]:
    return {
        ((i, first), (j, second))
        for i, j in combinations(range(len(FACTORS)), 2)
        for first in FACTORS[i]
        for second in FACTORS[j]
        if _is_meaningful(((i, first), (j, second)))
    }


def covering_rows(seed: int = 0, candidates: int = 30) -> list[Row]:
    """Few rows that cover every meaningful pair: again and again the best of some that begin with a missing pair."""
    generator = random.Random(seed)
    missing = _every_pair()
    rows = []
    while missing:
        completed = [_complete(generator.choice(sorted(missing)), missing, generator) for _ in range(candidates)]
        best = max((row for row in completed if row), key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        rows.append(Row(*best))
    return sorted(rows, key=lambda row: AROUND.index(row.around))


def _complete(pair: Pair, missing: set[Pair], generator: random.Random) -> list[str] | None:
    """Adds the other values, each the one that covers most of what is missing; None if it comes to a dead end."""
    chosen = dict(pair)
    for factor in generator.sample(range(len(FACTORS)), len(FACTORS)):
        if factor in chosen:
            continue
        gains = {}
        for value in FACTORS[factor]:
            pairs = {tuple(sorted([(factor, value), other])) for other in chosen.items()}
            if all(map(_is_meaningful, pairs)):
                gains[value] = (len(missing & pairs), generator.random())
        if not gains:
            return None
        chosen[factor] = max(gains, key=gains.__getitem__)
    return [chosen[factor] for factor in range(len(FACTORS))]


ROWS = covering_rows()


def test_every_two_values_meet():
    covered = set().union(*(_pairs(astuple(row)) for row in ROWS))
    assert covered == _every_pair()


class WrittenOut(nn.Module):
    """A layer over the reference: the same parameters under the same names, and the same signature."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.num_heads = layer.num_heads
        self.returns_pair = isinstance(layer, ma.noether.MixedAttention)
        for name, module in layer.named_children():
            self.add_module(name, copy.deepcopy(module))

    def forward(self, x, token_specs, attention_patterns, *, freqs=None, kv_cache=None, return_kv_cache=False):
        made = torch.cat([self._modules[name](x) for name in ("qkv", "q", "k", "v") if name in self._modules], -1)
        q, k, v = made.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if hasattr(self, "q_norm"):
            norms = self.q_norm.weight, self.k_norm.weight
            q, k = (nn.functional.rms_norm(t, t.shape[-1:], weight) for t, weight in zip((q, k), norms))
        if freqs is not None:
            q, k = _rotate(q, freqs), _rotate(k, freqs)
        keys, values, cached, start = [], [], [], 0
        for spec in token_specs:
            if spec.size is None:
                keys.append(kv_cache[spec.name]["k"].transpose(1, 2))
                values.append(kv_cache[spec.name]["v"].transpose(1, 2))
                cached.append(ma.TokenSpec(spec.name, keys[-1].shape[1]))
            else:
                keys.append(k[:, start : start + spec.size])
                values.append(v[:, start : start + spec.size])
                start += spec.size
        plan = ma.AttentionPlan.compile(token_specs, attention_patterns, cached=cached)
        out = self.proj(ma.reference.attention(q, torch.cat(keys, 1), torch.cat(values, 1), plan).flatten(2))
        recorded = None
        if not cached:
            recorded = {
                spec.name: {"k": key.transpose(1, 2), "v": value.transpose(1, 2)}
                for spec, key, value in zip(token_specs, keys, values)
                if "_anchor" in spec.name
            }
        return (out, recorded) if return_kv_cache or self.returns_pair else out


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * freqs.unsqueeze(2)).flatten(3).to(x.dtype)


class Model(nn.Module):
    """The branches of a row, inside a checkpoint; tensors in and out, so that every kind of checkpoint takes them.

    Takes the tokens, their frequencies or None, and keys and values of the cache of each attention. Returns the result
    and keys and values of every group that was recorded.
    """

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        config = {"dim": DIM, "num_heads": NUM_HEADS, "use_rope": row.positions == "rope", "init_weights": "torch"}
        config["qk_norm"] = "affine" if row.heads == "normed" else False
        make = {
            "a": lambda: LAYOUTS[row.layout](config),
            "n": lambda: nn.LayerNorm(DIM),
            "m": lambda: nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)),
        }
        self.branches = nn.ModuleList(
            nn.ModuleList(make[letter]() for letter in branch.strip("+")) for branch in MODELS[row.model]
        )

    def written_out(self) -> Model:
        """The same model with its layers written out over the reference, and nothing checkpointed."""
        model = copy.deepcopy(self)
        model.row = Row(**{**vars(self.row), "kept": "kept"})
        for branch in model.branches:
            for index, module in enumerate(branch):
                if isinstance(module, ma.MixedAttention):
                    branch[index] = WrittenOut(module)
        return model

    def attentions(self) -> list[nn.Module]:
        return [m for branch in self.branches for m in branch if isinstance(m, (ma.MixedAttention, WrittenOut))]

    def forward(self, x: Tensor, freqs: Tensor | None, *cached: Tensor) -> tuple[Tensor, ...]:
        return CHECKPOINTS[self.row.kept](self.body, x, freqs, *cached)

    def body(self, x: Tensor, freqs: Tensor | None, *cached: Tensor) -> tuple[Tensor, ...]:
        recorded: list[Tensor] = []
        remaining = iter(cached)
        for branch, modules in zip(MODELS[self.row.model], self.branches):
            y = x
            for letter, module in zip(branch.strip("+"), modules):
                y = self._attend(module, y, freqs, remaining, recorded) if letter == "a" else module(y)
                if self.row.around == "tensor_hooks" and y.requires_grad:
                    y.register_hook(lambda grad: grad * 1.25)
            x = x + y if "+" in branch else y
        return x, *recorded

    def _attend(
        self, layer: nn.Module, x: Tensor, freqs: Tensor | None, cached: Iterator[Tensor], recorded: list[Tensor]
    ) -> Tensor:
        options: dict = {"freqs": freqs}
        reads = self.row.cache == "read"
        if reads:
            options["kv_cache"] = {CACHED: {"k": next(cached), "v": next(cached)}}
        if self.row.cache == "recorded" and self.row.layout == "fused":
            options["return_kv_cache"] = True
        specs = [ma.TokenSpec(name, None if reads and name == CACHED else size) for name, size in SIZES.items()]
        made = layer(x, specs, PATTERNS, **options)
        out, entries = made if isinstance(made, tuple) else (made, None)
        if self.row.cache == "recorded":
            recorded += [entry[which] for entry in entries.values() for which in "kv"]
        return out


def make_model(row: Row) -> Model:
    """A model of a row, fp64 but under autocast."""
    torch.manual_seed(0)
    model = Model(row)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model.to(torch.float32 if row.mode == "autocast" else torch.float64)


def make_inputs(row: Row, dtype: torch.dtype, seed: int = 1) -> list[Tensor | None]:
    """Tokens, frequencies and caches; all but the frequencies require grad."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(SIZES.values()) - (SIZES[CACHED] if row.cache == "read" else 0)

    def draw(*shape: int) -> Tensor:  # numbers of fp32, so that both dtypes have the same ones
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    head_dim = DIM // NUM_HEADS
    inputs: list[Tensor | None] = [draw(BATCH_SIZE, num_tokens, DIM), None]
    if row.positions == "rope":
        angles = torch.randn(1, num_tokens, head_dim // 2, generator=generator).double()
        inputs[1] = torch.polar(torch.ones_like(angles), angles)
    if row.cache == "read":
        count = 2 * "".join(MODELS[row.model]).count("a")
        inputs += [draw(BATCH_SIZE, NUM_HEADS, SIZES[CACHED], head_dim) for _ in range(count)]
    return inputs


def scale_by_hooks(model: Model) -> None:
    """Hooks of every kind on the attentions and their projections, each of which changes what it sees."""

    def scale(factor: float, value: object) -> object:
        if isinstance(value, tuple):
            return tuple(scale(factor, each) if isinstance(each, Tensor) else each for each in value)
        return value * factor

    for attention in model.attentions():
        attention.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 0.75, *arguments[1:]))
        for module in (attention, *(each for each in attention.children() if isinstance(each, nn.Linear))):
            module.register_forward_hook(lambda _, arguments, out: scale(1.25, out))
            module.register_full_backward_hook(lambda _, grads_in, grads_out: scale(0.75, grads_in))


def scale_gradients(model: Model) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 0.75)


def put_into(row: Row, model: Model, inputs: Sequence[Tensor | None]) -> tuple[Callable, nn.Module]:
    """What is called in the place of a model, and the module whose parameters get the gradients."""
    if row.around == "deepcopy":
        model(*inputs)  # nothing that a call leaves behind may be in the way
        model = copy.deepcopy(model)
    elif row.around == "pickle":
        model(*inputs)
        model = pickle.loads(pickle.dumps(model))
    elif row.around == "compile":
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager"), model
    elif row.around == "inductor":
        torch._dynamo.reset()
        return torch.compile(model), model
    elif row.around == "export":
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, tuple(inputs)), file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        return loaded, loaded
    elif row.around == "save_on_cpu":

        def call(*arguments):
            with torch.autograd.graph.save_on_cpu():
                return model(*arguments)

        return call, model
    elif row.around == "ddp":
        return nn.parallel.DistributedDataParallel(model), model
    elif row.around in ("fsdp2", "fsdp2_of_wrapped"):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (NUM_RANKS,))
        for branch in model.branches:
            for index, module in enumerate(branch):
                if isinstance(module, ma.MixedAttention):
                    branch[index] = checkpoint_wrapper(module) if row.around == "fsdp2_of_wrapped" else module
                    fully_shard(branch[index], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model


def results_of(
    call: Callable, module: nn.Module, inputs: Sequence[Tensor | None], mode: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the inputs, and those of the parameters; of a fixed random functional of the outputs."""
    before = [None if each is None else each.detach().clone() for each in inputs]
    with MODES[mode]():
        outputs = call(*inputs)
    if mode in TRAINS:
        generator = torch.Generator().manual_seed(3)
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()
    own = {f"output {index}": t.detach() for index, t in enumerate(outputs)}
    for index, (each, value) in enumerate(zip(inputs, before)):
        if each is not None:
            assert torch.equal(each, value), f"input {index} was overwritten"
            if mode in TRAINS and each.requires_grad:
                own[f"gradient of input {index}"] = each.grad
    gradients = {name: p.grad for name, p in module.named_parameters()} if mode in TRAINS else {}
    assert all(gradient is not None for gradient in gradients.values())
    return own, gradients


def fused(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of q, k and v as one: that of a bias of keys alone is zero but for rounding, which has no measure.

    Likewise those of all norms of heads: of eight numbers alone the errors are small or large by chance.
    """
    merged = ma.checkpoint.convert_state_dict(gradients, "fused")
    norms = [merged.pop(name) for name in gradients if name.endswith("_norm.weight")]
    return merged | ({"norms of heads": torch.cat(norms)} if norms else {})


def expected_of(row: Row, model: Model, dtype: torch.dtype, mode: str, seeds: Sequence[int]) -> list[tuple]:
    """:func:`results_of` the written-out model, for each of several inputs."""
    results = []
    for seed in seeds:
        written_out = model.written_out().to(dtype)
        hook(row, written_out)
        results.append(results_of(written_out, written_out, make_inputs(row, dtype, seed), mode))
    return results


def hook(row: Row, model: Model) -> None:
    if row.around == "module_hooks":
        scale_by_hooks(model)
    elif row.around == "tensor_hooks":
        scale_gradients(model)


def check(row: Row, rank: int | None = None) -> None:
    """Runs a row and holds it against the written-out model; on a rank, with gradients that are means of all ranks."""
    seeds = [1] if rank is None else list(range(1, 1 + NUM_RANKS))
    own_index = rank or 0
    model = make_model(row)
    dtype = next(model.parameters()).dtype

    def merge(results: list[tuple]) -> dict[str, Tensor]:
        own, gradients = results[own_index][0], [fused(each[1]) for each in results]
        return own | {name: sum(each[name] for each in gradients) / len(gradients) for name in gradients[0]}

    exact = merge(expected_of(row, model, torch.float64, "plain" if row.mode in TRAINS else "no_grad", seeds))
    yardstick = merge(expected_of(row, model, dtype, row.mode, seeds)) if row.mode == "autocast" else exact

    hook(row, model)
    names = dict(model.named_parameters()).keys()
    inputs = make_inputs(row, dtype, seeds[own_index])
    with MODES[row.mode]():
        call, module = put_into(row, model, inputs)
    own, gradients = results_of(call, module, inputs, row.mode)
    gradients = {name.replace(WRAPPED, ""): _whole(gradient) for name, gradient in gradients.items()}
    assert gradients.keys() == names or row.mode not in TRAINS
    got = own | fused(gradients)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        error = (got[name].double() - expected).abs().max()
        if row.mode == "autocast":
            rounding = torch.finfo(torch.bfloat16).eps / 2 * expected.abs().max()
            bound = 2 * (yardstick[name].double() - expected).abs().max() + rounding
        else:  # what reordering a few hundred additions of numbers of order one may change
            bound = 1e-10 * expected.abs().max() + 1e-11
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g} of {expected.abs().max():.3g}"


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class Ranks:
    """Two processes of one group, which run rows as they come; started anew after a row that failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._workers: list = []
        self._starts = 0

    def check(self, row: Row) -> None:
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send(row)
        reports = [connection.recv() if connection.poll(600) else "no answer" for _, connection in self._workers]
        if any(reports):
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {report}" for rank, report in enumerate(reports) if report))

    def _start(self) -> None:
        self._starts += 1
        store = f"file://{self._folder / f'store{self._starts}'}"
        context = get_context("spawn")
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def stop(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []


def _work(rank, store, connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=300))
    while True:
        row = connection.recv()
        try:
            check(row, rank)
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("row", [row for row in ROWS if row.around not in ON_RANKS], ids=str)
def test_in_one_process(row):
    check(row)


@pytest.mark.parametrize("row", [row for row in ROWS if row.around in ON_RANKS], ids=str)
def test_on_two_ranks(row, ranks):
    ranks.check(row)


def test_compiled_by_inductor():
    check(Row("plain", "kept", "norm_attention", "rope", "fused", "fresh", "as_made", "inductor"))
