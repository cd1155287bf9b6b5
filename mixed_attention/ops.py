"""``attention`` and ``rotate``: the compiled operators, their fakes and derivatives, and the choice of path.

A functorch transform, a forward-mode level, or a second derivative: the functions of
:mod:`mixed_attention.derivatives`. fp64 on a GPU: the reference, a composition of framework operators that is closed
under every transform. Otherwise: a node in C++ over the kernels. Nothing else may answer, because a plain custom
operator would answer some transforms with silent zeros. The registered operator makes a choice by itself, since the
compiler traces transforms too and then nobody but the operator meets them.

The only module that imports ``_C``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Real
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mixed_attention import cuda_library, derivatives, reference, rotation, torch_internals
from mixed_attention.autocast import autocast_dtype
from mixed_attention.derivatives import is_legacy_batched
from mixed_attention.norms import exact_norms
from mixed_attention.plan import AttentionPlan, query_segments
from mixed_attention.rotation import rotate_composite

try:
    from mixed_attention import _C

    _import_error: ImportError | None = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = error


def _open_kernels() -> str | None:
    """Opens the library of CUDA kernels if none are linked into the compiled part; returns its path."""
    if _C is None or _C.has_cuda_kernels():
        return None
    try:
        path = cuda_library.path()
        _C.open_kernels(path)
    except (ImportError, RuntimeError) as error:
        _C.set_why_no_kernels(str(error))
        return None
    return path


_opened_kernels = _open_kernels()


def is_compiled() -> bool:
    """Whether the compiled part of the package is there."""
    return _C is not None


def _require_compiled() -> None:
    if _C is None:
        raise ImportError(
            "the compiled part of mixed_attention is missing or does not fit this torch; in a checkout run "
            "`make build`, otherwise `pip install --no-build-isolation --force-reinstall mixed_attention`. "
            "mixed_attention.reference.attention works without it"
        ) from _import_error


def describe_build() -> str:
    """What the compiled part was built with, or why it is missing; for people to read."""
    return f"missing: {_import_error}" if _C is None else f"{_C.build_flags}, {_C.__file__}"


def where_cuda_kernels_are() -> str | None:
    """Path of the binary that has the CUDA kernels, if there are any."""
    return _opened_kernels or (_C.__file__ if _C is not None and _C.has_cuda_kernels() else None)


def why_no_cuda_kernels() -> str:
    """What is missing where there are no CUDA kernels; for people to read."""
    return "the compiled part is missing" if _C is None else _C.why_no_kernels()


def cpu_instruction_set() -> str:
    """Instruction set of the CPU kernels: ``"AMX"``, ``"AVX512_BF16"``, ``"AVX512"``, ``"AVX2"`` or ``"portable"``."""
    _require_compiled()
    return _C.cpu_instruction_set()


def check_environment() -> None:
    """Checks the variables by which kernels are asked for. Calls that they concern raise the same.

    Raises:
        ValueError: ``MIXED_ATTENTION_CPU`` or ``MIXED_ATTENTION_GPU`` asks for what there is not, or not here.
    """
    if _C is not None:
        _C.check_environment()


def _index_of(device: torch.device) -> int:
    """Number of a GPU; that of the current one, or 0 where there is none, if the device has no number."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def cuda_kernel(
    dtype: torch.dtype, head_dim: int, device: torch.device, *, backward: bool, head_dim_v: int | None = None
) -> tuple[str, str]:
    """Which family of kernels serves a call on a GPU, and why not a faster one; for people to read.

    Args:
        dtype, head_dim, device: Those of queries and keys.
        backward: Which pass.
        head_dim_v: Width of values; None for that of queries and keys.

    Returns:
        ``"hopper"``, ``"portable"`` or ``"none"``, and a reason, empty where nothing was refused.
    """
    _require_compiled()
    return _C.cuda_kernel(dtype, head_dim, head_dim_v or head_dim, _index_of(device), backward)


