"""The KV cache: keys and values of token groups, recorded in one call and attended to in others.

A cache is a dict ``{group name: {"k": Tensor, "v": Tensor}}`` of ``(B, H, n, D)`` tensors, keys after rotation. Where
a padding mask was given when it was recorded, the entries also hold it, as ``"key_padding_mask"`` ``(B, n)``. Where the
tokens are spread over ranks, they hold what is this rank's, and how many keys every rank has, as ``"sizes"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from mixed_attention.autocast import autocast_dtype, cat
from mixed_attention.plan import AttentionPlan

KVEntry = dict[str, Tensor]
KVCache = dict[str, KVEntry]


def is_recorded(name: str, named: Set[str]) -> bool:
    """Whether a group goes into a cache: those whose name contains ``_anchor``, and those that are named."""
    return "_anchor" in name or name in named


def to(kv_cache: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """Moves a cache, or those of a stack of blocks, to another device or dtype.

    Args:
        kv_cache: What a layer returned; or lists, tuples and mappings of such, with None where a block has no cache.
        device: Where to.
        dtype: That of keys and values; padding masks stay boolean.

    Returns:
        The same structure. Tensors that need no move are shared.

    Raises:
        TypeError: If something in it is neither of these.
    """
    if kv_cache is None:
        return None
    if isinstance(kv_cache, Tensor):
        return kv_cache.to(device=device, dtype=dtype if kv_cache.is_floating_point() else None)
    if isinstance(kv_cache, Mapping):
        return {name: to(each, device, dtype) for name, each in kv_cache.items()}
    if isinstance(kv_cache, (list, tuple)):
        return type(kv_cache)(to(each, device, dtype) for each in kv_cache)
    raise TypeError(f"kv_cache: expected tensors in mappings, lists and tuples, got {type(kv_cache).__name__}")


def record_entry(
    k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, *, detach: bool = False, compact: bool = True
) -> KVEntry:
    """Makes an entry of keys and values ``(B, n, H, D)``; a compact one is a copy, which keeps nothing else alive."""
    entry = {"k": k.transpose(1, 2), "v": v.transpose(1, 2)}
    if key_padding_mask is not None:
        entry["key_padding_mask"] = key_padding_mask.expand(k.shape[0], -1)
    if detach:
        entry = {name: tensor.detach() for name, tensor in entry.items()}
    if not compact:
        return entry
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in entry.items()}


def read_entry(name: str, entry: Mapping[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of an entry as the attention takes them, ``(B, n, H, D)``, checked against the queries.

    Args:
        name: Whose entry it is, for the messages.
        entry: The entry; a batch of 1 serves every sequence.
        q: The projected queries ``(B, N, H, D)``.

    Raises:
        ValueError: If the entry lacks a tensor, or a shape, dtype or device does not fit.
    """
    for which in ("k", "v"):
        if not isinstance(entry, Mapping) or not isinstance(entry.get(which), Tensor):
            raise ValueError(f"kv_cache entry {name!r}: expected a dict with the tensors 'k' and 'v'")
    if entry.get("sizes") is not None:
        raise ValueError(
            f"kv_cache entry {name!r}: this is one rank's shard of a cache; ma.distributed.gather_cache makes it whole"
        )
    k, v = entry["k"], entry["v"]
    if autocast_dtype(q.device.type) is not None:
        k, v = (t.to(q.dtype) if t.dtype == torch.float32 else t for t in (k, v))
    for which, tensor in (("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"kv_cache entry {name!r}: expected {which} of shape (batch_size, num_heads, seqlen, head_dim), "
                f"got {tuple(tensor.shape)}"
            )
        batch_size = 1 if tensor.shape[0] == 1 else q.shape[0]
        expected = (batch_size, q.shape[2], k.shape[2], q.shape[3])
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"kv_cache entry {name!r}: expected {which} of shape {expected} to match x, got {tuple(tensor.shape)}"
            )
        for what in ("dtype", "device"):
            if getattr(tensor, what) != getattr(q, what):
                raise ValueError(
                    f"kv_cache entry {name!r}: expected {which} of {what} {getattr(q, what)} to match x, "
                    f"got {getattr(tensor, what)}"
                )
    if entry.get("key_padding_mask") is not None:
        _check_mask(name, entry["key_padding_mask"], q, k.shape[2])
    k, v = (tensor.transpose(1, 2).expand(q.shape[0], -1, -1, -1) for tensor in (k, v))
    return k, v


