"""Shards: what was prepared once from slow sources, as ArrayRecord files that training reads by index.

A folder:

shard-00000.array_record   one record a video; what is in it is the data set's business
shard-00000.json           what it was made of, its checksum, what was left out; written last: it makes the
                           shard valid
manifest.json              the whole: options, videos, totals; written when all shards are there

The work is a fixed list of units (neighbouring videos). A unit's .json carries a key made of everything that
decides the result: what is there with the right key and checksum is kept on the next run, everything else is
redone. The same input gives the same records, whatever the number of workers and interruptions.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tasks.common.optional import need
from tasks.common.storage import checksum, locked, read_record, remove_other_shards, replacing, write_json
from tasks.common.units import run_missing
from tasks.common.video.errors import VideoDataError, VideoError, VideoTimeout
from tasks.common.video.storage import read_json

MANIFEST = "manifest.json"
Progress = Callable[[int, int, int], None]


@runtime_checkable
class Recorder(Protocol):
    """Random access to what is to be stored. Picklable: worker processes get a copy."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where a video comes from, for messages and the manifest."""
        ...

    def key(self, index: int) -> Any:
        """JSON of everything, besides the options, that decides its record."""
        ...

    def encode(self, index: int) -> tuple[bytes, dict[str, Any]]:
        """(record, what the manifest says of it). Raises VideoError, VideoTimeout."""
        ...


@dataclass(frozen=True)
class Format:
    """A kind of shards.

    name, version: stated in the manifest; a folder of another is refused.
    command: that makes them, for messages.
    """

    name: str
    version: int
    command: str


