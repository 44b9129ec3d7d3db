"""Something-Something v2 and Kinetics, as they are distributed."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tasks.common.video.decoding import VIDEO_ENDINGS
from tasks.common.video.errors import VideoDataError
from tasks.common.video.storage import read_json
from tasks.video.data.lists import Listing, checked, hint

SPLITS = ("train", "validation", "test")


def _find(root: Path, names: list[str], what: str) -> Path | None:
    for name in names:
        if (root / name).exists():
            return root / name
    if what:
        raise VideoDataError(f"{root}: no {what} (looked for {', '.join(names)})")
    return None


# Something-Something v2


def _ssv2_file(root: Path, name: str, *, needed: bool = True) -> Path | None:
    names = [f"{folder}{prefix}{name}" for folder in ("", "labels/", "annotations/")
             for prefix in ("", "something-something-v2-")]  # fmt: skip
    return _find(root, names, f"Something-Something v2 file {name}" if needed else "")


def ssv2_classes(root: Path) -> tuple[str, ...]:
    """Class names in the order of labels.json, which maps each to its number, as text.

    Raises:
        VideoDataError: no labels.json, or not one.
    """
    path = _ssv2_file(root, "labels.json")
    assert path is not None
    table = read_json(path, 'a table {"class": "number"}')
    if not isinstance(table, dict) or not table:
        raise VideoDataError(f'{path}: expected a table {{"class": "number"}}')
    numbers = {}
    for name, number in table.items():
        if not str(number).isdecimal():
            raise VideoDataError(f"{path}: class {name!r} has the number {number!r}: expected a whole number")
        numbers[int(number)] = name
    if sorted(numbers) != list(range(len(table))):
        raise VideoDataError(
            f"{path}: {len(table)} classes must be numbered 0 to {len(table) - 1}, each once"
        )
    return tuple(numbers[i] for i in range(len(numbers)))


def _ssv2_entries(root: Path, split: str) -> tuple[Path, list[tuple[str, str]]]:
    """(the list, (id, class name) of every video)."""
    path = _ssv2_file(root, f"{split}.json")
    assert path is not None
    records = read_json(path, 'a list of {"id": ..., "template": ...}')
    if not isinstance(records, list):
        raise VideoDataError(f'{path}: expected a list of {{"id": ..., "template": ...}}')
    answers = _ssv2_answers(root) if split == "test" else {}
    entries = []
    for number, record in enumerate(records):
        name = str(record.get("id", "")) if isinstance(record, dict) else ""
        template = answers.get(name) if split == "test" else record.get("template") if name else None
        if not re.fullmatch(r"\d+", name) or not isinstance(template, str):
            lacks = "is not in test-answers.csv" if split == "test" and name else "has no id and template"
            raise VideoDataError(f"{path}, entry {number}: {lacks}: {str(record)[:80]}")
        entries.append((name, re.sub(r"[\[\]]", "", template)))
    return path, entries


def _ssv2_answers(root: Path) -> dict[str, str]:
    """Classes of the test videos: lines of "id;class"."""
    path = _ssv2_file(root, "test-answers.csv", needed=False)
    if path is None:
        raise VideoDataError(
            f"{root}: the test videos have labels only in test-answers.csv, which is not there: evaluate on "
            "the split validation, or add the file"
        )
    answers = {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        name, separator, template = line.partition(";" if ";" in line else ",")
        if not separator and line.strip():
            raise VideoDataError(f"{path}, line {number}: {line[:80]!r}: expected 'id;class'")
        answers[name.strip()] = template.strip().strip('"')
    return answers


def ssv2_listing(root: Path, split: str, *, missing: str = "skip") -> Listing:
    """A split of Something-Something v2: labels.json, train.json, ... (also below labels/, or with the prefix
    something-something-v2-) and <id>.webm in 20bn-something-something-v2/ (or videos/, or the folder itself).

    Raises:
        VideoDataError: files that are missing or not what they should be, a template that is no class.
    """
    classes = ssv2_classes(root)
    numbers = {name: i for i, name in enumerate(classes)}
    where, entries = _ssv2_entries(root, split)
    videos = _find(root, ["20bn-something-something-v2", "videos"], "") or root
    paths, labels, absent = [], [], []
    for name, template in entries:
        if template not in numbers:
            raise VideoDataError(
                f"{where}: unknown class {template!r} of video {name}: {hint(template, classes)}"
            )
        path = next((p for p in (videos / f"{name}{e}" for e in (".webm", ".mp4")) if p.is_file()), None)
        if path is None:
            absent.append(f"{name}.webm")
        else:
            paths.append(path)
            labels.append(numbers[template])
    return checked(paths, labels, classes, absent, where, videos, missing)


# Kinetics


def _kinetics_file(root: Path, split: str) -> Path:
    words = {"validation": ("validation", "val", "validate")}.get(split, (split,))
    for folder in (root, root / "annotations", root / "annotation"):
        for word in words:
            pattern = re.compile(rf"(?:kinetics[-_]?\d*[-_])?{word}\.csv")
            found = [p for p in sorted(folder.glob("*.csv")) if pattern.fullmatch(p.name.lower())]
            if found:
                return found[0]
    raise VideoDataError(
        f"{root}: no Kinetics list for the split {split} (looked for {', '.join(w + '.csv' for w in words)}, "
        "also with the prefix kinetics400_, there and in annotations/)"
    )


def _kinetics_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    needed = ("label", "youtube_id", "time_start", "time_end")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in needed if name not in (reader.fieldnames or ())]
            if lacking:
                raise VideoDataError(
                    f"{path}: no column {lacking[0]!r}: expected the official header label,youtube_id,"
                    "time_start,time_end,split"
                )
            for row in reader:
                if not all(row[name] for name in needed):
                    raise VideoDataError(f"{path}, line {reader.line_num}: a value is missing")
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise VideoDataError(f"{path}: not UTF-8 at byte {error.start}") from error
    except csv.Error as error:
        raise VideoDataError(f"{path}: {error}") from error


def _clip_name(path: Path, line: int, row: dict[str, str]) -> str:
    try:
        start, end = float(row["time_start"]), float(row["time_end"])
        return f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
    except (ValueError, OverflowError):
        raise VideoDataError(
            f"{path}, line {line}: times {row['time_start']!r}, {row['time_end']!r}: expected seconds"
        ) from None


def _files_by_stem(root: Path) -> dict[str, list[Path]]:
    """Video files anywhere below a folder, by name without ending: sets are stored in many layouts."""
    found: dict[str, list[Path]] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if path.suffix.lower() in VIDEO_ENDINGS and not name.startswith("."):
                found.setdefault(path.stem, []).append(path)
    return found


def kinetics_listings(
    root: Path, splits: tuple[str, ...] = ("train", "validation"), *, missing: str = "skip"
) -> dict[str, Listing]:
    """Splits of Kinetics: train.csv, val.csv, ... with the official columns; clips anywhere below the folder
    under the names <id>_<start>_<end> (six digits each) or <id>, with or without folders per split and class.

    The classes are those of train.csv, in alphabetical order.

    Raises:
        VideoDataError: lists that are missing or not official, or a class that train.csv does not have.
    """
    train = _kinetics_file(root, "train")
    classes = tuple(sorted({row["label"] for _, row in _kinetics_rows(train)}))
    if not classes:
        raise VideoDataError(f"{train}: names no videos")
    files = _files_by_stem(root)
    return {split: _kinetics_listing(root, split, classes, files, missing) for split in splits}


def _kinetics_listing(
    root: Path, split: str, classes: tuple[str, ...], files: dict[str, list[Path]], missing: str
) -> Listing:
    where = _kinetics_file(root, split)
    numbers = {name: i for i, name in enumerate(classes)}
    paths: list[Path] = []
    labels: list[int] = []
    absent: list[str] = []
    for line, row in _kinetics_rows(where):
        if row["label"] not in numbers:
            raise VideoDataError(
                f"{where}, line {line}: unknown class {row['label']!r}: {hint(row['label'], classes)}"
            )
        name = _clip_name(where, line, row)
        copies = files.get(name) or files.get(row["youtube_id"]) or []
        if not copies:
            absent.append(f"{name}.mp4")
            continue
        # The same clip in two places: the one in its split's folder, or else the first by name.
        paths.append(min(copies, key=lambda p: (not p.relative_to(root).parts[0].startswith(split[:3]), p)))
        labels.append(numbers[row["label"]])
    return checked(paths, labels, classes, absent, where, root, missing)
