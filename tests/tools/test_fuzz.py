"""The fuzzer itself: what is right passes, what is wrong is found soon and becomes small."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import mixed_attention as ma
from mixed_attention import ops

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "tools" / "fuzz.py")
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)

CPU = torch.device("cpu")


def test_what_is_right_passes(device: torch.device):
    counts = Counter()
    assert not any(fuzz.search(range(15), device, counts))
    assert counts["cases"] == 15
    assert counts["kind: layer"] > 0


def test_a_seed_is_a_trial():
    for seed in range(200):
        for device_type in ("cpu", "cuda"):
            trial = fuzz.draw(seed, device_type)
            assert trial == fuzz.draw(seed, device_type)
            names = {"Trial": fuzz.Trial, "Case": fuzz.Case, "torch": torch}
            assert eval(fuzz.spell(trial), names) == trial
            assert trial.case.plan.num_queries == sum(size for _, size in trial.case.asking)
            assert trial.case.plan.num_keys == sum(size for _, size in trial.case.placed)


def _without_last_keys(flat: list[int]) -> list[int]:
    """A plan whose ranges of 1 mod 16 keys, if longer than that, end a key early."""
    changed = []
    for segment in ops.query_segments(flat):
        ranges = [(start, end - ((end - start) % 16 == 1 < end - start)) for start, end in segment.key_ranges]
        changed += [segment.start, segment.end, len(ranges), *(row for key_range in ranges for row in key_range)]
    return changed


def drops_a_key(q, k, v, plan, *, softmax_scale, key_padding_mask, dropout_p, return_lse):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seed = ops.draw_seed(q.device) if dropout_p > 0 else None
    flat = _without_last_keys(plan.flat())
    return torch.ops.mixed_attention.forward(q, k, v, flat, scale, key_padding_mask, dropout_p, seed)


def counts_repeats_once(q, k, v, plan, **arguments):
    patterns = [ma.AttentionPattern(queries, list(dict.fromkeys(keys))) for queries, keys in plan.patterns]
    specs = [ma.TokenSpec(group.name, group.size if group.query_start is not None else None) for group in plan.groups]
    cached = [ma.TokenSpec(group.name, group.size) for group in plan.groups]
    is_short = any(group.key_start is None for group in plan.groups)
    plan = ma.AttentionPlan.compile(specs, patterns, cached=cached, skip_unread_keys=is_short)
    return ma.ops.attention(q, k, v, plan, **arguments)


def draws_another_seed(q, k, v, plan, *, dropout_p, **arguments):
    if dropout_p > 0:
        ops.draw_seed(q.device)
    return ma.ops.attention(q, k, v, plan, dropout_p=dropout_p, **arguments)


def forgets_dlse(q, k, v, plan, **arguments):
    out, lse = ma.ops.attention(q, k, v, plan, **arguments)
    return out, lse.detach() + 0 * out.sum()


def swaps_heads(q, k, v, plan, **arguments):
    out, lse = ma.ops.attention(q, k, v, plan, **arguments)
    return out.roll(1, 2), lse


def looks_behind_the_mask(q, k, v, plan, *, key_padding_mask, **arguments):
    mask = None if key_padding_mask is None else key_padding_mask[:1]
    return ma.ops.attention(q, k, v, plan, key_padding_mask=mask, **arguments)


# With what the smallest input that fails looks like.
PLANTED = {
    drops_a_key: {"sizes": (17,), "attends": "a>a"},
    counts_repeats_once: {"sizes": (1,), "attends": "a>aa"},
    draws_another_seed: {"batch_size": 1, "mask": None, "num_heads": 1},
    forgets_dlse: {"sizes": (1,), "attends": "a>a", "num_heads": 1, "dlse": True},
    swaps_heads: {"sizes": (1,), "attends": "a>a", "num_heads": 2},
    looks_behind_the_mask: {"batch_size": 2, "attends": "a>a", "num_heads": 1},
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_what_is_wrong_is_found_and_made_small(planted, monkeypatch):
    monkeypatch.setattr(ma, "attention", planted)
    trials = (fuzz.draw(seed, "cpu") for seed in range(200))
    is_wrong = lambda trial: isinstance(fuzz.error_of(trial, CPU), AssertionError)  # noqa: E731
    found = next(trial for trial in trials if not trial.is_layer and is_wrong(trial))
    smaller = fuzz.shrink(found, is_wrong)
    assert is_wrong(smaller)
    assert {name: getattr(smaller.case, name) for name in PLANTED[planted]} == PLANTED[planted]


def test_a_layer_that_rotates_wrongly_is_found(monkeypatch):
    monkeypatch.setattr(ops, "attend_in_place", _rotates_too_few(ops.attend_in_place))
    monkeypatch.setattr(ops, "run_layer", _rotates_too_few_at_once(ops.run_layer))
    failure = next(failure for failure in fuzz.search(range(200), CPU, Counter()) if failure)
    assert "of the layer is off by" in failure.error
    assert "is_layer=True" in failure.smaller
    assert "did not fail" not in failure.smaller_error


def _rotates_too_few(attend):
    def attend_in_place(buffers, pairs, mask, seed, call):
        turned = [None if pair is None else pair.index_fill(1, torch.tensor([0]), 1.0) for pair in pairs]
        return attend(buffers, turned, mask, seed, call)

    return attend_in_place


def _rotates_too_few_at_once(run):
    def run_layer(x, maps, freqs, mask, call):
        return run(x, maps, None if freqs is None else freqs.index_fill(1, torch.tensor([0]), 1.0), mask, call)

    return run_layer


def test_processes_that_end_or_hang_are_reported(monkeypatch, capfd):
    """A process is killed as if by a fault of the kernels: its seed is named, the rest is tried by another one."""
    monkeypatch.syspath_prepend(Path(fuzz.__file__).parent)  # where processes look for it
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "-n", "6", "--seed", "100"])
    real = fuzz.end_of

    def end_of(share, timeout):
        if share.seeds == range(100, 106) and share.at.value == 0 and share.process.is_alive():
            share.process.kill()
            share.process.join()
        return real(share, timeout)

    monkeypatch.setattr(fuzz, "end_of", end_of)
    assert fuzz.main() == 1
    out = capfd.readouterr().out
    assert "FAILED: seed 100, native: the process ended with exit code -9" in out
    assert "5 cases in" in out
