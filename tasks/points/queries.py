"""Which points of an annotated video are asked for: TAP-Vid's "first" and "strided" query sampling.

Tracks come as (x, y), as in TAP-Vid's files; queries are (t, y, x), in the same pixels.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.metrics import QueryMode

STRIDE = 5  # frames between the queries of "strided"


class Queries(NamedTuple):
    """Queries of one video with the track each belongs to.

    Attributes:
      query_tyx: frame (a whole number), y, x, float64.
      tracks_xy: the whole track of each query, in the dtype of the annotation.
      occluded: of those tracks.
      track: index of the track in the annotation, in ascending order for "first".
    """

    query_tyx: Float[np.ndarray, "Q 3"]
    tracks_xy: Float[np.ndarray, "Q T 2"]
    occluded: Bool[np.ndarray, "Q T"]
    track: Int[np.ndarray, " Q"]


def sample_first(occluded: Bool[np.ndarray, "N T"], tracks_xy: Float[np.ndarray, "N T 2"]) -> Queries:
    """One query per track, where it is first visible; tracks that never are are left out."""
    track = np.flatnonzero(np.any(~occluded, axis=1))
    frame = np.argmax(~occluded[track], axis=1)
    return _queries(occluded, tracks_xy, track, frame)


def sample_strided(
    occluded: Bool[np.ndarray, "N T"], tracks_xy: Float[np.ndarray, "N T 2"], stride: int = STRIDE
) -> Queries:
    """At frames 0, stride, 2 stride, ... a query for every track visible there, frame by frame.

    Raises:
      ValueError: stride below 1.
    """
    if stride < 1:
        raise ValueError(f"stride = {stride}: must be at least 1 frame")
    frame, track = np.nonzero(~occluded.T[::stride])
    return _queries(occluded, tracks_xy, track, frame * stride)


def sample_queries(
    occluded: Bool[np.ndarray, "N T"], tracks_xy: Float[np.ndarray, "N T 2"], mode: QueryMode
) -> Queries:
    """`sample_first` or `sample_strided` (every 5 frames).

    Raises:
      ValueError: an unknown mode.
    """
    if mode == "first":
        return sample_first(occluded, tracks_xy)
    if mode == "strided":
        return sample_strided(occluded, tracks_xy)
    raise ValueError(f"query mode {mode!r}: must be 'first' or 'strided'")


def _queries(occluded: np.ndarray, tracks_xy: np.ndarray, track: np.ndarray, frame: np.ndarray) -> Queries:
    at_xy = tracks_xy[track, frame]
    query_tyx = np.stack([frame, at_xy[:, 1], at_xy[:, 0]], axis=-1).astype(np.float64)
    return Queries(query_tyx, tracks_xy[track], occluded[track], track)
