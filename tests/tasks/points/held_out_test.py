"""Clips judged by hand: what counts, what is hidden in between, and the order of batches."""

import numpy as np
import pytest

from tasks.points.controls import static
from tasks.points.held_out import (
    OCCLUDED,
    REAPPEARING,
    batches_of,
    clip_metrics,
    hidden_before,
    judge_predictor,
    shown_means,
)

FRAMES, HEIGHT, WIDTH = 6, 64, 128


def clip(speed: float = 0.0, hidden: tuple[int, ...] = (), index: int = 0) -> dict[str, np.ndarray]:
    """Two points that move right by `speed` a frame, the first hidden at times; a third row fills up."""
    tracks = np.zeros((3, FRAMES, 2), np.float32)
    tracks[:, :, 0] = 20.0
    tracks[:, :, 1] = 30.0 + speed * np.arange(FRAMES)
    visible = np.ones((3, FRAMES), bool)
    visible[0, list(hidden)] = False
    queries = np.concatenate([np.zeros((3, 1)), tracks[:, 0]], axis=1).astype(np.float32)
    return {
        "video": np.full((FRAMES, HEIGHT, WIDTH, 3), index, np.uint8),
        "query_tyx": queries,
        "tracks_yx": tracks,
        "visible": visible,
        "valid": np.array([True, True, False]),
    }


def test_distances_are_measured_in_a_square_of_256_pixels() -> None:
    """3 pixels of 64 in height are 12 of 256, 3 of 128 in width are 6."""
    truth = clip()
    for axis, within in ((0, 1 / 5), (1, 2 / 5)):
        moved = truth["tracks_yx"].copy()
        moved[..., axis] += 3.0
        found = clip_metrics(truth, moved, truth["visible"])
        assert found["average_pts_within_thresh"] == pytest.approx(within)


def test_rows_that_fill_up_and_unknown_places_do_not_count() -> None:
    truth = clip(hidden=(3,))
    guess, seen = truth["tracks_yx"].copy(), truth["visible"].copy()
    guess[2], seen[2] = np.nan, False  # not a track
    guess[0, 3] = np.nan
    truth["tracks_yx"][0, 3] = np.nan  # hidden: unknown
    found = clip_metrics(truth, guess, seen)
    assert found["average_jaccard"] == 1.0
    assert found["occlusion_accuracy"] == 1.0
    assert found[REAPPEARING] == 1.0


def test_frames_after_an_occlusion_since_the_query_count_apart() -> None:
    truth = clip(hidden=(2, 3))
    guess = truth["tracks_yx"].copy()
    guess[0, 4:] += 100.0  # lost for good behind the occluder
    found = clip_metrics(truth, guess, truth["visible"])
    assert found[REAPPEARING] == 0.0
    assert found[OCCLUDED] == pytest.approx(1 / 3)  # of frames 1, 4 and 5 of the first track
    assert found["average_pts_within_thresh"] == pytest.approx(6 / 8)  # 8 visible frames after the queries
    assert np.isnan(clip_metrics(clip(), guess, truth["visible"])[REAPPEARING])
    # Hidden before the query is not since the query.
    truth["query_tyx"][0, 0] = 4
    assert not hidden_before(truth["query_tyx"], truth["visible"])[0].any()


def test_points_that_do_not_move_are_right_where_nothing_moves() -> None:
    means = shown_means(judge_predictor(static, [clip(), clip(speed=40.0), clip(hidden=(3,))]))
    # Of the second clip nothing, of the third all but one frame's visibility.
    assert means["delta_avg"] == pytest.approx(2 / 3)
    assert means["occlusion_accuracy"] == pytest.approx((1 + 1 + 9 / 10) / 3)
    assert means["delta_avg_after_occlusion"] == 1.0  # one clip has any


def test_the_last_batch_is_filled_up_and_not_counted_twice() -> None:
    clips = [clip(index=index) for index in range(5)]
    rows = [(batch["video"][:, 0, 0, 0, 0].tolist(), count) for batch, count in batches_of(clips, 2)]
    assert rows == [([0, 1], 2), ([2, 3], 2), ([4, 0], 1)]
    assert [count for _, count in batches_of(clips, 2, most=3)] == [2, 1]
    assert len(judge_predictor(static, clips, most=3)) == 3
