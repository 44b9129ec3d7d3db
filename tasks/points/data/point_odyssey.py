"""PointOdyssey as it is distributed: a folder per sequence.

SEQUENCE/rgbs/*.jpg      frames, in the order of their names
SEQUENCE/anno.npz        trajs_2d [S, N, 2] (x, y) in pixels, visibs [S, N], valids [S, N] (may be missing);
what
                         else is in it is not read

Sequences are thousands of frames of tens of thousands of points: a clip is a window of one, with some of its
points. The annotations of a sequence are one compressed file, which takes seconds to read: use `prepare` to
make shards of them once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import JpegClip
from tasks.common.video.shards import stamp
from tasks.points.data.clips import ANY_FRAME, PointClip, inside, place_outside
from tasks.points.data.npz_folder import read_arrays

FRAMES, ANNOTATIONS = "rgbs", "anno.npz"
_ENDINGS = (".jpeg", ".jpg", ".png")
_SEEN = 2  # frames of a window that a point must be visible in to be taken


@dataclass(frozen=True)
class OdysseyClips:
    """Windows of sequences.

    windows: (folder, first frame) of each.
    frames: of a window.
    points: most of a clip, drawn once for each window among those visible in it.
    limits: on a frame.
    """

    windows: tuple[tuple[str, int], ...]
    frames: int
    points: int
    limits: Limits

    def __len__(self) -> int:
        return len(self.windows)

    def name(self, index: int) -> str:
        folder, first = self.windows[index]
        return f"{folder}[{first}:{first + self.frames}]"

    def key(self, index: int) -> Any:
        folder, first = self.windows[index]
        return [folder, stamp(Path(folder) / ANNOTATIONS), first, self.frames, self.points]

    def open(self, index: int) -> PointClip:
        folder, first = self.windows[index]
        name, window = self.name(index), slice(first, first + self.frames)
        files = _frame_files(Path(folder))
        tracks_yx, visible, known = _annotations(folder)
        if visible.shape[1] != len(files):
            raise VideoError(folder, f"{len(files)} frames, tracks of {visible.shape[1]}")
        video = _read_frames(files[window], name, self.limits)
        height, width = video.shape[1:3]
        seen = visible[:, window] & inside(tracks_yx[:, window], height, width)
        usable = np.flatnonzero(seen.sum(axis=1) >= min(_SEEN, self.frames))
        if not len(usable):
            raise VideoError(name, "no point is visible in these frames")
        chosen = np.sort(np.random.default_rng([first, len(usable)]).permutation(usable)[: self.points])
        tracks = place_outside(tracks_yx[chosen, window], ~known[chosen, window], height, width)
        query = np.full(len(chosen), ANY_FRAME, np.int32)
        return PointClip(video, tracks, seen[chosen], query)


def find_odyssey(folder: Path, frames: int, points: int, limits: Limits | None = None) -> OdysseyClips:
    """The windows of all sequences below a folder, one after the other without overlap.

    Args:
        folder: with sequences in it, at any depth.
        frames: of a window; what is left at a sequence's end is not used.
        points: most of a clip.
        limits: on a frame.

    Raises:
        VideoDataError: no such folder, no sequences, or none that is long enough.
    """
    if not folder.is_dir():
        raise VideoDataError(f"{folder}: no such folder of sequences")
    sequences = sorted(path.parent for path in folder.rglob(ANNOTATIONS))
    if not sequences:
        raise VideoDataError(
            f"{folder}: no sequences in it: expected SEQUENCE/{ANNOTATIONS} and SEQUENCE/{FRAMES}/*.jpg"
        )
    windows = [
        (str(sequence), first)
        for sequence in sequences
        for first in range(0, len(_frame_files(sequence)) - frames + 1, frames)
    ]
    if not windows:
        raise VideoDataError(f"{folder}: {len(sequences)} sequences, none of {frames} frames or more")
    return OdysseyClips(tuple(windows), frames, points, limits or Limits())


def _frame_files(sequence: Path) -> list[Path]:
    folder = sequence / FRAMES
    if not folder.is_dir():
        raise VideoDataError(f"{sequence}: {ANNOTATIONS} without the folder {FRAMES} of frames beside it")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)


def _read_frames(files: Sequence[Path], name: str, limits: Limits) -> np.ndarray:
    try:
        clip = JpegClip([file.read_bytes() for file in files], name, limits=limits)
    except OSError as error:
        raise VideoError(name, f"{error.filename}: {error.strerror or error}") from error
    frames = clip.read(range(len(files)))
    if any(frame.shape != frames[0].shape for frame in frames):
        raise VideoError(name, "frames of different sizes")
    return np.stack(frames)


@lru_cache(maxsize=1)  # `prepare` goes through the windows of a sequence one after the other
def _annotations(
    folder: str,
) -> tuple[Float[np.ndarray, "N S 2"], Bool[np.ndarray, "N S"], Bool[np.ndarray, "N S"]]:
    """(tracks_yx, visible, whether the place is known) of a sequence."""
    path = Path(folder) / ANNOTATIONS
    arrays = read_arrays(path)
    missing = [name for name in ("trajs_2d", "visibs") if name not in arrays]
    if missing:
        raise VideoError(str(path), f"holds {', '.join(sorted(arrays))}; no {' and no '.join(missing)}")
    given, seen = arrays["trajs_2d"], arrays["visibs"]
    valid = arrays.get("valids", np.ones(seen.shape, bool))
    if given.ndim != 3 or given.shape[-1] != 2 or given.dtype.kind != "f":
        raise VideoError(
            str(path), f"trajs_2d is {given.dtype} {given.shape}; expected floats (frames, points, 2)"
        )
    if seen.shape != given.shape[:2] or valid.shape != given.shape[:2]:
        raise VideoError(
            str(path), f"visibs {seen.shape} and valids {valid.shape} of trajectories {given.shape[:2]}"
        )
    known = np.isfinite(given).all(axis=-1) & (valid != 0)
    tracks = np.where(known[..., None], given, 0.0)[..., ::-1].astype(np.float32)
    return tracks.swapaxes(0, 1), ((seen != 0) & known).T, known.T
