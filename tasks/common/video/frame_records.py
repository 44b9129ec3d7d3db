"""Encoded frames of one video as one record.

Magic "FVR1", then little-endian uint32 frames, uint32 zero, float64 fps, uint32 bytes of each frame, and the
JPEG (or PNG) files end to end. Lengths are checked before anything is read.
"""

import struct
from collections.abc import Sequence

import numpy as np

from tasks.common.video.errors import VideoError

_MAGIC = b"FVR1"
_HEAD = struct.Struct("<4sIId")


def pack_record(frames: Sequence[bytes], fps: float) -> bytes:
    """One video's encoded frames as a record."""
    lengths = np.asarray([len(frame) for frame in frames], "<u4").tobytes()
    return b"".join((_HEAD.pack(_MAGIC, len(frames), 0, fps), lengths, *frames))


def unpack_record(record: bytes, name: str) -> tuple[list[bytes], float]:
    """(encoded frames, fps) of a record.

    Raises:
        VideoError: not such a record, or cut off.
    """
    if len(record) < _HEAD.size:
        raise VideoError(name, "a record cut off in its head")
    magic, count, _, fps = _HEAD.unpack_from(record)
    start = _HEAD.size + 4 * count
    if magic != _MAGIC or count < 1 or start > len(record) or not (np.isfinite(fps) and fps > 0):
        raise VideoError(name, "not a record of frames, or damaged")
    ends = start + np.cumsum(np.frombuffer(record, "<u4", count, _HEAD.size).astype(np.int64))
    if int(ends[-1]) != len(record):
        raise VideoError(name, f"a record of {len(record)} bytes; its frames end at {int(ends[-1])}")
    starts = np.concatenate([[start], ends[:-1]])
    return [record[a:b] for a, b in zip(starts, ends, strict=True)], float(fps)
