"""Inputs of the operator's tests: problems as small values, and the fresh, hostile tensors that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import ascii_letters, digits

import torch
from torch import Tensor

import mixed_attention as ma
from mixed_attention import ops, reference

NAMES = ascii_letters + digits


@dataclass(frozen=True)
class Case:
    """One problem for the operator.

    Attributes:
        sizes: Number of tokens of the groups, whose names are ``a``, ``b``, ``c``…
        attends: The patterns, ``queries>keys`` each: ``"ab>a c>abb"`` says that a and b attend to a, and c to a, to
            b, and to b once more.
        head_dim_v: Width of v; None for that of q and k.
        layout: ``"contiguous"``; ``"packed"``: slices of one projection's output; ``"strided"``: odd strides and
            offsets in every dimension but the last, NaN in between; ``"spaced"``: the same in multiples of 16 bytes;
            ``"offset"``: contiguous, one element behind an aligned address; ``"transposed"``: heads before rows in
            memory.
        shared: Which of k and v, ``""``, ``"k"``, ``"v"`` or ``"kv"``, have batch size 1.
        mask: ``"random"``: any key may be masked; ``"blocked"``: all keys of the first sequence are; ``"front"`` and
            ``"back"``: all in that half of every sequence are; ``"shared"``: random with batch size 1.
        heavy_tails: Whether values are drawn from Student's t with 3 degrees of freedom instead of a normal.
        magnitude: Factor on q.
        spread: Rows of q, k and v are multiplied by a factor of their group, between 10 to the minus this and to this.
        dropout_p: Probability with which a weight is dropped; which ones, torch's generator says, seeded by ``seed``.
        dlse: Whether a gradient of the log-sum-exp comes in.
        skip_unread_keys: Whether k and v leave out the groups that nobody attends to.
        cached: Groups that ask nothing, as if their keys came from a cache.
    """

    sizes: tuple[int, ...]
    attends: str
    batch_size: int = 1
    num_heads: int = 1
    head_dim: int = 8
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    shared: str = ""
    mask: str | None = None
    heavy_tails: bool = False
    magnitude: float = 1.0
    softmax_scale: float | None = None
    spread: float = 0.0
    dropout_p: float = 0.0
    dlse: bool = True
    skip_unread_keys: bool = False
    cached: str = ""
    seed: int = 0

    @property
    def specs(self) -> list[ma.TokenSpec]:
        return [ma.TokenSpec(name, None if name in self.cached else size) for name, size in self.groups]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Names and sizes."""
        return list(zip(NAMES, self.sizes))

    @property
    def asking(self) -> list[tuple[str, int]]:
        """Groups that have queries."""
        return [(name, size) for name, size in self.groups if name not in self.cached]

    @property
    def placed(self) -> list[tuple[str, int]]:
        """Groups that have a place among the keys."""
        keys_of = dict(pattern.split(">") for pattern in self.attends.split())
        is_read = {name for keys in keys_of.values() for name in keys}
        return [(name, size) for name, size in self.groups if name in is_read or not self.skip_unread_keys]

    @property
    def patterns(self) -> list[ma.AttentionPattern]:
        return [ma.AttentionPattern(*(list(side) for side in pattern.split(">"))) for pattern in self.attends.split()]

    @property
    def plan(self) -> ma.AttentionPlan:
        cached = [ma.TokenSpec(name, size) for name, size in self.groups if name in self.cached]
        return ma.AttentionPlan.compile(
            self.specs, self.patterns, cached=cached, skip_unread_keys=self.skip_unread_keys
        )

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def with_(self, **changes: object) -> Case:
        """A copy with some attributes changed."""
        return replace(self, **changes)


