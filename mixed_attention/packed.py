"""Attention on packed projections: rotated in place, read through strides, gradients into buffers of the same form.

Private to the layers. A projection writes q, k and v, or some of them, as the slots of one buffer. In plain eager mode
the buffer is rotated where it lies and the kernels read it there; the backward fills one gradient per buffer and
rotates that back in place. Everywhere else the same is composed of :func:`mixed_attention.ops.rotate` and
:func:`mixed_attention.ops.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixed_attention import ops, reference
from mixed_attention.plan import AttentionPlan
from mixed_attention.rope import apply_rope

Freqs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """Some neighbouring slots out of (q, k, v).

    Attributes:
        buffer: A tensor that can be viewed as ``shape``. Where slots are to be rotated it must be a fresh result that
            nobody else reads, because it is overwritten.
        shape: ``(B, N, slots, H, D)``.
        rotated: How many of the first slots ``freqs`` rotates; 0 without ``freqs``.
        freqs: Frequencies of the N tokens, as :func:`mixed_attention.apply_rope` takes them.
    """

    buffer: Tensor
    shape: tuple[int, int, int, int, int]
    rotated: int = 0
    freqs: Freqs | None = None

    @classmethod
    def of(cls, slot: Tensor) -> Packed:
        """One slot ``(B, N, H, D)``, to be read as it is."""
        batch_size, seqlen, num_heads, head_dim = slot.shape
        return cls(slot.unsqueeze(2), (batch_size, seqlen, 1, num_heads, head_dim))


def attend(
    parts: Sequence[Packed],
    plan: AttentionPlan,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    parallel: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Rotates and attends.

    Args:
        parts: Their slots, one part after the other, are q, k and v. Consumed.
        plan: The compiled patterns.
        key_padding_mask: As :func:`mixed_attention.attention` takes it.
        dropout_p: Likewise.
        parallel: Whether to run the kernels; if not, the reference.

    Returns:
        The output ``(B, Nq, H, D)`` and the rotated q, k, v, each ``(B, N, H, D)``, as parts of the autograd graph.
    """
    if parallel and _may_run_in_place(parts):
        return _attend_in_place(parts, plan, key_padding_mask, dropout_p)
    q, k, v = slots = [slot for part in parts for slot in rotated_slots(part, parallel=parallel)]
    if parallel:
        out = ops.attention(q, k, v, plan, key_padding_mask=key_padding_mask, dropout_p=dropout_p)
    else:
        seed = ops.draw_seed(q.device) if dropout_p > 0 else None
        out, _ = reference.attend(q, k, v, plan.query_segments, q.shape[-1] ** -0.5, key_padding_mask, dropout_p, seed)
    return out, slots


def rotated_slots(part: Packed, *, parallel: bool = True) -> list[Tensor]:
    """The slots of a part, ``(B, N, H, D)`` each, rotated out of place."""
    packed = part.buffer.view(part.shape)
    if part.freqs is None:
        return list(packed.unbind(2))
    heads = packed[:, :, : part.rotated].flatten(2, 3)
    if parallel or isinstance(part.freqs, tuple):
        heads = apply_rope(heads, part.freqs)
    else:
        heads = ops.rotate_composite(heads, ops.real_freqs(part.freqs, heads.dtype), False)
    return [*heads.unflatten(2, (part.rotated, -1)).unbind(2), *packed[:, :, part.rotated :].unbind(2)]


def _may_run_in_place(parts: Sequence[Packed]) -> bool:
    """Whether this is plain eager mode with kernels, and nothing is asked that only a composition answers."""
    buffer = parts[0].buffer
    if torch.compiler.is_compiling() or not ops.has_kernels(buffer.device.type, buffer.dtype):
        return False
    if any(part.shape[0] != parts[0].shape[0] for part in parts):  # one sequence of keys for a batch
        return False
    freqs = [part.freqs for part in parts if isinstance(part.freqs, Tensor)]
    if any(isinstance(part.freqs, tuple) for part in parts) or any(f.requires_grad for f in freqs):
        return False
    return not ops.needs_composite(*freqs, *(part.buffer for part in parts))


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call computes, besides the buffers."""

    parts: tuple[tuple[tuple[int, int, int, int, int], int], ...]  # shape and number of rotated slots, per buffer
    plan: AttentionPlan
    dropout_p: float

    @property
    def scale(self) -> float:
        return self.parts[0][0][-1] ** -0.5

    def slots(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v, as views of the buffers."""
        return [slot for buffer, (shape, _) in zip(buffers, self.parts) for slot in buffer.view(shape).unbind(2)]

    def rotate_in_place(self, buffers: Sequence[Tensor], pairs: Sequence[Tensor | None], *, conjugate: bool) -> None:
        for buffer, freqs, (shape, rotated) in zip(buffers, pairs, self.parts):
            if freqs is not None:
                batch_size, seqlen, _, num_heads, head_dim = shape
                heads = buffer.view(shape)[:, :, :rotated].view(batch_size, seqlen, rotated * num_heads, head_dim)
                torch.ops.mixed_attention.rope_out.default(heads, freqs, conjugate, heads)


