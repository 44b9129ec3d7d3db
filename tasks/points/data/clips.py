"""Clips with point tracks: what every source gives, and the check that it is what it should be."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tasks.common.video.errors import VideoError

ANY_FRAME = -1  # as a query frame: any one where the point is visible


@dataclass(frozen=True, eq=False)
class PointClip:
    """A clip and points in it. Coordinates are (y, x) in pixels of its frames: (0, 0) is the outer corner of
    the top left pixel, whose centre is (0.5, 0.5).

    video: RGB.
    tracks_yx: where each of N points is, also where it is hidden; finite.
    visible: whether it is seen: inside the frame and not occluded.
    query_frames: the frame each is asked for at, one where it is visible; -1: any such.
    """

    video: UInt8[np.ndarray, "T H W 3"]
    tracks_yx: Float[np.ndarray, "N T 2"]
    visible: Bool[np.ndarray, "N T"]
    query_frames: Int[np.ndarray, " N"]


@runtime_checkable
class Clips(Protocol):
    """Random access to clips. Picklable: worker processes get a copy."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where a clip comes from, for messages; parts of one video end in [number] or [from:to]."""
        ...

    def key(self, index: int) -> Any:
        """JSON of everything that decides the clip, for shards made of it."""
        ...

    def open(self, index: int) -> PointClip:
        """The clip. Raises VideoError, VideoTimeout."""
        ...


@dataclass(frozen=True)
class ClipsBehind:
    """What is the same of clips and of something made of each of them."""

    clips: Clips

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        return self.clips.name(index)

    def key(self, index: int) -> Any:
        return self.clips.key(index)


def inside(yx: Float[np.ndarray, "*places 2"], height: int, width: int) -> Bool[np.ndarray, "*places"]:
    """Whether places are in a frame of height x width pixels: from 0 up to, but not at, its far edge."""
    return np.all((yx >= 0) & (yx < (height, width)), axis=-1)


def place_outside(
    tracks_yx: Float[np.ndarray, "N T 2"], unknown: Bool[np.ndarray, "N T"], height: int, width: int
) -> Float[np.ndarray, "N T 2"]:
    """Places of hidden points that are not known, one frame size before the first pixel: what is outside the
    frame teaches nothing, while a made-up place inside it would."""
    return np.where(unknown[..., None], np.array([-height, -width], np.float32), tracks_yx).astype(np.float32)


def check_clip(clip: PointClip, name: str) -> PointClip:
    """The clip, if it is one to train or evaluate on.

    Args:
        clip: of any source.
        name: of its source, for the message.

    Raises:
        VideoError: shapes that do not fit together, no points, none ever visible, places that are not finite,
            visible ones outside the frame (the wrong order of axes is named), or a query at a frame that is
            not there or where its point is hidden.
    """
    frames, height, width = clip.video.shape[:3]
    count = len(clip.tracks_yx)
    if count == 0:
        raise VideoError(name, "no points: a clip needs at least one track")
    if clip.tracks_yx.shape != (count, frames, 2) or clip.visible.shape != (count, frames):
        raise VideoError(
            name, f"tracks of shape {clip.tracks_yx.shape} and visibility of shape {clip.visible.shape} for "
            f"{frames} frames: expected (points, {frames}, 2) and (points, {frames})"
        )  # fmt: skip
    _check_places(clip.tracks_yx, clip.visible, (height, width), name)
    if not clip.visible.any():
        raise VideoError(name, "no point is visible in any frame")
    query = clip.query_frames
    if query.shape != (count,) or query.min() < ANY_FRAME or query.max() >= frames:
        raise VideoError(
            name, f"query frames {query.min()}..{query.max()} of {count} points: outside the clip of "
            f"{frames} frames (-1 means any)"
        )  # fmt: skip
    asked = np.flatnonzero(query != ANY_FRAME)
    hidden = asked[~clip.visible[asked, query[asked]]]
    if len(hidden):
        point = int(hidden[0])
        raise VideoError(name, f"point {point} is asked for at frame {query[point]}, where it is not visible")
    return clip


def _check_places(tracks_yx: np.ndarray, visible: np.ndarray, size: tuple[int, int], name: str) -> None:
    """Raises VideoError for places that cannot be (y, x) pixels of a frame of that size (height, width)."""
    finite = np.isfinite(tracks_yx).all(axis=-1)
    if not finite.all():
        point, frame = np.argwhere(~finite)[0]
        raise VideoError(name, f"point {point} at frame {frame} is {tracks_yx[point, frame].tolist()}: "
                         "coordinates must be finite")  # fmt: skip
    shown = inside(tracks_yx, *size)
    outside = visible & ~shown
    if outside.any():
        point, frame = np.argwhere(outside)[0]
        y, x = tracks_yx[point, frame].tolist()
        swapped = inside(tracks_yx[visible][:, ::-1], *size).all()
        hint = (
            ": as (x, y) all would be inside; tracks_yx is (y, x)" if swapped else
            "; places are (y, x) in pixels, (0, 0) the outer corner of the first, and a visible one is inside"
        )  # fmt: skip
        raise VideoError(
            name, f"point {point} is visible at frame {frame} at y = {y:g}, x = {x:g}, outside the frame of "
            f"{size[0]} x {size[1]} (height x width){hint}"
        )  # fmt: skip
