"""The meaning of the operation in plain PyTorch: the oracle of the tests and the path of higher derivatives.

For a query row ``i`` of a segment with listed keys ``j`` (ranges in order, a range listed twice visited twice)::

    s_ij  = softmax_scale * <q_i, k_j>          for keys that the padding mask leaves, else absent
    lse_i = log sum_j exp(s_ij)                 -inf where no key is left, or all s_ij are -inf
    p_ij  = exp(s_ij - lse_i)                   0 there, as in torch's own attention
    out_i = sum_j m_ij p_ij v_j                 0 where no key is left

with ``m_ij = 1`` without dropout, and ``keep_ij / (1 - dropout_p)`` with it (:func:`dropout_keep`).

Where q, k and v move along q', k', v' (:func:`jvp`)::

    s'_ij  = softmax_scale * (<q'_i, k_j> + <q_i, k'_j>)
    lse'_i = sum_j p_ij s'_ij                                   0 where no key is left
    out'_i = sum_j m_ij p_ij ((s'_ij - lse'_i) v_j + v'_j)      likewise
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixed_attention.autocast import without_autocast
from mixed_attention.plan import AttentionPlan, QuerySegment


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Structured attention, one segment of the plan after the other. Arguments as :func:`mixed_attention.attention`.

    Memory is that of one segment's scores. Differentiable any number of times, in both modes, under any transform.

    Args:
        q, k, v, plan, softmax_scale, key_padding_mask, dropout_p, return_lse: See :func:`mixed_attention.attention`.
        dropout_seed: The int64 tensor ``(1,)`` that fixes which weights are dropped; needed if ``dropout_p`` > 0.

    Returns:
        out ``(B, Nq, H, Dv)`` in the dtype of ``q``, and with ``return_lse`` the log-sum-exp ``(B, H, Nq)``.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = attend(q, k, v, plan.query_segments, scale, key_padding_mask, dropout_p, dropout_seed)
    return (out, lse) if return_lse else out


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The definition computes in the dtypes that it says."""

    @wraps(function)
    def run(first: Tensor, *arguments: Any) -> Any:
        with without_autocast(first.device.type):
            return function(first, *arguments)

    return run


