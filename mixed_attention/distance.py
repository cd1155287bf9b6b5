"""Attention that falls off with distance: a bias of scores that is made of a few more channels of queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixed_attention.autocast import autocast_dtype, cat

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_MULTIPLE = 8  # of channels; kernels for GPUs take up others more slowly


def coordinate_bias(
    q: Tensor,
    k: Tensor,
    coords: Tensor,
    k_coords: Tensor | None = None,
    *,
    beta: float | Tensor,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, float]:
    r"""Widens queries and keys, so that ``-beta * |x_i - x_j|²`` is added to their scaled scores.

    The square of a distance is a sum of products: ``-|x_i|² + 2 x_i · x_j - |x_j|²``. Each becomes a channel of its
    own, with coordinates taken from the middle of their range. Numbers of 16 bits are too coarse for that, so in these
    dtypes every factor is the sum of two numbers, whose products become three channels. Zeros fill up to a multiple
    of 8: coordinates in three dimensions widen heads by 8 channels, in 16 bits by 16. The values stay as they are,
    and are then narrower than queries and keys.

    With R the largest distance of a token from the middle, the bias is off by at most ``c * |beta| * R²``, where c is
    2⁻¹⁹ in fp32, 2⁻¹⁴ in bf16, 2⁻¹⁸ in fp16 (or by 2⁻²⁰ where that is more), 2⁻⁴⁸ in fp64. docs/precision.md says
    why. Products in TF32 have less precision than that: do not allow them here.

    Args:
        q: Queries ``(B, Nq, H, D)`` as :func:`mixed_attention.attention` takes them, already rotated where they are.
        k: Keys ``(B or 1, Nk, H, D)``.
        coords: Coordinates ``(B or 1, Nq, d)`` of the queries, fp32 or fp64 for the precision above. Differentiable.
        k_coords: Coordinates ``(B or 1, Nk, d)`` of the keys, dtype of ``coords``; by default those of the queries.
        beta: One over the square of a length. A number, or a tensor ``()`` or ``(H,)`` with one for each head, which
            is differentiable.
        softmax_scale: Factor on the products q·k without the bias; default ``D ** -0.5``.

    Returns:
        Queries and keys of more channels, and the ``softmax_scale`` that :func:`mixed_attention.attention` is to be
        called with. Under autocast they have its dtype.

    Raises:
        TypeError: If something is not a tensor, or ``beta`` neither that nor a number.
        ValueError: If a shape, dtype or device does not fit, or the scale or a number ``beta`` is not finite, or the
            scale is 0.

    Example:
        >>> plan = AttentionPlan.compile([TokenSpec("points", 50)], [AttentionPattern(["points"], ["points"])])
        >>> q, k, v = torch.randn(3, 1, 50, 2, 32).unbind(0)
        >>> q, k, scale = coordinate_bias(q, k, torch.rand(1, 50, 3), beta=4.0)
        >>> attention(q, k, v, plan, softmax_scale=scale).shape
        torch.Size([1, 50, 2, 32])
    """
    k_coords = coords if k_coords is None else k_coords
    _check(q, k, coords, k_coords, beta)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"softmax_scale: expected a finite number other than 0, got {softmax_scale}")
    by_autocast = autocast_dtype(q.device.type)
    if by_autocast is not None:
        q, k = (t.to(by_autocast) if t.dtype == torch.float32 else t for t in (q, k))
    precise = torch.float64 if torch.float64 in (q.dtype, coords.dtype) else torch.float32
    middle, reach = _extent(coords.to(precise), k_coords.to(precise))
    x, y = ((each.to(precise) - middle) / reach for each in (coords, k_coords))
    weight = torch.as_tensor(beta, dtype=precise, device=q.device).reshape(-1, 1) * reach.square() / scale
    # A power of two shares the factor between queries and keys, so that 16 bits hold both, whatever its size.
    share = _power_of_two(weight.detach().abs().sqrt())
    ask = weight / share
    x, y = (each.unsqueeze(2) for each in (x, y))  # (B or 1, N, 1, d): all heads alike
    pairs = [
        (2 * ask * x, share * y),
        (-ask * x.square().sum(-1, keepdim=True), share.expand(*y.shape[:2], -1, 1)),
        ((-ask).expand(*x.shape[:2], -1, 1), share * y.square().sum(-1, keepdim=True)),
    ]
    widened = zip(*(products for pair in pairs for products in _channels(*pair, q.dtype)))
    q, k = (_widen(head, channels) for head, channels in zip((q, k), widened))
    return q, k, scale


def _channels(a: Tensor, b: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Factors in a dtype whose products add up to those of a and b."""
    if dtype not in _SIXTEEN_BITS:
        return [(a.to(dtype), b.to(dtype))]
    (a, a_rest), (b, b_rest) = _split(a, dtype), _split(b, dtype)
    return [(a, b), (a, b_rest), (a_rest, b)]


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers of a dtype that add up to x. The derivative is that of the first, whose error is the second."""
    rounded = x.to(dtype)
    return rounded, (x.detach() - rounded.detach().to(x.dtype)).to(dtype)


def _widen(heads: Tensor, channels: tuple[Tensor, ...]) -> Tensor:
    """``(B, N, H, D)`` with more channels behind, and zeros up to a multiple of 8."""
    shape = heads.shape[:3]
    missing = -(heads.shape[-1] + sum([each.shape[-1] for each in channels])) % _MULTIPLE
    return cat([heads, *(each.expand(*shape, -1) for each in channels), heads.new_zeros(*shape, missing)], -1)


def _extent(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of all coordinates ``(d,)``, and a power of two that none is further from it than.

    Neither changes a distance, so that they have no derivatives. Coordinates that are not finite have no say.
    """
    points = torch.cat([each.detach().flatten(0, 1) for each in (x, y)])
    counts = points.isfinite()
    low, high = (torch.where(counts, points, bound) for bound in (math.inf, -math.inf))
    infinite = points.new_full((1, points.shape[-1]), math.inf)  # without which no tokens have no least coordinates
    low, high = torch.cat([low, infinite]).amin(0), torch.cat([high, -infinite]).amax(0)
    middle = torch.where(low <= high, low / 2 + high / 2, 0)
    return middle, _power_of_two(torch.where(low <= high, high / 2 - low / 2, 0).amax())


