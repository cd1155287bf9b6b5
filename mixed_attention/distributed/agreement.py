"""Before ranks exchange tokens they make sure that they mean the same, and learn each other's sizes.

Collectives between ranks that disagree hang, or return garbage. So every rank sends a few integers first: a checksum of
all that must be the same, whether it has failed, and its sizes. Where something is wrong every rank sees it, and every
rank raises.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mixed_attention import torch_internals
from mixed_attention.distributed.ranks import Ranks

T = TypeVar("T")

# Newer releases of torch warn of the old name.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

SIZES_A_WORD = 62  # so that the first exchange has 64 integers, whatever the number of groups
FAILURES = (TypeError, ValueError, AssertionError, RuntimeError, LookupError)
"""What may be wrong with a call on one rank alone. (Checkpoints end recomputations by another exception.)"""


_MARK = "_is_known_to_all_ranks"


class Facts(dict[str, Any]):
    """What must be the same on all ranks, by words for people; values of plain kinds."""


def facts_of_keys(dtype: torch.dtype, batch_size: int, heads: tuple[int, int], are_recorded: bool) -> dict[str, Any]:
    """What must be the same of the keys of all ranks: ``heads`` are number and width, ``are_recorded`` gradients."""
    return {
        "dtype of keys": str(dtype),
        "batch size": batch_size,
        "heads": heads,
        "gradients recorded": are_recorded,
    }


def agree(who: str, ranks: Ranks, facts: Facts, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Compares facts and exchanges sizes.

    Args:
        who: Whose call this is, for the messages.
        ranks: The ranks.
        facts: What must be the same.
        sizes: Numbers of this rank; as many on every rank if the facts are the same.

    Returns:
        For each number, what it is on every rank.

    Raises:
        ValueError: On every rank, naming the fact and its values, if facts differ.
        ValueError, RuntimeError: On every rank, naming the one and its error, if it has failed, see :func:`fail`.
    """
    checksum = zlib.crc32(repr(sorted(facts.items())).encode())
    words = _exchange(ranks, [checksum, 0, *_padded(sizes[:SIZES_A_WORD])])
    if any(has_failed for _, has_failed, *_ in words):
        _raise_failure(who, ranks, None)
    if any(other != checksum for other, *_ in words):
        _raise_difference(who, ranks, facts)
    rows = [row[2 : 2 + len(sizes)] for row in words]
    if len(sizes) > SIZES_A_WORD:
        rest = _exchange(ranks, list(sizes[SIZES_A_WORD:]))
        rows = [first + more for first, more in zip(rows, rest)]
    return tuple(zip(*rows))


def fail(who: str, ranks: Ranks, error: BaseException) -> NoReturn:
    """Takes part in :func:`agree` with an error, so that all ranks raise instead of waiting for this one."""
    _exchange(ranks, [0, 1, *_padded([])])
    _raise_failure(who, ranks, error)


def attempt(who: str, ranks: Ranks, prepare: Callable[[], T]) -> T:
    """What ``prepare`` returns; where it fails, all ranks learn it."""
    try:
        return prepare()
    except FAILURES as error:
        fail(who, ranks, error)


def _padded(sizes: Sequence[int]) -> list[int]:
    return [*sizes, *[0] * (SIZES_A_WORD - len(sizes))]


def _exchange(ranks: Ranks, word: list[int]) -> list[list[int]]:
    """The integers of every rank."""
    with torch_internals.without_transforms():  # these numbers are nobody's to transform
        sent = torch.tensor(word, dtype=torch.int64, device=ranks.device_of_words())
        received = sent.new_empty((ranks.size * len(word),))
        _all_gather_single(received, sent, group=ranks.group)
        return received.view(ranks.size, len(word)).tolist()


def _raise_failure(who: str, ranks: Ranks, error: BaseException | None) -> NoReturn:
    """Raises the own error, or one that says what happened elsewhere."""
    text = None if error is None else f"{type(error).__name__}: {error}"
    every = ranks.all_gather_objects((text, isinstance(error, ValueError)))
    if error is not None:
        raise _known(error)
    failed = [(rank, *entry) for rank, entry in enumerate(every) if entry[0] is not None]
    message = "; ".join(f"rank {rank} raised {text}" for rank, text, _ in failed)
    kind = ValueError if all(is_value for *_, is_value in failed) else RuntimeError
    raise _known(kind(f"{who}: {message}"))


def _raise_difference(who: str, ranks: Ranks, facts: Mapping[str, Any]) -> NoReturn:
    every = ranks.all_gather_objects(dict(facts))
    names = list(dict.fromkeys(name for each in every for name in each))
    differing = []
    for name in names:
        values = [each.get(name) for each in every]
        if any(value != values[0] for value in values):
            of_ranks = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
            differing.append(f"{name}: {of_ranks}")
    raise _known(ValueError(f"{who}: the ranks were called with different {'; '.join(differing)}"))


def _known(error: BaseException) -> BaseException:
    setattr(error, _MARK, True)
    return error


def is_known(error: BaseException) -> bool:
    """Whether all ranks raise for the same reason as this error of :func:`agree`, :func:`fail` or :func:`attempt`."""
    return hasattr(error, _MARK)


def can_exchange() -> bool:
    """Whether numbers can be brought to this process: neither while a compiler traces nor while a graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