def counts(case: Case, device: torch.device | str = "cpu") -> Tensor:
    """How often each query (row) counts each key (column): the patterns taken at their word, group by group.

    Independent of the plan's segments. fp64, ``(Nq, Nk)``.
    """
    keys_of = {name: keys for pattern in case.attends.split() for names, keys in [pattern.split(">")] for name in names}
    times = [[keys_of[query].count(key) for key, _ in case.placed] for query, _ in case.asking]
    total = torch.tensor(times, dtype=torch.float64, device=device).view(len(case.asking), len(case.placed))
    for dim, groups in enumerate((case.asking, case.placed)):
        sizes = torch.tensor([size for _, size in groups], dtype=torch.long, device=device)
        total = total.repeat_interleave(sizes, dim, output_size=sum(size for _, size in groups))
    return total


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case.

    Attributes:
        case: What they were made for.
        q, k, v: As the operator takes them; leaves that require grad.
        key_padding_mask: ``(B or 1, Nk)`` or None.
        dout, dlse: Gradients that come in; dlse may be None.
        weights: How often a query counts a key once the mask is applied, fp64, ``(B, Nq, Nk)``.
        kept: The same once dropout is applied as well, ``(B, H, Nq, Nk)``; None without dropout.
        keep_probability: What weights are divided by.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    key_padding_mask: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    weights: Tensor
    kept: Tensor | None = None
    keep_probability: float = 1.0


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Fresh random tensors, with NaN and infinities in all keys and values that no query may see."""
    generator = torch.Generator().manual_seed(case.seed)
    multiplicity = counts(case, device)
    num_queries, num_keys = multiplicity.shape
    batch, heads, width = case.batch_size, case.num_heads, case.head_dim
    width_v = case.head_dim_v or width
    q = case.magnitude * _random((batch, num_queries, heads, width), case, generator)
    k = _random((1 if "k" in case.shared else batch, num_keys, heads, width), case, generator)
    v = _random((1 if "v" in case.shared else batch, num_keys, heads, width_v), case, generator)
    if case.spread > 0:
        for tensor, groups in ((q, case.asking), (k, case.placed), (v, case.placed)):
            tensor *= _factors(groups, case.spread, generator)
    mask = make_mask(case, num_keys, generator)
    weights = multiplicity.expand(batch, -1, -1)
    if mask is not None:
        mask = mask.to(device)
        weights = weights * mask[:, None, :]
    visible = weights.any(1).cpu()  # (B, Nk)
    for tensor in (k, v):
        _poison(tensor, visible.any(0, keepdim=True) if tensor.shape[0] == 1 else visible)
    dout = _random((batch, num_queries, heads, width_v), case, generator)
    dlse = torch.randn((batch, heads, num_queries), generator=generator) if case.dlse else None
    q, k, v = _lay_out((q, k, v), case, device)
    (dout,) = _lay_out((dout,), case, device)
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Inputs(
        case,
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        mask,
        dout,
        None if dlse is None else dlse.to(device, lse_dtype),
        weights,
        *(_drop(case, weights) if case.dropout_p > 0 else (None, 1.0)),
    )


def _random(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if case.heavy_tails:
        values /= torch.randn((*shape, 3), generator=generator).square().mean(-1).sqrt()
    return values


def _factors(groups: list[tuple[str, int]], spread: float, generator: torch.Generator) -> Tensor:
    """A factor for every row, ``(rows, 1, 1)``, the same for all rows of a group."""
    exponents = spread * (2 * torch.rand(len(groups), generator=generator) - 1)
    sizes = torch.tensor([size for _, size in groups], dtype=torch.long)
    return (10**exponents).repeat_interleave(sizes)[:, None, None]


def _drop(case: Case, weights: Tensor) -> tuple[Tensor, float]:
    """What dropout leaves of the weights, by its definition; and the probability of keeping one."""
    torch.manual_seed(case.seed)
    seed = ops.draw_seed(weights.device)
    kept = torch.zeros(case.batch_size, case.num_heads, *weights.shape[1:], dtype=weights.dtype, device=weights.device)
    keep_probability = 1.0
    for segment in case.plan.query_segments:
        keep, keep_probability = reference.dropout_keep(segment, case.batch_size, case.num_heads, case.dropout_p, seed)
        keys = [torch.arange(*key_range, device=weights.device) for key_range in segment.key_ranges]
        if keys:
            kept[:, :, segment.start : segment.end].index_add_(3, torch.cat(keys), keep.to(weights.dtype))
    return torch.where(weights[:, None] > 0, kept, 0.0), keep_probability


def make_mask(case: Case, num_keys: int, generator: torch.Generator) -> Tensor | None:
    """The mask of a case, ``(B or 1, num_keys)``."""
    if case.mask is None:
        return None
    mask = torch.rand(1 if case.mask == "shared" else case.batch_size, num_keys, generator=generator) < 0.6
    if case.mask == "blocked":
        mask[:1] = False
    elif case.mask == "front":
        mask[:, : num_keys // 2] = False
    elif case.mask == "back":
        mask[:, num_keys // 2 :] = False
    return mask


def _poison(tensor: Tensor, visible: Tensor) -> None:
    """Puts NaN, inf and -inf, channel by channel in turn, into rows that nobody may see."""
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(tensor.shape[-1] // 3 + 1)[: tensor.shape[-1]]
    tensor.copy_(torch.where(visible[:, :, None, None], tensor, poison))


def _lay_out(tensors: tuple[Tensor, ...], case: Case, device: torch.device | str) -> list[Tensor]:
    """Copies of tensors in the layout of the case; whatever memory lies in between holds NaN."""
    if case.layout == "packed":
        views = _packed_views([t.shape for t in tensors], case.dtype, device)
    elif case.layout == "strided":
        views = [_strided_view(t.shape, case.dtype, device) for t in tensors]
    elif case.layout == "spaced":
        views = [_spaced_view(t.shape, case.dtype, device) for t in tensors]
    elif case.layout == "offset":
        views = [torch.empty(t.numel() + 1, dtype=case.dtype, device=device)[1:].view(t.shape) for t in tensors]
    elif case.layout == "transposed":
        views = [t.transpose(1, 2).to(device, case.dtype, copy=True).contiguous().transpose(1, 2) for t in tensors]
    else:
        views = [torch.empty(t.shape, dtype=case.dtype, device=device) for t in tensors]
    for view, tensor in zip(views, tensors):
        view.copy_(tensor)
    return [view.detach() for view in views]


def _strided_view(shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    batch, rows, heads, width = shape
    base = torch.full((batch + 1, 2 * rows + 1, heads + 1, width + 3), torch.nan, dtype=dtype, device=device)
    return base[1:, 1::2, 1:, 1 : width + 1]


def _spaced_view(shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    batch, rows, heads, width = shape
    base = torch.full((batch + 1, 2 * rows + 1, heads + 1, width + 8 & -8), torch.nan, dtype=dtype, device=device)
    return base[1:, 1::2, 1:, :width]


def _packed_views(shapes: list[torch.Size], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    batch, rows = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    widths = [shape[2] * shape[3] for shape in shapes]
    base = torch.full((batch, rows, sum(widths)), torch.nan, dtype=dtype, device=device)
    slots = base.split(widths, -1)
    return [slot[: s[0], : s[1]].unflatten(-1, (s[2], s[3])) for slot, s in zip(slots, shapes)]


def _table() -> dict[str, Case]:
    """The edge cases by name."""
    cases = {
        "one token": Case((1,), "a>a"),
        "two tokens to each other": Case((1, 1), "a>b b>a"),
        "dense": Case((40,), "a>a", num_heads=3),
        "anchors and queries": Case((33, 17, 20, 9), "ab>a cd>c", batch_size=2, num_heads=3, head_dim=64),
        "crossed": Case((33, 17, 20, 9), "ab>c cd>a", batch_size=2, num_heads=3, head_dim=64),
        "joint": Case((33, 17, 20, 9), "abcd>ac", batch_size=2, num_heads=3, head_dim=64),
        "joint, keys named backwards": Case((33, 17, 20, 9), "dcba>ca", num_heads=3, head_dim=64),
        "many groups": Case((7, 25, 13, 41, 9, 32, 10, 29), "ab>ae cd>cg ef>ea gh>gc", num_heads=2, head_dim=16),
        "keys shared by all patterns": Case((5, 18, 7, 31), "a>b b>ab c>bc d>dcb"),
        "keys that nobody reads": Case((19, 23, 5), "abc>b"),
        "keys that nobody reads, left out": Case((19, 23, 5), "abc>b", skip_unread_keys=True),
        "keys listed twice": Case((19, 23), "a>abb b>aab", num_heads=2),
        "only keys, listed three times": Case((19, 23), "ab>bbb"),
        "neighbours listed twice": Case((5, 6, 7), "abc>abcab"),
        "single tokens": Case((1, 1, 1, 1, 1), "a>b b>ce c>a d>ed e>abcde"),
        "apart, one token each": Case((1, 30, 1, 30, 1), "ace>bd bd>ace"),
        "an empty group asks": Case((0, 12), "a>b b>b"),
        "an empty group among the keys": Case((9, 0, 12), "a>abc bc>b"),
        "only empty keys": Case((9, 0, 12), "a>b bc>ac", batch_size=2),
        "nothing but empty keys": Case((9, 0), "ab>b"),
        "all groups empty": Case((0, 0), "ab>a"),
        "batch 0": Case((5, 6), "a>b b>a", batch_size=0),
        "batch 3": Case((21, 16), "a>b b>ab", batch_size=3, num_heads=2),
        "12 heads": Case((21, 16), "a>b b>ab", num_heads=12),
        "no heads": Case((4, 3), "a>b b>a", num_heads=0),
        "packed": Case((33, 40), "a>b b>a", batch_size=2, num_heads=3, head_dim=16, layout="packed"),
        "packed, v wider": Case((33, 40), "a>b b>a", batch_size=2, num_heads=3, head_dim_v=20, layout="packed"),
        "strided": Case((33, 40), "a>b b>a", batch_size=2, num_heads=3, head_dim=16, layout="strided"),
        "strided, odd width": Case((33, 40), "a>ab b>a", batch_size=2, num_heads=3, head_dim=7, layout="strided"),
        "heads before rows": Case((33, 40), "a>b b>a", batch_size=2, num_heads=3, head_dim=16, layout="transposed"),
        "k of batch 1": Case((13, 20), "a>b b>a", batch_size=3, num_heads=2, shared="k"),
        "v of batch 1": Case((13, 20), "a>b b>a", batch_size=3, num_heads=2, shared="v"),
        "k and v of batch 1": Case((13, 20), "a>b b>a", batch_size=3, num_heads=2, shared="kv", layout="packed"),
        "k of batch 1 for none": Case((13, 20), "a>b b>a", batch_size=0, shared="k"),
        "masked": Case((33, 40, 5), "a>bc b>a c>cab", batch_size=3, num_heads=2, mask="random"),
        "masked, strided": Case((33, 40), "a>b b>a", batch_size=2, num_heads=2, mask="random", layout="strided"),
        "masked, v of batch 1": Case((33, 40), "a>b b>ab", batch_size=2, mask="random", shared="v"),
        "one mask for all": Case((33, 40), "a>b b>a", batch_size=3, num_heads=2, mask="shared"),
        "a sequence fully masked": Case((33, 40), "a>b b>a", batch_size=2, num_heads=2, mask="blocked"),
        "all masked": Case((33, 40), "a>b b>a", num_heads=2, mask="blocked"),
        "masked and listed twice": Case((33, 40), "a>abb b>a", batch_size=2, mask="random"),
        "masked, nobody reads": Case((33, 40, 70), "a>b bc>a", batch_size=2, mask="random"),
        "no gradient of lse": Case((33, 40), "a>b b>a", batch_size=2, dlse=False),
        "logits of ten thousand": Case((33, 40), "a>b b>ab", head_dim=16, magnitude=2500.0),
        "negative scale": Case((33, 40), "a>b b>ab", head_dim=16, softmax_scale=-0.3),
        "scale zero": Case((33, 40), "a>b b>ab", head_dim=16, softmax_scale=0.0),
        "all logits far below zero": Case((33, 1), "ab>b", head_dim=1, magnitude=-300.0),
        "heavy tails": Case((100, 130), "a>b b>ab", num_heads=3, head_dim=64, heavy_tails=True),
        "8192 queries of few keys": Case((8192, 37), "ab>b", head_dim=16, skip_unread_keys=True),
        "8192 keys for few queries": Case((8192, 37), "ab>ab", head_dim=16, cached="a"),
        "cached groups": Case((20, 7, 33, 9), "ab>a cd>ac", num_heads=2, cached="ac"),
        "cached groups that nobody reads": Case((20, 7, 33), "ab>bb c>c", cached="a", skip_unread_keys=True),
        "everything is cached": Case((20, 7), "a>b b>a", cached="ab"),
    }
    for width in (1, 2, 3, 5, 7, 15, 16, 17, 20, 31, 32, 33, 48, 64, 80, 96, 112, 128, 160, 192, 256):
        cases[f"head_dim {width}"] = Case((34, 21), "a>b b>ab", head_dim=width, num_heads=2)
    for width, width_v in ((1, 160), (160, 1), (64, 24), (24, 64), (17, 33)):
        cases[f"head_dim {width}, v {width_v}"] = Case((34, 21), "a>b b>ab", head_dim=width, head_dim_v=width_v)
    for size in (15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 385):
        cases[f"{size} queries and keys"] = Case((size, 3), "a>a b>ab", head_dim=16)
        cases[f"{size} keys behind 3, {size} queries"] = Case((3, size), "a>b b>ab", head_dim=16)
    return cases


EDGE_CASES = _table()
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the kernels are built for: long enough that tiles, ranges and heads are many, with the widths of real models.
LARGE_CASES = {
    "abupt": Case((200, 411, 130, 193), "ab>a cd>c", num_heads=3, head_dim=64),
    "joint": Case((200, 411, 130, 193), "abcd>ac", num_heads=3, head_dim=64, layout="packed"),
    "wide": Case((300, 411), "a>b b>a", num_heads=2, head_dim=128),
    "groups": Case((77, 250, 130, 410, 91, 320), "ab>ae cd>ca ef>ec", num_heads=3, head_dim=48, layout="packed"),
    "masked": Case((300, 411), "a>b b>ab", batch_size=2, num_heads=2, head_dim=32, mask="random"),
}
