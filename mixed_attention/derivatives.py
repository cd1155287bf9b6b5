"""Derivatives of attention, of every order and in both modes, as autograd functions over the operators.

Four operators are closed under differentiation up to the second order: ``forward``, ``backward``, ``jvp`` (tangents of
out and log-sum-exp) and ``backward_jvp`` (the gradient of out and its tangents together). The gradient of ``jvp``, that
of ``backward`` and the tangent of ``backward`` are all ``backward_jvp``, with other names for what goes in. The third
order is the reference's, in closed form.

Each function has a backward, a jvp and a rule for vmap, so that functorch may put levels on it in any order. Tangents
have a dim of directions in front. vmap over tangents alone, as a Jacobian is made, makes directions of what it maps:
they share the scores and weights of one primal.

Gradients of q, k and v are total derivatives. So `out` and `lse`, which functions take to save their computation, get
none.

NOTE: the jvp of a function finds forward mode switched off, by which framework operators lose the tangents of outer
levels without a word, and its saved tensors may carry this level's tangents. `_rule` sees to both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from mixed_attention import reference, torch_internals
from mixed_attention.plan import query_segments

Tensors = tuple[Tensor | None, ...]
Composition = Callable[..., Any]  # of framework operators


@dataclass(frozen=True, eq=False)
class Call:
    """What an attention computes, but for its tensors; as the operators take it."""

    segments: Sequence[int]
    softmax_scale: float
    dropout_p: float

    def operator(self, mask: Tensor | None, seed: Tensor | None) -> tuple[Any, ...]:
        """The last arguments of the operators."""
        return self.segments, self.softmax_scale, mask, self.dropout_p, seed

    def reference(self, mask: Tensor | None, seed: Tensor | None) -> tuple[Any, ...]:
        """The last arguments of the reference."""
        return query_segments(self.segments), self.softmax_scale, mask, self.dropout_p, seed


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[int],
    softmax_scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The forward where transforms or forward mode are active. Tangents of this level are computed with it."""
    call = Call(segments, softmax_scale, dropout_p)
    primals, tangents = unpack(q, k, v)
    if not any(tangent is not None for tangent in tangents):
        return Forward.apply(call, mask, seed, q, k, v)
    out, lse, out_dot, lse_dot = Dual.apply(call, mask, seed, *primals, *one_direction(tangents))
    return forward_ad.make_dual(out, dense(out_dot[0])), forward_ad.make_dual(lse, dense(lse_dot[0]))


