"""Operators that write into what they are given: who sees it, and which memory they refuse.

Properties: a tensor that was written has a new version; what is written overlaps nothing, whatever the strides; memory
that is not there is never touched.
"""

import random

import pytest
import torch

import mixed_attention as ma
from mixed_attention.ops import rotate

ops = torch.ops.mixed_attention
SPECS = [ma.TokenSpec("a", 3), ma.TokenSpec("b", 2)]
PLAN = ma.AttentionPlan.compile(SPECS, [ma.AttentionPattern(["a", "b"], ["b"])])
SHAPE = (2, 5, 2, 4)


def backward_arguments():
    """Fresh arguments of ``backward_out`` by name."""
    q, k, v, dout = (torch.randn(SHAPE) for _ in range(4))
    mask, seed = torch.rand(2, 5) < 0.8, torch.tensor([7])
    out, lse = ops.forward(q, k, v, PLAN.flat(), 0.5, mask, 0.25, seed)
    tensors = {"dout": dout, "dlse": torch.randn_like(lse), "q": q, "k": k, "v": v, "out": out, "lse": lse}
    numbers = {"segments": PLAN.flat(), "softmax_scale": 0.5, "key_padding_mask": mask, "dropout_p": 0.25}
    grads = {name: torch.full(SHAPE, torch.nan) for name in ("dq", "dk", "dv")}
    return {**tensors, **numbers, "dropout_seed": seed, **grads}


def rope_arguments():
    return {"x": torch.randn(SHAPE), "freqs": torch.randn(1, 5, 2, 2), "conjugate": False, "out": torch.empty(SHAPE)}


def forward_arguments():
    arguments = backward_arguments()
    wanted = "q", "k", "v", "segments", "softmax_scale", "key_padding_mask", "dropout_p", "dropout_seed"
    return {name: arguments[name] for name in wanted}


OPERATORS = {
    "forward": forward_arguments,
    "backward": lambda: {n: t for n, t in backward_arguments().items() if n not in ("dq", "dk", "dv")},
    "backward_out": backward_arguments,
    "rope_out": rope_arguments,
}
WRITTEN = {"backward_out": ("dq", "dk", "dv"), "rope_out": ("out",)}


def call(operator, arguments):
    return getattr(ops, operator)(*arguments.values())


def tensors_of(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("operator", WRITTEN)
def test_versions_move_for_what_is_written_and_for_nothing_else(operator):
    arguments = OPERATORS[operator]()
    before = {name: tensor._version for name, tensor in tensors_of(arguments).items()}
    call(operator, arguments)
    moved = {name for name, tensor in tensors_of(arguments).items() if tensor._version != before[name]}
    assert moved == set(WRITTEN[operator])


@pytest.mark.parametrize(("operator", "name"), [(o, n) for o, names in WRITTEN.items() for n in names])
def test_a_graph_that_has_saved_what_is_written_says_so(operator, name):
    arguments = OPERATORS[operator]()
    leaf = torch.randn(SHAPE, requires_grad=True)
    saved = leaf * 1
    loss = saved.square().sum()
    with torch.no_grad():
        call(operator, {**arguments, name: saved})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_views_share_the_version():
    base = torch.randn(2, 5, 3, 2, 4)
    arguments = {**rope_arguments(), "out": base[:, :, 1]}
    call("rope_out", arguments)
    assert base._version == 1


@pytest.mark.parametrize("operator", WRITTEN)
def test_inference_tensors(operator):
    with torch.inference_mode():
        arguments = OPERATORS[operator]()
        call(operator, arguments)
    with pytest.raises(RuntimeError, match="inference tensor"):
        call(operator, arguments)


def addresses(tensor):
    """The places of all elements in storage, in order; places that coincide are repeated."""
    index = tensor.storage_offset() + sum(
        torch.arange(size).reshape([-1] + [1] * (tensor.ndim - 1 - dim)) * stride
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride()))
    )
    return index.flatten().tolist()


def random_view(choose, base, shape, nested):
    """A view of a buffer, its last dim contiguous; nested: without two elements in one place."""
    strides, within = [0] * len(shape), shape[-1]
    strides[-1] = 1
    for dim in choose.sample(range(len(shape) - 1), len(shape) - 1):
        strides[dim] = within + choose.choice([0, 0, 0, 1, 2]) if nested else choose.randrange(0, 12)
        within = max(within, within + strides[dim] * (shape[dim] - 1))
    room = base.numel() - 1 - sum((size - 1) * stride for size, stride in zip(shape, strides))
    return torch.as_strided(base, shape, strides, choose.randrange(0, min(room, 12) + 1))