class CudaLaunch(NamedTuple):
    """How a GPU serves a pass.

    Attributes:
        family: Which kernels: ``"hopper"``, ``"portable"`` or ``"none"``.
        why: Why not a faster one, or why none at all; empty where nothing was refused.
        tile_rows: Queries (forward) or keys (backward) that a thread block owns.
        block_rows: Rows of the other side that it takes up at a time.
        num_splits: Parts that the walk of a tile is cut into.
        num_tiles: Those of all heads and sequences, splits counted singly.
        num_slots: Tiles that the device works on at a time.
        num_split_tiles: Tiles whose walk is cut, all or some.
    """

    family: str
    why: str
    tile_rows: int
    block_rows: int
    num_splits: int
    num_tiles: int
    num_slots: int
    num_split_tiles: int


def cuda_launch(
    plan: AttentionPlan,
    *,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    head_dim_v: int | None = None,
    tangents: bool = False,
) -> CudaLaunch:
    """How a GPU serves a call of contiguous tensors without mask and dropout, as the call itself would decide it.

    With ``tangents`` it is a call of the operators of derivatives beyond the first, in one direction.
    """
    _require_compiled()
    width_v = head_dim_v or head_dim
    if width_v < head_dim and _fills_up(dtype, head_dim, width_v, device):
        width_v = head_dim
    shape = (batch_size, num_heads, plan.num_queries, plan.num_keys, head_dim, width_v)
    return CudaLaunch(*_C.cuda_launch(dtype, shape, plan.flat(), _index_of(device), backward, tangents))


