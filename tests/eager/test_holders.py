"""What others hold stays what it was: whoever keeps a tensor, a node or a graph sees what it saw, or torch's error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mixed_attention as ma
from mixed_attention import _C
from tests.layers import DIM, JOINT, NUM_HEADS, gradients, make_freqs, make_layer, make_x, oracle

TWICE = "backward through the graph a second time"
aten, ours = torch.ops.aten, torch.ops.mixed_attention


@dataclass(frozen=True)
class Case:
    """A layer and how it is called."""

    layout: str
    use_rope: bool
    autocast: bool
    block: str = "attention"
    qk_norm: bool | str = False

    def __str__(self) -> str:
        norm = "norm" * bool(self.qk_norm)
        names = [self.layout, norm, "rope" * self.use_rope, "autocast" * self.autocast, self.block]
        return " ".join(name for name in names if name)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else torch.float64

    def make(self) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
        """The block's modules, what calls them with a sum of all that a layer returns, and tokens."""
        cls = {"fused": ma.MixedAttention, "separate": ma.noether.MixedAttention}[self.layout]
        attention = make_layer(cls, use_rope=self.use_rope, qk_norm=self.qk_norm, dtype=self.dtype)
        norm, mlp = nn.LayerNorm(DIM, dtype=self.dtype), nn.Linear(DIM, DIM, dtype=self.dtype)
        freqs = make_freqs(JOINT.num_tokens) if self.use_rope else None

        def attend(x: Tensor) -> Tensor:
            result = attention(x, JOINT.specs, JOINT.patterns, freqs=freqs)
            if isinstance(result, Tensor):
                return result
            out, cache = result
            return out + sum(t.square().mean() for entry in cache.values() for t in entry.values())

        blocks: dict[str, Callable[[Tensor], Tensor]] = {
            "attention": attend,
            "norm, attention": lambda x: attend(norm(x)),
            "residual": lambda x: x + attend(norm(x)),
            "attention, mlp": lambda x: mlp(attend(x)),
            "twice": lambda x: attend(attend(x)),
        }

        def project(x: Tensor) -> Tensor:
            parts = [_C.ProjectedPart(0, DIM, None), _C.ProjectedPart(DIM, 3 * DIM, [(0, 6), (11, 15)])]
            dtype = torch.bfloat16 if self.autocast else self.dtype
            products = _C.project(x, attention.qkv.weight, attention.qkv.bias, parts, dtype)
            return torch.cat([product.flatten() for product in products])

        blocks["projection alone"] = project

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
                return blocks[self.block](x)

        return nn.ModuleList([attention, norm, mlp]), call, make_x(JOINT, dtype=self.dtype)

    def assert_close(self, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Equal up to the order of sums in fp64, up to one rounding of bf16 under autocast."""
        tolerance = 2**-7 if self.autocast else 1e-12
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


CASES = [Case(*each) for each in product(["fused", "separate"], [False, True], [False, True])]
BLOCKS = [
    Case(layout, True, autocast, block)
    for layout, autocast in [("fused", False), ("separate", True)]
    for block in ["norm, attention", "residual", "attention, mlp", "twice"]
]
NORMED = [
    Case("fused", True, False, qk_norm="affine"),
    Case("separate", False, True, qk_norm=True),
    Case("separate", True, True, "residual", "affine"),
]
ALL = pytest.mark.parametrize("case", [*CASES, *BLOCKS, *NORMED], ids=str)
SINGLE = pytest.mark.parametrize("case", CASES, ids=str)
NODES = [*CASES, Case("fused", False, False, "projection alone"), Case("fused", False, True, "projection alone")]
SINGLE_NODES = pytest.mark.parametrize("case", NODES, ids=str)


def policy(saves: Callable[[torch._ops.OpOverload], bool]):
    def decide(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saves(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, decide)


PRODUCTS = {aten.mm.default, aten.addmm.default}
POLICIES = {
    "products": lambda op: op in PRODUCTS,
    "attention": lambda op: op == ours.forward.default,
    "products and attention": lambda op: op in PRODUCTS or op == ours.forward.default,
    "ours": lambda op: op.namespace == "mixed_attention",
    "all that write": lambda op: op._schema.is_mutable,
    "all but what writes": lambda op: not op._schema.is_mutable,
    "all": lambda op: True,
    "casts and copies": lambda op: op in {aten._to_copy.default, aten.cat.default, aten.clone.default},
    "memory": lambda op: op in {aten.empty_like.default, aten.empty.memory_format},
}


class Watching(TorchDispatchMode):
    """Keeps every result, and what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor, Tensor, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and func not in {aten.empty.memory_format, aten.empty_like.default}:
                self.seen.append((str(func), each.detach(), each.clone(), each._version))
        return result

    def check(self) -> None:
        assert self.seen
        for name, now, then, version in self.seen:
            assert now._version != version or torch.equal(now, then), name


class Packing(torch.autograd.graph.saved_tensors_hooks):
    """Keeps everything that is saved, and what it was."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        super().__init__(self.pack, lambda x: x)

    def pack(self, x: Tensor) -> Tensor:
        self.seen.append((x.detach(), x.detach().clone()))
        return x

    def check(self) -> None:
        assert self.seen
        assert all(torch.equal(now, then) for now, then in self.seen)


HOLDERS: dict[str, Callable[..., Tensor]] = {
    "checkpoint": lambda call, x: checkpoint(call, x, use_reentrant=False),
    "checkpoint, without early stop": lambda call, x: checkpoint(call, x, use_reentrant=False, early_stop=False),
    "nested checkpoint": lambda call, x: checkpoint(
        lambda x: checkpoint(call, x, use_reentrant=False), x, use_reentrant=False
    ),
    "saved on the CPU": lambda call, x: _within(torch.autograd.graph.save_on_cpu(), call, x),
    "anomaly mode": lambda call, x: _within(torch.autograd.detect_anomaly(check_nan=False), call, x),
    "default device": lambda call, x: _within(torch.device("cpu"), call, x),
    **{
        f"saved {name}": lambda call, x, saves=saves: checkpoint(call, x, use_reentrant=False, context_fn=policy(saves))
        for name, saves in POLICIES.items()
    },
}


def _within(context, call, x: Tensor) -> Tensor:
    with context:
        return call(x)


@cache
def expected(case: Case) -> tuple[list[Tensor], Tensor]:
    """Gradients of everything and the output of a plain call."""
    modules, call, x = case.make()
    out = call(x)
    return [*gradients(out, [x, *modules.parameters()])], out.detach()


@pytest.mark.parametrize("case", [Case("fused", False, False), Case("fused", True, False)], ids=str)
def test_a_plain_call_is_what_the_definition_says(case):
    (attention, *_), call, x = case.make()
    out = oracle(attention, x, JOINT.counts(), make_freqs(JOINT.num_tokens) if case.use_rope else None)
    wanted = [x, *attention.parameters()]
    case.assert_close(gradients(call(x), wanted), gradients(out, wanted))


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@ALL
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_gradients_under(case, hold):
    wanted, out = expected(case)
    modules, call, x = case.make()
    held = hold(call, x)
    assert torch.equal(held, out)
    case.assert_close(gradients(held, [x, *modules.parameters()]), wanted)


@ALL
def test_gradients_under_reentrant_checkpoint(case):
    wanted, out = expected(case)
    modules, call, x = case.make()
    held = checkpoint(call, x, use_reentrant=True)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    held.backward(direction)
    got = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *modules.parameters())]
    case.assert_close(got, wanted)


@pytest.mark.parametrize(
    "watch, differentiable",
    [(Packing, True), (Watching, True), (Watching, False)],
    ids=["saved tensors", "results", "results without a graph"],
)
@ALL
def test_whoever_keeps_tensors_sees_what_they_were(case, watch, differentiable):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    watching = watch()
    with watching, nullcontext() if differentiable else torch.no_grad():
        out = call(x)
    if differentiable:
        case.assert_close(gradients(out, [x, *modules.parameters()]), wanted)
    watching.check()


@SINGLE_NODES
def test_a_mode_around_the_backward(case):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    with Watching():
        case.assert_close(gradients(call(x), [x, *modules.parameters()]), wanted)


@SINGLE_NODES
def test_a_graph_that_is_kept(case):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    out, leaves = call(x), [x, *modules.parameters()]
    for keeps in (True, True, False):
        case.assert_close(gradients(out, leaves, retain_graph=keeps), wanted)
    with pytest.raises(RuntimeError, match=TWICE):
        gradients(out, leaves)


@SINGLE
def test_what_the_caller_holds(case):
    """The output, the tokens and the cache are the caller's: changed, they do no harm or meet torch's own error."""
    wanted, _ = expected(case)
    modules, call, x = case.make()
    out = call(x)
    kept = out.detach().clone()
    out.mul_(2)
    case.assert_close([t / 2 for t in gradients(out, [x, *modules.parameters()])], wanted)
    assert torch.equal(out, 2 * kept)


@SINGLE
def test_layers_are_copied_half_way(case):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    out = call(x)
    copied = copy.deepcopy(modules)
    case.assert_close(gradients(out, [x, *modules.parameters()]), wanted)
    assert all(torch.equal(*pair) for pair in zip(copied.parameters(), modules.parameters(), strict=True))


@pytest.mark.parametrize("use_rope", [False, True], ids=["plain", "rope"])
def test_a_cache_that_is_changed_before_the_backward(use_rope):
    layer, x = make_layer(ma.noether.MixedAttention, use_rope=use_rope), make_x(JOINT)
    out, cache = layer(x, JOINT.specs, JOINT.patterns, freqs=make_freqs(JOINT.num_tokens) if use_rope else None)
    with torch.no_grad():
        cache["surface_anchors"]["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, [x])


class Surroundings(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that look whether torch is as the caller left it: does it differentiate, does it cast?"""

    def __init__(self, autocast: bool) -> None:
        self.seen: set[str] = set()
        self.autocast, self.is_looking = autocast, False
        super().__init__(partial(self.look, "pack"), partial(self.look, "unpack"))

    def look(self, when: str, x: Tensor) -> Tensor:
        if self.is_looking:
            return x
        self.is_looking = True
        self.seen.add(when)
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            square = torch.ones(2, 2, requires_grad=True)
            through = square @ square
            assert through.requires_grad
            assert through.dtype == (torch.bfloat16 if self.autocast else torch.float32)
            torch.autograd.grad(through.sum(), square)
            assert square.mul(1).add_(1)._version == 1
        self.is_looking = False
        return x


@SINGLE
def test_hooks_find_torch_as_they_left_it(case):
    modules, call, x = case.make()
    hooks = Surroundings(autocast=True)
    with hooks:
        out = call(x)
        for create_graph in (True, False):
            torch.autograd.grad(out.sum(), [x, *modules[0].parameters()], create_graph=create_graph)
    assert hooks.seen == {"pack", "unpack"}


def nodes_of(*tensors: Tensor) -> list:
    """All nodes of graphs."""
    todo, found = [t.grad_fn for t in tensors], []
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [each for each, _ in node.next_functions]
    return found


def nodes_of_ours(*tensors: Tensor) -> list:
    return [node for node in nodes_of(*tensors) if "Project" in node.name() or "Attend" in node.name()]


@pytest.mark.parametrize("register", ["register_hook", "register_prehook"])
@SINGLE_NODES
def test_a_backward_again_after_a_hook_raised(case, register):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    for index in range(len(nodes_of_ours(call(x)))):
        out, calls = call(x), []

        def hook(*grads, calls=calls):
            calls.append(0)
            if len(calls) == 1:
                raise KeyboardInterrupt("mine")

        getattr(nodes_of_ours(out)[index], register)(hook)
        with pytest.raises(KeyboardInterrupt, match="mine"):
            gradients(out, [x, *modules.parameters()])
        try:
            got = gradients(out, [x, *modules.parameters()])
        except RuntimeError as error:  # a node before this one was done
            assert TWICE in str(error)
        else:
            case.assert_close(got, wanted)


class Failing(TorchDispatchMode):
    """Fails at the n-th operation, as for want of memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("mine")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [NODES[1], *NODES[-3:]], ids=str)
def test_a_backward_again_after_it_failed_anywhere(case):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    leaves = [x, *modules.parameters()]
    for number in range(1, 1000):
        out = call(x)
        try:
            with Failing(number):
                gradients(out, leaves)
            break
        except MemoryError:
            pass
        try:
            got = gradients(out, leaves)
        except RuntimeError as error:
            assert TWICE in str(error)
        else:
            case.assert_close(got, wanted)
    assert number > 10


def dummy_grads(node) -> list[Tensor]:
    return [torch.ones(m.shape, dtype=m.dtype) for m in node._input_metadata]


@pytest.mark.parametrize("where", ["alone", "within another backward", "within its own backward", "of itself"])
@SINGLE_NODES
def test_a_node_called_by_hand(case, where):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    for index in range(len(nodes_of_ours(call(x)))):
        out, other = call(x), call(x)
        node = nodes_of_ours(out)[index]

        def by_hand(*_, node=node):
            grads = dummy_grads(node)
            node(*grads)
            node(grads[0], *[None] * (len(grads) - 1))

        if where == "alone":
            by_hand()
        elif where == "within another backward":
            other.register_hook(by_hand)
            other.sum().backward()
            x.grad = None
        elif where == "within its own backward":
            out.register_hook(by_hand)
        else:
            node.register_prehook(by_hand)
        case.assert_close(gradients(out, [x, *modules.parameters()]), wanted)


@SINGLE_NODES
def test_backwards_in_threads(case):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    out, leaves, results = call(x), [x, *modules.parameters()], {}

    def work(number: int) -> None:
        results[number] = gradients(out, leaves, retain_graph=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for got in results.values():
        case.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["tensor", "tensor, differentiable", "accumulated", "in the middle"])
@SINGLE
def test_hooks_on_tensors(case, kind):
    wanted, _ = expected(case)
    modules, call, x = case.make()
    leaves, seen = [x, *modules[0].parameters()], []
    wanted = wanted[: len(leaves)]
    out = call(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out)
    if kind == "accumulated":
        for leaf in leaves:
            leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad))
        out.backward(direction)
        got = [leaf.grad for leaf in leaves]
    elif kind == "in the middle":
        middle = (x * 1).requires_grad_()
        middle.retain_grad()
        out = call(middle)
        (dx,) = torch.autograd.grad(out, middle, direction)
        got, seen = [dx, *wanted[1:]], leaves
    else:
        create_graph = "differentiable" in kind
        if create_graph:  # other operations, rounded elsewhere
            wanted = torch.autograd.grad(call(x), leaves, direction, create_graph=True)
        for leaf in leaves:
            leaf.register_hook(seen.append)
        got = torch.autograd.grad(out, leaves, direction, create_graph=create_graph)
    assert len(seen) == len(leaves)
    case.assert_close(got, wanted)


@pytest.mark.parametrize("create_graph", [False, True], ids=["first derivative", "differentiable"])
def test_hooks_on_what_attention_takes_run_once(create_graph):
    plan = ma.AttentionPlan.compile(JOINT.specs, JOINT.patterns)
    q, k, v = (torch.randn(1, JOINT.num_tokens, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    wanted = torch.autograd.grad(ma.attention(q, k, v, plan).square().sum(), [q, k, v])
    for tensor in (q, k, v):
        tensor.register_hook(lambda grad: 2 * grad)
    got = torch.autograd.grad(ma.attention(q, k, v, plan).square().sum(), [q, k, v], create_graph=create_graph)
    torch.testing.assert_close(got, tuple(2 * grad for grad in wanted))


# --- what is changed between forward and backward, and what is saved at all ---


def of_linear_layers(layer: nn.Module, x: Tensor) -> Tensor:
    """What the fused layer means, by nn.Linear and the attention of tensors."""
    batch_size, seqlen, _ = x.shape
    q, k, v = layer.qkv(x).view(batch_size, seqlen, 3, NUM_HEADS, -1).unbind(2)
    plan = ma.AttentionPlan.compile(JOINT.specs, JOINT.patterns)
    return layer.proj(ma.attention(q, k, v, plan).flatten(2))


def of_the_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, JOINT.specs, JOINT.patterns)


PARAMETERS = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
FROZEN = [
    [],
    ["x"],
    PARAMETERS,
    ["qkv.weight", "proj.weight"],
    ["x", "qkv.weight", "qkv.bias"],
    ["x", "proj.weight"],
    ["qkv.bias", "proj.bias"],
    ["x", "qkv.weight", "proj.weight"],
]


@pytest.fixture(params=FROZEN, ids=lambda names: ", ".join(names) or "nothing frozen")
def frozen(request) -> list[str]:
    return request.param


def prepare(frozen: Sequence[str], autocast: bool) -> tuple[nn.Module, Tensor]:
    dtype = torch.float32 if autocast else torch.float64
    layer, x = make_layer(dtype=dtype), make_x(JOINT, dtype=dtype)
    for name, tensor in [("x", x), *layer.named_parameters()]:
        tensor.requires_grad_(name not in frozen)
    return layer, x


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("changed", ["x", *PARAMETERS])
def test_what_may_change_before_the_backward_is_what_linear_layers_allow(frozen, changed, autocast):
    outcomes = []
    for call in (of_linear_layers, of_the_layer):
        layer, x = prepare(frozen, autocast)
        tensors = {"x": x, **dict(layer.named_parameters())}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(layer, x)
        with torch.no_grad():
            tensors[changed].add_(1)
        wanted = [t for t in tensors.values() if t.requires_grad]
        try:
            outcomes.append(gradients(out, wanted))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.append(None)
    linear, layer = outcomes
    assert (layer is None) == (linear is None)
    if layer is not None:
        Case("fused", False, autocast).assert_close(layer, linear)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_what_is_saved_is_what_linear_layers_save(frozen, autocast):
    sizes = []
    for call in (of_linear_layers, of_the_layer):
        layer, x = prepare(frozen, autocast)
        packing = Packing()
        with packing, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            call(layer, x)
        known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t, _ in packing.seen}
        sizes.append(sum(nbytes for place, nbytes in stored.items() if place not in known))
    linear, layer = sizes
    assert layer <= linear


# --- the functions behind the layers ---


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_second_derivatives_of_a_projection_that_casts(needs):
    """To fp64, so that nothing is rounded."""
    x, weight, bias = torch.randn(2, 5, 4), torch.randn(6, 4), torch.randn(6)
    inputs = [t.requires_grad_(needed) for t, needed in zip((x, weight, bias), (*needs, True), strict=True)]

    def composed() -> list[Tensor]:
        products = nn.functional.linear(*(t.double() for t in inputs))
        return [products[..., :4], products[:, 1:3, 4:]]

    def in_one_step() -> list[Tensor]:
        parts = [_C.ProjectedPart(0, 4, None), _C.ProjectedPart(4, 6, [(1, 3)])]
        return _C.project(*inputs, parts, torch.float64)

    results = []
    for call in (composed, in_one_step):
        wanted = [t for t in inputs if t.requires_grad]
        first = torch.autograd.grad(sum(t.square().sum() for t in call()), wanted, create_graph=True)
        second = torch.autograd.grad(sum(t.double().square().sum() for t in first), wanted)
        results.append([*first, *second])
    torch.testing.assert_close(*results)


def test_what_is_rotated_in_place_has_another_version():
    freqs = torch.view_as_real(make_freqs(5))
    for grad in (False, True):
        buffer = torch.randn(1, 5, 3 * DIM, dtype=torch.float64)
        before, version = buffer.clone(), buffer._version
        call = _C.PackedCall([[1, 5, 3, NUM_HEADS, DIM // NUM_HEADS]], [2], [None], [0, 5, 1, 0, 5], 1.0, 0.0)
        with torch.set_grad_enabled(grad):
            _C.attend_in_place([buffer], [freqs], None, None, call)
        assert buffer._version > version
        assert not torch.equal(buffer, before)


def test_a_product_that_another_tensor_sees_is_left_alone():
    freqs = torch.view_as_real(make_freqs(5))
    buffer = torch.randn(1, 5, 3 * DIM, dtype=torch.float64)
    call = _C.PackedCall([[1, 5, 3, NUM_HEADS, DIM // NUM_HEADS]], [2], [None], [0, 5, 1, 0, 5], 1.0, 0.0)
    wanted = _C.attend_in_place([buffer.clone()], [freqs], None, None, call)
    alias, before = buffer[:, 1:], buffer.clone()
    got = _C.attend_in_place([buffer], [freqs], None, None, call)
    assert torch.equal(alias, before[:, 1:])
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


SHAPE = [1, 5, 3, NUM_HEADS, DIM // NUM_HEADS]
GOOD = {
    "buffers": [torch.zeros(1, 5, 3 * DIM)],
    "freqs": [torch.zeros(1, 5, DIM // NUM_HEADS // 2, 2)],
    "shapes": [SHAPE],
    "rotated": [2],
    "tokens": [None],
    "segments": [0, 5, 1, 0, 5],
}
BAD = [
    {"buffers": []},
    {"freqs": []},
    {"freqs": [None, None]},
    {"freqs": [torch.zeros(3)]},
    {"freqs": [torch.zeros(1, 4, DIM // NUM_HEADS // 2, 2)]},
    {"shapes": []},
    {"shapes": [[]]},
    {"shapes": [SHAPE[:4]]},
    {"shapes": [[1, 5, 3, NUM_HEADS, -8]]},
    {"shapes": [[1, 6, 3, NUM_HEADS, DIM // NUM_HEADS]]},
    {"shapes": [[1, 5, 1, 3 * NUM_HEADS, DIM // NUM_HEADS]]},
    {"buffers": [torch.zeros(1, 5, 6 * DIM)[..., ::2]]},
    {"buffers": [torch.zeros(1, 5, 3)]},
    {"rotated": []},
    {"rotated": [-1]},
    {"rotated": [4]},
    {"rotated": [2**40]},
    {"normalised": []},
    {"normalised": [-1]},
    {"normalised": [1]},
    {"normalised": [4]},
    {"normalised": [2**40], "rotated": [2**40]},
    {"normalised": [2], "shapes": [[1, 5, 3, DIM, 1]]},
    {"normalised": [2], "freqs": [None], "buffers": [torch.zeros(1, 5, 6 * DIM)[..., ::2]]},
    {"tokens": []},
    {"tokens": [[(0, 4)]]},
    {"tokens": [[(0, 5), (5, 6)]]},
    {"tokens": [[(-5, 0)]]},
    {"tokens": [[(3, 5), (0, 3)]]},
    {"segments": []},
    {"segments": [0, 5, 1, 0, 9]},
    dict.fromkeys(["buffers", "freqs", "shapes", "rotated", "tokens"], []),
]


@pytest.mark.parametrize("grad", [False, True], ids=["without a graph", "recording"])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{', '.join(bad)}: {str(next(iter(bad.values())))[:30]}")
def test_lists_that_do_not_fit(bad, grad):
    given = {**GOOD, **bad}
    buffers = given["buffers"]
    if all(buffer.is_contiguous() for buffer in buffers):
        buffers = [buffer.clone().requires_grad_(grad).mul(1) for buffer in buffers]
    rest = given["rotated"], given["tokens"], given["segments"], 1.0, 0.0, given.get("normalised")
    call = _C.PackedCall(given["shapes"], *rest)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError):
        _C.attend_in_place(buffers, given["freqs"], None, None, call)


BAD_PARTS = [[(-1, 2, None)], [(0, 9, None)], [(4, 2, None)], [(4, 6, None), (0, 2, None)], [(0, 2, [(0, 6)])]]
BAD_PARTS += [[(0, 2, [(-1, 2)])], [(0, 2, [(3, 4), (1, 2)])], [(0, 2, [(4, 3)])]]


@pytest.mark.parametrize("grad", [False, True], ids=["without a graph", "recording"])
def test_projections_that_do_not_fit(grad):
    x, weight, bias = torch.zeros(1, 5, 4, requires_grad=grad), torch.zeros(8, 4), torch.zeros(8)
    bad = [(x, weight, bias, parts) for parts in BAD_PARTS]
    bad += [(x[0], weight, bias, []), (x, weight[0], bias, []), (x, weight[:, :3], bias, []), (x, weight, bias[1:], [])]
    for *tensors, parts in bad:
        with torch.set_grad_enabled(grad), pytest.raises(ValueError):
            _C.project(*tensors, [_C.ProjectedPart(*part) for part in parts], torch.float32)
