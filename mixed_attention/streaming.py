"""Any number of queries past a model in chunks, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Tokens = TypeVar("Tokens", bound=Tensor | Mapping[str, Tensor])


def stream(
    predict: Callable[[Tokens], Any],
    queries: Tokens,
    *,
    chunk_size: int = 65536,
    dim: int = 1,
    device: torch.device | str | None = None,
    output_device: torch.device | str | None = "cpu",
    progress: bool | str = False,
) -> Any:
    """Calls a model on chunks of its queries and puts the results together.

    Meant for models whose queries do not see each other, but attend to anchors that a KV cache holds: there the result
    does not depend on the chunks. On ``device`` lies one chunk at a time, elsewhere the queries and the results; those
    may be as large as the memory there, or the file that is mapped into it. Gradients are not recorded.

    Args:
        predict: Takes a chunk of ``queries`` and returns a tensor, or a mapping of tensors, with as many entries along
            ``dim`` as the chunk has. May be a whole model, a stack of blocks, or a closure over anchors and caches.
        queries: A tensor, or a mapping of tensors, of equal size along ``dim``.
        chunk_size: Queries at a time.
        dim: Along which the queries lie.
        device: Where ``predict`` wants its chunks; by default where they are.
        output_device: Where the results go; None leaves them where they are made.
        progress: Whether to show a bar, which needs tqdm; a text stands before it.

    Returns:
        What ``predict`` returns, for all queries.

    Raises:
        ValueError: If ``chunk_size`` is below 1, sizes along ``dim`` differ, or a result has another size there than
            its chunk.
        ImportError: If a bar is asked for and tqdm is not installed.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> stream(layer, torch.randn(1, 1000, 3), chunk_size=300).shape
        torch.Size([1, 1000, 2])
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    sizes = {name: tensor.shape[dim] for name, tensor in _named(queries)}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"queries: expected tensors of one size along dim {dim}, got {sizes}")
    (num_queries,) = set(sizes.values())
    results: Any = None
    with torch.no_grad(), _bar(num_queries, progress) as bar:
        for start in range(0, max(num_queries, 1), chunk_size):
            length = min(chunk_size, num_queries - start)
            made = predict(_map(partial(_chunk, dim=dim, start=start, length=length, device=device), queries))
            for name, tensor in _named(made):
                if tensor.shape[dim] != length:
                    got = tuple(tensor.shape)
                    raise ValueError(f"{name}: expected {length} results along dim {dim} for a chunk, got {got}")
            if results is None:
                results = _map(lambda t: _empty_like(t, dim, num_queries, output_device), made)
            for (_, whole), (_, part) in zip(_named(results), _named(made)):
                whole.narrow(dim, start, length).copy_(part)
            bar.update(length)
    return results


def _named(tokens: Any) -> Iterator[tuple[str, Tensor]]:
    return iter(tokens.items() if isinstance(tokens, Mapping) else [("tensor", tokens)])


def _map(function: Callable[[Tensor], Tensor], tokens: Any) -> Any:
    if isinstance(tokens, Mapping):
        return {name: function(tensor) for name, tensor in tokens.items()}
    return function(tokens)


def _chunk(tensor: Tensor, dim: int, start: int, length: int, device: torch.device | str | None) -> Tensor:
    return tensor.narrow(dim, start, length).to(device or tensor.device)


def _empty_like(tensor: Tensor, dim: int, size: int, device: torch.device | str | None) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device if device is None else device)


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
