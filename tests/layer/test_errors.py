"""What a caller of the layers can get wrong, in the order in which it is found."""

import pytest
import torch
from layers import DIM, GROUPS, SELF, make_freqs, make_layer, make_x

import mixed_attention as ma

X = make_x(SELF).detach()
N = SELF.num_tokens
FREQS = make_freqs(N)
MASK = torch.ones(2, N, dtype=torch.bool)
CACHE = {name: {"k": torch.ones(2, 3, 4, 8), "v": torch.ones(2, 3, 4, 8)} for name in GROUPS}
PATTERN = ma.AttentionPattern
ABSENT = [ma.TokenSpec(GROUPS[0], None), *SELF.specs[1:]]  # the first group comes from a cache
X_PRESENT = X[:, SELF.sizes[GROUPS[0]] :]


def pattern(queries, keys):
    """Two patterns: the first as given, the second for the volume."""
    return [PATTERN(queries, keys), SELF.patterns[1]]


# Each row breaks one rule; the rows stand in the order of precedence.
ROWS = {
    "freqs without use_rope": (ValueError, "RoPE usage mismatch", {"freqs": FREQS}),
    "mask of pairs": (NotImplementedError, "Attention masks are not supported", {"attention_mask": MASK[:, None]}),
    "mask of floats": (ValueError, "bool tensor", {"key_padding_mask": MASK.float()}),
    "mask of rank 3": (ValueError, "2D", {"key_padding_mask": MASK[None]}),
    "mask of other tokens": (ValueError, "n_tokens dim", {"key_padding_mask": MASK[:, 1:]}),
    "mask of other batch": (ValueError, "batch_size is 3, but x has 2", {"key_padding_mask": MASK[:1].expand(3, -1)}),
    "sizes": (ValueError, "Token specs total size 23", {"token_specs": [ma.TokenSpec(GROUPS[0], 7), *SELF.specs[1:]]}),
    "query in two patterns": (
        ValueError,
        "'surface_anchors' cannot be a query in multiple",
        {"attention_patterns": [*SELF.patterns, SELF.patterns[0]]},
    ),
    "query missing": (
        ValueError,
        "set of query tokens must exactly match .* in no pattern: .'volume_anchors'",
        {"attention_patterns": SELF.patterns[:1]},
    ),
    "unknown key": (
        ValueError,
        "'volume' is not defined in `token_specs`",
        {"attention_patterns": pattern(GROUPS[:2], ["volume"])},
    ),
    "empty cache": (ValueError, "kv_cache is empty", {"token_specs": ABSENT, "x": X_PRESENT, "kv_cache": {}}),
}
NAMES = list(ROWS)


def call(layer=None, **changes):
    arguments = {"x": X, "token_specs": SELF.specs, "attention_patterns": SELF.patterns, **changes}
    return (layer or make_layer())(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_alone(name):
    error, message, changes = ROWS[name]
    with pytest.raises(error, match=message):
        call(**changes)


def combinable(first, second):
    """Whether both mistakes can be made at once: in different arguments, and with masks for the x of all tokens."""
    changes, more = ROWS[first][2], ROWS[second][2]
    return not changes.keys() & more.keys() and not ("mask" in first and "x" in more)


@pytest.mark.parametrize(
    "first, second", [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :] if combinable(a, b)]
)
def test_the_first_of_two_mistakes_is_reported(first, second):
    error, message, changes = ROWS[first]
    with pytest.raises(error, match=message):
        call(**{**ROWS[second][2], **changes})


def test_both_messages_of_the_rope_mismatch():
    with pytest.raises(ValueError, match="RoPE usage mismatch: use_rope is True, but freqs were not given"):
        call(make_layer(use_rope=True))
    with pytest.raises(ValueError, match="RoPE usage mismatch: use_rope is False, but freqs were given"):
        call(freqs=FREQS)


@pytest.mark.parametrize(
    "mask",
    [MASK.double(), MASK[0], MASK[:, 1:], MASK[:1].expand(3, -1), torch.ones(N, N, dtype=torch.bool), "causal"],
    ids=["float", "rank 1", "tokens", "batch", "square", "string"],
)
def test_attention_mask_that_is_no_padding_mask(mask):
    with pytest.raises(NotImplementedError, match="Attention masks are not supported: .* key_padding_mask"):
        call(attention_mask=mask)


def test_two_masks():
    with pytest.raises(ValueError, match="attention_mask and key_padding_mask are both given"):
        call(attention_mask=MASK, key_padding_mask=MASK)


@pytest.mark.parametrize(
    "patterns, message",
    [
        ([], "set of query tokens must exactly match"),
        (
            pattern(GROUPS[:1], GROUPS[:1]),
            "set of query tokens must exactly match .* in no pattern: .'surface_queries'",
        ),
        (
            pattern([*GROUPS[:2], "extra"], GROUPS[:1]),
            "set of query tokens must exactly match .* not in token_specs: .'extra'",
        ),
        (pattern([GROUPS[0], *GROUPS[:2]], GROUPS[:1]), "cannot be a query in multiple"),
        (pattern(GROUPS[:2], []), "attention pattern 0 has no key_value_tokens"),
        ([*SELF.patterns, PATTERN([], GROUPS)], "attention pattern 2 has no query_tokens"),
    ],
    ids=["none", "missing", "superfluous", "twice in one", "no keys", "no queries"],
)
def test_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        call(attention_patterns=patterns)


def test_names_must_be_unique():
    specs = [ma.TokenSpec(GROUPS[0], 3), ma.TokenSpec(GROUPS[0], 3), *SELF.specs[1:]]
    with pytest.raises(ValueError, match="'surface_anchors' stands more than once"):
        call(token_specs=specs)


@pytest.mark.parametrize("x", [X[0], X[:, 0, 0], X[None]], ids=["rank 2", "rank 1", "rank 4"])
def test_rank_of_x(x):
    with pytest.raises((ValueError, IndexError), match="Token specs total size 22 does not match x of shape"):
        call(x=x)


def test_width_of_x():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(x=torch.ones(2, N, DIM + 1, dtype=torch.float64))


@pytest.mark.parametrize(
    "freqs, error",
    [
        (FREQS[:, 1:], RuntimeError),
        (FREQS[..., 1:], RuntimeError),
        (FREQS.expand(3, -1, -1), RuntimeError),
        (FREQS[0], AssertionError),
        (FREQS.real, AssertionError),
        ([FREQS], AssertionError),
    ],
    ids=["tokens", "channels", "batch", "rank", "real", "list"],
)
@pytest.mark.parametrize("parallel", [True, False], ids=["fused kernels", "reference"])
def test_frequencies_that_do_not_fit(freqs, error, parallel):
    with pytest.raises(error, match="freqs"):
        call(make_layer(use_rope=True, parallel=parallel), freqs=freqs)


def test_mistakes_leave_the_layer_usable():
    layer = make_layer()
    expected = call(layer)
    for error, _, changes in ROWS.values():
        with pytest.raises(error):
            call(layer, **changes)
    assert torch.equal(call(layer), expected)
