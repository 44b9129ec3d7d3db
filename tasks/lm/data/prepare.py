"""Tokenise raw text into shards, once: by all cores, resumable after being killed at any moment.

The work is a fixed list of units (neighbouring slices of the input up to a size). A unit's result is two
data files and then, atomically, its .json, which carries a key made of everything that decides the result:
what is there with the right key and checksums is kept on the next run, everything else is redone. The same
input gives the same bytes, whatever the number of workers and interruptions.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tasks.common.storage import checksum, locked, read_record, remove_other_shards, replacing, write_json
from tasks.common.units import run_missing
from tasks.lm.data.documents import content_hash
from tasks.lm.data.readers import DataFileError, Reader, Slice
from tasks.lm.data.shards import FORMAT, INDEX, MANIFEST, VERSION, slice_record, tokenizer_record
from tasks.lm.data.tokenizers import Tokenizer

SHARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Job:
    """What every unit needs to know."""

    reader: Reader
    tokenizer: Tokenizer
    output: Path
    cut: int
    on_error: str

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    @property
    def options(self) -> dict[str, Any]:
        return {**self.reader.options, "cut": self.cut, "on_error": self.on_error}

    def key(self, parts: tuple[Slice, ...]) -> str:
        """Everything that decides a unit's result."""
        content = [VERSION, self.tokenizer.fingerprint, self.options, [asdict(p) for p in parts]]
        return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def units_of(parts: Iterable[Slice], shard_bytes: int) -> list[tuple[Slice, ...]]:
    """Neighbouring slices together, up to `shard_bytes` of input each (a larger slice is its own unit)."""
    units: list[list[Slice]] = []
    room = 0
    for part in parts:
        size = part.stop - part.start
        if not units or size > room:
            units.append([])
            room = shard_bytes
        units[-1].append(part)
        room -= size
    return [tuple(u) for u in units]


def pieces(text: str, limit: int) -> Iterator[str]:
    """The text, cut at line ends into pieces of up to `limit` bytes (a longer line is a piece); 0: uncut."""
    if limit == 0 or len(text.encode("utf-8", "surrogatepass")) <= limit:
        yield text
        return
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode("utf-8", "surrogatepass"))
        if held and size + length > limit:
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += length
    yield "".join(held)


