"""Rotation of channel pairs as autograd functions over the operators, and in framework operators.

It is linear in the rows and in the frequencies, which operators take as pairs of real numbers, ``(B or 1, N, D / 2,
2)``. Three operators are closed under differentiation up to the second order: ``rope``, ``rope_jvp`` (with tangents, in
one pass) and ``rope_backward`` (the gradient of both). The gradient of a gradient and the tangent of one are these
again, with other names for what goes in. What is beyond that is composed of framework operators.

Tangents have a dim of directions in front, as those of attention (:mod:`mixed_attention.derivatives`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from mixed_attention import torch_internals
from mixed_attention.derivatives import (
    as_directions,
    batched_gradients,
    dense,
    folded,
    forward_rule,
    is_legacy_batched,
    one_direction,
    reference_gradients,
    reference_tangents,
    unpack,
)

Tensors = tuple[Tensor | None, ...]


def rotate(conjugate: bool, x: Tensor, pairs: Tensor) -> Tensor:
    """Rows rotated, in any mode. Tangents of the forward-mode level that is open are computed with them."""
    primals, tangents = unpack(x, pairs)
    if all(tangent is None for tangent in tangents):
        return Rotate.apply(conjugate, x, pairs)
    out, out_dot = RotateDual.apply(conjugate, True, *primals, *one_direction(tangents))
    return forward_ad.make_dual(out, dense(out_dot[0]))


def rotate_back(dout: Tensor, pairs: Tensor, conjugate: bool = False) -> Tensor:
    """The gradient of what was rotated, differentiable itself."""
    if is_legacy_batched(dout, pairs):  # is_grads_batched
        return rotate_composite(dout, pairs, not conjugate)
    return Rotate.apply(not conjugate, dout, pairs)


def _run(name: str, *arguments: Any) -> Any:
    with torch_internals.below_autograd():
        return getattr(torch.ops.mixed_attention, name).default(*arguments)


def _tangent(conjugate: bool, x: Tensor, pairs: Tensor, x_dot: Tensor | None, pairs_dot: Tensor | None) -> Tensor:
    """How rotated rows move, in one direction; differentiable itself."""
    if pairs_dot is None:
        return Rotate.apply(conjugate, x_dot, pairs)
    if x_dot is None:
        return Rotate.apply(conjugate, x, pairs_dot)
    return RotateDual.apply(conjugate, False, x, pairs, *one_direction((x_dot, pairs_dot)))[1][0]


def _gradients(conjugate: bool, needed: Sequence[bool], dout: Tensor, x: Tensor, pairs: Tensor) -> Tensors:
    """Those of rows and frequencies that are needed, of rows without tangents; differentiable themselves."""
    if not needed[1]:
        return rotate_back(dout, pairs, conjugate) if needed[0] else None, None
    if is_legacy_batched(dout):

        def composed(x: Tensor, pairs: Tensor) -> tuple[Tensor]:
            return (rotate_composite(x, pairs, conjugate),)

        return tuple(batched_gradients(composed, (x, pairs), (dout,)))
    dx, dpairs, _, _ = RotateBack.apply(conjugate, (needed[0], True, False, False), dout, None, x, pairs, None, None)
    return dx if needed[0] else None, dpairs


class Rotate(Function):
    """(conjugate, x, pairs) -> x rotated."""

    @staticmethod
    def forward(conjugate, x, pairs):
        return _run("rope", x, pairs, conjugate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.conjugate, x, pairs = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, pairs)
        ctx.save_for_forward(x, pairs)

    @staticmethod
    def backward(ctx, dout):
        return None, *_gradients(ctx.conjugate, ctx.needs_input_grad[1:], dout, *ctx.saved_tensors)

    @forward_rule
    def jvp(ctx: Any, saved, moved):
        return _tangent(ctx.conjugate, *saved, *moved[1:])

    @staticmethod
    def vmap(info, in_dims, conjugate, x, pairs):
        size, (_, x_dim, pairs_dim) = info.batch_size, in_dims
        x = x.expand(size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        batch_size = x.shape[1]
        if pairs_dim is None and len(pairs) != 1 and batch_size != 1:
            # Frequencies of each sequence serve what is mapped as they serve heads.
            rows = x.permute(1, 2, 0, 3, 4)
            turned = Rotate.apply(conjugate, rows.flatten(2, 3), pairs)
            return turned.unflatten(2, rows.shape[2:4]), 2
        if pairs_dim is not None:
            pairs = pairs.movedim(pairs_dim, 0)
            pairs = pairs.expand(size, batch_size, *pairs.shape[2:]).flatten(0, 1)
        return Rotate.apply(conjugate, x.flatten(0, 1), pairs).unflatten(0, (size, batch_size)), 0


class RotateDual(Function):
    """(conjugate, wants_out, x, pairs, x_dot, pairs_dot) -> out, of no elements unless wanted, and out_dot."""

    @staticmethod
    def forward(conjugate, wants_out, x, pairs, x_dot, pairs_dot):
        return _run("rope_jvp", x, pairs, x_dot, pairs_dot, conjugate, wants_out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.conjugate, ctx.wants_out, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dout_dot):
        conjugate, needed = ctx.conjugate, ctx.needs_input_grad[2:]
        x, pairs, x_dot, pairs_dot = ctx.saved_tensors
        dout = dout if ctx.wants_out else None
        if dout is None and dout_dot is None:
            return (None,) * 6
        is_within_level = torch_internals.is_forward_mode() and torch_internals.current_transform() is None
        if is_within_level:
            # A plain level is still open around this backward: what was taken off the duals moves with it.
            x = x if x_dot is None else forward_ad.make_dual(x, dense(x_dot[0]))
            pairs = pairs if pairs_dot is None else forward_ad.make_dual(pairs, dense(pairs_dot[0]))
        if is_legacy_batched(dout, dout_dot):
            function = lambda *given: _dual_composite(conjugate, ctx.wants_out, *given)  # noqa: E731
            return None, None, *batched_gradients(function, (x, pairs, x_dot, pairs_dot), (dout, dout_dot))
        if dout_dot is None:
            return None, None, *_gradients(conjugate, needed, dout, x, pairs), None, None
        arguments = conjugate, tuple(needed), dout, dout_dot, x, pairs, x_dot, pairs_dot
        grads = (_back_composite if is_within_level else RotateBack.apply)(*arguments)
        return None, None, *(grad if wanted else None for grad, wanted in zip(grads, needed))

    @forward_rule
    def jvp(ctx: Any, saved, moved):
        return reference_tangents(
            lambda *given: _dual_composite(ctx.conjugate, ctx.wants_out, *given), saved, moved[2:]
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(d is not None for d in in_dims[:4]):
            return _fold(RotateDual, info.batch_size, in_dims, inputs, "x f tx tf", "x tx")
        tangents = [as_directions(x, d, info.batch_size) for x, d in zip(inputs[4:], in_dims[4:])]
        out, out_dot = RotateDual.apply(*inputs[:4], *tangents)
        return (out, out_dot.unflatten(0, (info.batch_size, -1))), (None, 0)


class RotateBack(Function):
    """Cotangents of out and out_dot, inputs and their tangents -> dx, dpairs, dx_dot, dpairs_dot.

    Its first arguments are whether the rotation was by the conjugate, and which of the four are wanted: others have no
    elements. Without tangents it is bilinear in dout and (x, pairs), so that what it needs for its own derivatives are
    the same operators.
    """

    @staticmethod
    def forward(conjugate, wanted, dout, dout_dot, x, pairs, x_dot, pairs_dot):
        return _run("rope_backward", dout, dout_dot, x, pairs, x_dot, pairs_dot, conjugate, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.conjugate, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        conjugate, needed = ctx.conjugate, ctx.needs_input_grad[2:]
        dout, dout_dot, x, pairs, x_dot, pairs_dot = inputs = ctx.saved_tensors
        grads = tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted))
        if all(grad is None for grad in grads):
            return (None,) * 8
        if dout_dot is not None or is_legacy_batched(*grads):
            gradients_of = batched_gradients if is_legacy_batched(*grads) else reference_gradients
            return (
                None,
                None,
                *gradients_of(lambda *given: _back_composite(conjugate, ctx.wanted, *given), inputs, grads),
            )
        ddx, ddpairs, _, _ = grads
        of_dout = _tangent(conjugate, x, pairs, ddx, ddpairs) if needed[0] else None
        # In <ddx, dx> + <ddpairs, dpairs> the rows stand beside ddpairs, and the frequencies beside ddx.
        if ddpairs is None:
            _, of_pairs = _gradients(conjugate, (False, needed[3]), dout, ddx, pairs)
            return None, None, of_dout, None, None, of_pairs, None, None
        of_x, of_pairs = _gradients(conjugate, (needed[2], needed[3] and ddx is not None), dout, ddx, ddpairs)
        return None, None, of_dout, None, of_x, of_pairs, None, None

    @forward_rule
    def jvp(ctx: Any, saved, moved):
        dout, dout_dot, x, pairs, _, _ = saved
        dout_moved, _, x_moved, pairs_moved, _, _ = moved[2:]
        if dout_dot is not None:
            return reference_tangents(
                lambda *given: _back_composite(ctx.conjugate, ctx.wanted, *given), saved, moved[2:]
            )
        results: list[Any] = [None, None]
        if dout_moved is not None:
            results = list(_gradients(ctx.conjugate, ctx.wanted, dout_moved, x, pairs))
        wanted = ctx.wanted[0] and pairs_moved is not None, ctx.wanted[1] and x_moved is not None
        if any(wanted):
            stand_in = pairs if pairs_moved is None else pairs_moved
            more = _gradients(ctx.conjugate, wanted, dout, x_moved, stand_in)
            results = [b if a is None else a if b is None else a + b for a, b in zip(results, more)]
        zeros = [torch.zeros_like(like) if wants else x.new_empty(0) for like, wants in zip((x, pairs), ctx.wanted)]
        results = [zero if result is None else result for result, zero in zip(results, zeros)]
        return *results, x.new_empty(0), pairs.new_empty(0)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(RotateBack, info.batch_size, in_dims, inputs, "x tx x f tx tf", "x f tx tf")


def _fold(
    function: Any, size: int, in_dims: Sequence[int | None], inputs: Sequence[Any], kinds: str, results: str
) -> Any:
    """What is mapped becomes part of the batch, each sequence with frequencies of its own.

    Args:
        function: The autograd function, of two numbers and tensors.
        size: How many times it is mapped.
        in_dims: The dims that are mapped.
        inputs: What the function takes.
        kinds: What each tensor is of, rows x or frequencies f, and a t in front where it has directions.
        results: The same of what the function returns.
    """
    given = [(x, dim, kind) for x, dim, kind in zip(inputs[2:], in_dims[2:], kinds.split())]
    sequences = {
        kind[-1]: (x if dim is None else x.select(dim, 0)).shape[kind[0] == "t"]
        for x, dim, kind in given
        if x is not None
    }
    batch_size = sequences["x"]

    tensors = (folded(x, dim, int(kind[0] == "t"), size, batch_size) for x, dim, kind in given)
    outputs = function.apply(*inputs[:2], *tensors)
    unfolded, out_dims = [], []
    for x, kind in zip(outputs, results.split()):
        axis = int(kind[0] == "t")
        is_there = x.dim() > 1
        if is_there:
            x = x.unflatten(axis, (size, batch_size))
            # One sequence of frequencies for the batch has one gradient.
            x = x.sum(axis + 1, keepdim=True) if kind[-1] == "f" and sequences["f"] != batch_size else x
        unfolded.append(x)
        out_dims.append(axis if is_there else None)
    return tuple(unfolded), tuple(out_dims)


# -- In framework operators


def rotate_composite(x: Tensor, pairs: Tensor, conjugate: bool) -> Tensor:
    """The rotation."""
    cos, sin = pairs[..., 0].unsqueeze(2), pairs[..., 1].unsqueeze(2)
    sin = -sin if conjugate else sin
    even, odd = _even_odd(x, pairs.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape).to(x.dtype)


def _even_odd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # NOTE: reshape instead of unflatten, which has no batching rule under is_grads_batched.
    return x.to(dtype).reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)


def _freqs_composite(x: Tensor, dout: Tensor, pairs: Tensor, conjugate: bool) -> Tensor:
    """conj(x) * dout, summed over what shares a frequency: the heads, and the batch where one sequence serves all."""
    x_even, x_odd = _even_odd(x, pairs.dtype)
    dout_even, dout_odd = _even_odd(dout, pairs.dtype)
    dcos = x_even * dout_even + x_odd * dout_odd
    dsin = x_even * dout_odd - x_odd * dout_even
    return torch.stack((dcos, -dsin if conjugate else dsin), -1).sum(2).sum_to_size(pairs.shape)


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for term in terms:
        total = total + term
    return total


def _dual_composite(
    conjugate: bool, wants_out: bool, x: Tensor, pairs: Tensor, x_dot: Tensor | None, pairs_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What :class:`RotateDual` computes."""
    moved = []
    for t in range(len(pairs_dot if x_dot is None else x_dot)):  # type: ignore[arg-type]
        terms = [] if x_dot is None else [rotate_composite(x_dot[t], pairs, conjugate)]
        terms += [] if pairs_dot is None else [rotate_composite(x, pairs_dot[t], conjugate)]
        moved.append(_sum(terms, x))
    return rotate_composite(x, pairs, conjugate) if wants_out else x.new_empty(0), torch.stack(moved)


