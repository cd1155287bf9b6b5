"""AB-UPT of the published package before and after the swap, where that package is installed."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("noether.modeling.models.ab_upt", reason="needs the package emmiai-noether")

from bench import noether as bench
from bench.check import relative_error

SIZES = bench.Sizes(dim=24, num_heads=3, supernodes=64, anchors=96)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return bench.make_model(SIZES)


@pytest.fixture
def step(model):
    return bench.make_step(SIZES, torch.device("cpu"), torch.bfloat16)


def test_results_are_as_exact_as_before(model, step):
    model = bench.with_large_weights(model)
    errors = bench.differences(model, step, torch.rand(1, 300, 3), chunk_size=128)
    for name, before in errors["noether"].items():
        assert errors["ours"][name]["relative"] <= 2 * before["relative"], name


def test_gradients_in_fp32_differ_as_much_as_those_of_another_order_of_tokens(model, step):
    step, order = replace(step, dtype=torch.float32), torch.randperm(SIZES.anchors)
    anchors = {name: tokens[:, order] for name, tokens in step.inputs["domain_anchor_positions"].items()}
    targets = {name: target[:, order] for name, target in step.targets.items()}
    shuffled = replace(step, inputs=step.inputs | {"domain_anchor_positions": anchors}, targets=targets)
    model = bench.with_large_weights(model)
    expected = gradients(model, step)
    rounding = relative_error(gradients(model, shuffled), expected)
    assert relative_error(gradients(bench.swapped(model), step), expected) <= 2 * rounding


def gradients(model, step):
    step.training(model)
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def test_losses_of_a_training(model, step):
    rows = bench.loss_curves({"noether": model, "ours": bench.swapped(model)}, step, num_steps=8)
    distances = {row["who"]: row["distance"] for row in rows}
    assert distances["ours"] <= 2 * distances["noether"]
