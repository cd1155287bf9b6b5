"""Derivatives of what a model predicts, by the positions that it is asked at: curl, divergence, Jacobian.

Meant for models whose query points do not see each other, but attend to anchors, through a KV cache say. Then the
Jacobian of all points at once takes as many forward-mode directions as a point has coordinates, and every layer
computes its primal once::

    value, jacobian = func.value_and_jacobian(predict, positions)
    velocity = func.curl(jacobian)

Results are differentiable in the model's parameters, so that a loss may be made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mixed_attention.autocast import autocast_dtype
from mixed_attention.norms import exact_norms

__all__ = ["curl", "divergence", "exact_norms", "value_and_jacobian"]


def value_and_jacobian(
    predict: Callable[[Tensor], Any], positions: Tensor, *, check: bool = True, tangent_scale: float = 1.0
) -> tuple[Any, Any]:
    """What a model predicts at points, and the Jacobian of each point's result by its own position.

    The derivative is by what is passed: a model that scales or embeds positions does that inside ``predict``, and the
    Jacobian is per unit of ``positions``. Norms inside have exact derivatives (:func:`exact_norms`). Dropout, if there
    is any, is the same in all directions.

    Args:
        predict: Takes ``(B, N, d)`` and returns a tensor ``(B, N, C)``, or a mapping of such. The results of a point
            may depend on that point alone (and on anchors, caches and parameters): its queries are no keys, and nothing
            is normalised over points.
        positions: Floating-point ``(B, N, d)``.
        check: Whether to try that, by one more direction, of random signs. It costs a fourth more in three
            dimensions; leave it on while a model is made, and off in loops and streams.
        tangent_scale: Power of two by which tangents are multiplied on their way through the model, and Jacobians
            divided. For fp16, whose range may not hold derivatives: they are linear in it.

    Returns:
        value, jacobian: What ``predict`` returns, and the same with ``(B, N, C, d)``, ``d value[..., c] /
        d positions[..., d]``, in the dtype of the value.

    Raises:
        TypeError: If ``predict`` is not callable, ``positions`` no tensor, or a result anything but tensors.
        ValueError: If a shape, dtype or scale does not fit, or the results of a point depend on other points.

    Example:
        >>> swirl = lambda x: torch.stack([-x[..., 1], x[..., 0]], -1)
        >>> value, jacobian = value_and_jacobian(swirl, torch.rand(1, 5, 2))
        >>> curl(jacobian)[0, 0]
        tensor([2.])
    """
    if not callable(predict):
        raise TypeError(f"predict: expected a function of positions, got {type(predict).__name__}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}")
    if positions.ndim != 3 or not positions.is_floating_point():
        got = f"{tuple(positions.shape)} of {positions.dtype}"
        raise ValueError(f"positions: expected floating-point numbers of shape (batch, points, dims), got {got}")
    if not _is_power_of_two(tangent_scale):
        raise ValueError(f"tangent_scale: expected a power of two, got {tangent_scale}")
    dims = positions.shape[-1]
    seeds = torch.eye(dims, dtype=positions.dtype, device=positions.device)[:, None, None, :] * tangent_scale
    seeds = seeds.expand(dims, *positions.shape)
    signs = _signs(positions) if check else None
    if signs is not None:
        # Every point moves along all axes at once, forth or back.
        seeds = torch.cat([seeds, (signs * seeds.sum(0))[None]])

    def along(seed: Tensor) -> tuple[Any, Any]:
        with exact_norms():
            value, tangent, *_ = torch.func.jvp(lambda x: _checked(predict(x), positions), (positions,), (seed,))
            return value, tangent

    out_dims: Any = None, -1  # torch's annotation knows of no None within
    value, tangents = torch.vmap(along, out_dims=out_dims, randomness="same")(seeds)
    if signs is not None:
        for name, tangent in _items(tangents):
            _check_independence(name, tangent[..., :dims], tangent[..., dims], signs)
    return value, _map(tangents, lambda tangent: tangent[..., :dims] / tangent_scale)


def curl(jacobian: Tensor) -> Tensor:
    """The curl of a field, from its Jacobian ``(…, C, d)``.

    Args:
        jacobian: ``(…, 3, 3)`` of a vector field in space; ``(…, 1, 2)`` of a stream function in the plane; ``(…, 2,
            2)`` of a vector field there.

    Returns:
        ``(…, 3)``: the curl; ``(…, 2)``: the velocity (dψ/dy, -dψ/dx); ``(…, 1)``: the vorticity. In units of the field
        per unit of the positions. That of a potential, or of a stream function, has no divergence.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has another shape.
    """
    _check_jacobian(jacobian)
    j = jacobian
    if j.shape[-2:] == (3, 3):
        pairs = ((2, 1), (0, 2), (1, 0))
        return torch.stack([j[..., a, b] - j[..., b, a] for a, b in pairs], -1)
    if j.shape[-2:] == (1, 2):
        return torch.stack([j[..., 0, 1], -j[..., 0, 0]], -1)
    if j.shape[-2:] == (2, 2):
        return (j[..., 1, 0] - j[..., 0, 1])[..., None]
    raise ValueError(f"jacobian: expected shape (…, 3, 3), (…, 1, 2) or (…, 2, 2), got {tuple(j.shape)}")


def divergence(jacobian: Tensor) -> Tensor:
    """The divergence of a field ``(…)``, from its Jacobian ``(…, d, d)``, in units of the field per unit of position.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the field has not as many components as there are dimensions.
    """
    _check_jacobian(jacobian)
    if jacobian.shape[-1] != jacobian.shape[-2]:
        raise ValueError(f"jacobian: expected shape (…, d, d), got {tuple(jacobian.shape)}")
    return jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)


def _check_jacobian(jacobian: Tensor) -> None:
    if not isinstance(jacobian, Tensor):
        way_out = "; choose one by its name" if isinstance(jacobian, Mapping) else ""
        raise TypeError(f"jacobian: expected a tensor, got {type(jacobian).__name__}{way_out}")
    if jacobian.ndim < 2:
        raise ValueError(f"jacobian: expected shape (…, components, dims), got {tuple(jacobian.shape)}")


def _is_power_of_two(x: Any) -> bool:
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0 < x < float("inf"):
        return False
    return float(x).hex().split("p")[0] == "0x1.0000000000000"


def _signs(positions: Tensor) -> Tensor:
    """1 or -1 for every point, both where there are two; always the same, and without torch's own generator."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (*positions.shape[:2], 1), generator=generator) * 2 - 1
    if signs.numel() > 1:
        signs.view(-1)[0], signs.view(-1)[-1] = 1, -1
    return signs.to(positions.device, positions.dtype)