@pytest.mark.parametrize("seed", range(8))
def test_memory_that_overlaps_is_refused_and_all_other_memory_is_served(seed):
    choose = random.Random(seed)
    served = refused = 0
    for _ in range(60):
        shape = (choose.randint(1, 2), choose.randint(1, 3), choose.randint(1, 2), choose.choice([2, 4]))
        base, nested = torch.randn(400), choose.random() < 0.8
        x, out = random_view(choose, base, shape, choose.random() < 0.7), random_view(choose, base, shape, nested)
        if choose.random() < 0.1:
            x = out.detach()
        freqs = torch.randn(1, shape[1], shape[3] // 2, 2)
        in_place = addresses(x) == addresses(out)
        overlaps = len(set(addresses(out))) < out.numel() or (
            not in_place and not set(addresses(x)).isdisjoint(addresses(out))
        )
        before, expected = base.clone(), rotate(x.clone(), torch.view_as_complex(freqs))
        try:
            ops.rope_out(x, freqs, False, out)
        except ValueError as error:
            assert "memory" in str(error) and (overlaps or not nested)
            assert torch.equal(base, before), "refused after something was written"
            refused += 1
        else:
            assert not overlaps
            torch.testing.assert_close(out, expected)
            served += 1
    assert served > 5 and refused > 5


@pytest.mark.parametrize("name", WRITTEN["backward_out"])
@pytest.mark.parametrize("other", tensors_of(backward_arguments()))
def test_gradients_overlap_nothing(name, other):
    if name == other:
        return
    arguments = backward_arguments()
    size = arguments[other].numel() * arguments[other].element_size()
    memory = torch.zeros(4 * 80 + size, dtype=torch.uint8)
    shifts = {"the same": 0, "by a row": 16} if arguments[other].dtype != torch.int64 else {"the same": 0}
    for shift in shifts.values():
        there = memory[shift : shift + size].view(arguments[other].dtype).view(arguments[other].shape)
        there.copy_(arguments[other])
        grad = memory[: 4 * 80].view(torch.float32).view(SHAPE)
        with pytest.raises(ValueError, match="expected memory of its own"):
            call("backward_out", {**arguments, other: there, name: grad})


def test_gradients_that_interleave_are_served():
    arguments = backward_arguments()
    expected = ops.backward(*[value for name, value in arguments.items() if name not in WRITTEN["backward_out"]])
    packed = torch.full((2, 5, 3, 2, 4), torch.nan)
    call("backward_out", {**arguments, **dict(zip(WRITTEN["backward_out"], packed.unbind(2)))})
    for grad, wanted in zip(packed.unbind(2), expected):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("name", WRITTEN["backward_out"])
def test_gradients_overlap_themselves_nowhere(name):
    with pytest.raises(ValueError, match=f"{name}: expected elements with memory of their own"):
        call("backward_out", {**backward_arguments(), name: torch.zeros(1, 5, 2, 4).expand(SHAPE)})


def test_other_storages_over_the_same_memory():
    arguments = rope_arguments()
    with pytest.raises(ValueError, match="out: expected memory of its own, but x lies there"):
        call("rope_out", {**arguments, "out": torch.from_numpy(arguments["x"].numpy())})


def test_lazy_copies_are_made_before_anything_is_written():
    arguments = rope_arguments()
    x = arguments["x"]
    copy, before = torch._lazy_clone(x), x.clone()
    expected = rotate(before, torch.view_as_complex(arguments["freqs"]))
    call("rope_out", {**arguments, "x": copy, "out": copy})
    assert torch.equal(x, before)
    torch.testing.assert_close(copy, expected)


@pytest.mark.parametrize("size", ["freed", "smaller"])
@pytest.mark.parametrize(
    ("operator", "name"), [(o, n) for o, make in OPERATORS.items() for n in tensors_of(make())], ids="-".join
)
def test_memory_that_is_not_there_is_refused(operator, name, size):
    arguments = OPERATORS[operator]()
    storage = arguments[name].untyped_storage()
    storage.resize_(0 if size == "freed" else storage.nbytes() - 1)
    with pytest.raises(ValueError, match=f"^{name}: expected a storage of at least .*freed"):
        call(operator, arguments)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_memory_that_is_not_there_in_eager_mode(name, grad):
    tensors = {n: torch.randn(SHAPE, requires_grad=grad) for n in ("q", "k", "v")}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^{name}: expected a storage"):
        ma.attention(**tensors, plan=PLAN)


@pytest.mark.parametrize("operator", WRITTEN)
def test_numbers_that_stand_for_their_negative(operator):
    arguments = OPERATORS[operator]()
    call(operator, arguments)
    negative = {n: torch._neg_view(-t) for n, t in tensors_of(arguments).items() if t.is_floating_point()}
    results = {name: torch.full_like(arguments[name], torch.nan) for name in WRITTEN[operator]}
    call(operator, {**arguments, **negative, **results})
    for name, result in results.items():
        torch.testing.assert_close(result, arguments[name])
        with pytest.raises(ValueError, match=f"{name}: expected the memory of numbers"):
            call(operator, {**arguments, name: torch._neg_view(result)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_gradients_of_keys_come_unrounded_where_asked(dtype, scale):
    q, k, v, dout = (torch.randn(SHAPE).to(dtype) for _ in range(4))
    mask = torch.rand(2, 5) < 0.8
    out, lse = ops.forward(q, k, v, PLAN.flat(), scale, mask, 0.0, None)
    given = dout, None, q, k, v, out, lse, PLAN.flat(), scale, mask, 0.0, None
    dq, *expected = ops.backward(*given)
    into = torch.full(SHAPE, torch.nan, dtype=dtype)
    unrounded = [torch.full(SHAPE, torch.nan) for _ in range(2)]
    ops.backward_out(*given, into, *unrounded)
    assert torch.equal(into, dq)
    for wide, rounded in zip(unrounded, expected):
        assert torch.equal(wide.to(dtype), rounded)
        assert wide.count_nonzero() == 0 or not torch.equal(wide, rounded.float())
    with pytest.raises(ValueError, match="dv: expected dtype Float"):
        ops.backward_out(*given, into, unrounded[0], torch.empty(SHAPE, dtype=dtype))
    with pytest.raises(ValueError, match="dk: expected dtype"):
        ops.backward_out(*given, into, *(t.double() for t in unrounded))
    with pytest.raises(ValueError, match="dq: expected dtype"):
        ops.backward_out(*given, into.float(), *unrounded)