def _attend_in_place(
    parts: Sequence[Packed], plan: AttentionPlan, key_padding_mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, list[Tensor]]:
    call = _Call(tuple((part.shape, part.rotated) for part in parts), plan, dropout_p)
    pairs = [ops.real_freqs(p.freqs, p.buffer.dtype) if isinstance(p.freqs, Tensor) else None for p in parts]
    seed = ops.draw_seed(parts[0].buffer.device) if dropout_p > 0 else None
    buffers = [part.buffer for part in parts]
    out, *rotated = _AttendInPlace.apply(call, pairs, key_padding_mask, seed, *buffers)
    remaining = iter(rotated)
    return out, call.slots([b if freqs is None else next(remaining) for b, freqs in zip(buffers, pairs)])


class _AttendInPlace(torch.autograd.Function):
    """Rotates buffers in place and attends. The outputs are ``out`` and the buffers that were rotated.

    What is saved are the rotated buffers, as outputs: so a second derivative finds the way through this node's own
    rotation, and a KV cache taken from them stays attached.
    """

    @staticmethod
    def forward(ctx, call, pairs, key_padding_mask, seed, *buffers):
        call.rotate_in_place(buffers, pairs, conjugate=False)
        rotated = [buffer for buffer, freqs in zip(buffers, pairs) if freqs is not None]
        q, k, v = call.slots(buffers)
        out, lse = ops.run_forward(q, k, v, call.plan.flat(), call.scale, key_padding_mask, call.dropout_p, seed)
        ctx.call = call
        ctx.mark_dirty(*rotated)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, key_padding_mask, seed, *buffers, *pairs)
        return out, *rotated

    @staticmethod
    def backward(ctx, dout, *drotated):
        call = ctx.call
        out, lse, key_padding_mask, seed, *saved = ctx.saved_tensors
        buffers, pairs = saved[: len(call.parts)], saved[len(call.parts) :]
        dout = torch.zeros_like(out) if dout is None else dout
        remaining = iter(drotated)
        dbuffers = [None if freqs is None else next(remaining) for freqs in pairs]
        if torch.is_grad_enabled() or ops.needs_composite(dout, *dbuffers, *buffers):
            grads = _backward_composite(call, buffers, pairs, dout, dbuffers, key_padding_mask, seed)
        else:
            grads = [torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device) for buffer in buffers]
            torch.ops.mixed_attention.backward_out.default(
                dout,
                None,
                *call.slots(buffers),
                out,
                lse,
                call.plan.flat(),
                call.scale,
                key_padding_mask,
                call.dropout_p,
                seed,
                *call.slots(grads),
            )
            for grad, more in zip(grads, dbuffers):
                if more is not None:
                    grad += more
            call.rotate_in_place(grads, pairs, conjugate=True)
        return None, None, None, None, *grads


def _backward_composite(call, buffers, pairs, dout, dbuffers, key_padding_mask, seed):
    """The derivative through the reference, so that it has derivatives of its own.

    Of the rotated values r = R(x) that were saved: first with respect to r, then back through R, which is linear.
    """
    with torch.enable_grad():
        wanted = [buffer for buffer in buffers if buffer.requires_grad]
        q, k, v = call.slots(buffers)
        segments = call.plan.query_segments
        out, _ = reference.attend(q, k, v, segments, call.scale, key_padding_mask, call.dropout_p, seed)
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True, materialize_grads=True))
        grads = [next(found) if buffer.requires_grad else None for buffer in buffers]
        return [_rotate_back(*each) for each in zip(grads, dbuffers, pairs, call.parts)]


def _rotate_back(grad, more, pairs, part):
    if grad is None or pairs is None:  # what was not rotated is no output of this node, and nothing more comes in
        return grad
    # NOTE: reshape and split alone, because is_grads_batched has batching rules for no other views.
    (batch_size, seqlen, slots, num_heads, head_dim), rotated = part
    grad_shape = grad.shape
    flat = (grad if more is None else grad + more).reshape(batch_size, seqlen, slots * num_heads, head_dim)
    heads, rest = flat.split([rotated * num_heads, (slots - rotated) * num_heads], 2)
    return torch.cat((ops.rotate_composite(heads, pairs, True), rest), 2).reshape(grad_shape)
