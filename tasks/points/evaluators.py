"""Scoring a predictor on one annotated video as TAP-Vid does: resize, queries, tracks, metrics."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.data.tracked_video import TrackedVideo
from tasks.points.metrics import METRIC_SIZE, METRICS, QueryMode, tapvid_metrics
from tasks.points.predictors import Predictor
from tasks.points.queries import Queries, sample_queries
from tasks.points.reappearance import AJ_RD, Reappearances, aj_rd, concatenate, reappearances
from tasks.points.resize import resize_video


class VideoResult(NamedTuple):
    """What a predictor made of one video. Places are in pixels of the 256 x 256 video, (x, y).

    Attributes:
      metrics: `METRICS` and "aj_rd", shares in [0, 1]; NaN where nothing is counted.
      events: reappearances, for a pool over the whole set.
      tracks_xy, visible: predicted, of each query.
      query_tyx: frame, y, x.
      track: the annotated track each query is of.
    """

    metrics: dict[str, float]
    events: Reappearances
    tracks_xy: Float[np.ndarray, "Q T 2"]
    visible: Bool[np.ndarray, "Q T"]
    query_tyx: Float[np.ndarray, "Q 3"]
    track: Int[np.ndarray, " Q"]


def queries_of(video: TrackedVideo, mode: QueryMode) -> Queries:
    """The queries of a video and their tracks, in pixels of the 256 x 256 video."""
    return sample_queries(video.occluded, video.tracks_xy * METRIC_SIZE, mode)


def evaluate_video(
    video: TrackedVideo, predictor: Predictor, mode: QueryMode, size: int = METRIC_SIZE
) -> VideoResult:
    """Scores a predictor on a video.

    Args:
      predictor: sees the whole video at size x size and all queries at once.
      mode: how queries are sampled and what counts.
      size: in pixels of a side, that the video is brought to. Distances are measured at 256 all the same.

    Raises:
      VideoError: a frame cannot be read.
      ValueError: the predictor's answer is not of its queries and frames, or not finite.
    """
    queries = queries_of(video, mode)
    if not len(queries.query_tyx):
        return _nothing(len(video))
    frames = resize_video(video.frames(), size, size)
    scale = size / METRIC_SIZE
    tracks_yx, visible = predictor(frames, queries.query_tyx * [1.0, scale, scale])
    expected = queries.occluded.shape
    if tracks_yx.shape != (*expected, 2) or visible.shape != expected:
        raise ValueError(
            f"{video.name}: tracks {tracks_yx.shape}, visible {visible.shape} of {expected} points and frames"
        )
    if not np.isfinite(tracks_yx).all():
        raise ValueError(
            f"{video.name}: {np.isnan(tracks_yx).sum()} of the tracks' coordinates are not finite"
        )
    return judge(queries, (tracks_yx[..., ::-1] / scale).astype(np.float64), visible.astype(bool), mode)


def judge(
    queries: Queries, tracks_xy: Float[np.ndarray, "Q T 2"], visible: Bool[np.ndarray, "Q T"], mode: QueryMode
) -> VideoResult:
    """Metrics of the predicted tracks of one video, all in pixels of the 256 x 256 video."""
    tracks = tapvid_metrics(
        queries.query_tyx[None],
        queries.occluded[None],
        queries.tracks_xy[None],
        ~visible[None],
        tracks_xy[None],
        mode,
    )
    events = reappearances(
        *(np.moveaxis(x, 0, 1)[None] for x in (queries.tracks_xy, ~queries.occluded, tracks_xy, visible))
    )
    metrics = {name: float(value[0]) for name, value in tracks.items()} | {AJ_RD: aj_rd(events)[AJ_RD]}
    return VideoResult(
        metrics, events, tracks_xy.astype(np.float32), visible, queries.query_tyx, queries.track
    )


def _nothing(frames: int) -> VideoResult:
    """A video in which no point is ever visible: nothing is asked, and nothing is defined."""
    return VideoResult(
        dict.fromkeys((*METRICS, AJ_RD), float("nan")),
        concatenate([]),
        np.zeros((0, frames, 2), np.float32),
        np.zeros((0, frames), bool),
        np.zeros((0, 3)),
        np.zeros(0, np.int64),
    )