def unpack(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Primals and tangents of the forward-mode level that is open, if one is."""
    duals = [forward_ad.unpack_dual(tensor) for tensor in tensors]
    return [dual.primal for dual in duals], [dual.tangent for dual in duals]


def one_direction(tangents: Sequence[Tensor | None]) -> Tensors:
    """Tangents as functions and operators take them."""
    return tuple(None if tangent is None else tangent.unsqueeze(0) for tangent in tangents)


def dense(x: Tensor) -> Tensor:
    """What a dual can be made with: no stride of 0 over several elements."""
    return x.clone() if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)) else x


def _run(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    with torch_internals.below_autograd():
        return getattr(torch.ops.mixed_attention, name).default(*arguments)


def _zeros(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


def _of_inputs(inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> Tensors:
    """Gradients of inputs that were given: the engine refuses others."""
    return tuple(None if given is None else grad for given, grad in zip(inputs, grads))


def is_legacy_batched(*tensors: Tensor | None) -> bool:
    """Whether these are what ``is_grads_batched`` calls a backward with, which has rules for few operators."""
    return any(t is not None and torch_internals.is_legacy_batched(t) for t in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], *more: Tensor | None) -> None:
    """Keeps the call, and all tensors: mask and seed first, then the others in their order."""
    call, *tensors = inputs
    ctx.call = call
    ctx.save_for_backward(*tensors, *more)
    ctx.save_for_forward(*tensors, *more)
    ctx.set_materialize_grads(False)


def forward_rule(rule: Callable[..., Any]) -> Any:
    """A jvp staticmethod that is right at every depth; `rule` gets the context, its saved primals, and the tangents."""

    def run(ctx: Any, *tangents: Tensor | None) -> Any:
        saved = [None if s is None else forward_ad.unpack_dual(s).primal for s in ctx.saved_tensors]
        with torch_internals.forward_mode(True):
            return rule(ctx, saved, tangents)

    return staticmethod(run)


def _rule(rule: Callable[..., Any]) -> Any:
    """The same for functions of (call, mask, seed, tensors), whose tangents are those of the tensors."""
    return forward_rule(lambda ctx, saved, tangents: rule(ctx, saved, tangents[3:]))


class Forward(Function):
    """(q, k, v) -> out, lse."""

    @staticmethod
    def forward(call, mask, seed, q, k, v):
        return _run("forward", q, k, v, *call.operator(mask, seed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx, dout, dlse):
        mask, seed, q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        return None, None, None, *gradients(ctx.call, mask, seed, dout, dlse, q, k, v, out, lse)

    @_rule
    def jvp(ctx: Any, saved, tangents):
        call = ctx.call
        mask, seed, q, k, v, out, lse = saved
        out_dot, lse_dot = Jvp.apply(call, mask, seed, q, k, v, out, lse, *one_direction(tangents))
        return out_dot[0], lse_dot[0]

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(Forward, info, in_dims, inputs, "q k v", "q lse")


def check_gradient() -> None:
    """To be called in a backward, before grad mode is switched.

    Raises:
        NotImplementedError: Where a transform would differentiate what ``torch.autograd.grad`` computes without a
            graph. Torch itself answers zeros there.
    """
    if torch_internals.is_within_gradient() and not torch.is_grad_enabled():
        raise NotImplementedError(
            "mixed_attention: expected create_graph=True in a backward inside torch.func.grad, vjp, jacrev or hessian, "
            "which would take zeros for its derivative; or use torch.func.vjp instead of torch.autograd.grad"
        )


def gradients(
    call: Call,
    mask: Tensor | None,
    seed: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, differentiable themselves, for gradients of out and lse of which one may be None."""
    check_gradient()
    if is_legacy_batched(dout, dlse):
        dq, dk, dv = batched_gradients(_forward_reference(call, mask, seed), (q, k, v), (dout, dlse))
        return dq, dk, dv
    dout = _zeros(dout, out)
    return Backward.apply(call, mask, seed, dout, dlse, q, k, v, out, lse)


class Backward(Function):
    """(dout, dlse, q, k, v, out, lse) -> dq, dk, dv."""

    @staticmethod
    def forward(call, mask, seed, *tensors):
        return _run("backward", *tensors, *call.operator(mask, seed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx, *ddqkv):
        call, (mask, seed, dout, dlse, q, k, v, out, lse) = ctx.call, ctx.saved_tensors
        if all(t is None for t in ddqkv):
            return (None,) * 10
        if is_legacy_batched(*ddqkv):
            function = _backward_reference(call, mask, seed)
            return None, None, None, *batched_gradients(function, (dout, dlse, q, k, v), ddqkv), None, None
        tangents = one_direction(ddqkv)
        out_dot, lse_dot = Jvp.apply(call, mask, seed, q, k, v, out, lse, *tangents)
        grads: Sequence[Tensor | None] = (None, None, None)
        if any(ctx.needs_input_grad[5:8]):
            cotangents = *one_direction((dout, dlse)), None, None
            *grads, _ = BackwardJvp.apply(
                call, mask, seed, *cotangents, q, k, v, out, lse, *tangents, out_dot, lse_dot, False
            )
        return None, None, None, out_dot[0], None if dlse is None else lse_dot[0], *grads, None, None

    @_rule
    def jvp(ctx: Any, saved, moved):
        call = ctx.call
        mask, seed, dout, dlse, q, k, v, out, lse = saved
        dout_moved, dlse_moved, *tangents, out_dot, lse_dot = moved
        if all(t is None for t in tangents):
            return Backward.apply(call, mask, seed, _zeros(dout_moved, dout), dlse_moved, q, k, v, out, lse)
        tangents = one_direction(tangents)
        if out_dot is None or lse_dot is None:
            out_dot, lse_dot = Jvp.apply(call, mask, seed, q, k, v, out, lse, *tangents)
        else:
            out_dot, lse_dot = one_direction((out_dot, lse_dot))
        cotangents = *one_direction((dout, dlse)), dout_moved, dlse_moved
        *grads, _ = BackwardJvp.apply(
            call, mask, seed, *cotangents, q, k, v, out, lse, *tangents, out_dot, lse_dot, False
        )
        return tuple(grads)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(Backward, info, in_dims, inputs, "q lse q k v q lse", "q k v")


class Jvp(Function):
    """(q, k, v, out, lse, q_dot, k_dot, v_dot) -> out_dot, lse_dot."""

    @staticmethod
    def forward(call, mask, seed, *tensors):
        return _run("jvp", *tensors, *call.operator(mask, seed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx, dout_dot, dlse_dot):
        call, (mask, seed, q, k, v, out, lse, *tangents, out_dot, lse_dot) = ctx.call, ctx.saved_tensors
        if dout_dot is None and dlse_dot is None:
            return (None,) * 11
        if is_legacy_batched(dout_dot, dlse_dot):
            function, inputs = _jvp_reference(call, mask, seed), (q, k, v, *tangents)
            dq, dk, dv, *rest = batched_gradients(function, inputs, (dout_dot, dlse_dot))
            return None, None, None, dq, dk, dv, None, None, *rest
        cotangents = _zeros(dout_dot, out_dot), dlse_dot, None, None
        saved = (mask, seed, q, k, v, out, lse, *tangents, out_dot, lse_dot)
        grads, of_tangents = _tangent_gradients(call, saved, cotangents, ctx.needs_input_grad[8:])
        return None, None, None, *grads, None, None, *of_tangents

    @_rule
    def jvp(ctx: Any, saved, moved):
        call = ctx.call
        mask, seed, q, k, v, _, _, *tangents, _, _ = saved
        moved = *moved[:3], *moved[5:]
        return reference_tangents(_jvp_reference(call, mask, seed), (q, k, v, *tangents), moved)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(d is not None for d in in_dims[:8]):
            return _fold(Jvp, info, in_dims, inputs, "q k v q lse tq tk tv", "tq tlse")
        tangents = [as_directions(x, d, info.batch_size) for x, d in zip(inputs[8:], in_dims[8:])]
        results = Jvp.apply(*inputs[:8], *tangents)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0)


class Dual(Function):
    """(q, k, v, q_dot, k_dot, v_dot) -> out, lse, out_dot, lse_dot, in one pass."""

    @staticmethod
    def forward(call, mask, seed, *tensors):
        return _run("forward_jvp", *tensors, *call.operator(mask, seed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx, dout, dlse, dout_dot, dlse_dot):
        call, (mask, seed, q, k, v, *tangents, out, lse, out_dot, lse_dot) = ctx.call, ctx.saved_tensors
        if dout is None and dlse is None and dout_dot is None and dlse_dot is None:
            return (None,) * 9
        is_first_order = dout_dot is None and dlse_dot is None
        is_within_level = torch_internals.is_forward_mode() and torch_internals.current_transform() is None
        if is_within_level:
            # A plain level is still open around this backward: what was taken off the duals moves with it.
            q, k, v = (x if t is None else forward_ad.make_dual(x, dense(t[0])) for x, t in zip((q, k, v), tangents))
            out, lse = forward_ad.make_dual(out, dense(out_dot[0])), forward_ad.make_dual(lse, dense(lse_dot[0]))
        if is_legacy_batched(dout, dlse, dout_dot, dlse_dot):
            function, inputs = _dual_reference(call, mask, seed), (q, k, v, *tangents)
            return None, None, None, *batched_gradients(function, inputs, (dout, dlse, dout_dot, dlse_dot))
        if is_first_order:
            dq, dk, dv = gradients(call, mask, seed, dout, dlse, q, k, v, out, lse)
            return None, None, None, dq, dk, dv, None, None, None
        cotangents = _zeros(dout_dot, out_dot), dlse_dot, dout, dlse
        if is_within_level:
            dq, dk, dv = _backward_jvp_reference(call, mask, seed)(*cotangents, q, k, v, *tangents)
            rest = _of_inputs(tangents, _first_order(call, mask, seed, cotangents, q, k, v, tangents))
            return None, None, None, dq, dk, dv, *rest
        saved = (mask, seed, q, k, v, out, lse, *tangents, out_dot, lse_dot)
        grads, of_tangents = _tangent_gradients(call, saved, cotangents, ctx.needs_input_grad[6:])
        return None, None, None, *grads, *of_tangents

    @_rule
    def jvp(ctx: Any, saved, moved):
        mask, seed, q, k, v, *tangents, _, _, _, _ = saved
        return reference_tangents(_dual_reference(ctx.call, mask, seed), (q, k, v, *tangents), moved)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        if any(d is not None for d in in_dims[:6]):
            return _fold(Dual, info, in_dims, inputs, "q k v tq tk tv", "q lse tq tlse")
        tangents = [as_directions(x, d, info.batch_size) for x, d in zip(inputs[6:], in_dims[6:])]
        out, lse, *moved = Dual.apply(*inputs[:6], *tangents)
        return (out, lse, *(x.unflatten(0, (info.batch_size, -1)) for x in moved)), (None, None, 0, 0)


class BackwardJvp(Function):
    """Cotangents of out_dot, lse_dot, out and lse, inputs, results and their tangents -> dq, dk, dv, dq_dot."""

    @staticmethod
    def forward(call, mask, seed, *inputs):
        *tensors, wants_dq_dot = inputs
        return _run("backward_jvp", *tensors, *call.operator(mask, seed), wants_dq_dot)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.wants_dq_dot = inputs[-1]
        _save(ctx, inputs[:-1])

    @staticmethod
    def _function(call: Call, mask: Tensor | None, seed: Tensor | None, wants_dq_dot: bool) -> Composition:
        """The same in framework operators, of those arguments of which results are functions."""

        def run(dout_dot, dlse_dot, dout, dlse, q, k, v, *tangents):
            cotangents = dout_dot, dlse_dot, dout, dlse
            grads = _backward_jvp_reference(call, mask, seed)(*cotangents, q, k, v, *tangents)
            if not wants_dq_dot:
                return *grads, q.new_empty((0, *q.shape))
            return *grads, _first_order(call, mask, seed, cotangents, q, k, v, tangents)[0]

        return run

    @staticmethod
    def backward(ctx, *grads):
        mask, seed, *tensors = ctx.saved_tensors
        inputs = *tensors[:7], *tensors[9:12]
        function = BackwardJvp._function(ctx.call, mask, seed, ctx.wants_dq_dot)
        gradients_of = batched_gradients if is_legacy_batched(*grads) else reference_gradients
        found = gradients_of(function, inputs, grads)
        return None, None, None, *found[:7], None, None, *found[7:], None, None, None

    @_rule
    def jvp(ctx: Any, saved, moved):
        mask, seed, *tensors = saved
        inputs, moved = (*tensors[:7], *tensors[9:12]), (*moved[:7], *moved[9:12])
        return reference_tangents(BackwardJvp._function(ctx.call, mask, seed, ctx.wants_dq_dot), inputs, moved)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        kinds = "tq tlse q lse q k v q lse tq tk tv tq tlse"
        return _fold(BackwardJvp, info, in_dims, inputs, kinds, "q k v tq")


def _tangent_gradients(
    call: Call, saved: Sequence[Any], cotangents: Tensors, needed: Sequence[bool]
) -> tuple[Tensors, Tensors]:
    """Gradients of q, k and v, and of those tangents that need one.

    Where queries alone move, that of their tangent comes out of the same pass.
    """
    mask, seed, q, k, v, out, lse, *tangents, out_dot, lse_dot = saved
    in_one_pass = bool(needed[0]) and not any(needed[1:])
    *grads, dq_dot = BackwardJvp.apply(
        call, mask, seed, *cotangents, q, k, v, out, lse, *tangents, out_dot, lse_dot, in_one_pass
    )
    if in_one_pass:
        return tuple(grads), (dq_dot, None, None)
    if not any(needed):
        return tuple(grads), (None, None, None)
    dout_dot, dlse_dot = cotangents[:2]
    assert dout_dot is not None
    directions = [
        Backward.apply(call, mask, seed, y, None if dlse_dot is None else dlse_dot[t], q, k, v, out, lse)
        for t, y in enumerate(dout_dot)
    ]
    of_tangents = tuple(torch.stack(each) for each in zip(*directions))
    return tuple(grads), _of_inputs(tangents, [x if wanted else None for x, wanted in zip(of_tangents, needed)])


def _forward_reference(call: Call, mask: Tensor | None, seed: Tensor | None) -> Composition:
    return lambda q, k, v: reference.attend(q, k, v, *call.reference(mask, seed))


def _backward_reference(call: Call, mask: Tensor | None, seed: Tensor | None) -> Composition:
    return lambda dout, dlse, q, k, v: reference.backward(dout, dlse, q, k, v, *call.reference(mask, seed))


def _dual_reference(call: Call, mask: Tensor | None, seed: Tensor | None) -> Composition:
    primal, moved = _forward_reference(call, mask, seed), _jvp_reference(call, mask, seed)
    return lambda q, k, v, *tangents: (*primal(q, k, v), *moved(q, k, v, *tangents))


def _jvp_reference(call: Call, mask: Tensor | None, seed: Tensor | None) -> Composition:
    def run(q, k, v, *tangents):
        directions = [reference.jvp(q, k, v, *each, *call.reference(mask, seed)) for each in _directions(tangents)]
        return tuple(torch.stack(each) for each in zip(*directions))

    return run


def _backward_jvp_reference(call: Call, mask: Tensor | None, seed: Tensor | None) -> Composition:
    def run(dout_dot, dlse_dot, dout, dlse, q, k, v, *tangents):
        total: list[Tensor] = []
        for t, each in enumerate(_directions(tangents)):
            numbers = None if dlse_dot is None else dlse_dot[t]
            primal = (dout, dlse) if t == 0 else (None, None)
            grads = reference.backward_jvp(dout_dot[t], numbers, *primal, q, k, v, *each, *call.reference(mask, seed))
            total = [a + b for a, b in zip(total, grads)] if total else list(grads)
        return tuple(total)

    return run


def _first_order(call, mask, seed, cotangents, q, k, v, tangents) -> list[Tensor]:
    """Gradients of tangents, which are those of the first order, in framework operators."""
    dout_dot, dlse_dot, *_ = cotangents
    directions = [
        reference.backward(y, None if dlse_dot is None else dlse_dot[t], q, k, v, *call.reference(mask, seed))
        for t, y in enumerate(dout_dot)
    ]
    return [torch.stack(each) for each in zip(*directions)]


def _directions(tangents: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    (count,) = {len(t) for t in tangents if t is not None}
    return [[None if t is None else t[i] for t in tangents] for i in range(count)]


def _given(
    function: Composition, inputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], Composition, Callable[[Sequence[Any]], list[Any]]]:
    """The inputs that there are, the function of them alone, and what puts something for each in its place."""
    places = [i for i, x in enumerate(inputs) if x is not None]

    def placed(given: Sequence[Any]) -> list[Any]:
        every = [None] * len(inputs)
        for place, x in zip(places, given):
            every[place] = x
        return every

    return [x for x in inputs if x is not None], lambda *given: function(*placed(given)), placed


def reference_tangents(function: Composition, inputs: Sequence[Tensor | None], moved: Sequence[Tensor | None]) -> Any:
    """How a composition moves with its inputs. Those that stay, or are not there, have None."""
    given, run, _ = _given(function, inputs)
    tangents = [_zeros(moved_x, x) for x, moved_x in zip(inputs, moved) if x is not None]
    return torch.func.jvp(run, tuple(given), tuple(tangents))[1]


def reference_gradients(
    function: Composition, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Any]:
    """Gradients of the inputs of a composition; None of those that are not there."""
    given, run, placed = _given(function, inputs)
    outputs, pull, *_ = torch.func.vjp(run, *given)
    return placed(pull(tuple(_zeros(g, o) for g, o in zip(grads, outputs))))


def batched_gradients(
    function: Composition, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Any]:
    """The same for ``is_grads_batched``, which has rules for what torch's own derivatives are made of, and few others.

    So the composition is computed of tensors that are not batched, and torch differentiates it.
    """
    given, run, placed = _given(function, inputs)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because hooks on the inputs see the gradient of the whole graph, once.
        leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in given]
        pairs = [(output, grad) for output, grad in zip(run(*leaves), grads) if grad is not None]
        outputs, batched = zip(*pairs)
        options = {"create_graph": create_graph, "materialize_grads": True}
        return placed(torch.autograd.grad(outputs, leaves, batched, **options))


# -- The operators


def forward_jvp(q, k, v, q_dot, k_dot, v_dot, segments, softmax_scale, mask=None, dropout_p=0.0, seed=None):
    """The operator where derivatives may be asked for: what a compiler has traced, or who calls it by hand."""
    call, tensors = Call(segments, softmax_scale, dropout_p), (q, k, v, q_dot, k_dot, v_dot)
    if q.is_cuda and q.dtype == torch.float64:  # as the forward: no kernel serves it
        return _dual_reference(call, mask, seed)(*tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch_internals.current_transform() is not None:
            return _dual_reference(call, mask, seed)(*tensors)
        return Dual.apply(call, mask, seed, *tensors)
    return _run("forward_jvp", *tensors, *call.operator(mask, seed))


def map_forward_jvp(info, in_dims, *inputs):
    """Its rule for vmap: over tangents alone, which become directions."""
    if any(d is not None for d in (*in_dims[:3], *in_dims[6:])):
        raise NotImplementedError("mixed_attention::forward_jvp: vmap over q, k or v; use mixed_attention.attention")
    tangents = [as_directions(x, d, info.batch_size) for x, d in zip(inputs[3:6], in_dims[3:6])]
    out, lse, *moved = torch.ops.mixed_attention.forward_jvp(*inputs[:3], *tangents, *inputs[6:])
    return (out, lse, *(x.unflatten(0, (info.batch_size, -1)) for x in moved)), (None, None, 0, 0)


def forward_jvp_composed(q, k, v, q_dot, k_dot, v_dot, segments, softmax_scale, mask=None, dropout_p=0.0, seed=None):
    """The operator where no kernel of tangents serves it; out and log-sum-exp are those of the forward kernel."""
    arguments = segments, softmax_scale, mask, dropout_p, seed
    out, lse = torch.ops.mixed_attention.forward(q, k, v, *arguments)
    return out, lse, *jvp_composed(q, k, v, out, lse, q_dot, k_dot, v_dot, *arguments)


def jvp_composed(q, k, v, out, lse, q_dot, k_dot, v_dot, segments, softmax_scale, mask=None, dropout_p=0.0, seed=None):
    """The operator where no kernel serves it, in framework operators."""
    return _jvp_reference(Call(segments, softmax_scale, dropout_p), mask, seed)(q, k, v, q_dot, k_dot, v_dot)


def backward_jvp_composed(
    dout_dot,
    dlse_dot,
    dout,
    dlse,
    q,
    k,
    v,
    out,
    lse,
    q_dot,
    k_dot,
    v_dot,
    out_dot,
    lse_dot,
    segments,
    softmax_scale,
    mask=None,
    dropout_p=0.0,
    seed=None,
    wants_dq_dot=False,
):
    """Likewise."""
    function = BackwardJvp._function(Call(segments, softmax_scale, dropout_p), mask, seed, wants_dq_dot)
    return function(dout_dot, dlse_dot, dout, dlse, q, k, v, q_dot, k_dot, v_dot)


# -- vmap


def as_directions(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Tangents that vmap maps, or does not, as so many times the directions."""
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def folded(x: Tensor | None, dim: int | None, axis: int, size: int, batch_size: int) -> Tensor | None:
    """What vmap maps, or does not, as so many times the batch, which is the axis of what is not mapped."""
    if x is None:
        return None
    x = x.unsqueeze(axis) if dim is None else x.movedim(dim, axis)
    shape = list(x.shape)
    shape[axis : axis + 2] = size, batch_size
    return x.expand(shape).flatten(axis, axis + 1)


def _fold(function, info, in_dims: Sequence[int | None], inputs: Sequence[Any], kinds: str, results: str) -> Any:
    """What is mapped becomes part of the batch, or, under dropout, which draws by it, a loop.

    Args:
        function: The autograd function.
        info: What functorch says of the map.
        in_dims: Those of the inputs.
        inputs: call, mask, seed, tensors, and what is no tensor.
        kinds: What each tensor is of (q, k, v or lse), and a t in front where it has directions.
        results: The same of what the function returns.
    """
    size = info.batch_size
    call, mask, seed, *rest = inputs
    names = kinds.split()
    if call.dropout_p > 0:
        return _loop(function, size, in_dims, inputs)
    tensors, more = rest[: len(names)], rest[len(names) :]
    dims = in_dims[3 : 3 + len(names)]
    batch = [_unmapped(x, d).shape[name[0] == "t"] for x, d, name in zip(tensors, dims, names) if x is not None]
    batch_size = max(batch) if 0 not in batch else 0

    # One sequence of keys for the batch has one gradient for each of what is mapped.
    shared = {name: _unmapped(x, d).shape[0] == 1 for x, d, name in zip(tensors, dims, names) if name in ("k", "v")}
    outputs = function.apply(
        call,
        folded(mask, in_dims[1], 0, size, batch_size),
        seed,
        *(folded(x, d, int(name[0] == "t"), size, batch_size) for x, d, name in zip(tensors, dims, names)),
        *more,
    )
    unfolded, out_dims = [], []
    for x, name in zip(outputs, results.split()):
        axis = int(name[0] == "t")
        x = x.unflatten(axis, (size, batch_size))
        if shared.get(name) and batch_size != 1:
            x = x.sum(1, keepdim=True)
        unfolded.append(x)
        out_dims.append(axis)
    return tuple(unfolded), tuple(out_dims)


def _unmapped(x: Tensor, dim: int | None) -> Tensor:
    return x if dim is None else x.select(dim, 0)


def _loop(function, size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> Any:
    rounds = [
        function.apply(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims))) for i in range(size)
    ]
    outputs = tuple(torch.stack(each) for each in zip(*rounds))
    return outputs, (0,) * len(outputs)
