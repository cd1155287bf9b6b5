"""What the benchmark of the layer measures are the same functions."""

import pytest
import torch

from bench import facts, layer, tables
from bench.cases import Case

SKIPPING = Case("some queries", 2, 3, 16, {"a": 40, "q": 30}, ((("a", "q"), ("a",)),))
PLAIN = Case("anchors", 1, 3, 16, {"a": 40, "b": 30}, ((("a",), ("b",)), (("b",), ("a",))))


@pytest.mark.parametrize("case", [SKIPPING, PLAIN], ids=lambda case: case.name)
def test_all_layers_compute_the_same(case):
    device = torch.device("cpu")
    step = layer.make_step(case, device, torch.float32)
    layers = layer.make_layers(case, device, ["baseline"], compiled=False)
    assert ("ours, without the skip" in layers) == (case is SKIPPING)
    ours = layers.pop("ours")
    expected = step.training(ours), step.x.grad, ours.layer.qkv.weight.grad
    for module in layers.values():
        got = step.training(module), step.x.grad, ours.layer.qkv.weight.grad
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


def test_rows():
    rows = list(layer.measure(SKIPPING, torch.device("cpu"), "float32", layer.What(2, ["baseline"])))
    who = ["ours", "baseline", "ours, without the skip", "ours, qk_norm", "ours, attention alone"]
    assert [(row["pass"], row["who"]) for row in rows] == [
        (passed, name) for passed in ("forward", "forward + backward") for name in who
    ]
    assert all(row["error"] < 1e-5 for row in rows if row["who"] not in ("ours, qk_norm", "ours, attention alone"))
    table = tables.tables({**facts.of_run("bench", torch.device("cpu"), "a commit"), "rows": rows})
    assert "### The layer with qk_norm, fp32, over ours without\n\n| case | forward | forward + backward |" in table
