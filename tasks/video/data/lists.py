"""Lists of labelled videos: CSV and JSON files, and the official layouts of Something-Something v2 and
Kinetics.

A list that names a class that does not exist is an error: every figure made from it would be wrong. A file
that is not there is left out, counted and named (copies of public sets are never complete), or is an error
with `missing="fail"`.
"""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int32

from configs.common import nearest
from tasks.common.video.decoding import VIDEO_ENDINGS
from tasks.common.video.errors import VideoDataError
from tasks.common.video.storage import read_json

_PATH_NAMES = {"path", "video", "file", "filename", "video_path", "clip", "name", "video_name"}
_LABEL_NAMES = {"label", "class", "category", "target", "label_id", "action"}
_MOST_BYTES = 1 << 30
_MOST_CLASSES = 1_000_000
_SHOWN = 3
_LISTED = 20


@dataclass(frozen=True)
class Listing:
    """Labelled video files.

    paths: files, all of which exist.
    labels: int32 [videos], indices into classes.
    classes: names.
    missing: paths that a list names and that are not there.
    """

    paths: tuple[Path, ...]
    labels: Int32[np.ndarray, " videos"]
    classes: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, keep: Sequence[int] | np.ndarray) -> "Listing":
        """The videos of the given indices."""
        kept = [int(i) for i in keep]
        return replace(self, paths=tuple(self.paths[i] for i in kept), labels=self.labels[kept])


Entry = tuple[str, str]  # path, label


def read_entries(path: Path) -> list[Entry]:
    """(path, label) of every line of a .csv, .txt or .json list, as text.

    A CSV line is "path,label" or "path label", a header is recognised by its names; a JSON list holds
    {"path": ..., "label": ...} or [path, label].

    Raises:
        VideoDataError: no such file, not such a list, or empty; names the line.
    """
    if not path.is_file():
        raise VideoDataError(f"{path}: no such file; expected a CSV or JSON list of videos and labels")
    if path.stat().st_size > _MOST_BYTES:
        raise VideoDataError(f"{path}: {path.stat().st_size} bytes: too large to be a list of videos")
    entries = _json_entries(path) if path.suffix.lower() == ".json" else _csv_entries(path)
    if not entries:
        raise VideoDataError(f"{path}: names no videos")
    return entries


