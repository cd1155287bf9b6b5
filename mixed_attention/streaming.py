"""Any number of queries past a model in chunks, with bounded memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Tokens = TypeVar("Tokens", bound=Tensor | Mapping[Any, Tensor])


def stream(
    predict: Callable[[Tokens], Any],
    queries: Tokens,
    *,
    chunk_size: int = 65536,
    dim: int = 1,
    device: torch.device | str | int | None = None,
    output_device: torch.device | str | int | None = "cpu",
    progress: bool | str = False,
) -> Any:
    """Calls a model on chunks of its queries and puts the results together, those of one name behind each other.

    Meant for models whose queries do not see each other, but attend to anchors that a KV cache holds: there the result
    does not depend on the chunks. On ``device`` lies one chunk at a time, elsewhere the queries and the results; those
    may be as large as the memory there, or the file that is mapped into it. Gradients are not recorded.

    Args:
        predict: Takes a chunk of ``queries`` and returns a tensor, or a mapping of tensors, with as many entries along
            ``dim`` as the chunk has; for every chunk alike. It may be a whole model, a stack of blocks, or a closure
            over anchors and caches. A chunk that need not be moved is a view of the queries. What is returned is
            copied before the next call, so that it may be memory that every call writes anew.
        queries: A tensor, or a mapping of tensors, of equal size along ``dim``.
        chunk_size: Queries at a time.
        dim: Along which the queries lie, in every tensor; may count from the end.
        device: Where ``predict`` wants its chunks; by default where they are.
        output_device: Where the results go; None leaves them where they are made.
        progress: Whether to show a bar, which needs tqdm; a text stands before it.

    Returns:
        What ``predict`` returns, for all queries: a tensor, or a dict in the order of the first chunk's mapping.

    Raises:
        TypeError: If an argument is of a wrong kind, or ``predict`` returns anything but tensors.
        ValueError: If ``chunk_size`` is below 1, a device or ``dim`` does not exist, sizes along ``dim`` differ, a
            mapping is empty, a result has another size along ``dim`` than its chunk, or names, a dtype, a device, or
            another size than those of the first chunk.
        ImportError: If a bar is asked for and tqdm is not installed.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> stream(layer, torch.randn(1, 1000, 3), chunk_size=300).shape
        torch.Size([1, 1000, 2])
    """
    if not callable(predict):
        raise TypeError(f"predict: expected a function of a chunk, got {_kind(predict)}")
    chunk_size, dim = _as_integer("chunk_size", chunk_size), _as_integer("dim", dim)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    chunk_device, results_device = _as_device("device", device), _as_device("output_device", output_device)
    if not isinstance(progress, (bool, str)):
        raise TypeError(f"progress: expected a bool or a text, got {_kind(progress)}")
    tokens = _named("queries", queries, "")
    sizes = {name: _size(_label("queries", name), tensor, dim) for name, tensor in tokens.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"queries: expected tensors of one size along dim {dim}, got {sizes}")
    (num_queries,) = set(sizes.values())
    expected: dict[Hashable, _Form] = {}
    results: dict[Hashable, Tensor] = {}
    with torch.no_grad(), _bar(num_queries, progress) as bar:
        for start in range(0, max(num_queries, 1), chunk_size):
            length = min(chunk_size, num_queries - start)
            chunk = {name: _chunk(tensor, dim, start, length, chunk_device) for name, tensor in tokens.items()}
            made = _named(_RESULT, predict(_unnamed(chunk)), "; a function around the model may leave the rest out")
            forms = {name: _form(_label(_RESULT, name), tensor, dim, length) for name, tensor in made.items()}
            if not results:
                _check_numbers(made, results_device)
                expected = forms
                results = {name: _empty_like(tensor, dim, num_queries, results_device) for name, tensor in made.items()}
            _check_alike(forms, expected)
            for name, tensor in made.items():
                results[name].narrow(dim, start, length).copy_(tensor)
            bar.update(length)
    return _unnamed(results)


_RESULT = "predict's result"
_BARE = object()  # the name of a tensor that stands by itself


def _named(what: str, tokens: Any, way_out: str) -> dict[Hashable, Tensor]:
    """A tensor or a mapping of tensors as a dict."""
    if isinstance(tokens, Tensor):
        return {_BARE: tokens}
    if not isinstance(tokens, Mapping):
        raise TypeError(f"{what}: expected a tensor or a mapping of tensors, got {_kind(tokens)}{way_out}")
    if not tokens:
        raise ValueError(f"{what}: expected a tensor or a mapping of tensors, got an empty mapping")
    for name, tensor in tokens.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_label(what, name)}: expected a tensor, got {_kind(tensor)}{way_out}")
    return dict(tokens)


def _unnamed(tensors: dict[Any, Tensor]) -> Any:
    """The inverse of :func:`_named`."""
    return tensors.get(_BARE, tensors)


def _label(what: str, name: Hashable) -> str:
    return what if name is _BARE else f"{what}[{name!r}]"


class _Form(NamedTuple):
    """What the results of all chunks must share."""

    dtype: torch.dtype
    device: torch.device
    shape: str  # with a star in the place of the size along dim


def _form(label: str, result: Tensor, dim: int, length: int) -> _Form:
    if result.ndim == 0 or _size(label, result, dim) != length:
        got = tuple(result.shape)
        raise ValueError(f"{label}: expected {length} results along dim {dim} for a chunk, got {got}")
    shape = [str(size) for size in result.shape]
    shape[dim] = "*"
    return _Form(result.dtype, result.device, f"({', '.join(shape)})")


def _check_alike(forms: dict[Hashable, _Form], expected: dict[Hashable, _Form]) -> None:
    """Holds the results of a chunk against those of the first."""
    if forms.keys() != expected.keys():
        names, first = ("a tensor" if _BARE in each else f"a mapping with {list(each)}" for each in (forms, expected))
        raise ValueError(f"{_RESULT}: expected {first}, as for the first chunk, got {names}")
    for name, form in forms.items():
        for what, got, wanted in zip(_Form._fields, form, expected[name]):
            if got != wanted:
                raise ValueError(
                    f"{_label(_RESULT, name)}: expected {what} {wanted}, as for the first chunk, got {got}"
                )


def _check_numbers(made: dict[Hashable, Tensor], device: torch.device | None) -> None:
    """Checks that results can be copied to where they are wanted."""
    for name, tensor in made.items():
        if tensor.is_meta and device is not None and device.type != "meta":
            raise ValueError(
                f"{_label(_RESULT, name)}: expected numbers to copy to {device}, got a tensor on meta, which has none; "
                "output_device=None leaves results where they are"
            )


def _size(label: str, tensor: Tensor, dim: int) -> int:
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        kinds = {"a nested tensor": tensor.is_nested, "a quantized tensor": tensor.is_quantized}
        kind = next((kind for kind, applies in kinds.items() if applies), f"layout {tensor.layout}")
        raise ValueError(f"{label}: expected a dense tensor, got {kind}")
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"{label}: expected a tensor with dim {dim}, got shape {tuple(tensor.shape)}")
    return tensor.shape[dim]


def _chunk(tensor: Tensor, dim: int, start: int, length: int, device: torch.device | None) -> Tensor:
    return tensor.narrow(dim, start, length).to(tensor.device if device is None else device)


def _empty_like(tensor: Tensor, dim: int, size: int, device: torch.device | None) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_empty(shape, device=tensor.device if device is None else device)


def _as_integer(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def _as_device(name: str, value: Any) -> torch.device | None:
    if value is None:
        return None
    try:
        device = torch.device(value)
        torch.empty(0, device=device)  # raises where there is no such device
        return device
    except TypeError as error:
        raise TypeError(f"{name}: expected a device, its name or its index, got {value!r}") from error
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:  # a torch without CUDA asserts
        why = str(error).splitlines()[0]
        raise ValueError(f"{name}: expected a device, its name or its index, got {value!r}: {why}") from error


def _kind(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(each).__name__ for each in value[:4]) or 'nothing'}"
    return type(value).__name__


class _NoBar:
    """What is called like a bar of tqdm and shows nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def _bar(total: int, progress: bool | str) -> Any:
    if progress is False:
        return _NoBar()
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ImportError("a progress bar needs tqdm: pip install tqdm, or pass progress=False") from error
    return tqdm(total=total, desc=None if progress is True else progress, unit="query", unit_scale=True)