def _check_independence(name: str, tangent: Tensor, signed: Tensor, signs: Tensor) -> None:
    """Holds a direction of many signs against the others: other points that count too have other signs."""
    eps = torch.finfo(_lowest_dtype(tangent)).eps
    tangent, signed = tangent.detach().double(), signed.detach().double()
    expected = signs.double() * tangent.sum(-1)
    largest = float(tangent.abs().max()) if tangent.numel() else 0.0
    error = float((signed - expected).abs().max()) if tangent.numel() else 0.0
    # Roundings of TF32, and several of a dtype of 16 bits; what depends on other points is off by far more.
    if error > max(2e-3, 8 * eps) * largest:
        raise ValueError(
            f"{name}: expected each point's result to depend on that point alone, but some depend on others "
            f"(Jacobians of up to {largest:.3g} are off by {error:.3g}): are the points keys, or is anything "
            "normalised over them? Let them be queries alone, with anchors in a KV cache; check=False leaves this out"
        )


def _lowest_dtype(x: Tensor) -> torch.dtype:
    """What a model computed in, at least in parts."""
    return autocast_dtype(x.device.type) or x.dtype


def _checked(result: Any, positions: Tensor) -> Tensor | dict[Any, Tensor]:
    """A result, if its tensors fit the points."""
    if not isinstance(result, Tensor):
        if not isinstance(result, Mapping) or not result:
            got = "an empty mapping" if isinstance(result, Mapping) else type(result).__name__
            raise TypeError(f"predict's result: expected a tensor or a mapping of tensors, got {got}")
        result = dict(result)
    for label, tensor in _items(result):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 3 or tensor.shape[:2] != positions.shape[:2] or not tensor.is_floating_point():
            batch_size, num_points, _ = positions.shape
            raise ValueError(
                f"{label}: expected floating-point numbers of shape ({batch_size}, {num_points}, channels), "
                f"got {tuple(tensor.shape)} of {tensor.dtype}"
            )
    return result


def _items(result: Tensor | dict[Any, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors of a result, and what messages call them."""
    if isinstance(result, Tensor):
        return [("predict's result", result)]
    return [(f"predict's result[{name!r}]", tensor) for name, tensor in result.items()]


def _map(result: Tensor | dict[Any, Tensor], function: Callable[[Tensor], Tensor]) -> Tensor | dict[Any, Tensor]:
    if isinstance(result, Tensor):
        return function(result)
    return {name: function(tensor) for name, tensor in result.items()}