def _check_mask(name: str, mask: Any, q: Tensor, seqlen: int) -> None:
    """Checks the padding mask of an entry against its keys: joined with others, a wrong one would mask their keys."""
    expected = f"kv_cache entry {name!r}: expected key_padding_mask"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{expected} to be a bool tensor, True = real token, got {got}")
    if mask.ndim != 2 or mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] != seqlen:
        raise ValueError(
            f"{expected} of shape ({q.shape[0]} or 1, {seqlen}) to match x and its keys, got {tuple(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"{expected} of device {q.device} to match x, got {mask.device}")


def cached_length(kv_cache: Mapping[str, Any] | None, name: str) -> int:
    """The number of keys that a cache holds of a group; 0 where it holds no such thing (see :func:`check_names`).

    Raises:
        TypeError: If the cache is no mapping.
    """
    if kv_cache is not None and not isinstance(kv_cache, Mapping):
        raise TypeError(
            "kv_cache: expected the mapping of group names to keys and values that a layer returned, got "
            f"{type(kv_cache).__name__}; of the caches of a stack of blocks, every block takes its own"
        )
    entry = (kv_cache or {}).get(name)
    k = entry.get("k") if isinstance(entry, Mapping) else None
    return k.shape[2] if isinstance(k, Tensor) and k.ndim == 4 else 0


def check_names(kv_cache: Mapping[str, Any] | None, names: Sequence[str]) -> None:
    """Checks that a cache has an entry for each of the groups.

    Raises:
        ValueError: If it has not.
    """
    if not names:
        return
    if not kv_cache:
        raise ValueError(f"kv_cache is empty, but the token groups {list(names)} have size None: pass their cache")
    for name in names:
        if name not in kv_cache:
            raise ValueError(f"token group {name!r} not found in kv_cache, which holds {sorted(kv_cache)}")


def join_keys(
    plan: AttentionPlan, fresh: Sequence[Tensor], kv_cache: Mapping[str, Any], q: Tensor
) -> tuple[Tensor, Tensor]:
    """Puts cached and fresh keys and values into the order of the plan.

    Args:
        plan: A plan with cached groups.
        fresh: Keys and values ``(B, n, H, D)`` of the other groups that the plan has keys of, in its order.
        kv_cache: The cache.
        q: The projected queries ``(B, N, H, D)``.

    Returns:
        k and v, ``(B, plan.num_keys, H, D)``.

    Raises:
        ValueError: If an entry does not fit, also one that nobody attends to.
    """
    pieces: list[tuple[Tensor, ...]] = []
    piece: tuple[Tensor, ...]
    taken = 0
    for group in plan.groups:
        if group.query_start is None:
            piece = read_entry(group.name, kv_cache[group.name], q)
        elif group.key_start is not None:
            piece = tuple(tensor[:, taken : taken + group.num_keys] for tensor in fresh)
            taken = taken + group.num_keys
        if group.key_start is not None:
            pieces.append(piece)
    k, v = pieces[0] if len(pieces) == 1 else (cat(tensors, 1) for tensors in zip(*pieces))
    return k, v


def join_masks(plan: AttentionPlan, mask: Tensor | None, kv_cache: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """The padding mask of the keys of a plan with cached groups, or None if there is nothing to mask.

    Args:
        plan: The plan.
        mask: The mask ``(B or 1, n)`` of the other groups that the plan has keys of, in its order.
        kv_cache: The cache, whose entries may hold masks of their own.
        like: A tensor ``(B, ...)`` on the device of the mask to make.

    Returns:
        Boolean ``(B, plan.num_keys)``.
    """
    pieces = []
    taken = 0
    for group in plan.groups:
        if group.key_start is None:
            continue
        if group.query_start is None:
            piece = kv_cache[group.name].get("key_padding_mask")
        else:
            piece = None if mask is None else mask[:, taken : taken + group.num_keys]
            taken = taken + group.num_keys
        pieces.append((piece, group.num_keys))
    if all(piece is None for piece, _ in pieces):
        return None
    every = [like.new_ones((1, n), dtype=torch.bool) if piece is None else piece for piece, n in pieces]
    return torch.cat([piece.expand(like.shape[0], -1) for piece in every], 1)
