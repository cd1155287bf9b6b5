"""The example of flows without divergence runs, and the claim that it makes holds whatever was learned."""

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from examples.airfoil.data import BOX, draw_batch, random_flows
from examples.solenoidal import airfoil, periodic
from examples.solenoidal.__main__ import main
from examples.solenoidal.flow import Flows, random_points
from examples.solenoidal.model import FlowModel, predicted_by_potential
from mixed_attention import func


def test_it_runs(tmp_path, capsys):
    options = ["--steps", "2", "--points", "300", "--resolution", "6", "--output", str(tmp_path)]
    assert main(options) == 0
    for name in ("periodic", "airfoil"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    printed = capsys.readouterr().out
    for name in ("periodic, curl of a potential", "airfoil, curl of a stream function"):
        assert name in printed


def test_flows_are_their_own_curl():
    generator = torch.Generator().manual_seed(0)
    flows = Flows.random(2, generator)
    points = random_points(2, 7, generator).double()
    velocity, jacobian = func.value_and_jacobian(flows.velocity, points)
    torch.testing.assert_close(func.curl(jacobian), velocity)


def has_no_divergence(velocity, points):
    with torch.no_grad():
        _, jacobian = func.value_and_jacobian(velocity, points, check=False)
    return float(func.divergence(jacobian).abs().max()) < 1e-4 * float(jacobian.abs().max())


def test_a_net_that_learned_nothing_predicts_no_divergence():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flows, anchors, points = Flows.random(1, generator), random_points(1, 9, generator), random_points(1, 20, generator)
    model = FlowModel(dim=16, num_heads=2, num_blocks=1)
    with torch.no_grad():
        velocity = predicted_by_potential(model, model.encode(anchors, flows.velocity(anchors)))
    assert has_no_divergence(velocity, points)


def airfoil_predictions():
    """Both predictions around a random section by nets that learned nothing, and points to ask for."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flows = random_flows(1, 320, 1024, np.random.default_rng(0))
    batch = draw_batch(flows, torch.tensor([0]), airfoil.SETTINGS, generator)
    anchors = {name: tokens for name, tokens in batch.groups.items() if name.endswith("anchors")}
    with torch.no_grad():
        predictions = [
            predict(airfoil.make_model(count), anchors, batch.stream) for predict, count in airfoil.MODELS.values()
        ]
    return predictions, batch.groups["volume_queries"][:, :40]


def test_around_an_airfoil_a_stream_function_has_no_divergence_and_a_velocity_has():
    (by_velocity, by_stream_function), points = airfoil_predictions()
    assert not has_no_divergence(by_velocity, points)
    assert has_no_divergence(by_stream_function, points)


def test_the_held_out_flow_around_an_airfoil():
    problem = airfoil.make_problem(2, 50, 8, 0)
    assert problem.many.shape == (1, 50, 2)
    inside = problem.on_grid[..., 0].isnan()
    assert 0 < int(inside.sum()) < problem.grid.shape[1] / 8
    assert problem.grid.shape[1] == problem.shape[0] * problem.shape[1]
    (left, right), _ = BOX
    assert left < float(problem.grid[..., 0].min()) < float(problem.grid[..., 0].max()) < right
    for points, truth in ((problem.tests, problem.truth), (problem.grid, problem.on_grid)):
        assert points.shape == truth.shape


def test_grids_of_the_picture_are_of_the_flow():
    problem = periodic.make_problem(2, 50, 8, 0)
    assert problem.shape == (8, 8)
    assert problem.on_grid.shape == problem.grid.shape == (1, 64, 3)
