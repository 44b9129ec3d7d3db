"""Clips as .npz files, one a clip, in a folder, at any depth:

video        uint8 [T, H, W, 3]      RGB frames
tracks_yx    float [N, T, 2]         (y, x) in pixels: (0, 0) is the outer corner of the first, its centre
  or tracks_xy                       (0.5, 0.5); (x, y)
visible      bool [N, T]             inside the frame and not occluded
  or occluded
query_frames int [N]                 when each point is asked for; may be left out; -1: any time

Where a hidden point is not known, it is NaN. Nothing pickled is read.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from models.common.official import read_npz
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.shards import stamp
from tasks.points.data.clips import ANY_FRAME, PointClip, place_outside

_MOST_BYTES = 8 << 30  # of the arrays of one file
_ONE_OF = (("tracks_yx", "tracks_xy"), ("visible", "occluded"))


def read_arrays(path: Path | str, most_bytes: int = _MOST_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
        VideoError: no such file, not one, damaged, pickled objects in it, or too large.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > most_bytes:
            raise VideoError(str(path), f"{size} bytes of arrays; the limit is {most_bytes}")
        return read_npz(path)
    except VideoError:
        raise
    except (ValueError, OSError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise VideoError(str(path), f"not a readable .npz file of arrays ({error})") from error


@dataclass(frozen=True)
class NpzClips:
    """The clips of a folder. See the module.

    files: one a clip.
    """

    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def key(self, index: int) -> Any:
        return [self.files[index], stamp(self.files[index])]

    def open(self, index: int) -> PointClip:
        return read_npz_clip(self.files[index])


def find_npz(folder: Path) -> NpzClips:
    """The .npz files below a folder, by name.

    Raises:
        VideoDataError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise VideoDataError(f"{folder}: no such folder of clips")
    files = sorted(str(path) for path in folder.rglob("*.npz") if path.is_file())
    if not files:
        raise VideoDataError(f"{folder}: no .npz files in it; expected one a clip")
    return NpzClips(tuple(files))


def read_npz_clip(path: Path | str) -> PointClip:
    """The clip in a file.

    Raises:
        VideoError: the file is damaged, an array is missing or of the wrong kind.
    """
    arrays, name = read_arrays(path), str(path)
    there = ", ".join(sorted(arrays)) or "nothing"
    for names in _ONE_OF:
        if sum(one in arrays for one in names) != 1:
            raise VideoError(name, f"holds {there}; expected one of {' and '.join(names)}")
    video = arrays.get("video", np.zeros(0))
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise VideoError(
            name, f"its video is {video.dtype} {video.shape}; expected uint8 (frames, height, width, 3)"
        )
    given = arrays.get("tracks_yx", arrays.get("tracks_xy", np.zeros(0)))
    flags = arrays.get("visible", arrays.get("occluded", np.zeros(0)))
    if given.ndim != 3 or given.shape[1:] != (len(video), 2) or given.dtype.kind not in "fiu":
        raise VideoError(
            name, f"its tracks are {given.dtype} {given.shape}; expected numbers (points, {len(video)}, 2)"
        )
    if flags.shape != given.shape[:2] or flags.dtype.kind not in "biu" or not set(np.unique(flags)) <= {0, 1}:
        raise VideoError(
            name, f"its visibility is {flags.dtype} {flags.shape}; expected bool {given.shape[:2]}"
        )
    visible = flags.astype(bool) if "visible" in arrays else ~flags.astype(bool)
    tracks_yx = (given if "tracks_yx" in arrays else given[..., ::-1]).astype(np.float32)
    query = arrays.get("query_frames", np.full(len(given), ANY_FRAME))
    if query.shape != (len(given),) or query.dtype.kind not in "iu":
        raise VideoError(
            name, f"its query_frames are {query.dtype} {query.shape}; expected whole numbers ({len(given)},)"
        )
    return known_places(video, tracks_yx, visible, np.clip(query, -2, 2**31 - 1))


def known_places(
    video: np.ndarray,
    tracks_yx: Float[np.ndarray, "N T 2"],
    visible: Bool[np.ndarray, "N T"],
    query: np.ndarray,
) -> PointClip:
    """A clip whose hidden points are outside the frame where their places are not known (NaN or infinite)."""
    unknown = ~np.isfinite(tracks_yx).all(axis=-1) & ~visible
    return PointClip(
        video, place_outside(tracks_yx, unknown, *video.shape[1:3]), visible, query.astype(np.int32)
    )
