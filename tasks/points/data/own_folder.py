"""Your own videos with tracks: a folder of video files (or folders of frames) and a file of tracks for each.

    DIR/box.mp4     or DIR/box/: the frames as JPEG or PNG files, in the order of their names
    DIR/box.npz     tracks_xy  float [N, T, 2], (x, y) in pixels of the video: (0, 0) is the outer corner of
                               the top-left pixel, its centre (0.5, 0.5)
                    visible    bool [N, T]
    DIR/box.csv     instead of the .npz: columns track, frame, x, y, visible, with this header; frames are
                    counted from 0; what has no row is not visible

OWN_VIDEOS.md has the whole page; `python -m tasks.points.data check --source=folder` finds what is wrong.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.video.decoding import VIDEO_ENDINGS, VideoFile
from tasks.common.video.errors import VideoError
from tasks.common.video.frames import Clip, FileClip, JpegClip
from tasks.points.data.npz_folder import read_arrays
from tasks.points.data.tracked_video import (
    PointDataError,
    TrackedSet,
    TrackedVideo,
    check_frames,
    checked_tracks,
    unique_names,
)

PICTURE_ENDINGS = (".jpeg", ".jpg", ".png")
COLUMNS = ("track", "frame", "x", "y", "visible")
_MOST_ELEMENTS = 500_000_000  # of the tracks that a CSV file may spread over an array


def track_files(folder: Path | str) -> list[Path]:
    """The files of tracks in a folder, in the order of their names.

    Raises:
      PointDataError: no such folder, none in it, or two for one video.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise PointDataError(f"{folder}: no such folder")
    files = sorted(f for f in folder.iterdir() if f.suffix in (".npz", ".csv") and f.is_file())
    if not files:
        raise PointDataError(
            f"{folder}: no tracks in it: expected NAME.npz or NAME.csv beside NAME.mp4 or NAME/"
        )
    for first, second in itertools.pairwise(files):
        if first.stem == second.stem:
            raise PointDataError(
                f"{folder}: {first.name} and {second.name} are both tracks of {first.stem}: keep one"
            )
    return files


def read_own_folder(folder: Path | str) -> TrackedSet:
    """All videos of a folder with their tracks.

    Raises:
      PointDataError: the first thing that is wrong; `python -m tasks.points.data check` finds all of them.
    """
    files = track_files(folder)
    videos = [read_own_video(file) for file in files]
    return TrackedSet(unique_names(videos, str(folder)), tuple(map(str, files)))


def read_own_video(tracks: Path) -> TrackedVideo:
    """One video by its file of tracks.

    Raises:
      PointDataError: names the file, what is wrong and what would be right.
    """
    frames = _frames_of(tracks)
    try:
        count, height, width = _size(frames)
    except VideoError as error:
        raise PointDataError(str(error)) from error
    points, occluded = _read_npz(tracks) if tracks.suffix == ".npz" else _read_csv(tracks, count)
    tracks_xy, occluded = checked_tracks(str(tracks), points, occluded, (width, height))
    check_frames(f"{tracks} and {frames}", count, occluded.shape[1])
    return TrackedVideo(tracks.stem, tracks_xy, occluded, lambda: _open(frames), np.arange(count))


def _frames_of(tracks: Path) -> Path:
    """The video file, or the folder of frames, of a file of tracks."""
    folder = tracks.with_suffix("")
    found = [
        f
        for f in sorted(tracks.parent.glob(f"{_escaped(tracks.stem)}.*"))
        if f.suffix.lower() in VIDEO_ENDINGS
    ]
    found = [f for f in found if f.stem == tracks.stem] + ([folder] if folder.is_dir() else [])
    if len(found) != 1:
        what = " and ".join(f.name for f in found) if found else "no video"
        raise PointDataError(
            f"{tracks}: {what} beside it; expected one of {tracks.stem}.mp4 (or another video file) and the "
            f"folder {tracks.stem}/ of frames"
        )
    return found[0]