@cache
def has_kernels(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this build has kernels for a type of device (``"cpu"``, ``"cuda"``, ...) and a dtype.

    GPUs have none for fp64, which the reference computes there.
    """
    if _C is None or (device_type == "cuda" and dtype == torch.float64):
        return False
    return torch_internals.has_operator_kernel("mixed_attention::forward", device_type)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are torch's own tensors and nobody intercepts its functions.

    Only then may steps in C++ stand for calls of torch's functions. A mode that says where new tensors are made
    (``torch.device`` as a context), or one that replaces norms, intercepts nothing of ours.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return not torch_internals.is_function_mode_enabled() or all(
        isinstance(mode, (torch_internals.DeviceContext, exact_norms)) for mode in torch_internals.function_modes()
    )


def is_distributed(tensor: Any) -> bool:
    """Whether this is a DTensor, whose module takes long to import: it is there if one is."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def needs_composite(*tensors: Tensor | None) -> bool:
    """Whether a transform is active, or forward mode, that a plain call of a kernel would not answer rightly."""
    if torch_internals.current_transform() is not None or is_legacy_batched(*tensors):
        return True
    return torch_internals.is_forward_mode() and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    dropout_p: float = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float | Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Structured attention: every query attends to the keys that the plan gives it, under one softmax.

    The definition is :mod:`mixed_attention.reference`. Differentiable in q, k, v and a scale that is a tensor, in any
    mode and order. On the meta device, and for fake tensors, it computes shapes; tensor subclasses and modes see
    ``torch.ops.mixed_attention.forward``.

    Args:
        q: Queries ``(B, Nq, H, D)``; fp32, fp64, bf16 or fp16; last dim contiguous, other strides free.
        k: Keys ``(B or 1, Nk, H, D)``, dtype and device of ``q``. With 1, one sequence serves the whole batch.
        v: Values ``(B or 1, Nk, H, Dv)``, likewise; Dv may be another width than D.
        plan: The compiled patterns; ``plan.num_queries`` = Nq, ``plan.num_keys`` = Nk.
        softmax_scale: Factor on the products q·k; default ``D ** -0.5``. A number, which must be finite; or a
            floating-point tensor on the device of ``q``, of shape ``()`` or ``(1,)``, or ``(H,)`` or ``(1, 1, H, 1)``
            with one for each head, which q is multiplied by and rounded to its dtype (under autocast, to that of the
            products).
        key_padding_mask: Boolean ``(B or 1, Nk)``, True = real token. Masked keys get no weight from anybody.
        dropout_p: Probability with which an attention weight is dropped, applied whenever it is above 0. Rounded to
            a multiple of 1/65536.
        return_lse: Whether to return the log-sum-exp as well.

    Returns:
        out ``(B, Nq, H, Dv)`` in the dtype of ``q``. With ``return_lse`` a pair of it and the natural log-sum-exp of
        the scores, ``(B, H, Nq)``, fp32 (fp64 for fp64). A row without keys: out 0, log-sum-exp -inf, gradients 0.

    Raises:
        TypeError: If an argument is not of the kind that stands above.
        ValueError: If a rank, shape, dtype, device, scale or probability does not fit, the plan was made for other
            sizes, or the memory of a tensor was freed.
        NotImplementedError: If the device has no kernels, or a tensor is not a dense one.
        ImportError: If the compiled part of the package is missing.
    """
    _require_compiled()
    tensors = (q, k, v) if key_padding_mask is None else (q, k, v, key_padding_mask)
    by_dispatcher = torch.compiler.is_compiling() or not is_plain(*tensors)
    if by_dispatcher:
        check_tensors(**dict(zip(("q", "k", "v", "key_padding_mask"), tensors)))
    if not isinstance(plan, AttentionPlan):
        raise TypeError(
            f"plan: expected an AttentionPlan, got {type(plan).__name__}; "
            "AttentionPlan.compile(token_specs, attention_patterns) makes one"
        )
    dropout_p = _number("dropout_p", dropout_p, "a number")
    if softmax_scale is None:
        scale = max(q.size(-1), 1) ** -0.5 if q.dim() == 4 else 1.0  # what does not fit is refused below
    elif isinstance(softmax_scale, Tensor):
        q, scale = _scale_queries(q, softmax_scale), 1.0
    else:
        scale = _number("softmax_scale", softmax_scale, "a number, a tensor or None")
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, v))
    if q.is_cuda and abs(scale) < _LEAST_SCALE and q.dtype in (torch.float32, torch.bfloat16):
        # GPU kernels scale products, which overflow long before scores of such a scale do, and round it.
        q, scale = q * _LEAST_SCALE, scale / _LEAST_SCALE
    width_v = v.size(-1) if v.dim() == q.dim() == 4 else 0
    if 0 < width_v < q.size(-1) and _fills_up(q.dtype, q.size(-1), width_v, q.device):
        v = nn.functional.pad(v, (0, q.size(-1) - width_v))
    seed = draw_seed(q.device) if dropout_p > 0 else None
    if by_dispatcher and any(is_distributed(tensor) for tensor in tensors):
        from mixed_attention.distributed import dtensor  # which says how the operators act on them

        seed = None if seed is None else dtensor.as_seed(seed, q)
    out, lse = (_dispatched if by_dispatcher else _attend)(q, k, v, plan, scale, key_padding_mask, dropout_p, seed)
    if v.size(-1) != width_v > 0:
        out = out[..., :width_v]
    return (out, lse) if return_lse else out


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *arguments: Any) -> tuple[Tensor, Tensor]:
    """In eager mode, of torch's own tensors."""
    if _lacks_kernels(q) or is_legacy_batched(q, k, v):
        return _composite(q, k, v, plan.flat(), *arguments)
    if not needs_composite(q, k, v):
        return _C.attend(q, k, v, _flat_plan(plan), *arguments)
    segments = plan.flat()
    _C.check_forward(q, k, v, segments, *arguments)
    return derivatives.attend(q, k, v, segments, *arguments)


def _flat_plan(plan: AttentionPlan) -> Any:
    """The plan's integers as C++ keeps them: brought over once, as those of thousands of groups take their time."""
    found = plan.kept.get(_FLAT)
    if found is None:
        found = plan.kept[_FLAT] = _C.FlatPlan(plan.flat())
    return found


_FLAT = "flat"
"""Under which a plan keeps them."""


def _lacks_kernels(q: Tensor) -> bool:
    """Whether the reference computes it: fp64 on a GPU. Where nobody does, operators say so."""
    return q.dtype == torch.float64 and not has_kernels(q.device.type, q.dtype)


def _dispatched(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *numbers: Any) -> tuple[Tensor, Tensor]:
    """By registered operators, which compilers, modes and subclasses see. Tangents are handed over beside primals."""
    arguments = plan.flat(), *numbers
    if torch.compiler.is_compiling():
        primals, tangents = derivatives.unpack(q, k, v)
        if any(tangent is not None for tangent in tangents):
            moved = derivatives.one_direction(tangents)
            results = torch.ops.mixed_attention.forward_jvp(*primals, *moved, *arguments)
            out, lse, out_dot, lse_dot = results
            return forward_ad.make_dual(out, out_dot[0]), forward_ad.make_dual(lse, lse_dot[0])
    return torch.ops.mixed_attention.forward(q, k, v, *arguments)


def check_tensors(**arguments: Any) -> None:
    """Checks that arguments are dense tensors.

    Raises:
        TypeError: If one is no tensor.
        NotImplementedError: If one is sparse, quantized or nested.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if _C is not None and not torch.compiler.is_compiling():
            _C.check_dense(name, value)


@torch_internals.assume_constant_result  # the compiler cannot trace into C++
def _fills_up(dtype: torch.dtype, head_dim: int, head_dim_v: int, device: torch.device) -> bool:
    """Whether faster kernels serve values as wide as queries and keys, which zeros make of narrower ones.

    Hopper's kernels load rows of multiples of 8 alone. All others take values of any width as they are.
    """
    if device.type != "cuda":
        return False
    families = [
        [_C.cuda_kernel(dtype, head_dim, width, _index_of(device), backward)[0] for width in (head_dim, head_dim_v)]
        for backward in (False, True)
    ]
    return ["hopper", "portable"] in families


def _number(name: str, value: Any, expected: str) -> Any:
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, Real):  # numpy's
        return float(value)
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


# Numbers of fp32 and bf16 that matter under a smaller scale can be multiplied by it without loss.
_LEAST_SCALE = 2.0**-64

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _scale_queries(q: Tensor, scale: Tensor) -> Tensor:
    """Queries whose products with keys need no scale any more."""
    check_tensors(q=q, softmax_scale=scale)
    if scale.dtype not in _DTYPES:
        raise ValueError(f"softmax_scale: expected dtype float32, float64, bfloat16 or float16, got {scale.dtype}")
    if scale.device != q.device:
        raise ValueError(f"softmax_scale: expected device {q.device} like q, got {scale.device}")
    if q.dtype not in _DTYPES or q.dim() != 4:  # refused behind this
        return q
    shape, num_heads = tuple(scale.shape), q.size(2)
    if shape == (num_heads,):
        scale = scale.reshape(num_heads, 1)
    elif shape not in ((), (1,), (1, 1, num_heads, 1)):
        raise ValueError(
            f"softmax_scale: expected shape () or (1,), or ({num_heads},) or (1, 1, {num_heads}, 1) "
            f"with one for each head, got {shape}"
        )
    return (q * scale).to(q.dtype)


def rotate(x: Tensor, freqs: Tensor, *, conjugate: bool = False) -> Tensor:
    """Multiplies neighbouring channel pairs, read as complex numbers, by ``freqs``, the same for all heads.

    Arithmetic is fp32 (fp64 for fp64 inputs); the result has the dtype of ``x``. Differentiable in both, in any mode
    and order.

    Args:
        x: ``(B, N, H, D)`` with even D, last dim contiguous.
        freqs: Complex ``(B or 1, N, D / 2)``, of any magnitude.
        conjugate: Whether to multiply by the conjugate: the inverse rotation where the magnitude is one.

    Returns:
        A new tensor, shape and dtype of ``x``.

    Raises:
        TypeError: If one is not a tensor.
        ValueError: If a shape, dtype or device does not fit.
        NotImplementedError: If a tensor is not a dense one.
        ImportError: If the compiled part of the package is missing.
    """
    check_tensors(freqs=freqs)  # of x apply_rope has asked
    if freqs.device != x.device:
        raise ValueError(f"freqs: expected device {x.device} like x, got {freqs.device}")
    if torch.compiler.is_compiling():
        return rotate_composite(x, real_freqs(freqs, x.dtype), conjugate)
    _require_compiled()
    pairs = real_freqs(freqs, x.dtype)
    if not is_plain(x, pairs):
        _C.check_rope(x, pairs, x)
        return rotate_composite(x, pairs, conjugate)
    if needs_composite(x, pairs):
        _C.check_rope(x, pairs, x)
        if is_legacy_batched(x, pairs):
            return rotate_composite(x, pairs, conjugate)
        return rotation.rotate(conjugate, x, pairs)
    return rotation.Rotate.apply(conjugate, x, pairs)


def real_freqs(freqs: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex frequencies as the kernels take them: ``(…, 2)`` in fp32, or in fp64 where x has that dtype."""
    freqs = freqs.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return torch.view_as_real(freqs.resolve_conj())


def draw_seed(device: torch.device) -> Tensor:
    """A seed for Philox from torch's own generator of the device, so that seeding, checkpointing and graphs work."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[int],
    softmax_scale: float,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator where derivatives may be asked for.

    Unlike `_C.attend`, which is this without the host time of Python, it takes the symbolic sizes of the compiler.
    """
    arguments = q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed
    if _lacks_kernels(q) or needs_composite(q, k, v):
        return _composite(*arguments)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        call = derivatives.Call(segments, softmax_scale, dropout_p)
        return derivatives.Forward.apply(call, key_padding_mask, dropout_seed, q, k, v)
    with torch_internals.below_autograd():
        return torch.ops.mixed_attention.forward.default(*arguments)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Sequence[tuple[int, int, Sequence[tuple[int, int]] | None]],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Products of tokens with parts of a weight, in plain eager mode: one step of the graph, and little host time.

    Args:
        x: Tokens ``(B, N, C)``.
        weight: ``(rows, C)``.
        bias: ``(rows,)``.
        parts: For each its first row and the one behind its last, and the half-open ranges of tokens that it sees,
            None for all.
        dtype: What everything is cast to. Gradients have the dtypes of what was given.

    Returns:
        For each part a new tensor ``(B, tokens seen, its rows)``.
    """
    return _C.project(x, weight, bias, [_C.ProjectedPart(*part) for part in parts], dtype)


def packed_call(
    shapes: Sequence[tuple[int, int, int, int, int]],
    rotated: Sequence[int],
    tokens: Sequence[Sequence[tuple[int, int]] | None],
    plan: AttentionPlan,
    softmax_scale: float,
    dropout_p: float,
    normalised: Sequence[int] | None = None,
) -> Any:
    """What :func:`attend_in_place` computes.

    Args:
        shapes: Those of the buffers, ``(B, N, slots, H, D)``.
        rotated: How many of the first slots of each are rotated.
        tokens: Half-open ranges of those that a buffer has, None for all.
        plan: The compiled patterns.
        softmax_scale: Factor on the products.
        dropout_p: Which share of the attention weights is dropped.
        normalised: How many of the first slots of each are divided by their root mean square before; none if None.
    """
    return _C.PackedCall(shapes, rotated, tokens, _flat_plan(plan), softmax_scale, dropout_p, normalised)


def attend_in_place(
    buffers: Sequence[Tensor],
    pairs: Sequence[Tensor | None],
    key_padding_mask: Tensor | None,
    dropout_seed: Tensor | None,
    call,
) -> list[Tensor]:
    """Rotates packed buffers where they lie and attends, in plain eager mode: one step of the graph.

    Returns:
        The output ``(B, Nq, H * D)``, and those buffers that were rotated, as parts of the graph.
    """
    return _C.attend_in_place(buffers, pairs, key_padding_mask, dropout_seed, call)


def layer_call(parts: Sequence[tuple[int, int, Sequence[tuple[int, int]] | None]], attention: Any) -> Any:
    """What :func:`run_layer` computes: the parts of :func:`project`, and what :func:`packed_call` makes."""
    return _C.LayerCall([_C.ProjectedPart(*part) for part in parts], attention)


def run_layer(
    x: Tensor,
    maps: Sequence[tuple[Tensor, Tensor | None]],
    freqs: Tensor | None,
    key_padding_mask: Tensor | None,
    call: Any,
) -> list[Tensor] | None:
    """A whole layer in plain eager mode: :func:`project`, :func:`attend_in_place` and :func:`project` again.

    Args:
        x: Tokens ``(B, N, C)``.
        maps: Weights and biases of the linear maps to q, k and v, which are read as one, and of the output projection.
        freqs: Complex frequencies ``(B or 1, N, D / 2)``.
        key_padding_mask: As :func:`attention` takes it.
        call: What :func:`layer_call` makes.

    Returns:
        The tokens ``(B, N, dim)``, and the buffers of q, k and v as parts of the graph. None, and nothing done, where
        this is no plain eager mode on a device with kernels, or something does not fit.
    """
    return None if _C is None else _C.run_layer(x, maps, freqs, key_padding_mask, call)


def shards(group: str, rank: int, share_a_host: bool, sizes: Sequence[Sequence[int]]) -> Any:
    """Where the rows of some groups lie that are spread over ranks; of every group its rows on each rank."""
    _require_compiled()
    return _C.Shards(group, rank, share_a_host, sizes)


def start_gather(rows: Tensor, where: Any) -> Callable[[], Tensor]:
    """Starts to bring the rows of all ranks together, ``(n, ...)`` of this one; without derivatives.

    Returns:
        What waits, and returns the whole ``(N, ...)``.
    """
    _require_compiled()
    gather = _C.start_gather(rows, where)
    return lambda: _C.finish_gather(gather, where)


def start_sums(rows: Tensor, where: Any) -> Callable[[], Tensor]:
    """Starts to add up rows of the whole ``(N, ...)`` over all ranks, in fp32 at least, each rank its own.

    Returns:
        What waits, and returns the sums ``(n, ...)`` of the rows of this rank.
    """
    _require_compiled()
    sums = _C.start_sums(rows, where)
    return lambda: _C.finish_sums(sums, where)


def gather_tokens(parts: Sequence[Tensor], tokens: Sequence[tuple[int, int]] | None, where: Any) -> list[Tensor]:
    """Brings tokens of all ranks together, in plain eager mode: one step of the graph.

    Args:
        parts: Tokens of this rank ``(B, N, ...)``, of one dtype.
        tokens: Half-open ranges of those that are brought together, None for all.
        where: What :func:`shards` makes of these.

    Returns:
        For each part those of all ranks ``(B, n, ...)``, groups behind groups, in each ranks behind ranks.
    """
    return _C.gather_tokens(parts, tokens, where)


def spread_layer_call(parts: Sequence[tuple[int, int, Any]], here: Any, attention: Any, where: Any) -> Any:
    """What :func:`run_layer_over_ranks` computes.

    The parts that :func:`layer_call` takes; what :func:`packed_call` makes of the buffers of this rank, and of one of
    queries and one of keys and values of all ranks; where these lie.
    """
    return _C.SpreadLayerCall([_C.ProjectedPart(*part) for part in parts], _C.SpreadCall(here, attention, where))


def run_layer_over_ranks(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], freqs: Tensor | None, call: Any
) -> list[Tensor] | None:
    """:func:`run_layer` where keys and values come from all ranks.

    Returns:
        The tokens ``(B, N, dim)`` of this rank, and its buffers of q, k and v. None, and nothing done, as there.
    """
    return _C.run_layer_over_ranks(x, maps, freqs, call)


def fits_layer(
    x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], freqs: Tensor | None, heads: tuple[int, int]
) -> bool:
    """Whether :func:`run_layer_over_ranks` would run, given the number of heads and their width."""
    return _C.fits_layer(x, maps, freqs, *heads)


def set_spread_composites(sums: Callable[..., list[Tensor]], attention: Callable[..., list[Tensor]]) -> None:
    """Says what gathers and attention over ranks call where their derivatives are to be differentiated themselves."""
    if _C is not None:
        _C.set_sums_composite(sums)
        _C.set_spread_composite(attention)


def set_backward_composite(composite: Callable[..., list[Tensor | None]]) -> None:
    """Says what :func:`attend_in_place` calls where its derivative is to be differentiated itself."""
    if _C is not None:
        _C.set_backward_composite(composite)


def _of_tangents(name: str) -> Callable[..., Any]:
    """An operator of tangents on GPUs: the kernels', or a composition where there are none of its dtype and heads."""
    kernel, composed = getattr(_C, name), getattr(derivatives, f"{name}_composed")
    q_place, v_place = (4, 6) if name == "backward_jvp" else (0, 2)
    num_required = {"forward_jvp": 8, "jvp": 10, "backward_jvp": 16}[name]
    defaults = (None, 0.0, None) if name != "backward_jvp" else (None, 0.0, None, False)

    def run(*arguments):
        arguments += defaults[len(arguments) - num_required :]  # which the dispatcher leaves out
        q, v = arguments[q_place], arguments[v_place]
        served = q.dim() == v.dim() == 4 and has_tangent_kernels(q.dtype, q.shape[-1], v.shape[-1], q.device)
        return (kernel if served else composed)(*arguments)

    return run


def has_tangent_kernels(dtype: torch.dtype, head_dim: int, head_dim_v: int, device: torch.device) -> bool:
    """Whether kernels on a GPU serve tangents of the forward, and gradients of them; else they are composed."""
    return why_no_tangent_kernels(dtype, head_dim, head_dim_v, device) == ""


def why_no_tangent_kernels(dtype: torch.dtype, head_dim: int, head_dim_v: int, device: torch.device) -> str:
    """Why not, for people to read; empty where they do."""
    if dtype not in _DTYPES:
        return f"{dtype} is no dtype of attention"
    family, why = _C.cuda_kernel(dtype, head_dim, head_dim_v, _index_of(device), True, True)
    return why if family == "none" else ""


def _composite(q, k, v, segments, scale, key_padding_mask, dropout_p, seed):
    _C.check_forward(q, k, v, segments, scale, key_padding_mask, dropout_p, seed)
    out, lse = reference.attend(q, k, v, query_segments(segments), scale, key_padding_mask, dropout_p, seed)
    return out, lse if q.dtype == torch.float64 else lse.float()


def unhooked(x: Tensor) -> Tensor:
    """The same tensor to differentiate by, without the hooks on it: they see the gradient of the whole graph, once."""
    return x.view_as(x)


def _attention_composite(saved, grads_out, needs_grad, key_padding_mask, seed, call):
    """The backward of `_C.attend` where it is to be differentiated itself."""
    derivatives.check_gradient()
    with torch.enable_grad():
        q, k, v = (unhooked(t) if needed else t for t, needed in zip(saved, needs_grad))
        described = derivatives.Call(call.segments, call.softmax_scale, call.dropout_p)
        (dout, dlse), (out, lse) = grads_out, saved[3:]
        grads = derivatives.gradients(described, key_padding_mask, seed, dout, dlse, q, k, v, out, lse)
    return [grad if needed else None for grad, needed in zip(grads, needs_grad)]


if _C is not None:
    _C.set_attention_composite(_attention_composite)

    # On meta and for fake tensors the operators check what the kernels check, but for memory and symbolic sizes.

    @torch.library.register_fake("mixed_attention::forward")
    def _forward_fake(q, k, v, segments, softmax_scale, key_padding_mask=None, dropout_p=0.0, dropout_seed=None):
        _C.check_forward(q, k, v, segments, softmax_scale, key_padding_mask, dropout_p, dropout_seed)
        batch_size, seqlen_q, num_heads, _ = q.shape
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty((batch_size, seqlen_q, num_heads, v.shape[-1]))
        return out, q.new_empty((batch_size, num_heads, seqlen_q), dtype=lse_dtype)

    @torch.library.register_fake("mixed_attention::backward")
    def _backward_fake(
        dout, dlse, q, k, v, out, lse, segments, softmax_scale, mask=None, dropout_p=0.0, dropout_seed=None
    ):
        arguments = dout, dlse, q, k, v, out, lse, segments, softmax_scale, mask, dropout_p, dropout_seed
        _C.check_backward(*arguments, [])
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @torch.library.register_fake("mixed_attention::backward_out")
    def _backward_out_fake(
        dout, dlse, q, k, v, out, lse, segments, softmax_scale, mask, dropout_p, dropout_seed, dq, dk, dv
    ):
        arguments = dout, dlse, q, k, v, out, lse, segments, softmax_scale, mask, dropout_p, dropout_seed
        _C.check_backward(*arguments, [dq, dk, dv])

    @torch.library.register_fake("mixed_attention::forward_jvp")
    def _forward_jvp_fake(
        q, k, v, q_dot, k_dot, v_dot, segments, softmax_scale, mask=None, dropout_p=0.0, dropout_seed=None
    ):
        out, lse = _forward_fake(q, k, v, segments, softmax_scale, mask, dropout_p, dropout_seed)
        _C.check_jvp(q, k, v, None, None, q_dot, k_dot, v_dot)
        return out, lse, *_moved_outputs(out, lse, q_dot, k_dot, v_dot)

    @torch.library.register_fake("mixed_attention::jvp")
    def _jvp_fake(
        q, k, v, out, lse, q_dot, k_dot, v_dot, segments, softmax_scale, mask=None, dropout_p=0.0, dropout_seed=None
    ):
        _C.check_forward(q, k, v, segments, softmax_scale, mask, dropout_p, dropout_seed)
        _C.check_jvp(q, k, v, out, lse, q_dot, k_dot, v_dot)
        return _moved_outputs(out, lse, q_dot, k_dot, v_dot)

    def _moved_outputs(out, lse, *tangents):
        (count, *_), *_ = (tangent.shape for tangent in tangents if tangent is not None)
        return out.new_empty((count, *out.shape)), lse.new_empty((count, *lse.shape))

    @torch.library.register_fake("mixed_attention::backward_jvp")
    def _backward_jvp_fake(
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
        dropout_seed=None,
        wants_dq_dot=False,
    ):
        _C.check_forward(q, k, v, segments, softmax_scale, mask, dropout_p, dropout_seed)
        tangents = q_dot, k_dot, v_dot
        _C.check_backward_jvp(
            dout_dot, dlse_dot, dout, dlse, q, k, v, out, lse, *tangents, out_dot, lse_dot, wants_dq_dot
        )
        dq_dot = q.new_empty((dout_dot.shape[0] if wants_dq_dot else 0, *q.shape))
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dq_dot

    @torch.library.register_fake("mixed_attention::rope")
    def _rope_fake(x, freqs, conjugate):
        out = x.new_empty(x.shape)
        _C.check_rope(out, freqs, out)
        return out

    @torch.library.register_fake("mixed_attention::rope_out")
    def _rope_out_fake(x, freqs, conjugate, out):
        _C.check_rope(x, freqs, out)

    @torch.library.register_fake("mixed_attention::rope_jvp")
    def _rope_jvp_fake(x, freqs, x_dot, freqs_dot, conjugate, wants_out=True):
        out = x.new_empty(x.shape)
        _C.check_rope(out, freqs, out)
        moves = x_dot if freqs_dot is None else freqs_dot
        return out if wants_out else x.new_empty(0), x.new_empty((len(moves), *x.shape))

    @torch.library.register_fake("mixed_attention::rope_backward")
    def _rope_backward_fake(dout, dout_dot, x, freqs, x_dot, freqs_dot, conjugate, wanted):
        out = x.new_empty(x.shape)
        _C.check_rope(out, freqs, out)
        given = x, freqs, x_dot, freqs_dot
        return tuple(like.new_empty(like.shape) if each else x.new_empty(0) for like, each in zip(given, wanted))

    _library = torch.library.Library("mixed_attention", "IMPL")  # holds the registration as long as it lives
    _library.impl("forward", _forward, "Autograd")
    _library.impl("forward_jvp", derivatives.forward_jvp, "Autograd")
    for _name in ("forward_jvp", "jvp", "backward_jvp"):
        if torch_internals.has_operator_kernel("mixed_attention::backward", "cuda"):
            _library.impl(_name, _of_tangents(_name), "CUDA")
    torch.library.register_vmap("mixed_attention::forward_jvp", derivatives.map_forward_jvp, lib=_library)
