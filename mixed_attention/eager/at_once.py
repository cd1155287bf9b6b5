"""A whole layer in plain eager mode: one call of C++, and what is known before there are tensors is kept.

Private to the layers. A small layer takes less time to compute than Python takes to say so in many calls. So the groups
and patterns of a call are looked up by who they are, and the call's shapes, row ranges and segments by its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple

from torch import Tensor

from mixed_attention import ops
from mixed_attention.cache import is_recorded
from mixed_attention.eager.packed import slots
from mixed_attention.eager.projection import Runs, taken_ranges
from mixed_attention.plan import MANY, AttentionPlan, ends
from mixed_attention.spec import AttentionPattern, ShardedTokenSpec, TokenSpec


class Unread(NamedTuple):
    """The tokens of a sequence that nobody attends to, and how many runs of neighbours they are."""

    num_tokens: int
    num_runs: int

    @classmethod
    def of(cls, specs: Iterable[TokenSpec], read: Set[str]) -> Unread:
        """Those of the groups that are in the sequence, but for the named ones. Sizes may be symbolic."""
        num_tokens = num_runs = 0
        is_run = False
        for spec in specs:
            if spec.size is None:
                continue
            goes_on, is_run = is_run, spec.name not in read
            if is_run:
                num_tokens += spec.size
                num_runs += not goes_on
        return cls(num_tokens, num_runs)


class Request:
    """Token groups and patterns, and what layers ask of them that is no matter of a call's tensors.

    Attributes:
        num_tokens: Those of the groups that are in the sequence.
        has_cached: Whether there are others.
        read: Names of the groups that somebody attends to.
        unread: What of the sequence nobody attends to.
    """

    def __init__(self, specs: tuple[TokenSpec, ...], patterns: tuple[AttentionPattern, ...]) -> None:
        self._given = specs, patterns  # whose ids stay theirs as long as this lives
        self.num_tokens = sum([spec.size for spec in specs if spec.size is not None])
        self.has_cached = any(spec.size is None for spec in specs)
        self.read = frozenset([name for pattern in patterns for name in pattern.key_value_tokens])
        self.unread = Unread.of(specs, self.read)
        self._plans: dict[bool, AttentionPlan] = {}
        self._recorded: dict[frozenset[str], frozenset[str]] = {}

    @staticmethod
    def of(specs: Any, patterns: Any) -> Request | None:
        """The request that these objects make, the same one for the same objects; None for those of other classes.

        Ours never change, unlike the lists that they come in.
        """
        if type(specs) not in _SEQUENCES or type(patterns) not in _SEQUENCES:
            return None
        # NOTE: thousands of ids take longer to hash than to compare one by one.
        are_many = len(specs) >= MANY
        key = ends(specs, patterns) if are_many else (len(specs), *map(id, specs), *map(id, patterns))
        found = _requests.get(key)
        if found is not None and (not are_many or found._given == (tuple(specs), tuple(patterns))):
            return found
        if not all(map(_is_whole, specs)) or not {AttentionPattern}.issuperset(map(type, patterns)):
            return None
        found = Request(tuple(specs), tuple(patterns))
        keep(_requests, key, found)
        return found

    def plan(self, skip_unread_keys: bool) -> AttentionPlan:
        """The plan of all groups, or without keys that nobody attends to."""
        found = self._plans.get(skip_unread_keys)
        if found is None:
            specs, patterns = self._given
            found = AttentionPlan.compile(specs, patterns, skip_unread_keys=skip_unread_keys)
            self._plans[skip_unread_keys] = found
        return found

    def recorded(self, named: frozenset[str]) -> frozenset[str]:
        """Names of the groups that go into a cache: the anchors, and those that are named."""
        found = self._recorded.get(named)
        if found is None:
            names = [spec.name for spec in self._given[0]]
            found = frozenset([name for name in names if is_recorded(name, named)])
            keep(self._recorded, named, found)
        return found


def _is_whole(spec: Any) -> bool:
    """Whether it is a group of ours all of whose tokens are here: also one that is spread over a single rank."""
    return type(spec) is TokenSpec or (type(spec) is ShardedTokenSpec and spec.num_keys == spec.size)


_SEQUENCES = (list, tuple)
_MOST_KEPT = 256
_requests: dict[tuple[int, ...], Request] = {}


def keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keeps a value to look it up again, of which there may be many in a long run."""
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    kept[key] = value


def run(
    x: Tensor,
    maps: Sequence[tuple[Tensor, Tensor | None]],
    plan: AttentionPlan,
    *,
    num_heads: int,
    head_dim: int,
    freqs: Any,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    normalises: bool = False,
) -> tuple[Tensor, Callable[[], Sequence[Tensor]]] | None:
    """The tokens that a layer makes ``(B, N, dim)``, and what makes the rotated q, k and v; None where it has no say.

    Args:
        x: Tokens ``(B, N, C)``.
        maps: Weights and biases of the linear maps to q, k and v, in this order, and of the output projection.
        plan: Whose queries are the tokens. Where it leaves out keys, these tokens are not projected to any.
        num_heads: Heads.
        head_dim: Channels of a head.
        freqs: Complex frequencies of all tokens, or None.
        key_padding_mask: That of the plan's keys.
        dropout_p: Which share of the attention weights is dropped.
        normalises: Whether queries and keys are divided by their root mean square, with an even ``head_dim``.
    """
    key = ("layer", x.shape[0], num_heads, head_dim, freqs is None, dropout_p, normalises)
    kept = plan.kept
    found = kept.get(key)
    if found is None:
        if not ops.is_compiled():
            return None
        found = _call(plan, x.shape[0], num_heads, head_dim, freqs is not None, dropout_p, normalises)
        keep(kept, key, found)
    call, shapes = found
    result = ops.run_layer(x, maps, freqs, key_padding_mask, call)
    if result is None:
        return None
    out, *buffers = result
    normalised: list[Tensor | None] = [None] * len(shapes)
    if normalises:
        normalised, buffers = list(buffers[: len(shapes)]), buffers[len(shapes) :]
    return out, lambda: slots(buffers, shapes, normalised)


def runs_with_keys(plan: AttentionPlan) -> Runs:
    """The tokens that are present, by whether the plan has keys of them."""
    return tuple((g.size, g.key_start is not None) for g in plan.groups if g.query_start is not None)


def _call(
    plan: AttentionPlan,
    batch_size: int,
    num_heads: int,
    head_dim: int,
    is_rotated: bool,
    dropout_p: float,
    normalises: bool,
) -> tuple[Any, list[tuple[int, int, int, int, int]]]:
    """What C++ takes, and the shapes of the buffers."""
    rows, num_tokens = num_heads * head_dim, plan.num_queries
    if all(group.key_start is not None for group in plan.groups):
        parts: list[tuple[int, int, Any]] = [(0, 3 * rows, None)]
        shapes, heads = [(batch_size, num_tokens, 3, num_heads, head_dim)], [2]
    else:
        parts = [(0, rows, None), (rows, 3 * rows, taken_ranges(runs_with_keys(plan)))]
        shapes = [(batch_size, n, s, num_heads, head_dim) for n, s in ((num_tokens, 1), (plan.num_keys, 2))]
        heads = [1, 1]
    normalised, rotated = (heads if each else [0] * len(parts) for each in (normalises, is_rotated))
    tokens = [ranges for _, _, ranges in parts]
    attention = ops.packed_call(shapes, rotated, tokens, plan, head_dim**-0.5, dropout_p, normalised)
    return ops.layer_call(parts, attention), shapes