def _json_entries(path: Path) -> list[Entry]:
    what = 'a list of {"path": ..., "label": ...}'
    records = read_json(path, what)
    if not isinstance(records, list):
        raise VideoDataError(f"{path}: a {type(records).__name__}; expected {what}")
    entries = []
    for number, record in enumerate(records):
        if isinstance(record, dict):
            keys = {str(k).lower(): k for k in record}
            found = [
                next((record[keys[k]] for k in keys if k in names), None)
                for names in (_PATH_NAMES, _LABEL_NAMES)
            ]
        else:
            found = list(record) if isinstance(record, list) and len(record) == 2 else [None, None]
        if not isinstance(found[0], str) or isinstance(found[1], bool) or not isinstance(found[1], str | int):
            raise VideoDataError(f"{path}, entry {number}: {json.dumps(record)[:80]}: expected {what}")
        entries.append((found[0], str(found[1])))
    return entries


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VideoDataError(f"{path}: not UTF-8 at byte {error.start}") from error
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _csv_row(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.rsplit(None, 1)  # the label is the last word; paths may hold spaces
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _csv_entries(path: Path) -> list[Entry]:
    lines = _lines(path)
    if not lines:
        return []
    delimiter = "," if "," in lines[0][1] else "\t" if "\t" in lines[0][1] else " "
    head = [cell.strip().lower() for cell in _csv_row(lines[0][1], delimiter)]
    columns = (0, 1)
    if set(head) & _PATH_NAMES and set(head) & _LABEL_NAMES:
        columns = (
            next(i for i, name in enumerate(head) if name in _PATH_NAMES),
            next(i for i, name in enumerate(head) if name in _LABEL_NAMES),
        )
        lines = lines[1:]
    entries = []
    for number, line in lines:
        try:
            row = _csv_row(line, delimiter)
        except csv.Error as error:
            raise VideoDataError(f"{path}, line {number}: {error}") from error
        if len(row) <= max(columns) or not row[columns[0]] or not row[columns[1]]:
            raise VideoDataError(
                f"{path}, line {number}: {line[:80]!r}: expected a path and a label, separated by "
                f"{'a comma' if delimiter == ',' else 'a space'} as in the first line"
            )
        entries.append((row[columns[0]], row[columns[1]]))
    return entries


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line; the line's number, from 0, is the label.

    Raises:
        VideoDataError: no such file, or a name twice.
    """
    if not path.is_file():
        raise VideoDataError(f"{path}: no such file; expected class names, one a line")
    names = [line.strip() for _, line in _lines(path)]
    _refuse_twins(names, path)
    return tuple(names)


def _refuse_twins(names: Sequence[str], where: Path) -> None:
    twins = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twins:
        raise VideoDataError(f"{where}: the class {sorted(twins)[0]!r} is there twice")
    if not names:
        raise VideoDataError(f"{where}: names no classes")


def hint(label: str, classes: Sequence[str]) -> str:
    """How to end an error about an unknown class: the closest one, or some of them."""
    if len(classes) <= _LISTED:
        return nearest(label, classes)
    ending = nearest(label, classes)
    return ending if ending.startswith("did you mean") else f"such as {', '.join(sorted(classes)[:_SHOWN])}"


def classes_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The classes a training list implies: its names in order; or, of whole numbers, 0 to the highest."""
    labels = {label for _, label in entries}
    if all(label.isdecimal() for label in labels):
        highest = max(map(int, labels))
        if highest >= _MOST_CLASSES:
            raise VideoDataError(f"label {highest}: class numbers run from 0 and below {_MOST_CLASSES}")
        return tuple(str(number) for number in range(highest + 1))
    return tuple(sorted(labels))


def resolve(
    entries: Sequence[Entry], classes: Sequence[str], root: Path, where: Path, *, missing: str = "skip"
) -> Listing:
    """Entries of a list as files and labels.

    Args:
        entries: from `read_entries`. A label is a class's name, or its number.
        classes: names.
        root: folder that relative paths are below.
        where: the list, for messages.
        missing: "skip" leaves out files that are not there, "fail" stops at them.

    Raises:
        VideoDataError: an unknown class, a path that leads out of the folder, or nothing left.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    paths, labels, absent = [], [], []
    for name, label in entries:
        number = numbers.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= number < len(classes):
            raise VideoDataError(
                f"{where}: unknown class {label!r} of {name}: there are {len(classes)} classes; "
                f"{hint(label, classes)}"
            )
        if ".." in PurePosixPath(name).parts:
            raise VideoDataError(f"{where}: {name!r} leads out of {root}: name files below it")
        path = root / name
        if path.is_file():
            paths.append(path)
            labels.append(number)
        else:
            absent.append(str(name))
    return checked(paths, labels, classes, absent, where, root, missing)


def checked(
    paths: Sequence[Path],
    labels: Sequence[int],
    classes: Sequence[str],
    absent: Sequence[str],
    where: Path,
    root: Path,
    missing: str,
) -> Listing:
    """A listing, once what is not there has been judged. Raises as `resolve`."""
    if absent and (missing == "fail" or not paths):
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        raise VideoDataError(
            f"{where}: {len(absent)} of {len(absent) + len(paths)} videos are not in {root}: "
            f"{', '.join(absent[:_SHOWN])}{more}"
        )
    return Listing(tuple(paths), np.asarray(labels, np.int32), tuple(classes), tuple(absent))


def folder_listing(root: Path) -> Listing:
    """A folder without a list: every folder below it is a class, the videos in it are its examples.

    Raises:
        VideoDataError: no such folder, or no videos in folders below it.
    """
    if not root.is_dir():
        raise VideoDataError(f"{root}: no such folder")
    found = [
        path for path in sorted(root.glob("*/**/*"))
        if path.suffix.lower() in VIDEO_ENDINGS and path.is_file() and not path.name.startswith(".")
    ]  # fmt: skip
    if not found:
        raise VideoDataError(
            f"{root}: no lists (train.csv, train.json) and no folders of videos, one a class; videos end in "
            f"{' '.join(VIDEO_ENDINGS)}"
        )
    names = [path.relative_to(root).parts[0] for path in found]
    classes = sorted(set(names))
    return Listing(tuple(found), np.asarray([classes.index(n) for n in names], np.int32), tuple(classes))


def split_by_name(listing: Listing, root: Path, fraction: float) -> tuple[Listing, Listing]:
    """Training and held-out videos, by a hash of their names: adding files moves no other across.

    Raises:
        VideoDataError: nothing would be left on one side.
    """
    hashes = [
        int.from_bytes(blake2b(os.path.relpath(p, root).encode(), digest_size=8).digest(), "big")
        for p in listing.paths
    ]
    held = np.asarray([h < int(fraction * 2**64) for h in hashes], bool)
    if fraction > 0 and not held.any():
        held[int(np.argmin(hashes))] = True
    if held.all():
        raise VideoDataError(
            f"{root}: all {len(listing)} videos fall into the validation split: give more, or a "
            "validation_list, or lower validation_fraction"
        )
    return listing.take(np.flatnonzero(~held)), listing.take(np.flatnonzero(held))
