"""Rotary position embeddings for continuous coordinates: making the frequencies and applying them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixed_attention.autocast import without_autocast
from mixed_attention.config import RopeFrequencyConfig
from mixed_attention.ops import check_tensors, rotate
from mixed_attention.torch_internals import assume_constant_result


def apply_rope(x: Tensor, freqs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Rotates the channel pairs of every head by the frequencies of the token. Differentiable in both.

    The arithmetic is fp32 (fp64 for fp64 inputs) whatever the dtype of ``x``.

    Args:
        x: ``(B, N, H, D)``, floating point.
        freqs: Complex ``(B or 1, N, D / 2)``: the channels 2i and 2i+1 form one complex number, which is multiplied
            by ``freqs[b, n, i]`` (of any magnitude), the same for all heads. Or, the legacy form, a tuple with one
            real tensor of angles ``(B or 1, N, m)`` per coordinate axis: the channels are cut into slices of m, one
            an axis, the channels i and i + m/2 of a slice form a pair, and channels beyond the slices stay as they
            are. The two forms pair other channels: weights trained with one do not fit the other.

    Returns:
        A new tensor, shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is no tensor.
        ValueError: If ``x`` is not of rank 4.
        AssertionError: If ``freqs`` is neither a complex tensor of rank 3 nor a tuple of real ones, or the slices of
            the legacy form are wider than the head.
        RuntimeError: If D is odd, or a size of ``freqs`` does not match ``x``.

    Warns:
        UserWarning: If angles come in 16 bits, in which they are off by up to whole radians.
    """
    check_tensors(x=x)
    if x.ndim != 4:
        raise ValueError(f"x: expected shape (batch_size, seqlen, num_heads, head_dim), got {tuple(x.shape)}")
    if isinstance(freqs, tuple):
        _warn_of_16_bits("freqs: angles", freqs, stacklevel=3)
        return _rotate_halves(x, freqs)
    check_freqs(freqs, x.shape[0], x.shape[1], x.shape[-1])
    return rotate(x, freqs)


def check_freqs(freqs: Any, batch_size: int, seqlen: int, head_dim: int) -> None:
    """Checks complex frequencies against the tokens they are to rotate; raises what :func:`apply_rope` says."""
    if not isinstance(freqs, Tensor) or not freqs.is_complex():
        got = freqs.dtype if isinstance(freqs, Tensor) else type(freqs).__name__
        raise AssertionError(f"freqs: expected a complex tensor or a tuple of angles, got {got}")
    if freqs.ndim != 3:
        raise AssertionError(f"freqs.shape should be (batch_size, seqlen, head_dim // 2), got {tuple(freqs.shape)}")
    if head_dim % 2:
        raise RuntimeError(f"head_dim: the channels are rotated in pairs, got an odd number of {head_dim}")
    for name, size, expected in zip(("seqlen", "head_dim // 2"), freqs.shape[1:], (seqlen, head_dim // 2)):
        if size != expected:
            raise RuntimeError(f"freqs: its size must match the tokens, expected {name} {expected}, got {size}")
    if freqs.shape[0] != 1 and freqs.shape[0] != batch_size:
        raise RuntimeError(
            f"freqs: its size must match the tokens, expected batch_size {batch_size} or 1, got {freqs.shape[0]}"
        )


def _rotate_halves(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    for axis in angles:
        if not isinstance(axis, Tensor) or axis.ndim != 3 or axis.is_complex():
            got = f"{axis.dtype} {tuple(axis.shape)}" if isinstance(axis, Tensor) else type(axis).__name__
            raise AssertionError(f"freqs: expected real angles (batch_size, seqlen, m), got {got}")
    widths = [axis.shape[-1] for axis in angles]
    if sum(widths) > x.shape[-1]:
        raise AssertionError(f"freqs: the axes rotate {sum(widths)} channels > head dimension {x.shape[-1]}")
    *slices, rest = x.split([*widths, x.shape[-1] - sum(widths)], -1)
    rotated = []
    for part, axis in zip(slices, angles):
        first, second = part.chunk(2, -1)
        axis = axis.unsqueeze(2)
        rotated.append((part * axis.cos() + torch.cat((-second, first), -1) * axis.sin()).to(x.dtype))
    return torch.cat([*rotated, rest], -1)


def _warn_of_16_bits(what: str, tensors: Sequence[Any], stacklevel: int) -> None:
    """Says that the precision of positions is gone before we saw them; once per place that calls."""
    dtypes = [tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)]
    rounded = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize < 4]
    if rounded:
        message = (
            f"{what} in {rounded[0]} are rounded too coarsely, rotations may be off by whole radians; keep coordinates "
            "and angles in fp32. Where FSDP's mixed precision casts them, use "
            "MixedPrecisionPolicy(cast_forward_inputs=False)"
        )
        _warn(message, stacklevel + 1)


@assume_constant_result  # the compiler, which cannot trace warnings, gives it once while it traces
def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, stacklevel=stacklevel)