def _power_of_two(x: Tensor) -> Tensor:
    """The next power of two above numbers, and 1 above 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(mantissa == 0, 1, torch.ldexp(torch.ones_like(x), exponent))


def _check(q: Tensor, k: Tensor, coords: Tensor, k_coords: Tensor, beta: float | Tensor) -> None:
    named = {"q": q, "k": k, "coords": coords, "k_coords": k_coords}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q, got {tensor.device}")
    for name, heads in (("q", q), ("k", k)):
        if heads.ndim != 4:
            raise ValueError(
                f"{name}: expected shape (batch_size, seqlen, num_heads, head_dim), got {tuple(heads.shape)}"
            )
    if k.dtype != q.dtype:
        raise ValueError(f"k: expected dtype {q.dtype} like q, got {k.dtype}")
    if k.shape[0] not in (1, q.shape[0]) or k.shape[2:] != q.shape[2:]:
        expected = f"({q.shape[0]} or 1, seqlen_k, {q.shape[2]}, {q.shape[3]})"
        raise ValueError(f"k: expected shape {expected} to match q, got {tuple(k.shape)}")
    for name, points, heads in (("coords", coords, q), ("k_coords", k_coords, k)):
        width = coords.shape[-1] if coords.ndim == 3 else "d"
        fits = points.ndim == 3 and points.shape[0] in (1, heads.shape[0]) and points.shape[1] == heads.shape[1]
        if not fits or points.shape[-1] != width:
            expected = f"({heads.shape[0]} or 1, {heads.shape[1]}, {width})"
            raise ValueError(
                f"{name}: expected shape {expected} to match {'qk'[heads is k]}, got {tuple(points.shape)}"
            )
    if k_coords.dtype != coords.dtype:
        raise ValueError(f"k_coords: expected dtype {coords.dtype} like coords, got {k_coords.dtype}")
    if isinstance(beta, Tensor):
        if tuple(beta.shape) not in ((), (1,), (q.shape[2],)):
            raise ValueError(f"beta: expected shape () or ({q.shape[2]},), one for each head, got {tuple(beta.shape)}")
        if beta.device != q.device and beta.ndim:
            raise ValueError(f"beta: expected device {q.device} like q, got {beta.device}")
    elif isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta: expected a number or a tensor, got {type(beta).__name__}")
    elif not math.isfinite(beta):
        raise ValueError(f"beta: expected a finite number, got {beta}")
