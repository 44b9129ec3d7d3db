"""TAP-Vid's pickles: DAVIS, RGB-Stacking, the Kinetics shards, RoboTAP.

A pickle holds a dict of name -> video, or a list of videos. A video is a dict of

    video      uint8 [T, H, W, 3], or T JPEG files: a list of bytes or an array of them
    points     float [N, T, 2], (x, y) as shares of width and height
    occluded   bool [N, T]

They are parsed by the restricted reader (`tasks.points.restricted_pickle`): nothing in them is run. Arrays
are views into the mapped files and cannot be written to, so reading twice gives the same points twice (the
official Kinetics reader scales the stored points in place).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tasks.common.video.frames import Clip, JpegClip
from tasks.points.data.tracked_video import (
    ArrayClip,
    PointDataError,
    TrackedSet,
    TrackedVideo,
    check_frames,
    checked_tracks,
    unique_names,
)
from tasks.points.numpy_pickle import PickleError
from tasks.points.restricted_pickle import read_pickle

# Videos of the complete sets; Kinetics depends on what can still be downloaded.
OFFICIAL_VIDEOS = {"davis": 30, "rgb_stacking": 50, "robotap": 265}
_ENDINGS = (".pkl", ".pickle")
_SHARD = re.compile(r"(\d+)_of_(\d+)")
_KEYS = ("video", "points", "occluded")


def read_tapvid(path: Path | str) -> TrackedSet:
    """The videos of a pickle, or of all pickles in a folder, in the order of the files' names.

    All annotations are read and checked; of the frames only the shapes.

    Raises:
      PointDataError: no such file, no pickles, shards missing, or a video that is not as above; also what
        `read_pickle` refuses.
    """
    path = Path(path).expanduser()
    files = _pickles(path)
    videos: list[TrackedVideo] = []
    for file in files:
        try:
            content = read_pickle(file)
        except (PickleError, OSError) as error:
            raise PointDataError(str(error)) from error
        videos += _videos(file, content)
    return TrackedSet(unique_names(videos, str(path)), tuple(map(str, files)))


def has_pickles(path: Path | str) -> bool:
    """Whether a path is a pickle, by its ending, or a folder with some."""
    path = Path(path).expanduser()
    if path.is_dir():
        return any(file.suffix in _ENDINGS for file in path.iterdir())
    return path.suffix in _ENDINGS


def _pickles(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PointDataError(f"{path}: no such file or folder")
    files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS and file.is_file())
    if not files:
        raise PointDataError(f"{path}: no pickles (.pkl) in this folder; unpack the set's archive first")
    _check_shards(path, files)
    return files


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Means over some of the shards would pass for those of the set."""
    found = [match.groups() for file in files if (match := _SHARD.search(file.stem))]
    for total in {total for _, total in found}:
        have = {int(number) for number, of in found if of == total}
        # Shards may be counted from 0 or from 1.
        first = 0 if 0 in have else 1
        absent = sorted(set(range(first, first + int(total))) - have)
        if absent:
            raise PointDataError(
                f"{folder}: shards {', '.join(map(str, absent))} of {int(total)} are missing (counted from "
                f"{first}); give one file to evaluate on that alone"
            )


def _videos(file: Path, content: Any) -> Iterator[TrackedVideo]:
    if isinstance(content, dict):
        # One video, not a set of them, is taken for what it is.
        named = [(file.stem, content)] if set(_KEYS) <= content.keys() else list(content.items())
    elif isinstance(content, list | tuple):
        named = [(f"{file.stem}/{number:04d}", entry) for number, entry in enumerate(content)]
    else:
        raise PointDataError(
            f"{file}: holds {type(content).__name__}; a dict or list of videos was expected, as in "
            "TAP-Vid's files"
        )
    for name, entry in named:
        yield _video(str(name), f"{file}: video {name}", entry)


def _video(name: str, where: str, entry: Any) -> TrackedVideo:
    if not isinstance(entry, dict) or not set(_KEYS) <= entry.keys():
        keys = (
            f"has keys {sorted(map(str, entry))}" if isinstance(entry, dict) else f"is {type(entry).__name__}"
        )
        raise PointDataError(f"{where} {keys}; a dict with {', '.join(_KEYS)} was expected")
    tracks_xy, occluded = checked_tracks(where, entry["points"], entry["occluded"])
    video = entry["video"]
    raw = (
        isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4 and video.shape[-1] == 3
    )
    if not raw and not _is_encoded(video):
        kind = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise PointDataError(
            f"{where}: its video is {kind}; uint8 [T, H, W, 3], or JPEG files as bytes, were expected"
        )
    if raw and 0 in video.shape:
        raise PointDataError(f"{where}: its video has shape {video.shape}: nothing in it")
    check_frames(where, len(video), occluded.shape[1])

    def open_frames() -> Clip:
        return ArrayClip(video, where) if raw else JpegClip(_Encoded(video), where)

    return TrackedVideo(name, tracks_xy, occluded, open_frames, np.arange(len(video)))


def _is_encoded(video: Any) -> bool:
    if isinstance(video, np.ndarray):
        return video.dtype.kind == "S" and video.ndim == 1
    return isinstance(video, list | tuple) and all(isinstance(frame, bytes | memoryview) for frame in video)


class _Encoded(Sequence[bytes]):
    """Encoded frames that are copied out of the mapped file one at a time."""

    def __init__(self, frames: Any):
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> "_Encoded": ...

    def __getitem__(self, index: int | slice) -> "bytes | _Encoded":
        return _Encoded(self._frames[index]) if isinstance(index, slice) else bytes(self._frames[index])
