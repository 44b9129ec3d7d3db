"""Decode videos once, into shards of JPEG frames: by all cores, resumable after being killed at any moment.

The work is a fixed list of units (neighbouring videos of the list). A unit's result is one ArrayRecord file
and then, atomically, its .json, which carries a key made of everything that decides the result: what is there
with the right key and checksum is kept on the next run, everything else is redone. The same input gives the
same frames, whatever the number of workers and interruptions.
"""

import fcntl
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.units import run_units
from tasks.video.data.errors import VideoDataError, VideoError, VideoTimeout
from tasks.video.data.records import FORMAT, MANIFEST, VERSION, pack_record
from tasks.video.data.sources import Videos
from tasks.video.data.storage import checksum, write_json

_READ_AT_ONCE = 64  # frames held decoded
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class PrepareConfig:
    """What is stored of a video.

    short_side: of the stored frames in pixels; smaller ones stay as they are; 0: all do.
    quality: of the JPEG files, 1..100.
    stride: every so many frames are kept.
    most_frames: of a video; later ones are left out; 0: all are kept.
    per_shard: videos in a shard.
    on_error: "skip" (leave out and list what cannot be read) or "fail" (stop at the first).
    """

    short_side: int = 256
    quality: int = 90
    stride: int = 1
    most_frames: int = 0
    per_shard: int = 64
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or self.stride < 1 or self.per_shard < 1:
            raise ValueError(
                f"quality {self.quality}, stride {self.stride}, per_shard {self.per_shard}: need a quality "
                "of 1..100, and at least 1 of the others"
            )
        if self.short_side < 0 or self.most_frames < 0:
            raise ValueError(
                f"short_side {self.short_side}, most_frames {self.most_frames}: need at least 0 (no limit)"
            )
        if self.on_error not in ("skip", "fail"):
            raise ValueError(f"on_error must be 'skip' or 'fail', got {self.on_error!r}")


