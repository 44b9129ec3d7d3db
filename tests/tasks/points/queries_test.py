"""Query sampling beyond the golden files: empty results, bad options, shared data left alone."""

import numpy as np
import pytest

from tasks.points.queries import sample_first, sample_queries, sample_strided


def test_a_video_without_visible_points_has_no_queries():
    occluded, tracks = np.ones((3, 7), bool), np.zeros((3, 7, 2), np.float32)
    for mode in ("first", "strided"):
        found = sample_queries(occluded, tracks, mode)
        assert found.query_tyx.shape == (0, 3)
        assert found.tracks_xy.shape == (0, 7, 2)


def test_queries_are_y_before_x():
    tracks = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    found = sample_first(np.array([[True, False]]), tracks)
    assert found.query_tyx.tolist() == [[1, 4, 3]]
    assert found.track.tolist() == [0]


def test_read_only_annotations_are_enough():
    """Nothing is scaled in place: the same arrays give the same queries again."""
    rng = np.random.default_rng(0)
    occluded, tracks = rng.random((4, 12)) < 0.4, rng.random((4, 12, 2))
    occluded.flags.writeable = tracks.flags.writeable = False
    first, again = sample_strided(occluded, tracks), sample_strided(occluded, tracks)
    np.testing.assert_array_equal(first.query_tyx, again.query_tyx)


def test_bad_options_are_refused(unchecked_types):
    occluded, tracks = np.zeros((1, 2), bool), np.zeros((1, 2, 2))
    with pytest.raises(ValueError, match="stride = 0: must be at least 1 frame"):
        sample_strided(occluded, tracks, 0)
    with pytest.raises(ValueError, match="query mode 'all'"):
        sample_queries(occluded, tracks, "all")
