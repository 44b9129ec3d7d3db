"""Paths through time and maps between textures and frames."""

import numpy as np
import pytest

from tasks.points.data.paths import constant, fold, wander
from tasks.points.data.warps import STEEPEST, placements, project, random_ripple


def test_a_path_is_smooth_and_keeps_to_its_bounds() -> None:
    low, high = np.array([-1.0, 5.0, 2.0]), np.array([1.0, 6.0, 2.0])
    path = wander(np.random.default_rng(0), 50, 7.0, np.array([3.0, 0.4, 9.0]), low, high)
    times = np.arange(-1, 50, 0.01)
    values = path(times)
    assert np.all((values >= low - 1e-9) & (values <= high + 1e-9))
    assert np.ptp(values[:, 2]) < 1e-12  # equal bounds fix a number
    assert np.ptp(values[:, 0]) > 0.5
    # Twice differentiable: the second differences change little from step to step.
    second = np.diff(values[:, 0], 2) / 0.01**2
    assert np.abs(np.diff(second)).max() < 0.05 * np.abs(second).max()


def test_a_path_runs_through_known_values() -> None:
    """A B-spline of knots on a line is that line; a constant path stays."""
    path = wander(np.random.default_rng(0), 10, 2.0, np.zeros(1), np.array([3.0]), np.array([3.0]))
    assert np.allclose(path(np.array([-1.0, 0.0, 9.5])), 3.0)
    assert np.array_equal(constant(np.array([1.0, 2.0]))(np.array([0.0, 1e6])), [[1, 2], [1, 2]])
    line = type(path)(np.arange(20.0)[:, None], 2.0)
    at = np.array([0.0, 1.0, 2.5])
    assert np.allclose(line(at)[:, 0], (at + 1) / 2 + 1)


def test_reflection() -> None:
    values = np.array([[0.0], [1.5], [2.5], [-0.25], [4.1]])
    assert np.allclose(fold(values, np.array([0.0]), np.array([1.0]))[:, 0], [0, 0.5, 0.5, 0.25, 0.1])


@pytest.mark.parametrize(
    ("frames", "spacing", "low", "high"), [(0, 1.0, 0.0, 1.0), (5, 0.0, 0.0, 1.0), (5, 1.0, 2.0, 1.0)]
)
def test_impossible_paths(frames: int, spacing: float, low: float, high: float) -> None:
    with pytest.raises(ValueError, match="nothing can move so"):
        wander(np.random.default_rng(0), frames, spacing, np.ones(1), np.array([low]), np.array([high]))


def test_placements_by_hand() -> None:
    """Scaled twice, turned by a quarter (x to y, as rows grow downwards), put at (10, 20)."""
    values = np.array([[10.0, 20.0, np.log(2.0), np.pi / 2, 0, 0, 0, 0]])
    places = project(
        placements(values, (3.0, 4.0))[:, None], np.array([[[3.0, 4.0], [4.0, 4.0], [3.0, 5.0]]])
    )
    assert np.allclose(places, [[[10, 20], [10, 22], [8, 20]]])
    tilted = placements(np.array([[0, 0, 0, 0, 0, 0, 0.1, 0.0]]), (0.0, 0.0))
    assert np.allclose(project(tilted, np.array([[5.0, 3.0]])), [[5 / 1.5, 2.0]])
    wide = placements(np.array([[0, 0, 0, 0, np.log(3.0), 0.5, 0, 0]]), (0.0, 0.0))
    assert np.allclose(project(wide, np.array([[1.0, 1.0]])), [[3 * 1.5, 1 / 3]])


def test_a_ripple_is_undone_exactly() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        ripple = random_ripple(rng, 30, 80.0, 6.0)
        times = rng.uniform(0, 29, 40)
        amplitudes = ripple.amplitudes(times)
        places = rng.uniform(0, 80, (5, 40, 2))
        undone = ripple.undo(amplitudes, places)
        again = undone + ripple.displace(amplitudes, undone)
        assert np.abs(again - places).max() < 1e-6
        assert np.abs(undone - places).max() <= ripple.reach
        steps = 1e-4 * np.array([[1.0, 0.0], [0.0, 1.0]])
        slopes = [
            np.linalg.norm(
                ripple.displace(amplitudes, places + s) - ripple.displace(amplitudes, places), axis=-1
            )
            for s in steps
        ]
        assert max(s.max() for s in slopes) / 1e-4 <= STEEPEST * 1.01
