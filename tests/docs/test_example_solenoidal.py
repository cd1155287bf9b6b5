"""The example of flows without divergence runs, and the claim that it makes holds whatever was learned."""

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from examples.solenoidal.__main__ import main
from examples.solenoidal.flow import Flows, random_points
from examples.solenoidal.model import FlowModel, predicted_by_potential
from mixed_attention import func


def test_it_runs(tmp_path, capsys):
    options = ["--steps", "2", "--points", "300", "--resolution", "6", "--output", str(tmp_path)]
    assert main(options) == 0
    assert (tmp_path / "solenoidal.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "curl of a potential" in printed


def test_flows_are_their_own_curl():
    generator = torch.Generator().manual_seed(0)
    flows = Flows.random(2, generator)
    points = random_points(2, 7, generator).double()
    velocity, jacobian = func.value_and_jacobian(flows.velocity, points)
    torch.testing.assert_close(func.curl(jacobian), velocity)


def test_a_net_that_learned_nothing_predicts_no_divergence():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flows, anchors, points = Flows.random(1, generator), random_points(1, 9, generator), random_points(1, 20, generator)
    model = FlowModel(dim=16, num_heads=2, num_blocks=1)
    with torch.no_grad():
        velocity = predicted_by_potential(model, model.encode(anchors, flows.velocity(anchors)))
        _, jacobian = func.value_and_jacobian(velocity, points, check=False)
    assert float(func.divergence(jacobian).abs().max()) < 1e-4 * float(jacobian.abs().max())
