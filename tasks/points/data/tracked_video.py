"""A video with annotated tracks, whatever file it comes from: what evaluation and fine-tuning read."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import Clip

_READ_AT_ONCE = 16  # frames


class PointDataError(VideoDataError):
    """Annotations that cannot be used: names the file and video, what is wrong, what would be right."""


@dataclasses.dataclass(frozen=True)
class TrackedVideo:
    """One video and its tracks.

    Attributes:
      name: unique in its set.
      tracks_xy: float64 [N, T, 2], x as a share of the frame's width, y of its height: (0, 0) is the outer
        corner of the top-left pixel, (1, 1) that of the bottom-right one. Read-only.
      occluded: [N, T].
      open: opens the frames.
      indices: of the clip's frames, those that the T columns are, ascending.
    """

    name: str
    tracks_xy: Float[np.ndarray, "N T 2"]
    occluded: Bool[np.ndarray, "N T"]
    open: Callable[[], Clip]
    indices: Int[np.ndarray, " T"]

    def __len__(self) -> int:
        """Frames."""
        return self.occluded.shape[1]

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """The frames one by one, in their own size, in bounded memory.

        Raises:
          VideoError: a frame cannot be read.
        """
        with self.open() as clip:
            for start in range(0, len(self), _READ_AT_ONCE):
                yield from clip.read(self.indices[start : start + _READ_AT_ONCE].tolist())

    def parts(self, most: int) -> list["TrackedVideo"]:
        """The video itself, or, if it is longer than `most` frames, equal parts of it that are not.

        Lengths differ by a frame where they must; nothing is left out.
        """
        count = -(-len(self) // most)
        if count <= 1:
            return [self]
        bounds = [round(i * len(self) / count) for i in range(count + 1)]
        return [
            dataclasses.replace(
                self,
                name=f"{self.name}[{a}:{b}]",
                tracks_xy=self.tracks_xy[:, a:b],
                occluded=self.occluded[:, a:b],
                indices=self.indices[a:b],
            )
            for a, b in itertools.pairwise(bounds)
        ]


@dataclasses.dataclass(frozen=True)
class TrackedSet:
    """Videos to evaluate on.

    Attributes:
      videos: in a fixed order, of different names.
      files: what they were read from.
      missing: names of annotated videos whose frames are not there.
    """

    videos: tuple[TrackedVideo, ...]
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


class ArrayClip:
    """Frames in memory, or in a mapped file, as a `Clip`."""

    def __init__(self, video: UInt8[np.ndarray, "T H W 3"], name: str, fps: float = 25.0):
        self._video, self._name, self.fps = video, name, fps

    @property
    def frames(self) -> int:
        return len(self._video)

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        return [self._video[index] for index in indices]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


def checked_tracks(
    where: str, points: Any, occluded: Any, scale_xy: tuple[float, float] = (1.0, 1.0)
) -> tuple[Float[np.ndarray, "N T 2"], Bool[np.ndarray, "N T"]]:
    """Tracks as `TrackedVideo` has them, out of arrays of a file.

    Args:
      where: file and video, for messages.
      points: [N, T, 2], (x, y), never changed.
      occluded: [N, T], booleans or 0 and 1.
      scale_xy: what x = 1 and y = 1 stand for: (1, 1) for shares, the frame's width and height for pixels.

    Raises:
      PointDataError: not numbers of these shapes, a visible point that is NaN or infinite, or coordinates
        that are clearly in other units or in another order.
    """
    if not isinstance(points, np.ndarray) or points.ndim != 3 or points.shape[-1] != 2:
        raise PointDataError(
            f"{where}: points are {_described(points)}; an array [tracks, frames, 2] was expected"
        )
    if not isinstance(occluded, np.ndarray) or occluded.shape != points.shape[:2]:
        raise PointDataError(
            f"{where}: visibility is {_described(occluded)}; an array {points.shape[:2]}, as of the points, "
            "was expected"
        )
    if points.dtype.kind not in "fiu" or occluded.dtype.kind not in "fiub":
        raise PointDataError(
            f"{where}: points are {points.dtype}, visibility is {occluded.dtype}; numbers were expected"
        )
    if points.shape[1] < 1:
        raise PointDataError(f"{where}: no frames")
    hidden = occluded.astype(bool)
    if not np.array_equal(hidden, occluded):
        raise PointDataError(f"{where}: visibility holds other values than 0 and 1")
    tracks = points.astype(np.float64) / np.asarray(scale_xy, np.float64)
    unknown = ~np.isfinite(tracks).all(axis=-1)
    if (unknown & ~hidden).any():
        track, frame = np.argwhere(unknown & ~hidden)[0]
        raise PointDataError(
            f"{where}: track {track} is visible at frame {frame}, but its place is "
            f"{points[track, frame].tolist()}"
        )
    tracks[unknown] = 0.0  # where a hidden point is does not matter, but NaN would spread
    _check_units(where, tracks[~hidden], scale_xy)
    tracks.flags.writeable = False
    return tracks, hidden


def _check_units(where: str, shown: np.ndarray, scale_xy: tuple[float, float]) -> None:
    """Refuses visible points [n, 2] that lie outside the frame; a few do so in the official sets, too."""
    if not len(shown):
        return
    outside = _share_outside(shown)
    exchanged = shown * scale_xy / np.asarray(scale_xy)[::-1]
    if outside > 0.1 and _share_outside(exchanged) < 0.01:
        raise PointDataError(
            f"{where}: {outside:.0%} of the visible points lie outside the frame, and none if y and x are "
            "exchanged; the order is (x, y)"
        )
    if outside > 0.5:
        is_share = scale_xy == (1.0, 1.0)
        units = "shares of width and height, from 0 to 1" if is_share else "pixels of the video"
        raise PointDataError(
            f"{where}: {outside:.0%} of the visible points lie outside the frame, up to "
            f"{(np.abs(shown) * scale_xy).max():.6g}; (x, y) in {units} was expected"
        )


def _share_outside(points: np.ndarray) -> float:
    return float(((points > 1) | (points < 0)).any(axis=-1).mean())


def check_frames(where: str, frames: int, tracks: int) -> None:
    """Raises PointDataError where a video and its tracks differ in length."""
    if frames != tracks:
        raise PointDataError(f"{where}: the video has {frames} frames, its tracks {tracks}")


def unique_names(videos: Sequence[TrackedVideo], where: str) -> tuple[TrackedVideo, ...]:
    """The videos, once no two have one name and there are any.

    Raises:
      PointDataError: otherwise.
    """
    if not videos:
        raise PointDataError(f"{where}: no videos in it")
    seen: set[str] = set()
    for video in videos:
        if video.name in seen:
            raise PointDataError(f"{where}: two videos are called {video.name}")
        seen.add(video.name)
    return tuple(videos)


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    return "missing" if value is None else type(value).__name__


__all__ = [
    "ArrayClip",
    "PointDataError",
    "TrackedSet",
    "TrackedVideo",
    "VideoError",
    "check_frames",
    "checked_tracks",
    "unique_names",
]
