"""Random problems of the operator, as hypothesis draws and shrinks them."""

from __future__ import annotations

from cases import DTYPES, NAMES, Case
from hypothesis import strategies as st

# Every size around a tile is as likely as an empty group or any small one.
SIZES = st.one_of(
    st.integers(0, 40),
    st.sampled_from([0, 1]),
    st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193]),
)
WIDTHS = st.one_of(st.integers(1, 160), st.sampled_from([1, 8, 16, 32, 48, 64, 96, 128]))


@st.composite
def attends(draw: st.DrawFn, num_groups: int) -> str:
    """Patterns: a random partition of the groups asks, each part for a random list of groups, with repeats."""
    part_of = draw(st.lists(st.integers(0, num_groups - 1), min_size=num_groups, max_size=num_groups))
    names = NAMES[:num_groups]
    parts = ["".join(name for name, part in zip(names, part_of) if part == i) for i in range(num_groups)]
    queries = draw(st.permutations([part for part in parts if part]))
    keys = st.lists(st.sampled_from(names), min_size=1, max_size=num_groups + 1).map("".join)
    return " ".join(f"{query}>{draw(keys)}" for query in queries)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any problem that is small enough to be judged at once."""
    num_groups = draw(st.integers(1, 6))
    width = draw(WIDTHS)
    return Case(
        sizes=tuple(draw(st.lists(SIZES, min_size=num_groups, max_size=num_groups))),
        attends=draw(attends(num_groups)),
        batch_size=draw(st.integers(0, 3)),
        num_heads=draw(st.sampled_from([1, 1, 2, 3, 12])),
        head_dim=width,
        head_dim_v=draw(st.one_of(st.none(), WIDTHS)),
        dtype=draw(st.sampled_from(list(DTYPES.values()))),
        layout=draw(st.sampled_from(["contiguous", "packed", "strided", "transposed"])),
        shared=draw(st.sampled_from(["", "", "k", "v", "kv"])),
        mask=draw(st.sampled_from([None, None, "random", "blocked", "shared"])),
        heavy_tails=draw(st.booleans()),
        magnitude=draw(st.sampled_from([1.0, 1.0, 0.01, 30.0])),
        softmax_scale=draw(st.sampled_from([None, None, 1.0, -0.2])),
        dlse=draw(st.booleans()),
        skip_unread_keys=draw(st.booleans()),
        cached="".join(draw(st.sets(st.sampled_from(NAMES[:num_groups]), max_size=1))),
        seed=draw(st.integers(0, 2**32)),
    )
