"""What the golden files do not show: means over videos, odd inputs, and figures worked out by hand."""

import math

import numpy as np
import pytest

from tasks.points.metrics import METRICS, mean_over_videos, tapvid_metrics

QUERY = np.array([[[0.0, 5.0, 5.0]]])


def by_hand(pred_xy, pred_occluded, mode="first"):
    """One point at (5, 5), hidden in frame 2 of 4."""
    truth = np.full((1, 1, 4, 2), 5.0)
    occluded = np.array([[[False, False, True, False]]])
    given = np.asarray(pred_xy, float)[None, None]
    found = tapvid_metrics(QUERY, occluded, truth, np.asarray(pred_occluded)[None, None], given, mode)
    return {name: float(value[0]) for name, value in found.items()}


def test_figures_worked_out_by_hand():
    """Frame 1 right and seen; frame 2 falsely seen; frame 3 three pixels off."""
    found = by_hand([[5, 5], [5, 5], [5, 5], [8, 5]], [False, False, False, False])
    assert found["occlusion_accuracy"] == pytest.approx(2 / 3)
    assert [found[f"pts_within_{d}"] for d in (1, 2, 4)] == [0.5, 0.5, 1.0]
    # Two visible; false alarms: frame 2, and below 4 pixels frame 3, too.
    assert [found[f"jaccard_{d}"] for d in (1, 2, 4)] == pytest.approx([1 / 4, 1 / 4, 2 / 3])
    assert found["average_pts_within_thresh"] == pytest.approx((0.5 + 0.5 + 3 * 1.0) / 5)
    assert found["average_jaccard"] == pytest.approx((2 * 0.25 + 3 * 2 / 3) / 5)


def test_the_query_frame_is_not_scored():
    good, bad = [[5, 5]] * 4, [[99, 99], *[[5, 5]] * 3]
    occluded = [False, False, True, False]
    for mode in ("first", "strided"):
        assert by_hand(bad, occluded, mode) == by_hand(good, occluded, mode)
        assert by_hand(good, occluded, mode)["average_jaccard"] == 1


def test_an_unknown_mode_is_refused(unchecked_types):
    with pytest.raises(ValueError, match="query mode 'last': must be 'first' or 'strided'"):
        by_hand([[5, 5]] * 4, [False] * 4, "last")


def test_undefined_videos_are_left_out_and_counted():
    defined, empty = dict.fromkeys(METRICS, 0.5), dict.fromkeys(METRICS, math.nan)
    partly = empty | {"occlusion_accuracy": 1.0}
    means = mean_over_videos([defined, empty, partly, defined | {"occlusion_accuracy": 0.0}])
    assert means["average_jaccard"] == (0.5, 2, 2)
    assert means["occlusion_accuracy"] == (0.5, 3, 1)
    assert math.isnan(mean_over_videos([empty])["average_jaccard"].value)
    assert mean_over_videos([]) == {}
    with pytest.raises(ValueError, match="different metrics"):
        mean_over_videos([{"a": 1.0}, {"b": 1.0}])


def test_nothing_visible_is_nan_without_a_warning(recwarn):
    query = np.array([[[3.0, 5.0, 5.0]]])  # on the last frame: nothing is evaluated
    zeros = np.zeros((1, 1, 4, 2))
    found = tapvid_metrics(query, np.zeros((1, 1, 4), bool), zeros, np.zeros((1, 1, 4), bool), zeros, "first")
    assert all(np.isnan(value).all() for value in found.values())
    assert not recwarn.list