class _ShardWriter:
    """Appends documents to the data files of one shard, and can take a half-read file back."""

    def __init__(self, job: Job, file: BinaryIO):
        self._job, self._file = job, file
        self.records: list[tuple[int, int, int]] = []
        self.max_id = -1
        self.problems: list[dict[str, str]] = []
        self.files: list[dict[str, Any]] = []

    def add(self, part: Slice) -> None:
        """All documents of a slice; none of them if reading it fails half way."""
        records, position, highest = len(self.records), self._file.tell(), self.max_id
        try:
            for _, text in self._job.reader.read(part, self._report):
                for piece in pieces(text, self._job.cut):
                    self._write(piece)
        except DataFileError as error:
            if self._job.on_error == "fail":
                raise
            del self.records[records:]
            self._file.seek(position)
            self._file.truncate()
            self.max_id = highest
            name, _, reason = str(error).partition(": ")
            self.problems.append({"name": name, "reason": reason})
            return
        self.files.append({"path": part.path, "first": records})

    def _report(self, name: str, reason: str) -> None:
        if self._job.on_error == "fail":
            raise DataFileError(f"{name}: {reason}")
        self.problems.append({"name": name, "reason": reason})

    def _write(self, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        ids = self._job.tokenizer.encode(text)
        if len(ids) == 0:
            return
        self.max_id = max(self.max_id, int(ids.max()))
        self._file.write(ids.astype(self._job.dtype).tobytes())
        self.records.append((len(ids), len(content), content_hash(content)))


def make_shard(job: Job, number: int, parts: tuple[Slice, ...]) -> dict[str, Any]:
    """Tokenise one unit and write its three files; the .json last.

    Raises:
        DataFileError: an input cannot be read and on_error is 'fail'.
    """
    name = f"shard-{number:05d}"
    tokens, index = job.output / f"{name}.tokens", job.output / f"{name}.index"
    with replacing(tokens) as new_tokens, replacing(index) as new_index:
        with new_tokens.open("wb") as file:
            writer = _ShardWriter(job, file)
            for part in parts:
                writer.add(part)
        records = np.array(writer.records, INDEX)
        with new_index.open("wb") as file:
            np.save(file, records)
        # A .json of other data must never lie beside this; one of the same key stays true.
        if read_record(job.output / f"{name}.json").get("key") != job.key(parts):
            (job.output / f"{name}.json").unlink(missing_ok=True)
    record = {
        "name": name,
        "key": job.key(parts),
        "documents": len(records),
        "tokens": int(records["length"].sum()),
        "bytes": int(records["bytes"].sum()),
        "max_id": writer.max_id,
        "tokens_crc32": checksum(tokens),
        "index_crc32": checksum(index),
        "files": writer.files,
        "skipped": writer.problems,
        "inputs": [slice_record(p, job.reader.digest(p)) for p in parts],
    }
    write_json(job.output / f"{name}.json", record, indent=1)
    return record


def _finished(job: Job, number: int, parts: tuple[Slice, ...]) -> dict[str, Any] | None:
    """The record of a shard made by an earlier run, if it is what would be made now and undamaged."""
    path = job.output / f"shard-{number:05d}.json"
    record = read_record(path)
    if record.get("key") != job.key(parts):
        return None
    try:
        same = all(
            checksum(path.with_suffix(f".{kind}")) == record[f"{kind}_crc32"] for kind in ("tokens", "index")
        )
    except OSError:
        return None
    return record if same else None


def _make(job: Job, unit: tuple[int, tuple[Slice, ...]]) -> dict[str, Any]:
    return make_shard(job, *unit)


def prepare(
    reader: Reader,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    workers: int | None = None,
    cut: int = 0,
    on_error: str = "skip",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Tokenise all of a reader's documents into a folder of shards. Returns the manifest.

    Args:
        reader: where documents come from.
        tokenizer: what makes tokens of them.
        output: folder of shards; what an earlier run has left there and is still right is kept.
        workers: processes; default: one per core.
        cut: documents of more bytes than this are cut at line ends; 0: never.
        on_error: 'skip' (leave out and list what cannot be read) or 'fail' (stop at the first).
        shard_bytes: input bytes per shard.
        progress: called with (input bytes done, input bytes in all, bytes of it found done by an earlier
            run).

    Raises:
        DataFileError: nothing to read, nothing left after skipping, or (on_error='fail') something
        unreadable.
        ValueError: bad options.
    """
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error must be 'skip' or 'fail', got {on_error!r}")
    if shard_bytes < 1 or cut < 0 or (workers is not None and workers < 1):
        raise ValueError(
            f"need shard_bytes >= 1, cut >= 0, workers >= 1; got {shard_bytes}, {cut}, {workers}"
        )
    output = Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    job = Job(reader, tokenizer, output, cut, on_error)
    with locked(output / ".lock"):
        return _prepare(job, shard_bytes, workers or os.cpu_count() or 1, progress)


def _prepare(
    job: Job, shard_bytes: int, workers: int, progress: Callable[[int, int, int], None] | None
) -> dict[str, Any]:
    units = units_of(job.reader.plan(), shard_bytes)
    sizes = [sum(p.stop - p.start for p in parts) for parts in units]
    found = {n: r for n, parts in enumerate(units) if (r := _finished(job, n, parts)) is not None}
    if len(found) < len(units):
        (job.output / MANIFEST).unlink(missing_ok=True)
    make = functools.partial(_make, job)
    return _finish(job, run_missing(make, list(enumerate(units)), sizes, found, workers, progress))


def _finish(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest, and remove what other runs have left."""
    documents = sum(r["documents"] for r in records)
    skipped = [s for r in records for s in r["skipped"]]
    if documents == 0:
        reasons = "; ".join(f"{s['name']}: {s['reason']}" for s in skipped[:3])
        raise DataFileError(
            f"{job.reader.location}: no document could be read ({reasons or 'all are empty'})"
        )
    content = json.dumps([job.tokenizer.fingerprint, [r["tokens_crc32"] + r["index_crc32"] for r in records]])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": blake2b(content.encode(), digest_size=16).hexdigest(),
        "tokenizer": tokenizer_record(job.tokenizer),
        "dtype": job.dtype.name,
        "options": job.options,
        "input": job.reader.location,
        "documents": documents,
        "tokens": sum(r["tokens"] for r in records),
        "bytes": sum(r["bytes"] for r in records),
        "max_id": max(r["max_id"] for r in records),
        "skipped": skipped,
        "shards": [{k: v for k, v in r.items() if k not in ("inputs", "skipped")} for r in records],
        "inputs": [i for r in records for i in r["inputs"]],
    }
    write_json(job.output / MANIFEST, manifest, indent=1)
    remove_other_shards(job.output, {r["name"] for r in records})
    return manifest
