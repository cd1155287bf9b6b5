"""Curl, divergence and Jacobians of what a model predicts, and the norms that they need."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp

import mixed_attention as ma
from mixed_attention import derivatives, func, norms


def abc(points, a=1.0, b=0.7, c=0.4):
    """A flow that is its own curl."""
    x, y, z = points.unbind(-1)
    return torch.stack([a * z.sin() + c * y.cos(), b * x.sin() + a * z.cos(), c * y.sin() + b * x.cos()], -1)


class Model(nn.Module):
    """A potential at queries that see anchors, through RoPE, norms and an MLP; or each other, if they are keys."""

    def __init__(self, keys=("m_anchor",), dim=12):
        super().__init__()
        self.keys = list(keys)
        self.rope = ma.RopeFrequency(dim // 2, 3)
        self.embed, self.head = nn.Linear(3, dim), nn.Linear(dim, 3)
        config = ma.MixedAttentionConfig(dim=dim, num_heads=2, use_rope=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.layers = nn.ModuleList(ma.MixedAttention(config) for _ in range(2))
        self.anchors = torch.rand(1, 9, 3)

    def run(self, points, specs, patterns, caches):
        x, made = self.embed(points), []
        for norm, layer, cache in zip(self.norms, self.layers, caches):
            options = {"kv_cache": cache, "return_kv_cache": True}
            out, entry = layer(norm(x), specs, patterns, freqs=self.rope(20 * points), **options)
            x = x + out
            made.append(entry)
        return self.head(x.sin()), made

    def forward(self, points):
        anchors = self.anchors.to(points.dtype)
        pattern = ma.AttentionPattern(["m_anchor"], ["m_anchor"])
        _, caches = self.run(anchors, [ma.TokenSpec("m_anchor", 9)], [pattern], [None, None])
        specs = [ma.TokenSpec("m_anchor", None), ma.TokenSpec("q", points.shape[1])]
        patterns = [ma.AttentionPattern(["m_anchor"], ["m_anchor"]), ma.AttentionPattern(["q"], self.keys)]
        return self.run(points, specs, patterns, caches)[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


POINTS = torch.rand(1, 11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_flow_that_is_its_own_curl():
    value, jacobian = func.value_and_jacobian(abc, POINTS)
    torch.testing.assert_close(func.curl(jacobian), value)
    assert float(func.divergence(jacobian).abs().max()) < 1e-15


def test_a_jacobian_is_that_of_each_point(model):
    value, jacobian = func.value_and_jacobian(model, POINTS)
    torch.testing.assert_close(value, model(POINTS))
    whole = jacrev(model)(POINTS)[0, :, :, 0]  # (points, channels, points, dims)
    expected = whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)[None]
    torch.testing.assert_close(jacobian, expected, rtol=1e-6, atol=1e-8)  # angles of RoPE are fp32


def test_each_layer_attends_once(model, monkeypatch):
    calls = []
    run = derivatives._run
    monkeypatch.setattr(
        derivatives, "_run", lambda name, *rest: (calls.append((name, len(rest[3]))), run(name, *rest))[1]
    )
    func.value_and_jacobian(model, POINTS, check=False)
    # Anchors are encoded by plain forwards; queries move in three directions at once.
    assert [call for call in calls if call[0] != "forward"] == [("forward_jvp", 3), ("forward_jvp", 3)]


def test_a_mapping_of_fields():
    def predict(x):
        return {"flow": abc(x), "pressure": x[..., :1] ** 2}

    value, jacobian = func.value_and_jacobian(predict, POINTS)
    assert {name: tuple(t.shape) for name, t in jacobian.items()} == {"flow": (1, 11, 3, 3), "pressure": (1, 11, 1, 3)}
    torch.testing.assert_close(jacobian["pressure"][..., 0, 0], 2 * POINTS[..., 0])
    assert value.keys() == jacobian.keys()


def test_the_curl_of_a_potential_has_no_divergence(model):
    def velocity(points):
        return func.curl(func.value_and_jacobian(model, points, check=False)[1])

    _, jacobian = func.value_and_jacobian(velocity, POINTS, check=False)
    # RoPE's angles are fp32, so that derivatives by them are; sums of them cancel like those of fp32.
    assert float(func.divergence(jacobian).detach().abs().max()) < 1e-6 * float(jacobian.detach().abs().max())


def test_a_loss_of_a_curl_has_the_gradients_of_differences(model):
    def loss():
        return (func.curl(func.value_and_jacobian(model, POINTS, check=False)[1]) - abc(POINTS)).square().mean()

    for weight in (model.layers[0].qkv.weight, model.norms[1].weight, model.embed.weight):
        (got,) = torch.autograd.grad(loss(), weight)
        direction, step = torch.randn_like(weight), 1e-5
        with torch.no_grad():
            weight.add_(step * direction)
            above = loss()
            weight.sub_(2 * step * direction)
            below = loss()
            weight.add_(step * direction)
        torch.testing.assert_close((got * direction).sum(), (above - below) / (2 * step), rtol=1e-4, atol=1e-7)


def test_streams(model):
    def velocity(points):
        return func.curl(func.value_and_jacobian(model, points, check=False)[1])

    points = torch.rand(1, 40, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ma.stream(velocity, points, chunk_size=16), velocity(points))


def test_points_that_see_each_other_are_refused():
    torch.manual_seed(0)
    model = Model(keys=["m_anchor", "q"]).double()
    with pytest.raises(ValueError, match="depend on that point alone"):
        func.value_and_jacobian(model, POINTS)
    func.value_and_jacobian(model, POINTS, check=False)


def test_what_is_normalised_over_points_is_refused():
    with pytest.raises(ValueError, match="depend on that point alone"):
        func.value_and_jacobian(lambda x: x - x[..., 2:].mean(1, keepdim=True), POINTS)
    with pytest.raises(ValueError, match="depend on that point alone"):
        func.value_and_jacobian(lambda x: x.flip(1), POINTS[:, :2])


def test_a_check_draws_nothing():
    before = torch.get_rng_state()
    func.value_and_jacobian(abc, POINTS)
    assert torch.equal(before, torch.get_rng_state())


def test_tangents_in_fp16_are_scaled():
    points = 1e-3 * torch.rand(1, 5, 2, dtype=torch.float16)
    predict = lambda x: 60000 * x * 4 / 256  # noqa: E731  # whose tangents are beyond fp16 on the way
    assert not func.value_and_jacobian(predict, points, check=False)[1].isfinite().all()
    _, jacobian = func.value_and_jacobian(predict, points, tangent_scale=2.0**-8)
    torch.testing.assert_close(jacobian.diagonal(dim1=-2, dim2=-1), torch.full((1, 5, 2), 937.5, dtype=torch.float16))


def test_a_stream_function_and_a_vorticity():
    points = torch.rand(1, 5, 2, dtype=torch.float64)
    _, jacobian = func.value_and_jacobian(lambda x: x[..., :1] * x[..., 1:] ** 2, points)
    x, y = points.unbind(-1)
    torch.testing.assert_close(func.curl(jacobian), torch.stack([2 * x * y, -(y**2)], -1))
    _, jacobian = func.value_and_jacobian(lambda x: torch.stack([-x[..., 1], x[..., 0]], -1), points)
    torch.testing.assert_close(func.curl(jacobian), torch.full((1, 5, 1), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: func.value_and_jacobian(3, POINTS), TypeError, "predict: expected a function of positions, got int"),
        (lambda: func.value_and_jacobian(abc, [1.0]), TypeError, "positions: expected a tensor, got list"),
        (lambda: func.value_and_jacobian(abc, POINTS[0]), ValueError, r"positions: .* got \(11, 3\)"),
        (lambda: func.value_and_jacobian(abc, POINTS.long()), ValueError, "positions: expected floating-point numbers"),
        (lambda: func.value_and_jacobian(abc, POINTS, tangent_scale=3.0), ValueError, "tangent_scale: .* got 3.0"),
        (lambda: func.value_and_jacobian(lambda x: (x,), POINTS), TypeError, "predict's result: .* got tuple"),
        (lambda: func.value_and_jacobian(lambda x: {}, POINTS), TypeError, "predict's result: .* an empty mapping"),
        (lambda: func.value_and_jacobian(lambda x: {"u": 1}, POINTS), TypeError, r"result\['u'\]: .* got int"),
        (
            lambda: func.value_and_jacobian(lambda x: x[:, :4], POINTS),
            ValueError,
            r"\(1, 11, channels\), got \(1, 4, 3\)",
        ),
        (lambda: func.curl(torch.zeros(5, 3, 2)), ValueError, r"jacobian: expected shape .* got \(5, 3, 2\)"),
        (lambda: func.curl({"u": torch.zeros(3, 3)}), TypeError, "jacobian: .* got dict; choose one by its name"),
        (lambda: func.curl(torch.zeros(3)), ValueError, r"jacobian: .* got \(3,\)"),
        (lambda: func.divergence(torch.zeros(5, 1, 2)), ValueError, r"jacobian: expected shape \(…, d, d\)"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


X = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WEIGHT, BIAS = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
NORMS = {
    "layer_norm": lambda x: F.layer_norm(x.mT, (4,), WEIGHT, BIAS),
    "layer_norm, two dims": lambda x: F.layer_norm(x, (4, 5)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, WEIGHT, BIAS, training=True),
    "instance_norm": lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS),
    "nn.LayerNorm": nn.LayerNorm(5).double(),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_exact_in_every_mixture(name):
    f = NORMS[name]
    scalar = lambda x: (f(x).sin() * torch.arange(1.0, 1 + f(x).numel()).view_as(f(x))).sum()  # noqa: E731
    expected = jacrev(jacrev(scalar))(X)
    with func.exact_norms():
        torch.testing.assert_close(f(X), NORMS[name](X))
        for outer, inner in ((jacrev, jacfwd), (jacfwd, jacfwd), (jacfwd, jacrev)):
            torch.testing.assert_close(outer(inner(scalar))(X), expected, rtol=1e-8, atol=1e-9)


def test_norms_have_the_values_and_statistics_of_torch():
    for dtype in (torch.float32, torch.bfloat16):
        x = X.to(dtype)
        layers = [nn.LayerNorm(5).to(dtype), nn.BatchNorm1d(4).to(dtype), nn.InstanceNorm1d(4, affine=True).to(dtype)]
        for layer in layers:
            torchs = layer(x)
            state = {name: t.clone() for name, t in layer.state_dict().items()}
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
            with func.exact_norms():
                # Numbers of order one, off by a few roundings: torch folds mean, deviation, weight and bias.
                off = 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(layer(x), torchs, rtol=off, atol=off)
            torch.testing.assert_close(layer.state_dict(), state)


def test_norms_are_replaced_only_where_torch_is_wrong(monkeypatch):
    slope = lambda x: jvp(lambda x: F.layer_norm(x, (5,)).sin().sum(), (x,), (x.cos(),))[1]  # noqa: E731
    exact = lambda x: jvp(lambda x: norms._layer_norm(x, (5,)).sin().sum(), (x,), (x.cos(),))[1]  # noqa: E731
    is_wrong = not torch.allclose(grad(slope)(X), grad(exact)(X))
    assert norms.is_needed() == is_wrong
    monkeypatch.setattr(norms, "is_needed", lambda: False)
    with func.exact_norms():
        assert torch.allclose(grad(slope)(X), grad(exact)(X)) != is_wrong


def test_attention_is_still_fused_where_norms_are_replaced():
    plan = ma.AttentionPlan.compile([ma.TokenSpec("a", 4)], [ma.AttentionPattern(["a"], ["a"])])
    q = torch.randn(1, 4, 1, 4, requires_grad=True)
    with func.exact_norms():
        out = ma.attention(q, q, q, plan)
    assert "Attend" in out.grad_fn.name()
