"""Which videos are shown, and what is drawn where."""

import numpy as np
import pytest

from tasks.points.data.sets import open_set
from tasks.points.evaluators import VideoResult, evaluate_video, queries_of
from tasks.points.predictors import Prediction
from tasks.points.worst_cases import drawn_frames, worst_videos
from tests.tasks.points.annotated_videos import annotated, write_davis


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple:
    video = open_set("davis", write_davis(tmp_path_factory.mktemp("x") / "x.pkl", [annotated(0, 12)])).videos[
        0
    ]
    truth = queries_of(video, "first")

    def predictor(frames, query_tyx):
        """40 pixels to the right."""
        tracks = truth.tracks_xy[..., ::-1] + [0.0, 40.0]
        return Prediction(tracks, np.ones(truth.occluded.shape, bool))

    return video, truth, evaluate_video(video, predictor, "first")


def scored(value: float, like: VideoResult) -> VideoResult:
    return like._replace(metrics=like.metrics | {"average_jaccard": value})


def test_the_lowest_come_first_and_undefined_ones_not_at_all(result):
    videos = [scored(value, result[2]) for value in (0.5, float("nan"), 0.1, 0.9)]
    assert worst_videos(videos, 2) == [2, 0]
    assert worst_videos(videos, 9) == [2, 0, 3]


def test_truth_is_green_and_the_prediction_red(result):
    video, truth, found = result
    frames = drawn_frames(video, found, "first")
    assert frames.shape == (8, 256, 256, 3)
    shown = int(found.query_tyx[:, 0].min())  # the first picture
    for point in np.flatnonzero(~truth.occluded[:, shown]):
        x, y = truth.tracks_xy[point, shown]
        red, green, blue = frames[0, int(y), int(x)].astype(int)
        assert green > 180 > max(red, blue)
        around = frames[0, int(y) - 4 : int(y) + 5, int(x) + 36 : int(x) + 45].astype(int)
        assert ((around[..., 0] > 200) & (around[..., 1] < 120)).sum() > 8