_ROUNDINGS = (
    (torch.float32,),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
)
"""What a file may have rounded frequencies to, one dtype after the other."""


def _is_rounded(given: Tensor, exact: Tensor) -> bool:
    """Whether given frequencies are the exact ones, but for roundings."""
    given = given.detach().to("cpu", torch.float64)
    # Another device's power function may differ in the last bits, and rounding is monotonic.
    low, high = (exact.double() * (1 + side * 2**-20) for side in (-1, 1))
    for dtypes in _ROUNDINGS:
        lowest, highest = low, high
        for dtype in dtypes:
            lowest, highest = lowest.to(dtype), highest.to(dtype)
        if bool(((lowest.double() <= given) & (given <= highest.double())).all()):
            return True
    return False


def _restore_frequencies(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of :class:`RopeFrequency`: what a file has rounded is loaded as it is defined."""
    key = f"{prefix}omega"
    given = state_dict.get(key)
    if isinstance(given, Tensor) and type(given) in (Tensor, nn.Parameter) and given.shape == module.omega.shape:
        state_dict[key] = module._restored(given, key)


class RopeFrequency(nn.Module):
    """Turns token coordinates into rotations, one group of frequencies per coordinate axis.

    With ``a`` axes, each has ``e / 2`` frequencies ``max_wavelength ** (-2i / e)``, where ``e`` is the largest even
    number with ``a * e <= hidden_dim``; the channels left over are not rotated.

    Args:
        hidden_dim: Channels of a head; or a configuration with the fields that follow.
        input_dim: Number of coordinate axes.
        max_wavelength: The longest wavelength, about.
        implementation: ``"complex"``, the default, or ``"real"`` for the legacy form of :func:`apply_rope`.

    Attributes:
        omega: The frequencies ``(e / 2,)``, part of the state dict. They stay those of the definition, in fp32,
            whatever the module is cast to, and where a file that rounded them is loaded. Loading others, those of
            another ``max_wavelength``, warns and then uses them, because the weights beside them were trained so.

    Raises:
        ValueError: If a value is not allowed, or there are too few channels for the axes.

    Example:
        >>> freqs = RopeFrequency(hidden_dim=64, input_dim=3)(torch.rand(1, 100, 3) * 1000)
        >>> freqs.shape, freqs.dtype
        (torch.Size([1, 100, 32]), torch.complex64)
    """

    config_class = RopeFrequencyConfig
    omega: Tensor

    def __init__(
        self,
        hidden_dim: int | Any,
        input_dim: int | None = None,
        max_wavelength: int = 10_000,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden_dim, int):
            given = {} if implementation is None else {"implementation": implementation}
            config = self.config_class(hidden_dim, input_dim, max_wavelength, **given)
        else:
            config = self.config_class.of(hidden_dim)
        self.hidden_dim = config.hidden_dim
        self.input_dim = config.input_dim
        self.max_wavelength = config.max_wavelength
        self.implementation = config.implementation
        left_over = self.hidden_dim % self.input_dim
        self.padding = left_over + self.input_dim * (self.hidden_dim // self.input_dim % 2)
        width = (self.hidden_dim - self.padding) // self.input_dim
        if width <= 0:
            raise ValueError(
                f"Effective hidden dimension per wave must be > 0, got {width} for {self.hidden_dim} channels "
                f"and {self.input_dim} axes"
            )
        self._width = width
        self.register_buffer("omega", self._definition().to(torch.get_default_device()))
        self.register_load_state_dict_pre_hook(_restore_frequencies)

    def _definition(self) -> Tensor:
        """The frequencies, computed on the CPU: there alone every machine finds the same bits."""
        steps = torch.arange(0, self._width, 2, dtype=torch.float32, device="cpu")
        return self.max_wavelength ** -(steps / self._width)

    def reset_parameters(self) -> None:
        """Makes the frequencies those of the definition again, e.g. where ``to_empty`` has left them uninitialised."""
        self._set_omega(self._definition())

    def _set_omega(self, omega: Tensor) -> None:
        """Writes frequencies where they lie, so that what shares their memory sees it, but not in another dtype."""
        if self.omega.dtype == omega.dtype:
            with torch.no_grad():
                self.omega.copy_(omega)
        else:
            self.omega = omega.to(self.omega.device)

    def _checked(self, omega: Tensor) -> Tensor:
        """Frequencies that may have been cast behind the back of the module, in fp32."""
        return omega if omega.dtype == torch.float32 else self._restored(omega, "omega")

    def _restored(self, given: Tensor, name: str) -> Tensor:
        """Those of the definition in place of given ones that are rounded; others as they are, with a warning."""
        exact = self._definition()
        if given.is_meta or _is_rounded(given, exact):
            return exact.to(given.device)
        warnings.warn(
            f"{name}: the frequencies given, from {given[0].item():g} to {given[-1].item():g}, are not those of "
            f"max_wavelength={self.max_wavelength}, from {exact[0].item():g} to {exact[-1].item():g}; they are used as "
            "given. Make RopeFrequency with the max_wavelength that they are of, or call reset_parameters()",
            stacklevel=2,
        )
        return given.float()

    def forward(self, coords: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Computes the rotations of tokens.

        Args:
            coords: ``(..., input_dim)``, any real values; taken in fp32, also under autocast.

        Returns:
            Complex64 ``(..., hidden_dim / 2)`` of magnitude one. For ``"real"``, a tuple of angles ``(..., e)``, one
            per axis.

        Raises:
            AssertionError: If the last dim of ``coords`` is not ``input_dim``, or the channels left over are odd.
            NotImplementedError: If ``implementation`` is ``"real"`` and ``coords`` is not of rank 2 or 3.
            TypeError: If ``coords`` is not a real tensor.

        Warns:
            UserWarning: If ``coords`` come in 16 bits, in which positions are rounded too coarsely.
        """
        if not isinstance(coords, Tensor) or coords.is_complex():
            got = coords.dtype if isinstance(coords, Tensor) else type(coords).__name__
            raise TypeError(f"coords: expected a real tensor (..., {self.input_dim}), got {got}")
        if not coords.ndim or coords.shape[-1] != self.input_dim:
            raise AssertionError(f"coords: expected {self.input_dim} axes in the last dim, got {tuple(coords.shape)}")
        _warn_of_16_bits("coords", [coords], stacklevel=5)  # the two before the user's place are those of nn.Module
        omega = self._checked(self.omega)
        with without_autocast(coords.device.type):
            angles = coords.float().unsqueeze(-1) * omega
            if self.implementation == "real":
                return self._angles_per_axis(angles)
            if self.padding % 2:
                raise AssertionError(f"hidden_dim: {self.hidden_dim} leaves an odd number of channels, {self.padding}")
            angles = nn.functional.pad(angles.flatten(-2), (0, self.padding // 2))
            return torch.polar(torch.ones_like(angles), angles)

    def _angles_per_axis(self, angles: Tensor) -> tuple[Tensor, ...]:
        if angles.ndim not in (3, 4):
            raise NotImplementedError(f"coords: the real form takes rank 2 or 3, got rank {angles.ndim - 1}")
        return torch.cat((angles, angles), -1).unbind(-2)

    def _apply(self, fn: Any, recurse: bool = True) -> RopeFrequency:
        # NOTE: 16-bit frequencies would be wrong by whole turns at coordinates of a thousand, so that casting a model
        # must leave them alone; moving it to another device must not, and from meta there is nothing to move.
        before = self.omega
        super()._apply(fn, recurse)
        if self.omega is not before:
            self._set_omega(self._definition() if before.is_meta else self._checked(before))
        return self

    def extra_repr(self) -> str:
        """What a printed model says of this module."""
        return f"hidden_dim={self.hidden_dim}, input_dim={self.input_dim}, max_wavelength={self.max_wavelength}"
