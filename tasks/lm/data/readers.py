"""Raw text in: a folder of text and JSON-lines files (plain, gzip, xz, zstandard), and TFDS data sets.

A reader plans slices (a file, a byte range of a long .jsonl, a range of TFDS examples) and reads one slice
at a time, so that slices can be tokenised by different processes and redone one by one.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tasks.common.optional import need

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py", ".text")
LINE_ENDINGS = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".xz", ".zst")
_CHUNK = 1 << 20
# A byte range of an uncompressed .jsonl this long is one slice.
_RANGE = 64 << 20
_TFDS_RANGE = 4096

Report = Callable[[str, str], None]
"""Called with (name, reason) for a line or document that is left out."""


class DataFileError(ValueError):
    """A data file that cannot be read: names the file and says why."""


@dataclass(frozen=True)
class Slice:
    """A part of the input: bytes (or examples) start..stop of `path`, as it was when planned."""

    path: str
    start: int
    stop: int
    size: int
    mtime_ns: int


@runtime_checkable
class Reader(Protocol):
    """Where raw documents come from. Picklable: worker processes get a copy."""

    @property
    def location(self) -> str:
        """What is read, for messages and the manifest."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """Everything besides the input that decides what is read; goes into the fingerprint."""
        ...

    def plan(self) -> list[Slice]: ...

    def read(self, part: Slice, report: Report) -> Iterator[tuple[str, str]]:
        """(name, text) of the documents of a slice. Raises DataFileError when it is unusable as a whole."""
        ...

    def digest(self, part: Slice) -> str: ...


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    # The package's stream readers take a cut-off frame for the end of the file; this loop does not.
    zstandard = need("zstandard", f"reading {path.name}")
    with path.open("rb") as file:
        frame, data = None, b""
        while data := data or file.read(_CHUNK):
            if frame is None:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DataFileError(f"{path}: damaged zstandard data: {error}") from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        if frame is not None:
            raise DataFileError(f"{path}: truncated: the zstandard data ends in the middle of a frame")


def _stream_chunks(path: Path, kind: str) -> Iterator[bytes]:
    """Of a gzip or xz file: both modules have one face."""
    module: Any = {"gzip": gzip, "xz": lzma}[kind]
    with module.open(path, "rb") as file:
        try:
            while data := file.read(_CHUNK):
                yield data
        except EOFError as error:
            raise DataFileError(f"{path}: truncated: the {kind} data ends before its end mark") from error
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise DataFileError(f"{path}: damaged {kind} data: {error}") from error


def _plain_chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = stop - start
        while left > 0 and (data := file.read(min(_CHUNK, left))):
            left -= len(data)
            yield data


def _chunks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        return _zstd_chunks(path)
    if path.suffix in (".gz", ".xz"):
        return _stream_chunks(path, "gzip" if path.suffix == ".gz" else "xz")
    return _plain_chunks(path, 0, path.stat().st_size)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _lines_of_range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in bytes start..stop of a plain file, the last one in full."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while file.tell() < stop and (line := file.readline()):
            yield line.rstrip(b"\n")


def _kind(path: Path) -> str:
    """'text', 'lines' or '' (not a file of ours) by the name's ending."""
    suffix = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix
    return "text" if suffix in TEXT_ENDINGS else "lines" if suffix in LINE_ENDINGS else ""


