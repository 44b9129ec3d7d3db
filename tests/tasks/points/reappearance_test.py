"""AJ_RD by hand: which events are kept, and what a pool of several videos gives."""

import math

import numpy as np
import pytest

from tasks.points.reappearance import aj_rd, concatenate, reappearances


def events_of(visible: str, pred_visible: str | None = None, off: float = 0.0):
    """One track in one video; "1" visible."""
    seen = np.array([c == "1" for c in visible])[None, :, None]
    told = seen if pred_visible is None else np.array([c == "1" for c in pred_visible])[None, :, None]
    truth = np.zeros((*seen.shape, 2))
    return reappearances(truth, seen, truth + np.array([off, 0.0]), told)


def test_only_records_of_duration_are_kept():
    #        0123456789
    found = events_of("0100101001")
    assert found.where[:, 1].tolist() == [1, 4]  # of 1, 2, 1 and 2 hidden frames
    assert found.durations.tolist() == [1, 2]
    assert events_of("1111").durations.size == 0
    assert events_of("0000").durations.size == 0


def test_a_distance_equal_to_the_threshold_is_near():
    found = events_of("011", off=2.0)
    assert found.jaccards.tolist() == [[0, 1, 1, 1, 1]]


def test_false_alarms_and_misses_after_the_event():
    # From frame 1 on: visible 1, 3; said to be visible 1, 2.
    found = events_of("0101", "0110")
    assert found.jaccards[0].tolist() == pytest.approx([1 / 3] * 5)
    assert aj_rd(found)["aj_rd"] == pytest.approx(1 / 3)


def test_a_pool_weighs_events_not_videos():
    one, two = events_of("0101", "0110"), events_of("00010000001")
    pooled = aj_rd(concatenate([one, two]))
    assert pooled["aj_rd_min1"] == pytest.approx((1 / 3 + 1 + 1) / 3)
    assert pooled["aj_rd_min4"] == pytest.approx(1.0)
    assert pooled["aj_rd"] == pytest.approx(((1 / 3 + 2) / 3 + 1) / 2)
    assert math.isnan(pooled["aj_rd_min16"])


def test_no_events_are_nan_without_a_warning(recwarn):
    assert all(math.isnan(value) for value in aj_rd(concatenate([])).values())
    assert not recwarn.list
