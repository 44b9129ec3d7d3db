"""Files that are there whole or not at all, and what tells whether they still are."""

import fcntl
import json
import os
import secrets
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` when whole; the folder is made if need be.

    A reader, a kill at any moment, a crash of the machine, or two who write at once leave an old or a new
    file, never a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """`replacing`, by this content; text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, indent: int | None = 2, **options: Any) -> None:
    """`atomic_write`, of JSON and a line end; `options` as those of `json.dumps`."""
    atomic_write(path, json.dumps(value, indent=indent, **options) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object that an earlier run left in a file; {} if there is none that can be read."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def checksum(path: Path) -> str:
    """CRC-32 of a file, as 8 hex digits: finds damage, cheap enough to run on every resume."""
    value = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time. Several may want the same files: the first makes them, the others find them."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_other_shards(folder: Path, names: Collection[str]) -> None:
    """Removes what other runs have left in a folder of shards: those not named, and temporary files."""
    for path in folder.glob("shard-*"):
        if path.name.split(".")[0] not in names:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
