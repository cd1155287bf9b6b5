"""One call for all patterns, by what each peer is told of sequences, is the attention of the plan."""

import pytest
import torch

from bench import check
from bench.cases import Case
from bench.peers import sdpa
from bench.varlen import Varlen

PLANS = {
    "in place": ("ab->a", "cd->c"),
    "in place, all": ("a->a", "b->b", "cd->cd"),
    "across": ("a->b", "b->a", "cd->c"),
    "unions": ("a->ad", "b->b", "cd->abc"),
    "one": ("abcd->bc",),
}


def case_of(*patterns):
    pairs = tuple((tuple(queries), tuple(keys)) for queries, keys in (each.split("->") for each in patterns))
    return Case("some case", 2, 3, 8, {"a": 3, "b": 4, "c": 5, "d": 2}, pairs)


def sequence_by_sequence(q, k, v, at):
    """What the peers are asked for, by torch; rows of keys that nobody reads get wrong gradients, as from them."""
    outs = []
    for i, (begin, end) in enumerate(zip(at.queries, at.queries[1:])):
        length = at.keys[i + 1] - at.keys[i] if at.num_keys_read is None else at.num_keys_read[i]
        rows = slice(int(at.keys[i]), int(at.keys[i] + length))
        assert end - begin <= at.max_queries and length <= at.max_keys
        outs.append(sdpa(q[None, begin:end], k[None, rows], v[None, rows])[0])
    if at.unread_keys is None:
        return torch.cat(outs)
    wrong = k[at.unread_keys].sum() + v[at.unread_keys].sum()
    return torch.cat(outs) + (wrong - wrong.detach())


@pytest.mark.parametrize("reads_a_part", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_sequences_are_the_patterns(name, reads_a_part):
    plan = case_of(*PLANS[name]).plan
    q, k, v = (torch.randn(2, 14, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    (out,) = Varlen(sequence_by_sequence, reads_a_part=reads_a_part)(q, k, v, plan)
    exact = check.exact_attention(q, k, v, plan)
    torch.testing.assert_close(out, exact)
    dout = torch.randn_like(out)
    for got, expected in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(exact, (q, k, v), dout)):
        torch.testing.assert_close(got, expected)


def test_queries_of_a_pattern_that_lie_apart_are_refused():
    plan = case_of("ac->a", "bd->b").plan
    x = torch.randn(1, 14, 1, 8)
    with pytest.raises(ValueError, match="do not lie together"):
        Varlen(sequence_by_sequence, reads_a_part=True)(x, x, x, plan)