def _back_composite(
    conjugate: bool,
    wanted: Sequence[bool],
    dout: Tensor | None,
    dout_dot: Tensor | None,
    x: Tensor,
    pairs: Tensor,
    x_dot: Tensor | None,
    pairs_dot: Tensor | None,
) -> Tensors:
    """What :class:`RotateBack` computes."""
    directions = range(0 if dout_dot is None else len(dout_dot))
    of_x = [] if dout is None else [rotate_composite(dout, pairs, not conjugate)]
    of_pairs = [] if dout is None else [_freqs_composite(x, dout, pairs, conjugate)]
    if pairs_dot is not None and dout_dot is not None:
        of_x += [rotate_composite(dout_dot[t], pairs_dot[t], not conjugate) for t in directions]
    if x_dot is not None and dout_dot is not None:
        of_pairs += [_freqs_composite(x_dot[t], dout_dot[t], pairs, conjugate) for t in directions]
    empty, empty_pairs = x.new_empty(0), pairs.new_empty(0)
    dx_dot, dpairs_dot = empty, empty_pairs
    if dout_dot is not None and wanted[2]:
        dx_dot = torch.stack([rotate_composite(dout_dot[t], pairs, not conjugate) for t in directions])
    if dout_dot is not None and wanted[3]:
        dpairs_dot = torch.stack([_freqs_composite(x, dout_dot[t], pairs, conjugate) for t in directions])
    return (
        _sum(of_x, x) if wanted[0] else empty,
        _sum(of_pairs, pairs) if wanted[1] else empty_pairs,
        dx_dot,
        dpairs_dot,
    )
