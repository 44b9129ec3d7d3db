"""Tracks on their way to files: written frame by frame to a spool on disk, read back by frame or by track.

A tracker finishes frames; users want tracks. Neither the length of a video nor the number of points should
show in memory, so the two are exchanged on disk.
"""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Shaped

from tasks.common.storage import replacing

UNKNOWN, HIDDEN, VISIBLE = 1, 2, 3  # 0: never written
TRACK = np.dtype([("xy", "<f4", 2), ("certainty", "<f4"), ("state", "u1")])
"""One point in one frame: where (NaN where not known), how certain, and what is known of it."""

_BLOCK = 16 << 20  # bytes held while columns are gathered

Rows = Shaped[np.ndarray, " Q"]


def track_rows(count: int) -> Rows:
    """Rows of `count` points of which nothing is known."""
    rows = np.zeros(count, TRACK)
    rows["xy"] = rows["certainty"] = np.nan
    rows["state"] = UNKNOWN
    return rows


class TrackSpool:
    """A temporary file of T x Q rows of `TRACK`. A context manager; the file goes with it or the process.

    Args:
      folder: where it is made; it must exist.
      tracks: Q.

    Attributes:
      frames: T, one more than the last frame written.

    Raises:
      OSError: from all methods, when the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, tracks: int):
        self.tracks, self.frames = tracks, 0
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".tracks-")  # noqa: SIM115  closed on exit

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, frame: int, rows: Rows, first: int = 0) -> None:
        """Writes the rows of tracks first, first + 1, ... of a frame."""
        self._file.seek((frame * self.tracks + first) * TRACK.itemsize)
        self._file.write(rows.tobytes())
        self.frames = max(self.frames, frame + 1)

    def read(self, frame: int) -> Rows:
        """The rows of all tracks in a frame; those never written are unknown."""
        return self._read(frame, 1)[0]

    def columns(self, field: str) -> Iterator[np.ndarray]:
        """One field of all frames, by tracks: blocks [q, T, ...] of as many tracks as fit the memory."""
        per_track = max(1, self.frames * TRACK.itemsize)
        tracks = max(1, _BLOCK // per_track)
        frames = max(1, _BLOCK // (self.tracks * TRACK.itemsize))
        for first in range(0, self.tracks, tracks):
            last = min(first + tracks, self.tracks)
            shape = TRACK[field].shape
            block = np.empty((last - first, self.frames, *shape), TRACK[field].base)
            for frame in range(0, self.frames, frames):
                rows = self._read(frame, min(frames, self.frames - frame))
                block[:, frame : frame + len(rows)] = np.swapaxes(rows[field][:, first:last], 0, 1)
            yield block

    def _read(self, frame: int, count: int) -> np.ndarray:
        size = count * self.tracks * TRACK.itemsize
        self._file.seek(frame * self.tracks * TRACK.itemsize)
        # A last frame that only some tracks have ends early.
        content = self._file.read(size).ljust(size, b"\0")
        rows = np.frombuffer(bytearray(content), TRACK).reshape(count, self.tracks)
        rows[rows["state"] == 0] = track_rows(1)
        return rows


def _new_zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)  # more gains little on floats


def write_npz(path: Path, spool: TrackSpool, arrays: Mapping[str, Any]) -> None:
    """Writes tracks_xy [Q, T, 2] float32, certainty [Q, T] float32, visible [Q, T] bool, and small arrays.

    The file takes its place when it is whole.

    Raises:
      OSError: it cannot be written.
    """
    shape = (spool.tracks, spool.frames)
    fields = {
        "tracks_xy": ("xy", (*shape, 2), np.float32),
        "certainty": ("certainty", shape, np.float32),
        "visible": ("state", shape, np.bool_),
    }
    with replacing(path) as temporary, _new_zip(temporary) as archive:
        for name, (field, whole, dtype) in fields.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": whole,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for block in spool.columns(field):
                    values = block == VISIBLE if field == "state" else block
                    file.write(np.ascontiguousarray(values, dtype).tobytes())
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