@_without_autocast
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_segments: Iterable[QuerySegment],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` over the query segments of a plan; always returns both, out and log-sum-exp."""
    given, mask = q.dtype, key_padding_mask
    q, k, v = _prepared(q, mask, k, v)
    outs, lses = _no_rows(q, k, v)
    for w in _weights(q, k, query_segments, softmax_scale, mask, dropout_p, dropout_seed):
        outs.append(torch.einsum("bhqk,bkhd->bqhd", w.kept(w.p), w.keys(v)))
        lses.append(w.lse)
    return torch.cat(outs, 1).to(given), torch.cat(lses, 2)


def _no_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What there is of out and log-sum-exp without any segment: nothing, but with a derivative."""
    nothing = q[:, :0, :, :1] * k[:, :0, :, :1]
    return [nothing * v[:, :0]], [nothing.squeeze(-1).transpose(1, 2)]


class _Weights(NamedTuple):
    """What a segment reads: its rows and ranges of keys, p and its log-sum-exps ``(B, H, rows)``, and what m is."""

    rows: slice
    ranges: Sequence[tuple[int, int]]
    p: Tensor
    lse: Tensor
    keep: Tensor | None
    keep_probability: float

    def kept(self, x: Tensor) -> Tensor:
        """Times m."""
        return x if self.keep is None else x * self.keep / self.keep_probability

    def queries(self, x: Tensor) -> Tensor:
        return x[:, self.rows]

    def keys(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :0], *(x[:, start:end] for start, end in self.ranges)], 1)

    def numbers(self, x: Tensor) -> Tensor:
        """Numbers of the rows, ``(B, H, rows, 1)``."""
        return x[:, :, self.rows].unsqueeze(-1)

    def scattered(self, x: Tensor, num_keys: int) -> Tensor:
        """The transpose of :meth:`keys`."""
        total = x.new_zeros(x.shape[0], num_keys, *x.shape[2:])
        pieces = x.split([end - start for start, end in self.ranges], 1)
        for (start, end), piece in zip(self.ranges, pieces):
            total = total + F.pad(piece, (0, 0, 0, 0, start, num_keys - end))
        return total


def _weights(
    q: Tensor,
    k: Tensor,
    query_segments: Iterable[QuerySegment],
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Iterator[_Weights]:
    """Segment by segment, from what :func:`_prepared` returns."""
    batch_size, _, num_heads, _ = q.shape
    for segment in query_segments:
        w = _Weights(slice(segment.start, segment.end), segment.key_ranges, q, q, None, 1.0)
        s = torch.einsum("bqhd,bkhd->bhqk", w.queries(q) * scale, w.keys(k))
        if mask is not None:
            s = s.masked_fill(~w.keys(mask)[:, None, None, :], -torch.inf)
        # The floor keeps the maximum of a row without keys finite, and the two `where` its derivatives.
        s_max = s.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min) if s.shape[-1] else 0.0
        p = torch.exp(s - s_max)
        p_sum = p.sum(-1, keepdim=True)
        # The greatest score has a weight of 1: the sum is 0 only where there is no score above -inf. Not "> 0": a NaN
        # that a query may see must show.
        has_scores = p_sum != 0
        p_sum = torch.where(has_scores, p_sum, 1)
        w = w._replace(p=p / p_sum, lse=torch.where(has_scores, s_max + torch.log(p_sum), -torch.inf).squeeze(-1))
        if dropout_p > 0:
            if seed is None:
                raise ValueError("dropout_seed: expected an int64 tensor of shape (1,), got None")
            keep, keep_probability = dropout_keep(segment, batch_size, num_heads, dropout_p, seed)
            w = w._replace(keep=keep, keep_probability=keep_probability)
        yield w


def _prepared(q: Tensor, mask: Tensor | None, *keys: Tensor | None) -> tuple[Any, ...]:
    """q, and keys, values and the like for every sequence, as :func:`attend` computes in, with zeros where masked.

    As in the kernels, 16 bits would not hold large scores, nor tell one from another; and masked keys must not matter
    even as NaN, neither in the products nor in their derivatives.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    read = [k if k is None else k.to(dtype).expand(q.shape[0], -1, -1, -1) for k in keys]
    if mask is not None:
        read = [k if k is None else torch.where(mask[:, :, None, None], k, 0) for k in read]
    return q.to(dtype), *read


@_without_autocast
def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    query_segments: Iterable[QuerySegment],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """How out and log-sum-exp move with q, k and v; None is what stays. In closed form, so differentiable itself."""
    given, mask, scale = q, key_padding_mask, softmax_scale
    q, k, v, k_dot, v_dot = _prepared(q, mask, k, v, k_dot, v_dot)
    outs, lses = _no_rows(q, k, v)
    for w in _weights(q, k, query_segments, scale, mask, dropout_p, dropout_seed):
        s_dot = _tangents_of_scores(w, q, k, q_dot, k_dot, scale)
        mean = (w.p * s_dot).sum(-1, keepdim=True)
        out = torch.einsum("bhqk,bkhd->bqhd", w.kept(w.p * (s_dot - mean)), w.keys(v))
        if v_dot is not None:
            out = out + torch.einsum("bhqk,bkhd->bqhd", w.kept(w.p), w.keys(v_dot))
        outs.append(out)
        lses.append(mean.squeeze(-1))
    return torch.cat(outs, 1).to(given.dtype), torch.cat(lses, 2)


def _tangents_of_scores(
    w: _Weights, q: Tensor, k: Tensor, q_dot: Tensor | None, k_dot: Tensor | None, scale: float
) -> Tensor:
    s_dot = torch.zeros_like(w.p)
    if q_dot is not None:
        s_dot = s_dot + torch.einsum("bqhd,bkhd->bhqk", w.queries(q_dot).to(q.dtype) * scale, w.keys(k))
    if k_dot is not None:
        s_dot = s_dot + torch.einsum("bqhd,bkhd->bhqk", w.queries(q) * scale, w.keys(k_dot))
    return s_dot


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_segments: Iterable[QuerySegment],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. In closed form, so differentiable itself."""
    nothing = torch.zeros_like(dout)
    call = (query_segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed)
    return backward_jvp(nothing, None, dout, dlse, q, k, v, None, None, None, *call)


@_without_autocast
def backward_jvp(
    dout_dot: Tensor,
    dlse_dot: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    query_segments: Iterable[QuerySegment],
    softmax_scale: float,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of <dout, out> + <dlse, lse> + <dout_dot, out'> + <dlse_dot, lse'>; None is zero.

    In closed form, so differentiable itself. With z = s' - lse', eps = <dout_dot, out> - dlse_dot and gamma =
    <dout, out> - dlse + <dout_dot, out'>, for each pair::

        g  = p (m <dout_dot, v> - eps)
        ds = p (m (<dout, v> + <dout_dot, v'>) - gamma) + z g
        dq = scale * sum over keys of (ds k + g k')             dk = scale * sum over queries of (ds q + g q')
        dv = sum over queries of m p (dout + z dout_dot)
    """
    mask, scale = key_padding_mask, softmax_scale
    dtypes = q.dtype, k.dtype, v.dtype
    shapes = k.shape, v.shape
    q, k, v, k_dot, v_dot = _prepared(q, mask, k, v, k_dot, v_dot)
    y = dout_dot.to(q.dtype)
    num_keys = k.shape[1]
    dqs, dk, dv = [q[:, :0]], torch.zeros_like(k), torch.zeros_like(v)
    for w in _weights(q, k, query_segments, scale, mask, dropout_p, dropout_seed):
        k_rows, v_rows, q_rows, y_rows = w.keys(k), w.keys(v), w.queries(q) * scale, w.queries(y)
        p = w.kept(w.p)
        s_dot = _tangents_of_scores(w, q, k, q_dot, k_dot, scale)
        z = s_dot - (w.p * s_dot).sum(-1, keepdim=True)
        e = w.kept(torch.einsum("bqhd,bkhd->bhqk", y_rows, v_rows))
        eps = (w.p * e).sum(-1, keepdim=True)
        if dlse_dot is not None:
            eps = eps - w.numbers(dlse_dot)
        g = w.p * (e - eps)
        # <dout_dot, out'> is the sum over keys of p z e, and what v' adds to it that of p m <dout_dot, v'>.
        x = torch.zeros_like(w.p)
        if dout is not None:
            x = x + torch.einsum("bqhd,bkhd->bhqk", w.queries(dout).to(q.dtype), v_rows)
        if v_dot is not None:
            x = x + torch.einsum("bqhd,bkhd->bhqk", y_rows, w.keys(v_dot))
        x = w.kept(x)
        gamma = (w.p * (x + z * e)).sum(-1, keepdim=True)
        if dlse is not None:
            gamma = gamma - w.numbers(dlse)
        ds = w.p * (x - gamma) + z * g
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, k_rows)
        dk_rows = torch.einsum("bhqk,bqhd->bkhd", ds, q_rows)
        dv_rows = torch.einsum("bhqk,bqhd->bkhd", p * z, y_rows)
        if k_dot is not None:
            dq = dq + torch.einsum("bhqk,bkhd->bqhd", g, w.keys(k_dot))
        if q_dot is not None:
            dk_rows = dk_rows + torch.einsum("bhqk,bqhd->bkhd", g, w.queries(q_dot).to(q.dtype) * scale)
        if dout is not None:
            dv_rows = dv_rows + torch.einsum("bhqk,bqhd->bkhd", p, w.queries(dout).to(q.dtype))
        dqs.append(scale * dq)
        dk, dv = dk + w.scattered(dk_rows, num_keys), dv + w.scattered(dv_rows, num_keys)
    if mask is not None:
        dk, dv = (torch.where(mask[:, :, None, None], x, 0) for x in (dk, dv))
    dk, dv = (_sum_broadcast(x, shape) for x, shape in zip((dk, dv), shapes))
    return torch.cat(dqs, 1).to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


def _sum_broadcast(x: Tensor, shape: torch.Size) -> Tensor:
    return x.sum(0, keepdim=True) if shape[0] == 1 and x.shape[0] != 1 else x


def dropout_keep(
    segment: QuerySegment, batch_size: int, num_heads: int, dropout_p: float, dropout_seed: Tensor
) -> tuple[Tensor, float]:
    """Which attention weights dropout keeps: the definition that every kernel follows.

    Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the 64-bit seed. The
    counter is ``(query row, 4 * window + t, index of the key range in its segment, batch * num_heads + head)``. One
    draw of four words decides over eight keys of a range: with ``x`` the key's position in the range,
    ``window = x // 32``, ``t = x % 8 // 2``, word ``x % 32 // 8``, its low half for even ``x``, its high half for odd.
    (Those eight are the keys that one thread holds in the tensor cores' accumulator layout.) A weight is kept where
    these 16 bits are at least ``round(65536 * dropout_p)``.

    Returns:
        The boolean tensor ``(B, H, queries of the segment, keys of the segment)`` and the exact probability of
        keeping; 1 instead of 0 where everything is dropped, so that it can be divided by.
    """
    device = dropout_seed.device
    threshold = round(65536 * dropout_p)
    rows = torch.arange(segment.start, segment.end, device=device)
    batch_heads = torch.arange(batch_size * num_heads, device=device)
    keeps = [torch.empty(len(batch_heads), len(rows), 0, dtype=torch.bool, device=device)]
    for index, (start, end) in enumerate(segment.key_ranges):
        x = torch.arange(end - start, device=device)
        words = _philox(
            (
                rows[None, :, None],
                (x // 32 * 4 + x % 8 // 2)[None, None, :],
                torch.full((1, 1, 1), index, device=device),
                batch_heads[:, None, None],
            ),
            (dropout_seed & 0xFFFFFFFF, dropout_seed >> 32 & 0xFFFFFFFF),
        )
        word_of_key = (x % 32 // 8).expand(1, *words[0].shape)
        word = torch.stack(torch.broadcast_tensors(*words)).gather(0, word_of_key).squeeze(0)
        keeps.append((word >> x % 2 * 16 & 0xFFFF) >= threshold)
    keep = torch.cat(keeps, 2).unflatten(0, (batch_size, num_heads))
    return keep, max(1 - threshold / 65536, 0) or 1.0


def _philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 on 32-bit words held in int64; products wrap at 64 bits, which leaves every bit in place."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3