@dataclass(frozen=True)
class _Job:
    """Makes shards."""

    videos: Videos
    output: Path
    config: PrepareConfig
    quality: dict[str, Any]  # of the config, what decides frames

    def key(self, unit: tuple[int, int, int]) -> str:
        """Everything that decides a unit's result."""
        _, start, stop = unit
        inputs = [
            [self.videos.name(i), int(self.videos.labels[i]), _stamp(self.videos.name(i))]
            for i in range(start, stop)
        ]
        content = json.dumps([VERSION, self.quality, list(self.videos.classes), inputs])
        return blake2b(content.encode(), digest_size=16).hexdigest()

    def __call__(self, unit: tuple[int, int, int]) -> dict[str, Any]:
        """Writes one shard: the records, and then its .json. Returns what is in that."""
        number, start, stop = unit
        name = f"shard-{number:05d}"
        path, record_path = self.output / f"{name}.array_record", self.output / f"{name}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            videos, skipped = self._write(temporary, start, stop)
            key = self.key(unit)
            # A .json of other data must never lie beside this; one of the same key stays true.
            if _read_record(record_path).get("key") != key:
                record_path.unlink(missing_ok=True)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        record = {
            "name": name,
            "key": key,
            "size": path.stat().st_size,
            "crc32": checksum(path),
            "videos": videos,
            "skipped": skipped,
        }
        write_json(record_path, record)
        return record

    def _write(self, path: Path, start: int, stop: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        module = need("array_record.python.array_record_module", "writing shards")
        # JPEG does not compress further, and one record is read at a time.
        writer = module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        videos, skipped = [], []
        try:
            for index in range(start, stop):
                name = self.videos.name(index)
                try:
                    frames, fps = encoded_frames(self.videos, index, self.config)
                except (VideoError, VideoTimeout) as error:
                    if self.config.on_error == "fail":
                        raise
                    reason = error.reason if isinstance(error, VideoError) else str(error)
                    skipped.append({"name": name, "reason": reason})
                    continue
                writer.write(pack_record(frames, fps))
                videos.append({"name": name, "label": int(self.videos.labels[index]), "frames": len(frames)})
        finally:
            writer.close()
        return videos, skipped


def _stamp(name: str) -> list[int]:
    """Size and time of a file; nothing for records of other sets."""
    try:
        stat = Path(name).stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def encoded_frames(videos: Videos, index: int, config: PrepareConfig) -> tuple[list[bytes], float]:
    """(JPEG files, fps) of one video, as they are stored.

    Raises:
        VideoError, VideoTimeout: it cannot be read.
    """
    with videos.open(index) as clip:
        wanted = list(range(0, clip.frames, config.stride))
        wanted = wanted[: config.most_frames or len(wanted)]
        encoded = []
        for start in range(0, len(wanted), _READ_AT_ONCE):
            frames = clip.read(wanted[start : start + _READ_AT_ONCE])
            encoded += [_jpeg(frame, config) for frame in frames]
        return encoded, clip.fps / config.stride


def _jpeg(frame: UInt8[np.ndarray, "H W 3"], config: PrepareConfig) -> bytes:
    image_module = need("PIL.Image", "encoding frames")
    image = image_module.fromarray(frame)
    short = min(image.size)
    if 0 < config.short_side < short:
        size = [max(1, round(side * config.short_side / short)) for side in image.size]
        image = image.resize(size, image_module.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=config.quality)
    return file.getvalue()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _finished(job: _Job, unit: tuple[int, int, int]) -> dict[str, Any] | None:
    """The record of a shard made by an earlier run, if it is what would be made now and undamaged."""
    path = job.output / f"shard-{unit[0]:05d}.json"
    record = _read_record(path)
    if record.get("key") != job.key(unit):
        return None
    try:
        same = checksum(path.with_suffix(".array_record")) == record["crc32"]
    except (OSError, KeyError):
        return None
    return record if same else None


def prepare(
    videos: Videos,
    output: Path | str,
    config: PrepareConfig | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stores all frames of all videos of one split in a folder of shards. Returns the manifest.

    Args:
        videos: labelled videos.
        output: folder; what an earlier run has left there and is still right is kept.
        config: what is stored.
        workers: processes (default: one per core).
        progress: called with (videos done, in all, done by an earlier run).

    Raises:
        VideoDataError: nothing could be read, or (on_error="fail") something could not.
        VideoTimeout: idem, in time.
        ImportError: an optional package is missing.
    """
    config, output = config or PrepareConfig(), Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    quality = {
        "short_side": config.short_side, "quality": config.quality, "stride": config.stride,
        "most_frames": config.most_frames, "on_error": config.on_error,
    }  # fmt: skip
    job = _Job(videos, output, config, quality)
    with (output / ".lock").open("w") as lock:
        # Two commands at once would write the same shards: the first makes them, the other finds them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _prepare(job, workers, progress)


def _prepare(job: _Job, workers: int | None, progress: Progress | None) -> dict[str, Any]:
    count, step = len(job.videos), job.config.per_shard
    units = [(n, start, min(start + step, count)) for n, start in enumerate(range(0, count, step))]
    records = {unit[0]: r for unit in units if (r := _finished(job, unit)) is not None}
    kept = done = sum(stop - start for number, start, stop in units if number in records)
    todo = [(unit[0], unit) for unit in units if unit[0] not in records]
    if todo:
        (job.output / MANIFEST).unlink(missing_ok=True)
    if progress:
        progress(done, count, kept)
    for number, record in run_units(job, todo, workers):
        records[number] = record
        done += units[number][2] - units[number][1]
        if progress:
            progress(done, count, kept)
    return _finish(job, [records[unit[0]] for unit in units])


def _finish(job: _Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest, and remove what other runs have left."""
    videos = sum(len(r["videos"]) for r in records)
    skipped = [s for r in records for s in r["skipped"]]
    if videos == 0:
        reasons = "; ".join(f"{s['name']}: {s['reason']}" for s in skipped[:3])
        raise VideoDataError(f"{job.output}: no video could be read ({reasons or 'there are none'})")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "options": job.quality,
        "classes": list(job.videos.classes),
        "videos": videos,
        "frames": sum(v["frames"] for r in records for v in r["videos"]),
        "bytes": sum(r["size"] for r in records),
        "missing": list(job.videos.missing),
        "skipped": skipped,
        "shards": [{k: v for k, v in r.items() if k != "skipped"} for r in records],
    }
    write_json(job.output / MANIFEST, manifest)
    names = {r["name"] for r in records}
    for path in job.output.glob("shard-*"):
        if path.name.split(".")[0] not in names:
            path.unlink(missing_ok=True)
    for path in job.output.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    return manifest
