"""TAP-Vid's annotations as CSV, next to video files: what Kinetics and RoboTAP are built from.

    FOLDER/*.csv     rows without a header: id, start, end (seconds), then x, y, occluded of every frame at 25
                     frames a second; x and y as shares of width and height; one row per track
    FOLDER/**/       the videos: <id>_<start>_<end>.mp4, cut already (numbers padded to 6 digits, as
                     downloaders of Kinetics name them), or <id>.mp4, whole

Videos longer than 1000 frames are split into equal parts. As in the shards that the official tools make, a
stored x becomes (x width - 1/2) / width, so that both give the same numbers. Videos that are not there (some
of Kinetics no longer are) are left out and listed.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks.common.video.decoding import VIDEO_ENDINGS, VideoFile
from tasks.common.video.errors import VideoError
from tasks.common.video.frames import FileClip
from tasks.points.data.tracked_video import (
    PointDataError,
    TrackedSet,
    TrackedVideo,
    checked_tracks,
    unique_names,
)

FPS = 25.0
MOST_FRAMES = 1000
_LONGEST_ROW = 1 << 24  # characters of a line
_ID, _START, _END, _HEAD = 0, 1, 2, 3

_Key = tuple[str, float, float]


def read_tapvid_csv(path: Path | str, most_frames: int = MOST_FRAMES) -> TrackedSet:
    """The videos of one CSV file, or of all in a folder.

    Args:
      path: a CSV file beside (or above) its videos, or their folder.
      most_frames: longer videos are split.

    Raises:
      PointDataError: no such file, rows that are not as above, or none of the videos is there.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise PointDataError(f"{path}: no such CSV file, or no CSV file in the folder")
    known = {
        file.stem: file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in VIDEO_ENDINGS and file.is_file()
    }
    videos: list[TrackedVideo] = []
    missing: list[str] = []
    for file in files:
        for key, rows in _tracks_of(file).items():
            video = _video(f"{file}: {_name(key)}", key, rows, known)
            if video is None:
                missing.append(_name(key))
            else:
                videos += video.parts(most_frames)
    if missing and not videos:
        raise PointDataError(
            f"{path}: none of its {len(missing)} videos is in {folder}; names such as {missing[0]}.mp4 "
            "were expected"
        )
    return TrackedSet(unique_names(videos, str(path)), tuple(map(str, files)), tuple(missing))


def _name(key: _Key) -> str:
    name, start, end = key
    return f"{name}_{start:06.0f}_{end:06.0f}"


def _tracks_of(path: Path) -> dict[_Key, list[np.ndarray]]:
    """Rows [3 T] of every video, in the order they come in."""
    tracks: dict[_Key, list[np.ndarray]] = {}
    for number, row in _rows(path):
        where = f"{path}:{number}"
        if len(row) < _HEAD + 3 or (len(row) - _HEAD) % 3:
            raise PointDataError(
                f"{where}: {len(row)} columns; id, start, end and three for every frame were expected"
            )
        try:
            start, end = float(row[_START]), float(row[_END])
            values = np.asarray(row[_HEAD:], np.float64)
        except ValueError as error:
            raise PointDataError(
                f"{where}: {error}; id, then numbers were expected, and no header"
            ) from error
        if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
            raise PointDataError(f"{where}: from {start:g} to {end:g} seconds: start must come before end")
        rows = tracks.setdefault((row[_ID], start, end), [])
        if rows and len(rows[0]) != len(values):
            raise PointDataError(
                f"{where}: {len(values) // 3} frames; earlier rows of this video have {len(rows[0]) // 3}"
            )
        rows.append(values)
    if not tracks:
        raise PointDataError(f"{path}: no rows in it")
    return tracks


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    old = csv.field_size_limit(_LONGEST_ROW)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            yield from ((reader.line_num, row) for row in reader if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PointDataError(f"{path}: not readable as CSV: {error}") from error
    finally:
        csv.field_size_limit(old)


def _video(where: str, key: _Key, rows: list[np.ndarray], known: dict[str, Path]) -> TrackedVideo | None:
    """None: there is no such file."""
    name, start, _ = key
    cut = known.get(_name(key))
    file = cut or known.get(name)
    if file is None:
        return None
    values = np.stack(rows).reshape(len(rows), -1, 3)
    try:
        with VideoFile(file) as video:
            info = video.info
    except VideoError as error:
        raise PointDataError(f"{where}: {error}") from error
    # The middle of each annotated frame's time; at 25 frames a second simply frame i.
    times = (0.0 if cut else start) + (np.arange(values.shape[1]) + 0.5) / FPS
    indices = np.floor(times * info.fps).astype(np.int64)
    there = int(np.count_nonzero(indices < info.frames))
    if not there:
        raise PointDataError(f"{where}: {file} ends before {times[0]:.2f} s, where the annotated part begins")
    half_pixel = np.asarray([0.5 / info.width, 0.5 / info.height])
    tracks_xy, occluded = checked_tracks(where, values[:, :there, :2] - half_pixel, values[:, :there, 2])
    return TrackedVideo(_name(key), tracks_xy, occluded, lambda: FileClip(file), indices[:there])
