"""Dropout of attention weights: the kernels draw exactly what the reference defines, and what they draw is random."""

import pytest
import torch

import mixed_attention as ma
from mixed_attention import reference

SPECS = [ma.TokenSpec("a", 70), ma.TokenSpec("b", 45), ma.TokenSpec("c", 33)]
PATTERNS = [ma.AttentionPattern(["a"], ["a", "c", "c"]), ma.AttentionPattern(["b", "c"], ["b"])]
PLAN = ma.AttentionPlan.compile(SPECS, PATTERNS)


def attend(dropout_p, *, seed=3, dtype=torch.float64, mask=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 148, 3, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    seed = torch.tensor([seed])
    out, _ = torch.ops.mixed_attention.forward(*leaves, PLAN.flat(), 0.25, mask, dropout_p, seed)
    expected = reference.attention(
        *leaves, PLAN, softmax_scale=0.25, key_padding_mask=mask, dropout_p=dropout_p, dropout_seed=seed
    )
    return leaves, out, expected


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 123456789123])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_follow_the_definition(seed, dropout_p, masked):
    mask = torch.rand(2, 148) < 0.7 if masked else None
    leaves, out, expected = attend(dropout_p, seed=seed, mask=mask)
    # fp64 sums of at most 136 weights, each up to 1 / (1 - dropout_p) times its own: 1e-9 is far above rounding, and
    # far below what a single weight dropped wrongly changes.
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, dout), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [0, -1, 123456789123])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("width", [64, 128, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_passes_keep_exactly_the_weights_of_the_definition(dtype, width, dropout_p, seed, device):
    """All scores are zero, and every key, or query, has a channel of its own: the results are the weights."""
    sizes = width // 2, width // 3, width - width // 2 - width // 3
    specs = [ma.TokenSpec(name, size) for name, size in zip("abc", sizes)]
    plan = ma.AttentionPlan.compile(specs, PATTERNS)
    q = torch.zeros(2, width, 3, width, dtype=dtype, device=device)
    one_hot = torch.eye(width, dtype=dtype, device=device)[None, :, None].expand(2, width, 3, width).contiguous()
    arguments = plan.flat(), 1.0, None, dropout_p, torch.tensor([seed], device=device)
    out, lse = torch.ops.mixed_attention.forward(q, q, one_hot, *arguments)
    _, _, dv = torch.ops.mixed_attention.backward(one_hot, None, q, q, one_hot, out, lse, *arguments)
    for segment in plan.query_segments:
        keep, keep_probability = reference.dropout_keep(segment, 2, 3, dropout_p, torch.tensor([seed]))
        kept = torch.zeros(2, 3, segment.end - segment.start, width)  # by key, however often it is listed
        keys = torch.cat([torch.arange(*key_range) for key_range in segment.key_ranges])
        kept.index_add_(3, keys, keep.float())
        weight = 1 / (len(keys) * keep_probability)
        rows = slice(segment.start, segment.end)
        for got in (out[:, rows].transpose(1, 2), dv.permute(0, 2, 3, 1)[:, :, rows]):
            # Counts of up to two, times one weight: off by a few roundings, a hundredth at most in any dtype.
            torch.testing.assert_close(got.float().cpu() / weight, kept, rtol=0.01, atol=0.01)


def test_everything_dropped_is_zero():
    leaves, out, _ = attend(1.0)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


def test_kept_share_is_binomial():
    segment = ma.AttentionPlan.compile([ma.TokenSpec("a", 500)], [ma.AttentionPattern(["a"], ["a"])]).query_segments[0]
    for dropout_p in (0.1, 0.5, 0.9):
        keep, probability = reference.dropout_keep(segment, 2, 2, dropout_p, torch.randint(2**62, (1,)))
        deviation = (probability * (1 - probability) / keep.numel()) ** 0.5
        assert abs(keep.double().mean() - probability) < 6 * deviation  # one in 5e8 by chance
        # Weights of neighbouring keys, queries and heads are dropped independently.
        for dim in range(1, 4):
            both = (keep.narrow(dim, 0, keep.shape[dim] - 1) & keep.narrow(dim, 1, keep.shape[dim] - 1)).double()
            expected = probability**2
            assert abs(both.mean() - expected) < 8 * (expected / both.numel()) ** 0.5


def test_torch_seed_fixes_the_mask():
    q = torch.randn(1, 148, 2, 16)
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(ma.attention(q, q, q, PLAN, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_expectation_is_attention_without_dropout():
    q = torch.randn(1, 148, 2, 16, dtype=torch.float64)
    exact = ma.attention(q, q, q, PLAN)
    draws = torch.stack([ma.attention(q, q, q, PLAN, dropout_p=0.2) for _ in range(400)])
    error = (draws.mean(0) - exact).abs()
    assert (error < 7 * draws.std(0) / 400**0.5 + 1e-12).all()
