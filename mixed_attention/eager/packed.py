"""Attention on packed projections: rotated in place, read through strides, gradients into buffers of the same form.

Private to the layers. A projection writes q, k and v, or some of them, as the slots of one buffer. Norms of q and k
make a buffer of their own. In plain eager mode the buffer is rotated where it lies and the kernels read it there; the
backward fills one gradient per buffer and rotates that back in place. Everywhere else the same is composed of
:func:`mixed_attention.ops.rotate` and :func:`mixed_attention.ops.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixed_attention import derivatives, ops, reference
from mixed_attention.eager.projection import Runs, take, taken_ranges
from mixed_attention.plan import AttentionPlan
from mixed_attention.rms_norm import rms_norm_back
from mixed_attention.rope import apply_rope
from mixed_attention.rotation import rotate_back, rotate_composite

Freqs = Tensor | tuple[Tensor, ...]
Rotated = Callable[[], Sequence[Tensor]]
"""Makes the views of q, k and v after rotation ``(B, N, H, D)``, which few calls need, as parts of the graph."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Some neighbouring slots out of (q, k, v).

    Attributes:
        buffer: A tensor that can be viewed as ``shape``. Where slots are to be rotated it must be a fresh result that
            nobody else reads, because it is overwritten.
        shape: ``(B, N, slots, H, D)``.
        rotated: How many of the first slots ``freqs`` rotates; 0 without ``freqs``.
        freqs: Frequencies of tokens, as :func:`mixed_attention.apply_rope` takes them.
        runs: Which of these tokens are the N, None if all.
        norms: What the first slots ``(B, N, H, D)`` go through before they are rotated, one each; none if empty.
        plain_norms: Whether each of these is :func:`mixed_attention.rms_norm.rms_norm` without a weight and nothing
            else, so that kernels may do it.
    """

    buffer: Tensor
    shape: tuple[int, int, int, int, int]
    rotated: int = 0
    freqs: Freqs | None = None
    runs: Runs | None = None
    norms: tuple[Callable[[Tensor], Tensor], ...] = ()
    plain_norms: bool = False

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
) -> tuple[Tensor, Rotated]:
    """Normalises, rotates and attends.

    Args:
        parts: Their slots, one part after the other, are q, k and v. Consumed.
        plan: The compiled patterns.
        key_padding_mask: As :func:`mixed_attention.attention` takes it.
        dropout_p: Likewise.
        parallel: Whether to run the kernels; if not, the reference.

    Returns:
        The output ``(B, Nq, H * D)``, and what makes the rotated q, k and v.
    """
    parts = [part if part.plain_norms and part.shape[-1] % 2 == 0 else _normalised(part) for part in parts]
    if parallel and _may_run_in_place(parts):
        return _attend_in_place(parts, plan, key_padding_mask, dropout_p)
    q, k, v = slots = [slot for part in parts for slot in rotated_slots(part, parallel=parallel)]
    if parallel:
        out = ops.attention(q, k, v, plan, key_padding_mask=key_padding_mask, dropout_p=dropout_p)
    else:
        seed = ops.draw_seed(q.device) if dropout_p > 0 else None
        out, _ = reference.attend(q, k, v, plan.query_segments, q.shape[-1] ** -0.5, key_padding_mask, dropout_p, seed)
    return out.flatten(2), lambda: slots


def _normalised(part: Packed) -> Packed:
    """A part whose norms were applied, out of place."""
    if not part.norms:
        return part
    slots = list(part.buffer.view(part.shape).unbind(2))
    for index, norm in enumerate(part.norms):
        slots[index] = norm(slots[index]).to(part.buffer.dtype)
    # NOTE: a copy even of a single slot, because it may be rotated in place, and hooks may hold what norms have made.
    return replace(part, buffer=torch.stack(slots, 2), norms=())


def rotated_slots(part: Packed, *, parallel: bool = True) -> list[Tensor]:
    """The slots of a part, ``(B, N, H, D)`` each, normalised and rotated out of place."""
    part = _normalised(part)
    packed = part.buffer.view(part.shape)
    if part.freqs is None:
        return list(packed.unbind(2))
    # NOTE: one split, whose derivative is one concatenation, which a compiler fills in place. No piece is empty: the
    # unbind of an empty one makes no tensors, and exported programs with such a call cannot be loaded.
    heads, *rest = packed.split([slots for slots in (part.rotated, part.shape[2] - part.rotated) if slots], 2)
    heads = heads.flatten(2, 3)
    if isinstance(part.freqs, tuple):
        heads = apply_rope(heads, tuple(take(angles, part.runs) for angles in part.freqs))
    elif parallel:
        heads = apply_rope(heads, take(part.freqs, part.runs))
    else:
        heads = rotate_composite(heads, ops.real_freqs(take(part.freqs, part.runs), heads.dtype), False)
    return [slot for slots in (heads.unflatten(2, (part.rotated, -1)), *rest) for slot in slots.unbind(2)]


def _may_run_in_place(parts: Sequence[Packed]) -> bool:
    """Whether this is plain eager mode with kernels, and nothing is asked that only a composition answers."""
    buffer, shape = parts[0].buffer, parts[0].shape
    if torch.compiler.is_compiling() or not ops.has_kernels(buffer.device.type, buffer.dtype):
        return False
    for part in parts:
        if part.shape[0] != shape[0]:  # one sequence of keys for a batch
            return False
        if part.freqs is not None and (isinstance(part.freqs, tuple) or part.freqs.requires_grad):
            return False
        tensors = (part.buffer,) if part.freqs is None else (part.buffer, part.freqs)
        if not ops.is_plain(*tensors) or ops.needs_composite(*tensors):
            return False
    return True


def _attend_in_place(
    parts: Sequence[Packed], plan: AttentionPlan, key_padding_mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Rotated]:
    """One node of the graph. What it saves are the rotated buffers, the output and the log-sum-exp."""
    shapes = [part.shape for part in parts]
    pairs = [ops.real_freqs(p.freqs, p.buffer.dtype) if isinstance(p.freqs, Tensor) else None for p in parts]
    seed = ops.draw_seed(parts[0].buffer.device) if dropout_p > 0 else None
    tokens = [None if p.runs is None else taken_ranges(p.runs) for p in parts]
    rotated_slots = [p.rotated for p in parts]
    counts = [len(p.norms) for p in parts]
    call = ops.packed_call(shapes, rotated_slots, tokens, plan, shapes[0][-1] ** -0.5, dropout_p, counts)
    out, *rotated = ops.attend_in_place([p.buffer for p in parts], pairs, key_padding_mask, seed, call)
    remaining = iter(rotated)
    made = [None if pair is None and not part.norms else next(remaining) for part, pair in zip(parts, pairs)]
    buffers = [p.buffer if p.norms or each is None else each for p, each in zip(parts, made)]
    normalised = [each if p.norms else None for p, each in zip(parts, made)]
    return out, lambda: slots(buffers, shapes, normalised)


def slots(
    buffers: Sequence[Tensor], shapes: Sequence[Sequence[int]], normalised: Sequence[Tensor | None]
) -> list[Tensor]:
    """q, k and v, as views of the buffers, or of what their first slots were normalised to."""
    found: list[Tensor] = []
    for buffer, shape, made in zip(buffers, shapes, normalised):
        first = () if made is None else made.unbind(2)
        found += [*first, *buffer.view(shape).unbind(2)[len(first) :]]
    return found


def backward_composite(buffers, pairs, key_padding_mask, seed, call, out, lse, dout, normalised, drotated):
    """The derivative by functions that have derivatives of their own.

    What was saved are the rotated values r = R(x). The derivative is taken with respect to r, then back through R,
    which is linear, and through the norms, with respect to what they divided.
    """
    derivatives.check_gradient()
    with torch.enable_grad():
        buffers = [ops.unhooked(buffer) for buffer in buffers]
        q, k, v = slots(buffers, call.shapes, [None if each is None else ops.unhooked(each) for each in normalised])
        out, dout = (t.reshape(*q.shape[:2], *v.shape[2:]) for t in (out, dout))
        described = derivatives.Call(call.segments, call.softmax_scale, call.dropout_p)
        remaining = iter(derivatives.gradients(described, key_padding_mask, seed, dout, None, q, k, v, out, lse))
        # NOTE: those of all buffers. Under functorch no buffer says that it requires grad.
        stacked = [torch.stack([next(remaining) for _ in range(shape[2])], 2) for shape in call.shapes]
        grads = [grad.reshape(buffer.shape) for grad, buffer in zip(stacked, buffers)]
        of_parts = (grads, drotated, pairs, buffers, call.tokens, call.shapes, call.rotated, call.normalised)
        return [gradient_of_buffer(*part) for part in zip(*of_parts)]


def gradient_of_buffer(grad, more, pairs, buffer, tokens, shape, rotated, normalised):
    """The gradient of a buffer, given those of its slots as they were read and as they left the node."""
    count = normalised or (0 if pairs is None else rotated)
    if count == 0:  # what was not rotated is no output of this node, and nothing more comes in
        return grad
    # NOTE: reshape and split alone, because is_grads_batched has batching rules for no other views.
    batch_size, seqlen, num_slots, num_heads, head_dim = shape
    rows = (batch_size, seqlen, num_slots * num_heads, head_dim)
    counts = [count * num_heads, (num_slots - count) * num_heads]
    heads, rest = grad.reshape(rows).split(counts, 2)
    if more is not None and normalised:  # the first slots are the output, else all
        heads = heads + more.reshape(batch_size, seqlen, counts[0], head_dim)
    elif more is not None:
        more_heads, more_rest = more.reshape(rows).split(counts, 2)
        heads, rest = heads + more_heads, rest + more_rest
    if pairs is not None:
        if tokens is not None:
            pairs = torch.cat([pairs[:, start:end] for start, end in tokens], 1)
        heads = rotate_back(heads, pairs)
    if normalised:
        divided, _ = buffer.reshape(rows).split(counts, 2)
        heads = rms_norm_back(heads, divided)
    return torch.cat((heads, rest), 2).reshape(grad.shape)


ops.set_backward_composite(backward_composite)
