"""Exported layers: saved, loaded, and run with the numbers of the layer."""

from __future__ import annotations

import io

import pytest
import torch
from layers import DIM, GROUPS, NUM_HEADS, SELF, make_layer, make_x
from torch import nn

import mixed_attention as ma

HEAD_DIM = DIM // NUM_HEADS
COORDS = 100 * torch.rand(1, SELF.num_tokens, 2, generator=torch.Generator().manual_seed(4))
PRESENT = SELF.rows(*GROUPS[1:])
ABSENT = [ma.TokenSpec(GROUPS[0], None), *SELF.specs[1:]]


class Call(nn.Module):
    """A layer with the arguments that are no tensors, and the rotations made inside."""

    def __init__(self, layer, form, *constants, **options):
        super().__init__()
        self.layer, self.constants, self.options = layer, constants, options
        self.rope = ma.RopeFrequency(HEAD_DIM, 2, implementation=form) if form else None

    def forward(self, x, coords, **tensors):
        freqs = {} if self.rope is None else {"freqs": self.rope(coords)}
        if isinstance(self.layer, ma.PerceiverAttention):
            freqs = {f"{side}_freqs": each for side in "qk" for each in freqs.values()}
            return self.layer(x, None if "kv_cache" in tensors else x.sin(), **freqs, **tensors, **self.options)
        return self.layer(x, *self.constants, **freqs, **tensors, **self.options)


def make_call(name, separate, form):
    """A call of a layer and its arguments."""
    family = ma.noether if separate else ma
    which, _, variant = name.partition(" ")
    layer = make_layer(getattr(family, which), use_rope=form is not None, dtype=torch.float32, kv_dim=None)
    x, coords = make_x(SELF, dtype=torch.float32).detach(), COORDS
    constants = {"MixedAttention": [SELF.specs, SELF.patterns], "DotProductAttention": [], "PerceiverAttention": []}
    constants = constants.get(which, [SELF.specs])
    recording = {} if separate or which == "DotProductAttention" else {"return_kv_cache": variant == "recorded"}
    call = Call(layer, form, *constants, **recording)
    if variant != "read":
        return call, (x, coords), {}
    call.options = {} if separate else {"return_kv_cache": True}
    _, cache = call(x, coords)
    call.options = {}
    if which == "PerceiverAttention":
        return call, (x, coords), {"kv_cache": cache}
    call.constants = [ABSENT, *constants[1:]]
    return call, (x[:, PRESENT], coords[:, PRESENT]), {"kv_cache": {GROUPS[0]: cache[GROUPS[0]]}}


def tensors_of(result):
    return torch.utils._pytree.tree_leaves(result)


NAMES = [
    "MixedAttention",
    "MixedAttention recorded",
    "MixedAttention read",
    "DotProductAttention",
    "PerceiverAttention",
    "PerceiverAttention read",
    "SelfAnchorAttention",
    "SelfAnchorAttention read",
    "CrossAnchorAttention",
    "JointAnchorAttention",
]


FORMS = {"no rope": None, "complex": "complex", "real": "real"}
# Every two of name, layout and form meet; all three at once would be twice as many, and an export takes seconds.
CALLS = {
    f"{name}-{'separate' if separate else 'fused'}-{form}": (name, separate, FORMS[form])
    for i, name in enumerate(NAMES)
    for j, form in enumerate(FORMS)
    for separate in [(i + j) % 2 == 1]
}


def test_every_two_values_of_an_export_meet():
    for i, j in ((0, 1), (0, 2), (1, 2)):
        met = {(call[i], call[j]) for call in CALLS.values()}
        assert len(met) == len({call[i] for call in CALLS.values()}) * len({call[j] for call in CALLS.values()})


@pytest.mark.parametrize(("name", "separate", "form"), CALLS.values(), ids=CALLS)
def test_exported_saved_and_loaded(name, separate, form):
    call, args, kwargs = make_call(name, separate, form)
    with torch.no_grad():
        expected = call(*args, **kwargs)
        file = io.BytesIO()
        torch.export.save(torch.export.export(call, args, kwargs), file)
        file.seek(0)
        result = torch.export.load(file).module()(*args, **kwargs)
    # The same operators on the same numbers; but products of parts may be summed in another order.
    torch.testing.assert_close(tensors_of(result), tensors_of(expected), rtol=1e-5, atol=1e-5)


class AnySpec:
    """A token group of another library."""

    def __init__(self, name, size):
        self.name, self.size = name, size


class OfAnyLength(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.layer, self.spec = make_layer(dtype=torch.float32), spec

    def forward(self, x):
        specs = [self.spec("a", x.shape[1])]
        return self.layer(x, specs, [ma.AttentionPattern(["a"], ["a"])])


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("which", ["TokenSpec", "any spec", "dense"])
def test_sizes_may_be_dynamic(which, strict):
    make = {
        "TokenSpec": lambda: OfAnyLength(ma.TokenSpec),
        "any spec": lambda: OfAnyLength(AnySpec),
        "dense": lambda: make_layer(ma.DotProductAttention, dtype=torch.float32),
    }
    layer = make[which]()
    sizes = ({1: torch.export.Dim("n", min=2, max=1000)},)
    program = torch.export.export(layer, (torch.randn(1, 9, DIM),), dynamic_shapes=sizes, strict=strict)
    x = torch.randn(1, 17, DIM)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
