"""Every tensor argument in every place and form: computed, shape-inferred, or refused by name; no mixture answers.

Each row of the tables below is a public function with good arguments; each place takes one of its tensors elsewhere.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import mixed_attention as ma
from mixed_attention import reference

ops = torch.ops.mixed_attention
SHAPE = (2, 5, 2, 4)
SPECS = [ma.TokenSpec("a_anchors", 3), ma.TokenSpec("b", 2)]
PATTERNS = [ma.AttentionPattern(["a_anchors", "b"], ["a_anchors"])]
PLAN = ma.AttentionPlan.compile(SPECS, PATTERNS)
SEGMENTS = PLAN.flat()


def attention(q, k, v, key_padding_mask, softmax_scale):
    return ma.attention(q, k, v, PLAN, key_padding_mask=key_padding_mask, softmax_scale=softmax_scale, return_lse=True)


def forward(q, k, v, key_padding_mask, dropout_seed):
    return ops.forward(q, k, v, SEGMENTS, 0.5, key_padding_mask, 0.25, dropout_seed)


def backward(dout, dlse, q, k, v, out, lse, key_padding_mask, dropout_seed):
    return ops.backward(dout, dlse, q, k, v, out, lse, SEGMENTS, 0.5, key_padding_mask, 0.25, dropout_seed)


def backward_out(dout, dlse, q, k, v, out, lse, key_padding_mask, dropout_seed, dq, dk, dv):
    return ops.backward_out(
        dout, dlse, q, k, v, out, lse, SEGMENTS, 0.5, key_padding_mask, 0.25, dropout_seed, dq, dk, dv
    )


def rope_out(x, freqs, out):
    return ops.rope_out(x, freqs, False, out)


def samples():
    """Each function with fresh arguments."""
    q, k, v, dout = (torch.randn(SHAPE) for _ in range(4))
    mask, seed, lse = torch.tensor([[True, False, True, True, True]]), torch.tensor([7]), torch.randn(2, 2, 5)
    scale = torch.tensor([0.5, 0.7])
    inputs = {"q": q, "k": k, "v": v, "key_padding_mask": mask}
    results = {"dout": dout, "dlse": torch.randn_like(lse), "q": q, "k": k, "v": v, "out": dout.sin(), "lse": lse}
    saved = {**results, "key_padding_mask": mask, "dropout_seed": seed}
    freqs = torch.polar(torch.ones(1, 5, 2), torch.randn(1, 5, 2))
    return {
        "attention": (attention, {**inputs, "softmax_scale": scale}),
        "forward": (forward, {**inputs, "dropout_seed": seed}),
        "backward": (backward, saved),
        "backward_out": (backward_out, {**saved, **{name: torch.empty(SHAPE) for name in ("dq", "dk", "dv")}}),
        "rope_out": (rope_out, {"x": q, "freqs": torch.view_as_real(freqs), "out": torch.empty(SHAPE)}),
        "apply_rope": (ma.apply_rope, {"x": q, "freqs": freqs}),
    }


OPERATORS = ["forward", "backward", "backward_out", "rope_out"]
ARGUMENTS = [(function, name) for function, (_, arguments) in samples().items() for name in arguments]


def described(results):
    """What can be told of results without numbers."""
    return tree_map(lambda t: (t.shape, t.dtype, t.stride()) if torch.is_tensor(t) else t, results)


@pytest.mark.parametrize("function", samples())
@pytest.mark.parametrize("place", ["meta", "fake"])
def test_shapes_are_inferred(function, place):
    call, arguments = samples()[function]
    expected = described(call(**arguments))
    if place == "meta":
        got = call(**{name: tensor.to("meta") for name, tensor in arguments.items()})
        assert all(t.is_meta for t in (got if isinstance(got, tuple) else (got,)) if t is not None)
    else:
        with FakeTensorMode() as mode:
            got = call(**{name: mode.from_tensor(tensor) for name, tensor in arguments.items()})
    assert described(got) == expected


def elsewhere(name, t):
    """Places and forms that nothing can be computed from."""
    forms = {"meta": lambda: t.to("meta"), "sparse": lambda: t.to_sparse(), "complex": lambda: t.to(torch.complex128)}
    forms["rank"] = lambda: t[None, None, None, None, None]
    if t.dtype == torch.float32:
        forms["quantized"] = lambda: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
        forms["mkldnn"] = lambda: t.to_mkldnn()
        forms["int"] = lambda: t.int()
        forms["nested"] = lambda: torch.nested.nested_tensor(list(t))
        forms["jagged"] = lambda: torch.nested.nested_tensor(list(t), layout=torch.jagged)
        forms["float8"] = lambda: t.to(torch.float8_e4m3fn)
    if name == "freqs" and t.is_complex():
        forms["complex"] = lambda: t[..., :1]  # freqs are
    return forms


ELSEWHERE = [
    (f, n, place)
    for f, n in ARGUMENTS
    for place in elsewhere(n, samples()[f][1][n])
    if not (place == "jagged" and (f in OPERATORS or n == "softmax_scale"))  # refuses operators itself, by their names
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "name", "place"), ELSEWHERE, ids=map("-".join, ELSEWHERE))
def test_one_argument_elsewhere_is_refused_by_name(function, name, place):
    call, arguments = samples()[function]
    arguments[name] = elsewhere(name, arguments[name])[place]()
    # An argument stands for those that are to be like it, and is named where it is the odd one or the others are.
    others = "k|v|key_padding_mask|dropout_seed|softmax_scale|dout|out|lse|dlse|freqs"
    with pytest.raises(
        (ValueError, NotImplementedError, AssertionError, RuntimeError), match=rf"\b({name}|{others})\b"
    ):
        call(**arguments)


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, n in ARGUMENTS if f not in OPERATORS])
@pytest.mark.parametrize("form", [np.asarray, torch.Tensor.tolist, str], ids=["numpy", "list", "str"])
def test_what_is_no_tensor_is_refused_by_name(function, name, form):
    call, arguments = samples()[function]
    with pytest.raises((TypeError, AssertionError), match=f"^{name}: expected"):
        call(**{**arguments, name: form(arguments[name])})


Q = torch.randn(SHAPE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": SPECS}, TypeError, "plan: expected an AttentionPlan, got list; AttentionPlan.compile"),
        ({"plan": None}, TypeError, "plan: expected an AttentionPlan, got NoneType"),
        ({"dropout_p": "0.5"}, TypeError, "dropout_p: expected a number, got str"),
        ({"dropout_p": None}, TypeError, "dropout_p: expected a number, got NoneType"),
        ({"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p: expected a number, got Tensor"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability, got nan"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, a tensor or None, got str"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number, got nan"),
        ({"softmax_scale": -float("inf")}, ValueError, "softmax_scale: expected a finite number, got -inf"),
        ({"softmax_scale": torch.ones(3)}, ValueError, r"softmax_scale: expected shape \(\) or \(1,\)"),
        ({"softmax_scale": torch.ones(2, 1, 1, 1)}, ValueError, "softmax_scale: expected shape"),
        ({"softmax_scale": torch.tensor(1)}, ValueError, "softmax_scale: expected dtype float32"),
        ({"q": torch.tensor(1.0)}, ValueError, r"q: expected shape .*, got \[\]"),
        ({"q": 1.0}, TypeError, "q: expected a tensor, got float"),
        ({"k": None}, TypeError, "k: expected a tensor, got NoneType"),
        ({"key_padding_mask": [True] * 5}, TypeError, "key_padding_mask: expected a tensor, got list"),
    ],
)
@pytest.mark.parametrize("place", ["cpu", "meta", "functorch"])
def test_what_the_operator_says(changes, error, message, place):
    arguments = {"q": Q, "k": Q, "v": Q, "plan": PLAN, **changes}
    if place == "meta":
        arguments = {name: t.to("meta") if torch.is_tensor(t) else t for name, t in arguments.items()}
    with pytest.raises(error, match=f"^{message}"):
        if place == "functorch":
            torch.func.vjp(lambda v: ma.attention(**{**arguments, "v": v}), arguments["v"])
        else:
            ma.attention(**arguments)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, int], ids=lambda kind: kind.__name__)
def test_numbers_of_other_kinds(kind):
    assert torch.equal(
        ma.attention(Q, Q, Q, PLAN, softmax_scale=kind(2)), ma.attention(Q, Q, Q, PLAN, softmax_scale=2.0)
    )


class Same(torch.Tensor):
    """A subclass that changes nothing."""


class Seen(torch.Tensor):
    """A wrapper that notes which functions it went through."""

    log: list[str] = []
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.log.append(str(func))
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


CONFIG = {"dim": 8, "num_heads": 2, "init_weights": "torch"}  # torch cannot draw truncated normals for fake tensors


def layer(use_rope=True, **options):
    torch.manual_seed(0)
    return ma.MixedAttention({**CONFIG, "use_rope": use_rope, **options})


def through_layer(x, freqs):
    return layer()(x, SPECS, PATTERNS, freqs=freqs)


def through_operator(x, freqs):
    return ma.attention(x.unflatten(2, (2, 4)).sin(), x.unflatten(2, (2, 4)), x.unflatten(2, (2, 4)), PLAN).flatten(2)


def through_rotation(x, freqs):
    return ma.apply_rope(x.unflatten(2, (2, 4)), freqs).flatten(2)


def through_all(x, freqs):
    return through_layer(through_rotation(through_operator(x, freqs), freqs), freqs)


FREQS = torch.polar(torch.ones(1, 5, 2), torch.arange(10.0).reshape(1, 5, 2))


def value_and_gradient(function, x, freqs=FREQS):
    x.requires_grad_()
    y = function(x, freqs)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y, grad


@pytest.mark.parametrize("function", [through_layer, through_operator, through_rotation, through_all])
@pytest.mark.parametrize("subclass", [Same, Seen])
@pytest.mark.parametrize("which", ["tokens", "freqs", "both"])
def test_subclasses(function, subclass, which):
    x = torch.randn(2, 5, 8)
    expected = value_and_gradient(function, x.clone())
    wrap = (lambda t: Seen(t)) if subclass is Seen else (lambda t: t.clone().as_subclass(Same))
    wrapped = wrap(x) if which != "freqs" else x.clone()
    got = value_and_gradient(function, wrapped, wrap(FREQS) if which != "tokens" else FREQS)
    if which != "freqs":
        assert all(type(t) is subclass for t in got)
    plain = [t.inner if isinstance(t, Seen) else t.as_subclass(torch.Tensor) for t in got]
    torch.testing.assert_close(plain, list(expected))


def test_subclasses_see_the_operator():
    Seen.log.clear()
    value_and_gradient(through_operator, Seen(torch.randn(2, 5, 8)))
    assert "mixed_attention.forward.default" in Seen.log and "mixed_attention.backward.default" in Seen.log


class NotesFunctions(TorchFunctionMode):
    def __init__(self, replacement=None):
        super().__init__()
        self.log, self.replacement = [], replacement

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.log.append(func)
        if self.replacement is not None and "mixed_attention" in str(func):
            return self.replacement
        return func(*args, **(kwargs or {}))


class NotesDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.log.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [through_operator, through_layer])
@pytest.mark.parametrize("mode", [NotesFunctions, NotesDispatch])
def test_modes_see_the_operator(function, mode):
    x = torch.randn(2, 5, 8)
    expected = value_and_gradient(function, x.clone())
    with mode() as seen:
        got = value_and_gradient(function, x.clone())
    assert any("mixed_attention" in str(func) and "forward" in str(func) for func in seen.log)
    torch.testing.assert_close(got, expected)


def test_modes_may_answer_for_the_operator():
    answer = torch.full(SHAPE, 3.0), torch.zeros(2, 2, 5)
    with NotesFunctions(answer):
        assert ma.attention(Q, Q, Q, PLAN) is answer[0]


def test_a_default_device_changes_no_path():
    with torch.device("cpu"), NotesDispatch() as notes:
        through_layer(torch.randn(2, 5, 8), FREQS)
    assert any("mixed_attention.rope" in str(func) for func in notes.log), "the layer was composed"


LAYERS = {
    "MixedAttention": lambda x: layer(use_rope=False)(x, SPECS, PATTERNS),
    "with RoPE": lambda x: layer()(x, SPECS, PATTERNS, freqs=ma.RopeFrequency(4, 1)(x[..., :1])),
    "with a mask": lambda x: layer(False)(x, SPECS, PATTERNS, key_padding_mask=x.new_ones(x.shape[:2]).bool()),
    "with dropout": lambda x: layer(False, dropout=0.5)(x, SPECS, PATTERNS),
    "to and from a cache": lambda x: layer(False)(
        x[:, 3:],
        [ma.TokenSpec("a_anchors", None), SPECS[1]],
        PATTERNS,
        kv_cache=layer(False)(x, SPECS, PATTERNS, return_kv_cache=True)[1],
    ),
    "PerceiverAttention": lambda x: ma.PerceiverAttention({**CONFIG, "kv_dim": 8})(x, x),
    "DotProductAttention": lambda x: ma.DotProductAttention({**CONFIG, "use_rope": False})(x),
    "reference": lambda x: layer(False, parallel=False)(x, SPECS, PATTERNS),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("place", ["meta", "fake"])
def test_layers_infer_shapes(name, place):
    call = LAYERS[name]
    expected = value_and_gradient(lambda x, _: call(x), torch.randn(2, 5, 8))
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        got = value_and_gradient(lambda x, _: call(x), torch.randn(2, 5, 8))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    assert all(t.is_meta for t in got) or place == "fake"


@pytest.mark.parametrize("form", ["conjugated", "negated", "both", "strided", "expanded", "leaf"])
@pytest.mark.parametrize("function", [through_rotation, through_layer, "compiled"])
def test_frequencies_of_every_form(function, form):
    plain = torch.polar(torch.ones(1, 5, 2), torch.randn(1, 5, 2))
    forms = {
        "conjugated": lambda f: f.conj().resolve_conj().conj(),
        "negated": lambda f: torch._neg_view(-f),
        "both": lambda f: torch._neg_view(-f.conj().resolve_conj()).conj(),
        "strided": lambda f: torch.stack([f, f], -1)[..., 0],
        "expanded": lambda f: f.expand(2, -1, -1),
        "leaf": lambda f: f.clone().requires_grad_(),
    }
    x = torch.randn(2, 5, 8)
    if function == "compiled":
        torch._dynamo.reset()
        function = torch.compile(through_rotation, backend="aot_eager")
    got = value_and_gradient(function, x.clone(), forms[form](plain))
    expected = value_and_gradient(through_layer if function is through_layer else through_rotation, x, plain)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_conjugated_frequencies(compiled):
    x, freqs = torch.randn(SHAPE), torch.randn(1, 5, 2, dtype=torch.complex64, requires_grad=True)
    rotate = torch.compile(ma.apply_rope, backend="aot_eager") if compiled else ma.apply_rope
    weights = torch.randn(SHAPE)
    (got,) = torch.autograd.grad((rotate(x, freqs.conj()) * weights).sum(), freqs)
    rotated = torch.view_as_real(torch.view_as_complex(x.reshape(2, 5, 2, 2, 2)) * freqs.conj().unsqueeze(2))
    (expected,) = torch.autograd.grad((rotated.reshape(SHAPE) * weights).sum(), freqs)
    torch.testing.assert_close(got, expected)


FORMS = {
    "negated": lambda t: torch.imag(torch.complex(torch.zeros_like(t), -t).conj()),
    "expanded batch": lambda t: t[:1].expand(2, -1, -1, -1),
    "expanded rows": lambda t: t[:, :1].expand(-1, 5, -1, -1),
    "expanded heads": lambda t: t[:, :, :1].expand(-1, -1, 2, -1),
    "expanded channels": lambda t: t[..., :1].expand(-1, -1, -1, 4),
    "channels first": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "lazy copy": lambda t: torch._lazy_clone(t),
    "inference": lambda t: torch.inference_mode()(lambda: t.clone())(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_every_form_is_computed(form, name):
    tensors = {n: torch.randn(SHAPE) for n in ("q", "k", "v", "dout")}
    tensors[name] = FORMS[form](tensors[name])
    copies = {n: t.clone(memory_format=torch.contiguous_format).resolve_neg() for n, t in tensors.items()}

    def results(q, k, v, dout):
        out, lse = ops.forward(q, k, v, SEGMENTS, 0.5)
        return out, lse, *ops.backward(dout, None, q, k, v, out, lse, SEGMENTS, 0.5)

    torch.testing.assert_close(results(**tensors), results(**copies))
    expected, _ = reference.attention(copies["q"], copies["k"], copies["v"], PLAN, softmax_scale=0.5, return_lse=True)
    torch.testing.assert_close(results(**tensors)[0], expected)


@pytest.mark.parametrize("form", ["expanded batch", "expanded keys", "strided", "every other row"])
def test_masks_of_every_form(form):
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    forms = {
        "expanded batch": mask[:1].expand(2, -1),
        "expanded keys": mask[:, :1].expand(-1, 5),
        "strided": mask.t().contiguous().t(),
        "every other row": torch.stack([mask, ~mask], 1)[:, 0],
    }
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    got = ops.forward(q, k, v, SEGMENTS, 0.5, forms[form])
    torch.testing.assert_close(
        got, ops.forward(q, k, v, SEGMENTS, 0.5, forms[form].clone(memory_format=torch.contiguous_format))
    )


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 5, 0, 4)], ids=["batch", "heads"])
def test_nothing_to_compute(shape):
    q = torch.randn(shape)
    out, lse = ops.forward(q, q, q, SEGMENTS, 0.5)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], 5)
    assert all(t.shape == shape for t in ops.backward(out, None, q, q, q, out, lse, SEGMENTS, 0.5))


SCALES = {"()": (), "(1,)": (1,), "(H,)": (2,), "(1, 1, H, 1)": (1, 1, 2, 1)}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("mode", ["eager", "compiled", "functorch", "second order", "autocast"])
def test_scales_that_are_learned(shape, mode):
    dtype = torch.float32 if mode == "autocast" else torch.float64
    q, k, v = (torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(3))
    scale = torch.rand(shape, dtype=dtype).add(0.2).requires_grad_()

    def ours(q, k, v, scale):
        return ma.attention(q, k, v, PLAN, softmax_scale=scale)

    def expected(q, k, v, scale):
        factor = scale.reshape(-1, 1) if scale.numel() > 1 else scale
        return reference.attention(q * factor, k, v, PLAN, softmax_scale=1.0)

    def rounded_once(q, k, v, scale):
        q, k, v = ((q * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)).bfloat16(), k.bfloat16(), v.bfloat16())
        return ma.attention(q, k, v, PLAN, softmax_scale=1.0)

    def gradients(function):
        if mode == "functorch":
            return torch.func.grad(lambda *t: function(*t).square().sum(), (0, 1, 2, 3))(q, k, v, scale)
        found = torch.autograd.grad(function(q, k, v, scale).square().sum(), (q, k, v, scale), create_graph=True)
        if mode == "second order":
            return torch.autograd.grad(sum(g.square().sum() for g in found), (q, k, v, scale))
        return found

    if mode == "compiled":
        torch._dynamo.reset()
        torch.testing.assert_close(
            gradients(torch.compile(ours, backend="aot_eager", fullgraph=True)), gradients(expected)
        )
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = gradients(ours), gradients(rounded_once)
        torch.testing.assert_close(got, wanted)
    else:
        torch.testing.assert_close(gradients(ours), gradients(expected))


def test_a_scale_of_16_bits_is_rounded_once():
    q, k, v = (torch.randn(SHAPE).bfloat16() for _ in range(3))
    scale = torch.tensor(0.37)
    expected = ma.attention((q.float() * scale).bfloat16(), k, v, PLAN, softmax_scale=1.0)
    assert torch.equal(ma.attention(q, k, v, PLAN, softmax_scale=scale), expected)


def test_errors_reach_the_user_of_a_compiler():
    compiled = torch.compile(lambda q, k: ma.attention(q, k, k, PLAN), backend="aot_eager")
    with pytest.raises(Exception, match="k: expected dtype"):
        compiled(Q, Q.double())


def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("torch finds fewer than two GPUs")
    return torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "name"), ARGUMENTS, ids=map("-".join, ARGUMENTS))
def test_one_argument_on_another_gpu_is_refused_by_name(function, name):
    first, second = two_gpus()
    call, arguments = samples()[function]
    arguments = {n: t.to(second if n == name else first) for n, t in arguments.items()}
    with pytest.raises(ValueError, match="expected device cuda"):
        call(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("place", [0, 1])
def test_the_current_gpu_does_not_matter(place, current, dtype):
    device = two_gpus()[place]
    torch.manual_seed(0)
    x, freqs = torch.randn(2, 5, 8).to(dtype), FREQS

    def results(device):
        moved = x.to(device).requires_grad_()
        y = layer().to(device, dtype)(moved, SPECS, PATTERNS, freqs=freqs.to(device))
        z = through_rotation(through_operator(moved, None), freqs.to(device))
        grads = torch.autograd.grad((y.float().square().sum() + z.float().square().sum()), moved)
        return [t.cpu() for t in (y, z, *grads)]

    with torch.cuda.device(current):
        got = results(device)
    torch.testing.assert_close(got, results(torch.device("cpu")), rtol=2e-2, atol=2e-2)
