"""TAP-Vid metrics: occlusion accuracy, points within a threshold, Jaccard, averages, and data-set means.

The official definitions (TAP-Vid, arXiv 2211.03726, section 3; numbers as its evaluation code gives them).
Distances are in pixels of the video scaled to 256 x 256, whatever resolution it was tracked at.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

QueryMode = Literal["first", "strided"]
THRESHOLDS = (1, 2, 4, 8, 16)  # pixels
METRIC_SIZE = 256  # pixels of the square that distances are measured in
AVERAGE_JACCARD = "average_jaccard"
AVERAGE_WITHIN = "average_pts_within_thresh"
OCCLUSION_ACCURACY = "occlusion_accuracy"
METRICS = (
    AVERAGE_JACCARD,
    AVERAGE_WITHIN,
    OCCLUSION_ACCURACY,
    *(f"jaccard_{d}" for d in THRESHOLDS),
    *(f"pts_within_{d}" for d in THRESHOLDS),
)

Flags = Bool[np.ndarray, "B Q T"] | Integer[np.ndarray, "B Q T"] | Float[np.ndarray, "B Q T"]


def evaluated_frames(
    query_frames: Float[np.ndarray, "B Q"], frames: int, mode: QueryMode
) -> Bool[np.ndarray, "B Q T"]:
    """Frames that count: "first": those after the query; "strided": all but the query's own.

    A fractional query frame is rounded to the nearest, halves to the even one.

    Raises:
      ValueError: an unknown mode.
    """
    at = np.round(query_frames).astype(np.int32)[..., None]
    now = np.arange(frames)
    if mode == "first":
        return now > at
    if mode == "strided":
        return now != at
    raise ValueError(f"query mode {mode!r}: must be 'first' or 'strided'")


def tapvid_metrics(
    query_tyx: Float[np.ndarray, "B Q 3"],
    gt_occluded: Flags,
    gt_tracks_xy: Float[np.ndarray, "B Q T 2"],
    pred_occluded: Flags,
    pred_tracks_xy: Float[np.ndarray, "B Q T 2"],
    mode: QueryMode,
    *,
    per_track: bool = False,
) -> dict[str, Float[np.ndarray, "..."]]:
    """The TAP-Vid metrics of a batch of videos.

    Args:
      query_tyx: frame, y, x; only the frame is used.
      gt_occluded, pred_occluded: true (or 1) where a point is not seen.
      gt_tracks_xy, pred_tracks_xy: pixels of the 256 x 256 video, in one order: (x, y) in TAP-Vid's files,
        but any order that both share gives the same numbers. Where the truth is occluded any finite value.
      mode: which frames count (`evaluated_frames`).
      per_track: metrics of each track instead of each video, whose sums run over all its points and frames.

    Returns:
      Name -> shares in [0, 1], float64 [B], or [B, Q] per track: `METRICS`. NaN where nothing is counted: no
      evaluated frame, or none on which the point is visible (and, for Jaccard, none predicted visible).

    Raises:
      ValueError: an unknown mode.
    """
    evaluated = evaluated_frames(query_tyx[..., 0], gt_tracks_xy.shape[2], mode)
    axes = (2,) if per_track else (1, 2)
    visible = np.logical_not(gt_occluded)
    predicted = np.logical_not(pred_occluded)
    squared = np.sum(np.square(pred_tracks_xy - gt_tracks_xy), axis=-1)

    def count(flags: np.ndarray) -> np.ndarray:
        return np.sum(flags & evaluated, axis=axes)

    found = {OCCLUSION_ACCURACY: _share(count(predicted == visible), count(np.ones_like(evaluated)))}
    positives = count(visible)
    for threshold in THRESHOLDS:
        near = squared < np.square(threshold)
        hits = count(near & visible & predicted)
        false_alarms = count(predicted & ~(visible & near))
        found[f"pts_within_{threshold}"] = _share(count(near & visible), positives)
        found[f"jaccard_{threshold}"] = _share(hits, positives + false_alarms)
    for average, part in ((AVERAGE_JACCARD, "jaccard"), (AVERAGE_WITHIN, "pts_within")):
        found[average] = np.mean([found[f"{part}_{d}"] for d in THRESHOLDS], axis=0)
    return {name: found[name] for name in METRICS}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN for 0 / 0, silently, since `part` is 0 wherever `whole` is."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


class Mean(NamedTuple):
    """A mean over videos.

    Attributes:
      value: over the videos where the metric is defined; NaN if there are none.
      defined: how many these are.
      undefined: videos left out because the metric is 0 / 0 there.
    """

    value: float
    defined: int
    undefined: int


def mean_over_videos(videos: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """Plain means over videos, each video counting once, those without a value left out and counted.

    TAP-Vid's own mean is NaN as soon as one video is (all its queries on the last frame, say); the two agree
    where `undefined` is 0.

    Args:
      videos: metrics of each, by name; all of the same names.

    Raises:
      ValueError: videos of different metrics.
    """
    names = list(videos[0]) if videos else []
    means = {}
    for name in names:
        if any(video.keys() != videos[0].keys() for video in videos):
            raise ValueError(f"videos have different metrics: expected {names} of each")
        values = np.asarray([video[name] for video in videos], np.float64)
        known = values[~np.isnan(values)]
        value = float(known.mean()) if len(known) else float("nan")
        means[name] = Mean(value, len(known), len(values) - len(known))
    return means
