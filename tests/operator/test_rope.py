import copy

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mixed_attention as ma

B, N, H, D = 2, 5, 3, 8


def random_inputs(dtype=torch.float64, batch_size_freqs=1):
    torch.manual_seed(0)
    x = torch.randn(B, N, H, D, dtype=torch.float64).to(dtype)
    freqs = torch.randn(batch_size_freqs, N, D // 2, dtype=torch.complex128)
    return x, freqs if dtype == torch.float64 else freqs.to(torch.complex64)


def as_complex_product(x, freqs):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs[:, :, None]).flatten(-2)


@pytest.mark.parametrize("batch_size_freqs", [1, B])
def test_neighbouring_channels_are_one_complex_number(batch_size_freqs):
    x, freqs = random_inputs(batch_size_freqs=batch_size_freqs)
    torch.testing.assert_close(ma.apply_rope(x, freqs), as_complex_product(x, freqs), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_fp32_and_rounded_once(dtype):
    x, freqs = random_inputs(dtype)
    exact = as_complex_product(x.double(), freqs.to(torch.complex128))
    rotated = ma.apply_rope(x, freqs)
    assert rotated.dtype == dtype
    # Three fp32 roundings of terms of the size of x times freqs, then one to the dtype.
    bound = (
        3 * torch.finfo(torch.float32).eps * x.abs().max() * freqs.abs().max() + torch.finfo(dtype).eps * exact.abs()
    )
    assert ((rotated.double() - exact).abs() <= bound).all()


def test_input_is_left_as_it_is():
    x, freqs = random_inputs()
    before = x.clone()
    ma.apply_rope(x, freqs)
    assert torch.equal(x, before)


def test_derivatives_of_both_arguments():
    x, freqs = random_inputs()
    inputs = (x.requires_grad_(), freqs.requires_grad_())
    assert gradcheck(ma.apply_rope, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ma.apply_rope, inputs)


@pytest.mark.parametrize(
    "freqs, error, message",
    [
        (
            torch.ones(N, D // 2, dtype=torch.complex64),
            AssertionError,
            r"freqs.shape should be \(batch_size, seqlen, head_dim // 2\)",
        ),
        (torch.ones(B, N, 1, D // 2, dtype=torch.complex64), AssertionError, "freqs.shape should be"),
        (torch.ones(B, N, D // 2), AssertionError, "expected a complex tensor"),
        ([torch.ones(B, N, D)], AssertionError, "expected a complex tensor .* got list"),
        (
            torch.ones(B + 1, N, D // 2, dtype=torch.complex64),
            RuntimeError,
            "size must match .* batch_size 2 or 1, got 3",
        ),
        (torch.ones(B, N + 1, D // 2, dtype=torch.complex64), RuntimeError, "size must match .* seqlen 5, got 6"),
        (torch.ones(B, N, D, dtype=torch.complex64), RuntimeError, r"size must match .* head_dim // 2 4, got 8"),
        ((torch.ones(B, N, 6), torch.ones(B, N, 4)), AssertionError, "10 channels > head dimension 8"),
        ((torch.ones(N, 4),), AssertionError, "expected real angles"),
    ],
    ids=["rank 2", "rank 4", "real", "list", "batch", "tokens", "channels", "wide axes", "angles of rank 2"],
)
def test_frequencies_that_do_not_fit(freqs, error, message):
    with pytest.raises(error, match=message):
        ma.apply_rope(torch.ones(B, N, H, D), freqs)


def test_last_dims_and_gradients_may_have_any_strides():
    x, freqs = random_inputs()
    strided = x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    out = ma.apply_rope(strided, freqs)
    assert torch.equal(out, ma.apply_rope(x, freqs))
    dout = torch.randn(B, N, D, H, dtype=torch.float64).transpose(2, 3)
    (grad,) = torch.autograd.grad(out, strided, dout)
    torch.testing.assert_close(grad, as_complex_product(dout, freqs.conj()), rtol=1e-14, atol=1e-14)


def test_odd_head_dim_is_refused():
    with pytest.raises(RuntimeError, match="rotated in pairs, got an odd number of 7"):
        ma.apply_rope(torch.ones(B, N, H, 7), torch.ones(1, N, 3, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(0, N, H, D), (B, 0, H, D)], ids=["no batch", "no tokens"])
def test_nothing_to_rotate(shape):
    freqs = torch.ones(1, shape[1], D // 2, dtype=torch.complex64)
    assert ma.apply_rope(torch.ones(shape), freqs).shape == shape


def test_tuple_form_is_the_complex_form_where_slices_are_pairs():
    x, _ = random_inputs()
    turns = [torch.rand(1, N, 1, dtype=torch.float64) * 6 for _ in range(2)]
    rotated = ma.apply_rope(x, tuple(torch.cat((turn, turn), -1) for turn in turns))
    for axis, turn in enumerate(turns):
        part = slice(2 * axis, 2 * axis + 2)
        expected = as_complex_product(x[..., part], torch.polar(torch.ones_like(turn), turn))
        torch.testing.assert_close(rotated[..., part], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(rotated[..., 4:], x[..., 4:])


def test_tuple_form_is_the_complex_form_of_permuted_channels():
    x, _ = random_inputs()
    coords = torch.rand(1, N, 2) * 100
    freqs = ma.RopeFrequency(D, 2)(coords).to(torch.complex128)
    angles = ma.RopeFrequency(D, 2, implementation="real")(coords)
    # New channel 2i is the old i of its slice, 2i + 1 the old i + m/2.
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])
    permuted = ma.apply_rope(x[..., order], freqs)
    torch.testing.assert_close(ma.apply_rope(x, angles)[..., order], permuted, rtol=0, atol=1e-6)  # fp32 sines


@pytest.mark.parametrize(
    "head_dim, axes, per_axis, unrotated",
    [
        (64, 3, 10, 4),
        (64, 2, 16, 0),
        (64, 1, 32, 0),
        (48, 3, 8, 0),
        (32, 3, 5, 2),
        (16, 3, 2, 4),
        (8, 3, 1, 2),
        (6, 3, 1, 0),
    ],
)
def test_frequency_table(head_dim, axes, per_axis, unrotated):
    rope = ma.RopeFrequency(head_dim, axes)
    assert (rope.omega.shape, rope.padding) == ((per_axis,), unrotated)
    coords = torch.randn(2, 7, axes) * 1000
    freqs = rope(coords)
    assert freqs.shape == (2, 7, head_dim // 2)
    assert freqs.dtype == torch.complex64
    omega = 10_000.0 ** (-torch.arange(per_axis, dtype=torch.float64) / per_axis)
    angles = (coords.double()[..., None] * omega).flatten(-2)
    expected = torch.polar(torch.ones_like(angles), angles)
    # An angle of a few thousand radians is known to half an ulp of fp32 per rounding: omega, the product.
    bound = 2 * torch.finfo(torch.float32).eps * angles.abs() + 1e-6
    assert ((freqs[..., : angles.shape[-1]].to(torch.complex128) - expected).abs() <= bound).all()
    assert torch.equal(freqs[..., angles.shape[-1] :], torch.ones(2, 7, unrotated // 2, dtype=torch.complex64))


def test_too_few_channels():
    with pytest.raises(ValueError, match="Effective hidden dimension per wave must be > 0"):
        ma.RopeFrequency(4, 3)


@pytest.mark.parametrize("head_dim, axes", [(5, 2), (7, 3)])
def test_odd_left_over_channels_fail_when_called(head_dim, axes):
    rope = ma.RopeFrequency(head_dim, axes)
    with pytest.raises(AssertionError, match="odd number of channels"):
        rope(torch.zeros(1, 1, axes))


def test_wrong_number_of_axes():
    with pytest.raises(AssertionError, match="expected 3 axes"):
        ma.RopeFrequency(64, 3)(torch.zeros(1, 1, 2))


def test_tuple_form_takes_rank_2_and_3():
    rope = ma.RopeFrequency(64, 3, implementation="real")
    assert [a.shape for a in rope(torch.zeros(9, 3))] == [(9, 20)] * 3
    with pytest.raises(NotImplementedError, match="rank 2 or 3, got rank 4"):
        rope(torch.zeros(1, 1, 9, 3))


def test_omega_is_saved_and_stays_fp32():
    rope = ma.RopeFrequency(64, 3)
    assert list(rope.state_dict()) == ["omega"]
    omega = rope.omega.clone()
    assert torch.equal(copy.deepcopy(rope).bfloat16().omega, omega)
    assert torch.equal(torch.nn.Sequential(copy.deepcopy(rope)).half()[0].omega, omega)
    assert rope.to("meta").omega.device.type == "meta"


def test_autocast_does_not_touch_the_angles():
    coords = torch.rand(1, 50, 3) * 1000
    rope = ma.RopeFrequency(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rope(coords), rope(coords.clone()))
        inside = rope(coords)
    assert torch.equal(inside, rope(coords))


def test_gradient_reaches_the_coordinates():
    coords = torch.rand(1, N, 2, requires_grad=True)
    x, _ = random_inputs(torch.float32)
    rope = ma.RopeFrequency(D, 2, max_wavelength=10)
    (grad,) = torch.autograd.grad((ma.apply_rope(x, rope(coords)) * x.flip(1)).sum(), coords)
    for index in ((0, 1, 0), (0, 3, 1)):
        step = torch.zeros_like(coords)
        step[index] = 1e-2
        change = sum(
            s * (ma.apply_rope(x, rope(coords.detach() + s * step)) * x.flip(1)).double().sum() for s in (1, -1)
        )
        # Central difference of a function whose third derivative is of the size of its value.
        torch.testing.assert_close(grad[index].double(), change / 2e-2, rtol=1e-2, atol=1e-2)


def test_made_from_a_configuration():
    rope = ma.RopeFrequency(ma.RopeFrequencyConfig(hidden_dim=64, input_dim=3, max_wavelength=100))
    assert (rope.hidden_dim, rope.input_dim, rope.max_wavelength) == (64, 3, 100)
    assert torch.equal(rope.omega, ma.RopeFrequency({"hidden_dim": 64, "input_dim": 3, "max_wavelength": 100}).omega)
