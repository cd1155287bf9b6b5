"""A rank whose call fails leaves word why, for those that wait for it.

Where sizes on all ranks are known nothing is exchanged before tokens are, and a rank that fails takes no part in what
the others wait for. They fail with it, when its process ends or their patience does, and find in the store of the
process group who it was. Where all is well nothing is written and nothing read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mixed_attention import torch_internals
from mixed_attention.distributed.agreement import FAILURES, is_known
from mixed_attention.distributed.ranks import Ranks

T = TypeVar("T")

_word_of: list[Ranks] = []
"""Groups in whose stores lies a word of this process."""


def named(who: str, ranks: Ranks, call: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """What a call returns in which ranks wait for each other.

    Args:
        who: Whose call this is, for the message.
        ranks: The ranks.
        call: What is called with the other arguments.

    Raises:
        RuntimeError: That names the rank that failed first, where a collective has failed for it.
    """
    if torch.compiler.is_compiling():
        return call(*arguments, **more)
    if _word_of:
        _take_back()
    try:
        return call(*arguments, **more)
    except FAILURES as error:
        if is_known(error):
            raise
        found = _word_of_others(ranks) if isinstance(error, RuntimeError) else None
        if found is not None:
            raise RuntimeError(f"{who}: {found}") from error
        _leave(ranks, error)
        raise


def _key(rank: int) -> str:
    return f"mixed_attention/failed/{rank}"


def _leave(ranks: Ranks, error: BaseException) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong with the store, the error is what matters
        text = f"rank {ranks.rank} raised {type(error).__name__}: {error}"
        torch_internals.store_of(ranks.group).set(_key(ranks.rank), text)
        _word_of.append(ranks)


def _take_back() -> None:
    """Takes back the words about errors that all ranks have raised and survived."""
    while _word_of:
        ranks = _word_of.pop()
        with contextlib.suppress(Exception):
            torch_internals.store_of(ranks.group).delete_key(_key(ranks.rank))


def _word_of_others(ranks: Ranks) -> str | None:
    with contextlib.suppress(Exception):
        store = torch_internals.store_of(ranks.group)
        for rank in range(ranks.size):
            if rank != ranks.rank and store.check([_key(rank)]):
                return str(store.get(_key(rank)).decode())
    return None