def _escaped(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURE_ENDINGS and f.is_file())


def _open(frames: Path) -> Clip:
    return _PictureClip(frames) if frames.is_dir() else FileClip(frames)


def _size(frames: Path) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    if frames.is_dir():
        with _PictureClip(frames) as clip:
            return clip.frames, *clip.read([0])[0].shape[:2]
    with VideoFile(frames) as video:
        return video.info.frames, video.info.height, video.info.width


class _PictureClip(JpegClip):
    """A folder of pictures as a clip; each is read when it is asked for."""

    def __init__(self, folder: Path):
        self._files = _pictures(folder)
        if not self._files:
            raise VideoError(
                str(folder), f"no frames in it; files ending in {', '.join(PICTURE_ENDINGS)} were expected"
            )
        super().__init__([b""] * len(self._files), str(folder))

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        frames = []
        for index in indices:
            file = self._files[index]
            frames += JpegClip([file.read_bytes()], str(file)).read([0])
        return frames


def _read_npz(path: Path) -> tuple[Any, Any]:
    """(points, occluded) of a file, unchecked."""
    try:
        arrays = read_arrays(path)
    except VideoError as error:
        raise PointDataError(str(error)) from error
    flags = [name for name in ("visible", "occluded") if name in arrays]
    if "tracks_xy" not in arrays or len(flags) != 1:
        raise PointDataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}; expected tracks_xy and one of "
            "visible and occluded"
        )
    flag = arrays[flags[0]]
    if flags == ["visible"] and flag.dtype.kind in "biuf":  # `checked_tracks` refuses other kinds
        flag = 1.0 - flag
    return arrays["tracks_xy"], flag


def _read_csv(path: Path, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(points [N, T, 2], occluded [N, T]) of a file."""
    rows: dict[tuple[int, int], tuple[float, float, bool]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise PointDataError(
                    f"{path}: its first line is {reader.fieldnames}; expected {','.join(COLUMNS)}"
                )
            for row in reader:
                where = f"{path}:{reader.line_num}"
                track, frame, *rest = _csv_row(where, row, frames)
                if (track, frame) in rows:
                    raise PointDataError(f"{where}: track {track} has frame {frame} twice")
                rows[track, frame] = (rest[0], rest[1], bool(rest[2]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PointDataError(f"{path}: not readable as CSV: {error}") from error
    numbers = sorted({track for track, _ in rows})
    if len(numbers) * frames > _MOST_ELEMENTS:
        raise PointDataError(
            f"{path}: {len(numbers)} tracks of {frames} frames: too many for a CSV file, use .npz"
        )
    index = {track: i for i, track in enumerate(numbers)}
    points = np.zeros((len(numbers), frames, 2))
    occluded = np.ones((len(numbers), frames), bool)
    for (track, frame), (x, y, visible) in rows.items():
        points[index[track], frame] = x, y
        occluded[index[track], frame] = not visible
    return points, occluded


def _csv_row(where: str, row: dict[str, Any], frames: int) -> tuple[int, int, float, float, int]:
    try:
        track, frame, visible = (int(row[name]) for name in ("track", "frame", "visible"))
        x, y = (float(row[name] or "nan") for name in ("x", "y"))
    except (TypeError, ValueError) as error:
        raise PointDataError(f"{where}: {error}; expected numbers for {','.join(COLUMNS)}") from error
    if track < 0 or visible not in (0, 1):
        raise PointDataError(
            f"{where}: track {track}, visible {visible}: track counts from 0, visible is 0 or 1"
        )
    if not 0 <= frame < frames:
        raise PointDataError(f"{where}: frame {frame} of a video of {frames} frames, which count from 0")
    if visible and not (math.isfinite(x) and math.isfinite(y)):
        raise PointDataError(f"{where}: a visible point at x = {row['x']!r}, y = {row['y']!r}")
    return track, frame, x, y, visible