def _text_of(line: bytes, field: str) -> str:
    """The text of one JSON line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON ({error.msg} at column {error.colno} of {len(line)}; cut off?)"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        fields = ", ".join(sorted(record)[:6]) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no text in field {field!r} (there is: {fields})")
    text = record[field]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise ValueError(f"character {error.start} of the text is half a surrogate pair") from error
    return text


class FolderReader:
    """Files below a folder (or one file): .txt .md .rst .py are one document, .jsonl one a line; also packed.

    Args:
        folder: the folder or file.
        field: the JSON field that holds the text.

    Raises:
        DataFileError: no such folder, or nothing in it that could be read.
    """

    def __init__(self, folder: str | Path, field: str = "text"):
        self.folder, self.field = Path(folder).expanduser().resolve(), field
        if not self.folder.exists():
            raise DataFileError(f"{self.folder}: no such file or folder")

    @property
    def location(self) -> str:
        return str(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        return {"reader": "folder", "field": self.field}

    def _path(self, part: Slice) -> Path:
        return self.folder if self.folder.is_file() else self.folder / part.path

    def plan(self) -> list[Slice]:
        if self.folder.is_file():
            files = [self.folder]
        else:
            files = [p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        base = self.folder.parent if self.folder.is_file() else self.folder
        slices = []
        for path in sorted(files, key=lambda p: p.relative_to(base).as_posix()):
            kind, stat = _kind(path), path.stat()
            if not kind:
                continue
            whole = kind == "text" or path.suffix in COMPRESSED or stat.st_size == 0
            step = max(stat.st_size, 1) if whole else _RANGE
            name = path.relative_to(base).as_posix()
            for start in range(0, max(stat.st_size, 1), step):
                stop = min(start + step, stat.st_size)
                slices.append(Slice(name, start, stop, stat.st_size, stat.st_mtime_ns))
        if not slices:
            endings, packed = " ".join((*TEXT_ENDINGS, *LINE_ENDINGS)), " ".join(COMPRESSED)
            raise DataFileError(f"{self.folder}: no files ending in {endings} (or these with {packed})")
        return slices

    def digest(self, part: Slice) -> str:
        state = blake2b(digest_size=16)
        for chunk in _plain_chunks(self._path(part), part.start, part.stop):
            state.update(chunk)
        return state.hexdigest()

    def read(self, part: Slice, report: Report) -> Iterator[tuple[str, str]]:
        path = self._path(part)
        if part.size == 0:
            raise DataFileError(f"{path}: empty")
        try:
            if _kind(path) == "lines":
                yield from self._read_lines(path, part, report)
            else:
                yield from self._read_text(path, part)
        except OSError as error:
            raise DataFileError(f"{path}: {error.strerror or error}") from error

    def _read_text(self, path: Path, part: Slice) -> Iterator[tuple[str, str]]:
        content = b"".join(_chunks(path))
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataFileError(
                f"{path}: not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
            ) from error
        if not text.strip():
            raise DataFileError(f"{path}: empty")
        yield part.path, text

    def _read_lines(self, path: Path, part: Slice, report: Report) -> Iterator[tuple[str, str]]:
        compressed = path.suffix in COMPRESSED
        lines = _lines(_chunks(path)) if compressed else _lines_of_range(path, part.start, part.stop)
        # Line numbers of a later byte range would need a pass over the file: name the place in bytes instead.
        where = f" of the part from byte {part.start}" if part.start else ""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = _text_of(line, self.field)
            except ValueError as error:
                report(f"{path}, line {number}{where}", str(error))
                continue
            if text.strip():
                yield f"{part.path}:{number}{where}", text


class TfdsReader:
    """A prepared TFDS data set with a Text feature, stored as ArrayRecord: TensorFlow is not needed.

    Args:
        name: data set name ('name', 'name/config', 'name/config:1.0.0'), or '' if `data_dir` is the folder
            of one prepared data set (the folder that holds dataset_info.json).
        data_dir: TFDS's data_dir; '' is its default.
        split: which split (TFDS syntax, 'train[:10%]' included).
        field: feature that holds the text.

    Raises:
        ImportError: tensorflow_datasets or importlib_resources is missing.
        DataFileError: not prepared, unknown split, no such feature, or stored in a format without random
        access.
    """

    def __init__(self, name: str, data_dir: str = "", split: str = "train", field: str = "text"):
        self.name, self.data_dir, self.split, self.field = name, data_dir, split, field
        self._version = ""
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_source"}

    @property
    def location(self) -> str:
        return f"tfds:{self.name or self.data_dir}:{self.split}"

    @property
    def options(self) -> dict[str, Any]:
        return {"reader": "tfds", "name": self._version, "split": self.split, "field": self.field}

    @cached_property
    def _source(self) -> Any:
        need("importlib_resources", "TFDS")
        tfds = need("tensorflow_datasets", "data.source='tfds'")
        folder = Path(self.data_dir).expanduser() if self.data_dir else None
        if not self.name and not (folder and (folder / "dataset_info.json").is_file()):
            raise DataFileError(f"{folder}: no prepared TFDS data set: there is no dataset_info.json")
        try:
            if self.name:
                builder = tfds.builder(self.name, data_dir=str(folder) if folder else None)
            else:
                builder = tfds.builder_from_directory(str(folder))
            if not builder.info.splits:
                raise DataFileError(
                    f"TFDS data set {self.name!r} is not prepared under {builder.data_dir}: run its "
                    "download_and_prepare(file_format='array_record') first; nothing is downloaded here"
                )
            self._version = builder.info.full_name
            return builder.as_data_source(split=self.split)
        except DataFileError:
            raise
        except Exception as error:  # TFDS raises many kinds
            raise DataFileError(f"{self.location}: {type(error).__name__}: {error}") from error

    def _check(self) -> None:
        if len(self._source) == 0:
            raise DataFileError(f"{self.location}: no examples")
        example = self._source[0]
        if not isinstance(example, dict) or not isinstance(example.get(self.field), bytes | str):
            fields = ", ".join(sorted(example)) if isinstance(example, dict) else type(example).__name__
            raise DataFileError(f"{self.location}: no text in feature {self.field!r} (there is: {fields})")

    def plan(self) -> list[Slice]:
        count = len(self._source)
        ranges = range(0, count, _TFDS_RANGE)
        return [Slice(self.location, i, min(i + _TFDS_RANGE, count), count, 0) for i in ranges]

    def digest(self, part: Slice) -> str:
        state = blake2b(digest_size=16)
        for index in range(part.start, part.stop):
            text = self._text(index)
            state.update(len(text).to_bytes(8, "big") + text)
        return state.hexdigest()

    def _text(self, index: int) -> bytes:
        text = np.asarray(self._source[index][self.field]).item()
        return text.encode("utf-8") if isinstance(text, str) else text

    def read(self, part: Slice, report: Report) -> Iterator[tuple[str, str]]:
        for index in range(part.start, part.stop):
            name = f"{self.location}:{index}"
            try:
                text = self._text(index).decode("utf-8")
            except UnicodeDecodeError as error:
                report(name, f"not UTF-8 at byte {error.start}")
                continue
            if text.strip():
                yield name, text
