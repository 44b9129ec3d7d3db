"""Prepared videos: ArrayRecord shards of JPEG frames, which `prepare` writes and training reads.

A folder of one split:

shard-00000.array_record   one record a video (below)
shard-00000.json           what it was made of, its checksum, what was left out; written last: it makes the
                           shard valid
manifest.json              the whole: options, classes, videos, totals; written when all shards are there

A record: magic "FVR1", then little-endian uint32 frames, uint32 zero, float64 fps, uint32 bytes of each
frame, and the JPEG files end to end. Lengths are checked before anything is read.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.common.optional import need
from tasks.video.data.decoding import Limits
from tasks.video.data.errors import VideoDataError, VideoError
from tasks.video.data.frames import Clip, JpegClip
from tasks.video.data.storage import checksum, read_json

FORMAT = "foxtrot-video-shards"
VERSION = 1
MANIFEST = "manifest.json"
PREPARE = "python -m tasks.video.data prepare --output=DIR ..."
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        VideoDataError: none there, unfinished, damaged, or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob("shard-*.json")):
            raise VideoDataError(
                f"{folder}: preparing it has not finished: run the same `prepare` command again"
            )
        raise VideoDataError(f"{folder}: no {MANIFEST}: not a folder of shards; make one by `{PREPARE}`")
    manifest = read_json(path, f"a manifest of {FORMAT}")
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") != VERSION
    ):
        raise VideoDataError(f"{path}: not a manifest of {FORMAT} version {VERSION}; run `prepare` again")
    return manifest


class RecordVideos:
    """The videos of a folder of shards.

    Raises:
        VideoDataError: unfinished or damaged shards.
        ImportError: array_record is missing.
    """

    missing: tuple[str, ...] = ()

    def __init__(self, folder: Path | str, limits: Limits | None = None):
        self.folder, self.limits = Path(folder).expanduser(), limits or Limits()
        self.manifest = read_manifest(self.folder)
        try:
            self._read_index()
        except (KeyError, TypeError, AttributeError) as error:
            raise VideoDataError(
                f"{self.folder / MANIFEST}: damaged ({type(error).__name__}: {error}); run `prepare` again"
            ) from error
        self._readers: dict[int, Any] = {}

    def _read_index(self) -> None:
        self.classes = tuple(self.manifest["classes"])
        self._shards = self.manifest["shards"]
        for shard in self._shards:
            path = self._path(shard)
            if not re.fullmatch(r"shard-\d{5,}", shard["name"]):
                raise VideoDataError(f"{self.folder / MANIFEST}: {shard['name']!r} is no name of a shard")
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise VideoDataError(
                    f"{path}: missing or not {shard['size']} bytes long: damaged; run `prepare` again"
                )
        self._videos = [(s, row, video) for s, shard in enumerate(self._shards)
                        for row, video in enumerate(shard["videos"])]  # fmt: skip
        self.labels = np.asarray([video["label"] for _, _, video in self._videos], np.int32)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise VideoDataError(f"{self.folder / MANIFEST}: a label beyond the {len(self.classes)} classes")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def _path(self, shard: dict[str, Any]) -> Path:
        return self.folder / f"{shard['name']}.array_record"

    def __len__(self) -> int:
        return len(self._videos)

    def name(self, index: int) -> str:
        return str(self._videos[index][2]["name"])

    def open(self, index: int) -> Clip:
        shard, row, video = self._videos[index]
        name = f"{self._path(self._shards[shard])}, record {row} ({video['name']})"
        module = need("array_record.python.array_record_module", "reading shards")
        try:
            if shard not in self._readers:
                path = str(self._path(self._shards[shard]))
                # Records are read one at a time, from anywhere: reading ahead would be in vain.
                self._readers[shard] = module.ArrayRecordReader(path, options="readahead_buffer_size:0")
            (record,) = self._readers[shard].read([row])
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise VideoError(name, f"damaged shard ({error}); run `prepare` again") from error
        frames, fps = unpack_record(record, name)
        return JpegClip(frames, name, fps, self.limits)

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            VideoDataError: names the first damaged file.
        """
        for shard in self._shards:
            if checksum(self._path(shard)) != shard["crc32"]:
                raise VideoDataError(f"{self._path(shard)}: damaged (checksum differs); run `prepare` again")
