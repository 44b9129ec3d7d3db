"""Prepared clips: shards of JPEG or PNG frames with their tracks, from any source, in any order of access.

A record: magic "FPT1"; little-endian uint32 frames, points, height, width, bytes of the frames; the frames
(`frame_records.py`); float32 tracks_yx [N, T, 2]; int32 query_frames [N]; visible [N, T] as bits, in whole
bytes. Sizes are checked before anything is read.
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoError
from tasks.common.video.frame_records import pack_record, unpack_record
from tasks.common.video.frames import JpegClip
from tasks.common.video.shards import Format, Progress, Shards, Stored, write_shards
from tasks.points.data.clips import Clips, ClipsBehind, PointClip, check_clip

FORMAT = Format("foxtrot-point-clips", 1, "python -m tasks.points.data prepare --output=DIR ...")
LOSSLESS = 0  # as a quality: PNG
_MAGIC = b"FPT1"
_HEAD = struct.Struct("<4s5I")
_FPS = 25.0  # clips of points have no rate; records of frames have one


def pack_clip(clip: PointClip, quality: int = 95) -> bytes:
    """A clip as a record.

    Args:
        clip: checked.
        quality: of its JPEG frames, 1..100; 0: PNG, which loses nothing.
    """
    frames = pack_record([_encode(frame, quality) for frame in clip.video], _FPS)
    count, (length, height, width) = len(clip.tracks_yx), clip.video.shape[:3]
    parts = (
        _HEAD.pack(_MAGIC, length, count, height, width, len(frames)),
        frames,
        np.ascontiguousarray(clip.tracks_yx, "<f4").tobytes(),
        np.ascontiguousarray(clip.query_frames, "<i4").tobytes(),
        np.packbits(clip.visible).tobytes(),
    )
    return b"".join(parts)


def _encode(frame: UInt8[np.ndarray, "H W 3"], quality: int) -> bytes:
    image, file = need("PIL.Image", "encoding frames").fromarray(np.ascontiguousarray(frame)), io.BytesIO()
    if quality == LOSSLESS:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def unpack_clip(record: bytes, name: str, limits: Limits | None = None) -> PointClip:
    """The clip of a record.

    Raises:
        VideoError: not such a record, cut off, or damaged.
    """
    if len(record) < _HEAD.size:
        raise VideoError(name, "a record cut off in its head")
    magic, length, count, height, width, size = _HEAD.unpack_from(record)
    tracks, query = 8 * count * length, 4 * count
    bits = -(-count * length // 8)
    if magic != _MAGIC or not count or len(record) != _HEAD.size + size + tracks + query + bits:
        raise VideoError(name, "not a record of a clip with points, or damaged")
    frames, _ = unpack_record(record[_HEAD.size : _HEAD.size + size], name)
    if len(frames) != length:
        raise VideoError(name, f"a record of {len(frames)} frames that says {length}")
    start = _HEAD.size + size
    tracks_yx = np.frombuffer(record, "<f4", 2 * count * length, start).reshape(count, length, 2)
    query_frames = np.frombuffer(record, "<i4", count, start + tracks)
    visible = np.unpackbits(
        np.frombuffer(record, np.uint8, bits, start + tracks + query), count=count * length
    )
    video = JpegClip(frames, name, _FPS, limits).read(range(length))
    if any(frame.shape[:2] != (height, width) for frame in video):
        raise VideoError(name, f"frames that are not {height} x {width} pixels, as its record says")
    return PointClip(
        np.stack(video), tracks_yx.astype(np.float32), visible.reshape(count, length).astype(bool),
        query_frames.astype(np.int32),
    )  # fmt: skip


class RecordClips(Shards):
    """The clips of a folder of shards.

    Raises:
        VideoDataError: unfinished or damaged shards.
        ImportError: array_record is missing.
    """

    def __init__(self, folder: Path | str, limits: Limits | None = None):
        self.limits = limits or Limits()
        super().__init__(folder, FORMAT)

    def key(self, index: int) -> Any:
        shard, row, _ = self._videos[index]
        return [self._shards[shard]["crc32"], row]

    def open(self, index: int) -> PointClip:
        record, name = self.read_record(index)
        return unpack_clip(record, name, self.limits)


@dataclass(frozen=True)
class _Recorder(ClipsBehind):
    """A source's clips as records."""

    quality: int

    def encode(self, index: int) -> tuple[bytes, dict[str, Any]]:
        clip = check_clip(self.clips.open(index), self.clips.name(index))
        described = {"frames": len(clip.video), "points": len(clip.tracks_yx)}
        return pack_clip(clip, self.quality), described


def prepare_clips(
    clips: Clips,
    output: Path | str,
    *,
    quality: int = 95,
    per_shard: int = 64,
    on_error: str = "skip",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stores all clips of a source in a folder of shards. Returns the manifest.

    Args:
        clips: the source.
        output: folder; what an earlier run has left there and is still right is kept.
        quality: of JPEG frames, 1..100; 0: PNG.
        per_shard: clips in a shard.
        on_error: "skip" (leave out and list what cannot be used) or "fail" (stop at the first).
        workers: processes (default: one per core).
        progress: called with (clips done, in all, done by an earlier run).

    Raises:
        VideoDataError: nothing could be used, or (on_error="fail") something could not.
        ValueError: quality, per_shard or on_error that make no sense.
        ImportError: an optional package is missing.
    """
    if not 0 <= quality <= 100:
        raise ValueError(f"quality = {quality}: must be 1..100, or 0 for PNG")
    stored = Stored(FORMAT, {"quality": quality, "on_error": on_error}, {}, per_shard, on_error)
    return write_shards(_Recorder(clips, quality), output, stored, workers=workers, progress=progress)
