"""AJ_RD: how well points are found again after they were hidden (TAPNext++, arXiv 2604.10582).

An event is a frame where a point is visible again after `duration` invisible ones (those before it is first
seen count too). Of each track only events longer than all before them are kept. An event's score is the
Jaccard of its track from that frame to the end. Unlike TAP-Vid's, a distance equal to the threshold is near,
and the query frame is not left out.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.metrics import THRESHOLDS

MIN_DURATIONS = (1, 4, 16, 64, 256)  # frames
AJ_RD = "aj_rd"


class Reappearances(NamedTuple):
    """Events of one or more videos, in ascending order of video, frame, track.

    Attributes:
      where: video, frame, track of each.
      durations: invisible frames before it.
      jaccards: of the rest of the track, one per threshold of `THRESHOLDS`, in [0, 1]. Always defined: the
        event's own frame is visible.
    """

    where: Int[np.ndarray, "E 3"]
    durations: Int[np.ndarray, " E"]
    jaccards: Float[np.ndarray, "E 5"]


def reappearances(
    gt_tracks: Float[np.ndarray, "B T Q 2"],
    gt_visible: Bool[np.ndarray, "B T Q"],
    pred_tracks: Float[np.ndarray, "B T Q 2"],
    pred_visible: Bool[np.ndarray, "B T Q"],
) -> Reappearances:
    """The kept events of a batch of videos, scored.

    Args:
      gt_tracks, pred_tracks: pixels of the 256 x 256 video, in one order, (x, y) or (y, x).
      gt_visible, pred_visible: whether the point is seen. Time comes before points, as in TAPNext++'s code.
    """
    keep, durations = _record_events(gt_visible)
    where = np.argwhere(keep)
    video, frame, track = where.T
    # float64: the official code takes the root of float32 sums; only equality with a threshold could differ.
    distance = np.linalg.norm(pred_tracks.astype(np.float64) - gt_tracks.astype(np.float64), axis=-1)
    positives = _from_here(gt_visible)
    scores = []
    for threshold in THRESHOLDS:
        near = gt_visible & (distance <= threshold)
        hits = _from_here(near & pred_visible)
        false_alarms = _from_here(pred_visible & ~near)
        scores.append((hits / np.maximum(positives + false_alarms, 1))[video, frame, track])
    jaccards = np.stack(scores, axis=-1).reshape(-1, len(THRESHOLDS)).astype(np.float64)
    return Reappearances(where, durations[video, frame, track], jaccards)


def _record_events(visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(kept events, invisible frames right before each frame), both [B, T, Q]."""
    durations = np.zeros(visible.shape, np.int64)
    keep = np.zeros(visible.shape, bool)
    longest = np.zeros((visible.shape[0], visible.shape[2]), np.int64)
    for t in range(1, visible.shape[1]):
        durations[:, t] = np.where(visible[:, t - 1], 0, durations[:, t - 1] + 1)
        event = visible[:, t] & ~visible[:, t - 1]
        keep[:, t] = event & (durations[:, t] > longest)
        longest = np.where(keep[:, t], durations[:, t], longest)
    return keep, durations


def _from_here(flags: np.ndarray) -> np.ndarray:
    """How many are true from each frame to the end."""
    return np.flip(np.cumsum(np.flip(flags, 1), axis=1), 1)


def concatenate(parts: Sequence[Reappearances]) -> Reappearances:
    """The events of several videos as one pool; `where` keeps the numbering of the parts' videos."""
    empty = Reappearances(
        np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros((0, len(THRESHOLDS)), np.float64)
    )
    where, durations, jaccards = zip(empty, *parts, strict=True)
    return Reappearances(np.concatenate(where), np.concatenate(durations), np.concatenate(jaccards))


def aj_rd(events: Reappearances) -> dict[str, float]:
    """AJ_RD of a pool of events, and its parts.

    Returns:
      Shares in [0, 1], NaN where there is no event: "aj_rd_<d>_min<m>" for threshold d (pixels) over events
      of at least m invisible frames, "aj_rd_min<m>" (mean over d), and "aj_rd" (mean over those m that have
      events).
    """
    parts, means = {}, {}
    for shortest in MIN_DURATIONS:
        chosen = events.jaccards[events.durations >= shortest]
        values = chosen.mean(axis=0) if len(chosen) else np.full(len(THRESHOLDS), math.nan)
        for threshold, value in zip(THRESHOLDS, values, strict=True):
            parts[f"{AJ_RD}_{threshold}_min{shortest}"] = float(value)
        means[f"{AJ_RD}_min{shortest}"] = float(values.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a pool without any event
        return {AJ_RD: float(np.nanmean(list(means.values()))), **means, **parts}
