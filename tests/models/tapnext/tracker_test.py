"""The tracker for users: bookkeeping, one program, equality with the whole clip, clear errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import SlotTracker, TAPNextRuntime, certainty
from models.tapnext import tracker as tracker_module
from tests.models.tapnext.small_tapnext import RUNTIME, random_params, run, small, video

CONFIG = small()
PARAMS = random_params(CONFIG)
FRAMES = np.asarray((127.5 * (video(1, 8)[0] + 1)).astype(jnp.uint8))


def make(slots=4, **options):
    return SlotTracker(CONFIG, PARAMS, slots, **options)


def test_tracks_are_the_models():
    """Points of the first frame and a late one, frame by frame: as the whole clip is tracked."""
    tracker = make()
    queries = np.array([[0, 2.3, 7.1], [3, 6.6, 1.2]], np.float32)
    np.testing.assert_array_equal(tracker.add(queries), [0, 1])
    found = [tracker.step(frame[None]) for frame in FRAMES]
    expected, _ = run(CONFIG, RUNTIME, PARAMS, jnp.asarray(FRAMES)[None], jnp.asarray(queries)[None])
    sure = certainty(CONFIG, expected.track_logits, expected.tracks_yx, 8.0)
    for slot, first in ((0, 0), (1, 3)):
        for name, wanted in (
            ("tracks_yx", expected.tracks_yx),
            ("visible_logits", expected.visible_logits),
            ("certainty", sure),
        ):
            series = np.concatenate([getattr(tracks, name)[slot] for tracks in found])
            np.testing.assert_allclose(series[first:], wanted[0, slot, first:], atol=1e-4, err_msg=name)
            assert np.isnan(series[:first]).all()
        visible = np.concatenate([tracks.visible[slot] for tracks in found])
        np.testing.assert_array_equal(visible[first:], expected.visible_logits[0, slot, first:] > 0)
        assert not visible[:first].any()
    assert np.isnan(found[-1].tracks_yx[2:]).all()
    assert not found[-1].visible[2:].any()
    assert tracker.frame == 8


def test_slots_are_added_moved_and_freed_while_it_runs():
    tracker = make()
    tracker.add([[0, 1, 1], [0, 2, 2]])
    tracker.step(FRAMES[:1])
    np.testing.assert_array_equal(tracker.in_use, [True, True, False, False])
    tracker.free([0])
    np.testing.assert_array_equal(tracker.add([[tracker.frame, 3, 3], [tracker.frame + 2, 4, 4]]), [0, 2])
    first = tracker.step(FRAMES[1:2])
    assert not np.isnan(first.tracks_yx[:2]).any()
    assert np.isnan(first.tracks_yx[2:]).all()
    tracker.move([1], [[7.0, 3.0]])
    tracker.fill([0], [[2, 5.0, 5.0]])
    tracker.step(FRAMES[2:3])
    state = tracker.state.model
    np.testing.assert_array_equal(state.queries.frame[0, :3, 0], [2, 2, 3])
    np.testing.assert_array_equal(state.queries.yx[0, :3, 0], [[5, 5], [7, 3], [4, 4]])
    assert int(state.step[0]) == tracker.frame == 3


def test_one_program_per_resolution_number_of_slots_and_of_frames():
    """However many points come and go, and for every tracker."""
    before = tracker_module._step_program()._cache_size()
    for _ in range(2):
        tracker = make()
        for t, frame in enumerate(FRAMES[:4]):
            tracker.add([[t, 1.0 + t, 2.0]])
            tracker.step(frame[None])
    assert tracker_module._step_program()._cache_size() <= before + 1


@pytest.mark.slow
def test_other_resolutions_and_bfloat16():
    half = TAPNextRuntime(compute_dtype="bfloat16")
    tracker = make(image_size=(16, 24), runtime=half, radius=2.5)
    assert tracker.state.model.layers["0"].conv[0].dtype == jnp.bfloat16
    tracker.add([[0, 7.9, 11.9]])
    tracks = tracker.step(np.zeros((2, 16, 24, 3), np.uint8))
    assert tracks.tracks_yx.shape == (4, 2, 2)
    assert (tracks.tracks_yx[0] <= [7.5, 11.5]).all()  # pixels of the native image


def test_clear_errors(unchecked_types):
    tracker = make()
    tracker.add([[0, 1, 1]] * 3)
    with pytest.raises(ValueError, match="2 queries, but only 1 of 4 slots are free"):
        tracker.add([[0, 1, 1], [0, 2, 2]])
    with pytest.raises(ValueError, match=r"shape \(0,\); it must be \[Q, 3\]"):
        tracker.add([])
    with pytest.raises(ValueError, match=r"query_tyx\[0\] = \[0.0, nan, 1.0\]"):
        tracker.add([[0, np.nan, 1]])
    with pytest.raises(ValueError, match="slot 3 is free; fill it first"):
        tracker.move([3], [[1, 1]])
    with pytest.raises(ValueError, match=r"yx has shape \(2,\); it must be \[n, 2\]"):
        tracker.move([0], [1, 1])
    with pytest.raises(ValueError, match=r"slots = \[4\]; they must be different numbers from 0 to 3"):
        tracker.free([4])
    with pytest.raises(ValueError, match=r"slots = \[0, 0\]; they must be different"):
        tracker.fill([0, 0], [[0, 1, 1], [0, 2, 2]])
    with pytest.raises(ValueError, match=r"they must be whole numbers"):
        tracker.free([0.5])
    with pytest.raises(ValueError, match="1 slots, but 2 queries"):
        tracker.fill([0], [[0, 1, 1], [0, 2, 2]])
    with pytest.raises(ValueError, match=r"video has shape \(8, 12, 3\); this tracker takes \[T, 8, 12, 3\]"):
        tracker.step(FRAMES[0])
    tracker.step(FRAMES[:1])
    with pytest.raises(ValueError, match=r"query_tyx\[0\] is for frame 0, which has passed: the next is 1"):
        tracker.fill([3], [[0, 1, 1]])
    np.testing.assert_array_equal(tracker.in_use, [True, True, True, False])
