"""The airfoil example: its panel method against theory, and a small run through its command line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from examples.airfoil.__main__ import main
from examples.airfoil.data import ANGLES, Flows, as_pairs, free_streams, points_in_box
from examples.airfoil.evaluate import TrainingMean, make_case, predict
from examples.airfoil.model import AirfoilSurrogate
from examples.airfoil.panel import Naca4, PanelFlow, free_stream
from examples.airfoil.report import Report
from examples.airfoil.settings import Settings
from examples.airfoil.train import Training

ROOT = Path(__file__).parents[2]
TINY = ["--epochs", "3", "--sections", "12", "--cases", "1", "--queries", "3000"]


def flow_around(digits: str, num_panels: int = 160) -> PanelFlow:
    return PanelFlow(Naca4.of(digits).contour(num_panels))


def circle(num_panels: int) -> PanelFlow:
    nodes = np.exp(1j * np.linspace(0, 2 * np.pi, num_panels + 1))
    nodes[-1] = nodes[0]
    return PanelFlow(nodes)


class TestPanelMethod:
    def test_surface_velocity_of_a_cylinder(self) -> None:
        """Along the contour, counter-clockwise, it is -2 sin(theta); the error of the panels is of second order."""
        errors = []
        for num_panels in (40, 80):
            flow = circle(num_panels)
            errors.append(np.abs(flow.strengths[:, 0] + 2 * np.sin(np.angle(flow.nodes))).max())
        assert errors[0] < (2 * np.pi / 40) ** 2
        assert errors[1] < errors[0] / 3

    def test_field_of_a_cylinder(self) -> None:
        """Panels of length h bend the field by their angle h / 2 near a corner, and by (h / 2)^2 away from corners."""
        flow, panel_length = circle(160), 2 * np.pi / 160
        angle = np.linspace(0.01, 2 * np.pi, 500)
        for radius, bound in ((1 + panel_length / 4, panel_length / 2), (1.5, (panel_length / 2) ** 2), (8, 1e-4)):
            z = radius * np.exp(1j * angle)
            exact = (1 - 1 / z**2).conj()
            assert np.abs(flow.velocity(z, 0.0) - exact).max() < bound

    @pytest.mark.parametrize("digits", ["0006", "0012", "0018"])
    def test_lift_slope_of_a_thin_section(self, digits: str) -> None:
        """2 pi at no thickness. By conformal mapping to first order in the half thickness y(theta), it is 2 pi (1 + e)

        with e = 2 / pi * integral of y / sin(theta) over 0..pi: t for an ellipse, 0.77 t for Joukowski's sections,
        0.84 t for this family. Terms of the order of t squared stay.
        """
        half = Naca4.of(digits).contour(4000)[1:2000].imag
        angle = np.linspace(0, np.pi, 2001)[1:-1]
        first_order = 2 / np.pi * np.trapezoid(half / np.sin(angle), angle)
        flow, small = flow_around(digits), 1e-3
        slope = flow.lift_coefficient(small) / small
        thickness = int(digits[2:]) / 100
        assert abs(slope / (2 * np.pi) - 1 - first_order) < thickness**2
        assert 0.77 * thickness < slope / (2 * np.pi) - 1 < thickness  # between Joukowski's sections and the ellipse

    @pytest.mark.parametrize("digits", ["2406", "2412", "4412", "6509"])
    def test_zero_lift_angle_of_a_cambered_section(self, digits: str) -> None:
        """Thin-airfoil theory: -1/pi * integral of slope * (cos(theta) - 1), x = (1 - cos(theta)) / 2; off by O(t)."""
        section = Naca4.of(digits)
        angle = (np.arange(20000) + 0.5) * np.pi / 20000
        m, p, x = section.camber, section.camber_position, (1 - np.cos(angle)) / 2
        slope = 2 * (p - x) * np.where(x < p, m / p**2, m / (1 - p) ** 2)
        expected = -(slope * (np.cos(angle) - 1)).mean()
        flow = flow_around(digits)
        lift = np.array([flow.lift_coefficient(0.0), flow.lift_coefficient(np.pi / 2)])  # of cos(a) and of sin(a)
        assert np.arctan2(-lift[0], lift[1]) == pytest.approx(expected, rel=section.thickness)

    def test_no_flow_through_the_panels(self) -> None:
        """Seen from a millionth of a panel outside. The leak that stays is an error of second order in the panels."""
        leaks = []
        for num_panels in (80, 160):
            flow = flow_around("4412", num_panels)
            lengths = np.abs(np.diff(flow.nodes))
            velocity = flow.basis_velocity(flow.midpoints - 1j * flow.tangents * lengths * 1e-6)
            leaks.append(np.abs((velocity * flow.tangents.conj()[:, None]).imag).max())
        assert leaks[0] < 1e-3
        assert leaks[1] < leaks[0] / 3

    @pytest.mark.parametrize("digits", ["0012", "2412", "6409"])
    def test_lift_converges_with_the_square_of_the_panel_length(self, digits: str) -> None:
        lifts = [flow_around(digits, num_panels).lift_coefficient(0.1) for num_panels in (40, 80, 160, 320)]
        steps = np.abs(np.diff(lifts))
        np.testing.assert_allclose(steps[:-1] / steps[1:], 4, rtol=0.1)

    def test_lift_is_the_circulation_around_the_section(self) -> None:
        """Integrated along a circle that is far away; the trapezoidal rule is exact there but for rounding."""
        flow, angle = flow_around("2412"), 0.1
        arc = np.exp(1j * np.arange(256) * 2 * np.pi / 256)
        velocity = flow.velocity(0.5 + 1.5 * arc, angle)
        circulation = (velocity * (1j * arc).conj()).real.mean() * 2 * np.pi * 1.5
        assert flow.lift_coefficient(angle) == pytest.approx(-2 * circulation, abs=1e-9)

    @pytest.mark.parametrize("num_panels", [160, 320])
    def test_speed_along_the_surface_is_that_just_outside(self, num_panels: int) -> None:
        """Though one is interpolated and the other summed; they differ by the square of the turn between panels."""
        flow, angle = flow_around("2412", num_panels), 0.1
        position = np.arange(num_panels) + 0.5
        points, normals, speeds = flow.surface(position)
        along, outside = np.abs(speeds @ free_stream(angle)), np.abs(flow.velocity(points + 1e-7 * normals, angle))
        turn = np.abs(np.angle(flow.tangents[1:] / flow.tangents[:-1])).max()
        # At the trailing edge the speed is a small power of the distance, which no straight line follows.
        assert np.abs(along - outside)[2:-2].max() < turn**2 * along.max()
        np.testing.assert_allclose(flow.pressure(position, angle), 1 - along**2)

    def test_points_inside_and_on_nodes_have_no_velocity(self) -> None:
        flow = flow_around("2412")
        inside = np.array([0.01, 0.3 + 0.02j, 0.99 + 0.001j, flow.nodes[7]])
        outside = np.array([-0.01, 0.3 + 0.2j, 1.01, 0.3 - 0.1j])
        assert np.isnan(flow.velocity(inside, 0.1)).all()
        assert np.isfinite(flow.velocity(outside, 0.1)).all()

    def test_angles_combine_two_solutions(self) -> None:
        flow, points = flow_around("2412"), np.array([0.5 + 0.3j, -0.2 - 0.1j])
        turned = flow.basis_velocity(points) @ free_stream(0.3)
        assert np.array_equal(turned, flow.velocity(points, 0.3))
        far = 1e6 * np.exp(1j * np.arange(4))
        np.testing.assert_allclose(flow.velocity(far, 0.3), np.exp(0.3j), atol=1e-6)

    @pytest.mark.parametrize("digits", ["241", "24120", "24x2", "2400", "2012"])
    def test_designations_that_name_no_section(self, digits: str) -> None:
        with pytest.raises(ValueError, match="expected a NACA 4-digit section"):
            Naca4.of(digits)

    def test_contours_that_are_refused(self) -> None:
        nodes = Naca4.of("2412").contour(40)
        with pytest.raises(ValueError, match="expected a closed contour"):
            PanelFlow(nodes[:-1])
        with pytest.raises(ValueError, match="got a clockwise one"):
            PanelFlow(nodes[::-1])
        with pytest.raises(ValueError, match="num_panels: expected an even number"):
            Naca4.of("2412").contour(41)


@pytest.fixture
def settings() -> Settings:
    return Settings(sections=6)


class TestRun:
    def test_an_interrupted_run_resumes_to_the_same_bits(self, tmp_path, monkeypatch, capsys) -> None:
        assert main([*TINY, "--output", str(tmp_path / "whole")]) == 0
        report = capsys.readouterr().out
        for word in ("pressure coefficient", "velocity", "all"):
            assert word in report
        assert (tmp_path / "whole" / "airfoil.png").read_bytes().startswith(b"\x89PNG")

        take_step, steps = Training.step, iter(range(100))

        def step_until_interrupted(*arguments):
            if next(steps) == 3:  # of two steps an epoch: in the middle of the second
                raise KeyboardInterrupt
            return take_step(*arguments)

        again = [*TINY, "--output", str(tmp_path / "interrupted")]
        monkeypatch.setattr(Training, "step", step_until_interrupted)
        assert main(again) == 130
        assert "interrupted after epoch 1 of 3" in capsys.readouterr().out
        monkeypatch.undo()
        assert main(again) == 0
        assert "1 of 3 epochs are done" in capsys.readouterr().out

        whole, resumed = (torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "interrupted"))
        for part in ("model", "generator"):
            torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
        for ours, theirs in zip(resumed["optimizers"], whole["optimizers"]):
            torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)

    def test_a_checkpoint_without_losses_resumes_in_the_schedule(self, tmp_path, monkeypatch) -> None:
        """Those of before losses were kept: the learning rate goes on where it was."""
        path, progress = tmp_path / "checkpoint.pt", []
        settings = Settings(epochs=2, sections=12)
        training = Training(settings, torch.device("cpu"))
        training.epoch = 1
        training.save(path)
        state = torch.load(path)
        del state["losses"]
        torch.save(state, path)
        monkeypatch.setattr(Training, "step", lambda self, batch, at: progress.append(at) or 0.0)
        monkeypatch.setattr("examples.airfoil.train.epoch_of_batches", lambda *_: [None, None])
        resumed = Training(settings, torch.device("cpu"))
        resumed.load(path)
        resumed.run(range(12), path)
        assert progress == [0.5, 0.75]
        assert resumed.losses == [0.0, 0.0]

    def test_a_checkpoint_of_other_settings_is_refused(self, tmp_path) -> None:
        Training(Settings(epochs=3), torch.device("cpu")).save(tmp_path / "checkpoint.pt")
        with pytest.raises(SystemExit, match=r"trained with \{'epochs': 3\}.*--restart"):
            main(["--epochs", "4", "--output", str(tmp_path)])

    def test_too_few_sections_are_refused(self, tmp_path) -> None:
        with pytest.raises(SystemExit, match="sections: expected at least 6"):
            main(["--sections", "5", "--output", str(tmp_path)])

    def test_a_failed_save_leaves_the_old_checkpoint(self, tmp_path, monkeypatch) -> None:
        training = Training(Settings(), torch.device("cpu"))
        path = tmp_path / "checkpoint.pt"
        training.save(path)
        before = path.read_bytes()

        def fail_halfway(state, file):
            file.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", fail_halfway)
        with pytest.raises(KeyboardInterrupt):
            training.save(path)
        assert path.read_bytes() == before

    def test_a_missing_package_is_named_with_the_extra_that_has_it(self) -> None:
        program = (
            "import runpy, sys; sys.modules['tqdm'] = None; runpy.run_module('examples.airfoil', run_name='__main__')"
        )
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "needs tqdm, which is not installed: pip install 'mixed_attention[examples]'" in run.stderr


class TestEvaluation:
    @pytest.fixture
    def case(self, settings):
        return make_case("2412", 4.0, 1500, settings, np.random.default_rng(0))

    def test_chunks_do_not_matter(self, case) -> None:
        """Each query sees the anchors alone, so only the rounding of products of another height may differ."""
        model = AirfoilSurrogate().eval()
        whole = predict(model, case, chunk_size=10**6)
        chunked = predict(model, case, chunk_size=137)
        for branch, values in whole.items():
            assert values.shape == case.truth[branch].shape
            torch.testing.assert_close(chunked[branch], values, rtol=1e-4, atol=1e-5)

    def test_the_cache_does_not_matter(self, case) -> None:
        """The same queries beside their anchors, in one pass without a cache."""
        model = AirfoilSurrogate().eval()
        queries = {f"{branch}_queries": tokens for branch, tokens in case.queries.items()}
        with torch.inference_mode():
            uncached = model({**case.anchors, **queries}, case.stream)
        for branch, values in predict(model, case).items():
            num_anchors = case.anchors[f"{branch}_anchors"].shape[1]
            torch.testing.assert_close(values, uncached[branch][:, num_anchors:], rtol=1e-4, atol=1e-5)

    def test_the_shape_reaches_the_volume_through_surface_anchors(self, case) -> None:
        model = AirfoilSurrogate().eval()
        thicker = case.anchors["surface_anchors"] * torch.tensor([1.0, 1.5, 1.0, 1.0])
        other = dataclasses.replace(case, anchors={**case.anchors, "surface_anchors": thicker})
        assert not torch.allclose(predict(model, case)["volume"], predict(model, other)["volume"])

    def test_queries_are_outside_and_as_many_as_asked_for(self, case) -> None:
        assert case.queries["volume"].shape[1] >= 1500
        assert all(tokens.isfinite().all() for tokens in (*case.queries.values(), *case.truth.values()))
        assert case.outside.sum() == case.queries["volume"].shape[1] < case.outside.size

    def test_the_training_mean_is_taken_over_places_and_angles(self, case) -> None:
        """Flows made by hand: the velocity is twice the free stream everywhere, along the surface its x component."""
        rng = np.random.default_rng(0)
        flows = Flows(
            surface=torch.zeros(2, 320, 4),
            surface_speed=torch.tensor([1.0, 0.0]).expand(2, 320, 2),
            volume=as_pairs(points_in_box(2 * 20_000, rng)).view(2, -1, 2),
            volume_velocity=2 * torch.eye(2).expand(2, 20_000, 2, 2),
        )
        streams = free_streams(torch.deg2rad(torch.linspace(*ANGLES, 1001)))
        values = TrainingMean(flows).predict(case)
        for branch, expected in (("surface", 1 - streams[:, :1] ** 2), ("volume", streams)):
            assert values[branch].shape == case.truth[branch].shape
            torch.testing.assert_close(values[branch], expected.mean(0).expand_as(values[branch]), rtol=0, atol=2e-3)

    def test_the_report_counts_squares(self, case) -> None:
        report, truth = Report(), case.truth
        report.add(case, {k: 1.1 * v for k, v in truth.items()}, {k: 0.5 * v for k, v in truth.items()})
        for errors in report.total.values():
            assert errors.relative == pytest.approx((0.1, 0.5), rel=1e-5)
            assert errors.factor == pytest.approx(5, rel=1e-5)
        assert "NACA 2412 at 4.0°" in str(report)