@dataclass(frozen=True)
class _Job:
    """Makes shards."""

    recorder: Recorder
    output: Path
    format: Format
    options: dict[str, Any]  # what decides records
    header: dict[str, Any]  # more for the manifest
    skip: bool  # leave out and list what cannot be read

    def key(self, unit: tuple[int, int, int]) -> str:
        """Everything that decides a unit's result."""
        _, start, stop = unit
        inputs = [self.recorder.key(i) for i in range(start, stop)]
        content = json.dumps([self.format.version, self.options, inputs])
        return blake2b(content.encode(), digest_size=16).hexdigest()

    def __call__(self, unit: tuple[int, int, int]) -> dict[str, Any]:
        """Writes one shard: the records, and then its .json. Returns what is in that."""
        number, start, stop = unit
        name = f"shard-{number:05d}"
        path, record_path = self.output / f"{name}.array_record", self.output / f"{name}.json"
        with replacing(path) as temporary:
            videos, skipped = self._write(temporary, start, stop)
            key = self.key(unit)
            # A .json of other data must never lie beside this; one of the same key stays true.
            if read_record(record_path).get("key") != key:
                record_path.unlink(missing_ok=True)
        record = {
            "name": name,
            "key": key,
            "size": path.stat().st_size,
            "crc32": checksum(path),
            "videos": videos,
            "skipped": skipped,
        }
        write_json(record_path, record, indent=1)
        return record

    def _write(self, path: Path, start: int, stop: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        module = need("array_record.python.array_record_module", "writing shards")
        # Images do not compress further, and one record is read at a time.
        writer = module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        videos, skipped = [], []
        try:
            for index in range(start, stop):
                name = self.recorder.name(index)
                try:
                    content, described = self.recorder.encode(index)
                except (VideoError, VideoTimeout) as error:
                    if not self.skip:
                        raise
                    reason = error.reason if isinstance(error, VideoError) else str(error)
                    skipped.append({"name": name, "reason": reason})
                    continue
                writer.write(content)
                videos.append({"name": name, **described})
        finally:
            writer.close()
        return videos, skipped


def stamp(path: Path | str) -> list[int]:
    """Size and time of a file, for a recorder's key; nothing where there is none."""
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _finished(job: _Job, unit: tuple[int, int, int]) -> dict[str, Any] | None:
    """The record of a shard made by an earlier run, if it is what would be made now and undamaged."""
    path = job.output / f"shard-{unit[0]:05d}.json"
    record = read_record(path)
    if record.get("key") != job.key(unit):
        return None
    try:
        same = checksum(path.with_suffix(".array_record")) == record["crc32"]
    except (OSError, KeyError):
        return None
    return record if same else None


@dataclass(frozen=True)
class Stored:
    """How a recorder is stored.

    format: of the folder.
    options: what, besides the recorder, decides the records; stated in the manifest.
    header: more for the manifest.
    per_shard: videos in a shard.
    on_error: "skip" (leave out and list what cannot be read) or "fail" (stop at the first).
    """

    format: Format
    options: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    per_shard: int = 64
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise ValueError(f"per_shard = {self.per_shard}: need at least 1")
        if self.on_error not in ("skip", "fail"):
            raise ValueError(f"on_error must be 'skip' or 'fail', got {self.on_error!r}")


def write_shards(
    recorder: Recorder,
    output: Path | str,
    stored: Stored,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stores everything of a recorder in a folder of shards. Returns the manifest.

    Args:
        recorder: what is stored.
        output: folder; what an earlier run has left there and is still right is kept.
        stored: how.
        workers: processes (default: one per core).
        progress: called with (videos done, in all, done by an earlier run).

    Raises:
        VideoDataError: nothing could be read, or (on_error="fail") something could not.
        VideoTimeout: idem, in time.
        ImportError: an optional package is missing.
    """
    output = Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    job = _Job(recorder, output, stored.format, stored.options, stored.header, stored.on_error == "skip")
    with locked(output / ".lock"):
        return _write_all(job, stored.per_shard, workers, progress)


def _write_all(job: _Job, step: int, workers: int | None, progress: Progress | None) -> dict[str, Any]:
    count = len(job.recorder)
    units = [(n, start, min(start + step, count)) for n, start in enumerate(range(0, count, step))]
    found = {unit[0]: r for unit in units if (r := _finished(job, unit)) is not None}
    if len(found) < len(units):
        (job.output / MANIFEST).unlink(missing_ok=True)
    sizes = [stop - start for _, start, stop in units]
    return _finish(job, run_missing(job, units, sizes, found, workers, progress))


def _finish(job: _Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest, and remove what other runs have left."""
    videos = sum(len(r["videos"]) for r in records)
    skipped = [s for r in records for s in r["skipped"]]
    if videos == 0:
        reasons = "; ".join(f"{s['name']}: {s['reason']}" for s in skipped[:3])
        raise VideoDataError(f"{job.output}: no video could be read ({reasons or 'there are none'})")
    manifest = {
        "format": job.format.name,
        "version": job.format.version,
        "options": job.options,
        **job.header,
        "videos": videos,
        "frames": sum(v["frames"] for r in records for v in r["videos"]),
        "bytes": sum(r["size"] for r in records),
        "skipped": skipped,
        "shards": [{k: v for k, v in r.items() if k != "skipped"} for r in records],
    }
    write_json(job.output / MANIFEST, manifest, indent=1)
    remove_other_shards(job.output, {r["name"] for r in records})
    return manifest


def read_manifest(folder: Path, format: Format) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        VideoDataError: none there, unfinished, damaged, or of another format or version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if any(folder.glob("shard-*.json")):
            raise VideoDataError(
                f"{folder}: preparing it has not finished: run the same `prepare` command again"
            )
        raise VideoDataError(
            f"{folder}: no {MANIFEST}: not a folder of shards; make one by `{format.command}`"
        )
    manifest = read_json(path, f"a manifest of {format.name}")
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (format.name, format.version):
        raise VideoDataError(
            f"{path}: not a manifest of {format.name} version {format.version}; run `prepare` again"
        )
    return manifest


class Shards:
    """The records of a folder of shards, by index. Picklable.

    Raises:
        VideoDataError: unfinished or damaged shards.
        ImportError: array_record is missing.
    """

    def __init__(self, folder: Path | str, format: Format):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder, format)
        try:
            self._read_index()
        except (KeyError, TypeError, AttributeError) as error:
            raise VideoDataError(
                f"{self.folder / MANIFEST}: damaged ({type(error).__name__}: {error}); run `prepare` again"
            ) from error
        self._readers: dict[int, Any] = {}

    def _read_index(self) -> None:
        """Checks the manifest; may raise KeyError, TypeError and AttributeError on what is not as it was
        written."""
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def _path(self, shard: dict[str, Any]) -> Path:
        return self.folder / f"{shard['name']}.array_record"

    def __len__(self) -> int:
        return len(self._videos)

    def entry(self, index: int) -> dict[str, Any]:
        """What the manifest says of a video."""
        return self._videos[index][2]

    def name(self, index: int) -> str:
        """What the video was made of."""
        return str(self.entry(index)["name"])

    def read_record(self, index: int) -> tuple[bytes, str]:
        """(record, name of it for messages). Raises VideoError: a damaged shard."""
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
        return record, name

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            VideoDataError: names the first damaged file.
        """
        for shard in self._shards:
            if checksum(self._path(shard)) != shard["crc32"]:
                raise VideoDataError(f"{self._path(shard)}: damaged (checksum differs); run `prepare` again")
