"""Sizes and shapes at which kernels go wrong, each against the oracle in every dtype."""

import pytest
import torch
from cases import DTYPES, Case
from compare import check

EDGES = {
    "one token": Case((1,), "a>a"),
    "empty query group": Case((0, 5), "a>b b>b"),
    "empty keys": Case((5, 0), "a>b b>a"),
    "everything empty": Case((0, 0), "a>b b>a"),
    "single tokens": Case((1, 1, 1), "a>bc b>a c>c"),
    "union in any order": Case((9, 30, 21, 17), "ad>dba bc>cd"),
    "keys of several patterns": Case((20, 33, 14), "a>ab b>ab c>b"),
    "keys that nobody reads": Case((20, 33, 14), "abc>a"),
    "keys listed twice": Case((20, 33), "a>aab b>bbb"),
    "interleaved groups": Case((20, 70, 20, 70), "ac>a bd>c"),
    "unread keys left out": Case((20, 33, 14), "abc>b", skip_unread_keys=True),
    "no batch": Case((20, 33), "a>ab b>a", batch_size=0),
    "three sequences": Case((20, 33), "a>ab b>a", batch_size=3),
    "twelve heads": Case((20, 33), "a>ab b>a", num_heads=12),
    "narrow": Case((20, 33), "a>ab b>a", head_dim=1),
    "wide": Case((20, 33), "a>ab b>a", head_dim=160),
    "wider values": Case((20, 33), "a>ab b>a", head_dim=16, head_dim_v=72),
    "narrower values": Case((20, 33), "a>ab b>a", head_dim=72, head_dim_v=3),
    "one sequence of keys": Case((20, 33), "a>ab b>a", batch_size=3, shared="kv"),
    "packed": Case((20, 33), "a>ab b>a", num_heads=3, layout="packed"),
    "strided": Case((20, 33), "a>ab b>a", num_heads=3, layout="strided"),
    "masked": Case((70, 133), "a>ab b>a", batch_size=2, mask="random"),
    "all keys of a sequence masked": Case((70, 133), "a>ab b>a", batch_size=2, mask="blocked"),
    "large scores": Case((40, 50), "a>ab b>a", head_dim=64, magnitude=1000.0),
    "negative scale": Case((40, 50), "a>ab b>a", softmax_scale=-0.5),
    "no scale": Case((40, 50), "a>ab b>a", softmax_scale=0.0),
    "heavy tails": Case((200, 150), "a>ab b>a", head_dim=64, heavy_tails=True),
    "thousands of keys": Case((40, 3000), "a>b b>a", head_dim=32),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edge(case: Case, dtype: torch.dtype, device: torch.device):
    check(case.with_(dtype=dtype), device)


@pytest.mark.parametrize("size", [15, 16, 17, 31, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 385])
def test_sizes_around_a_tile(size: int, device: torch.device):
    check(Case((size, 50), "a>ab b>a", head_dim=64), device)
    check(Case((50, size), "a>ab b>b", head_dim=24), device)
