"""Files that are there whole or not at all, and JSON that is read with suspicion."""

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

from tasks.video.data.errors import VideoDataError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also if the process dies or two write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomically`, of JSON."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        VideoDataError: no such file, not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise VideoDataError(f"{path}: no such file; expected {what}") from None
    except OSError as error:
        raise VideoDataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise VideoDataError(f"{path}: not UTF-8 at byte {error.start}; expected {what}") from error
    except json.JSONDecodeError as error:
        raise VideoDataError(
            f"{path}: not JSON ({error.msg} at line {error.lineno}; cut off?); expected {what}"
        ) from error
    except RecursionError as error:
        raise VideoDataError(f"{path}: nested too deep; expected {what}") from error


def checksum(path: Path) -> str:
    """CRC-32 of a file, as 8 hex digits: finds damage, cheap enough to run on every resume."""
    value = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            value = zlib.crc32(data, value)
    return f"{value:08x}"
