"""The embedded data set: generated clips as mp4 files, with lists, in a folder made once.

DIR/train/00000.mp4 ...     DIR/train.csv        path,label
DIR/validation/...          DIR/validation.csv
DIR/classes.txt             one class a line
DIR/manifest.json           what it was made from, a checksum per file; written last

The folder is like any folder of video files: source `folder` reads it. The same configuration gives the same
pictures, whatever the number of workers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from tasks.common.optional import need
from tasks.common.photographs import SPLITS, Texturer, photographs_digest
from tasks.common.storage import checksum, locked, write_json
from tasks.common.units import run_missing
from tasks.common.video.encoding import CODEC, encode_mp4
from tasks.common.video.errors import VideoDataError
from tasks.common.video.storage import read_json
from tasks.video.data.motion import DEFAULT_PAIRS, VERSION, class_names, render_clip

FORMAT = "foxtrot-motion"
MANIFEST = "manifest.json"
CLASSES = "classes.txt"
_UNIT = 50  # clips
_FEW = 200  # clips that are made sooner than processes start
_FPS = 12.0

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class MotionConfig:
    """What is generated.

    pairs: of classes, see `motion.py`.
    train, validation: clips.
    size: side of a frame in pixels, even.
    frames: of a clip, a multiple of 4, at least 8.
    seed: of everything.
    """

    pairs: tuple[str, ...] = DEFAULT_PAIRS
    train: int = 2000
    validation: int = 400
    size: int = 64
    frames: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        classes = class_names(self.pairs)
        if self.train < len(classes) or self.validation < len(classes):
            raise ValueError(
                f"{self.train} training and {self.validation} validation clips: need at least one of each of "
                f"the {len(classes)} classes"
            )
        if self.size < 16 or self.size % 2 or self.frames < 8 or self.frames % 4:
            raise ValueError(
                f"{self.frames} frames of {self.size} pixels: need a multiple of 4, at least 8, and an even "
                "number of pixels, at least 16"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by label."""
        return class_names(self.pairs)

    def count(self, split: str) -> int:
        """Clips of a split."""
        return {"train": self.train, "validation": self.validation}[split]


def _record(config: MotionConfig) -> dict[str, Any]:
    """Everything that decides the files."""
    library = need("av", "encoding video").library_versions["libavcodec"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": {**asdict(config), "pairs": list(config.pairs)},
        "photographs": photographs_digest(),
        "codec": f"{CODEC}, libavcodec {'.'.join(map(str, library))}",
    }


def make_clip(config: MotionConfig, split: str, index: int) -> tuple[int, np.ndarray]:
    """(label, frames uint8 [T, S, S, 3]) of one clip: a pure function of the arguments."""
    label = index % len(config.classes)
    rng = np.random.default_rng([config.seed % 2**63, sorted(SPLITS).index(split), index])
    pair, member = config.pairs[label // 2], label % 2
    return label, render_clip(pair, member, Texturer(split), rng, config.size, config.frames)


@dataclass(frozen=True)
class _Unit:
    """Makes the clips [start, stop) of a split."""

    config: MotionConfig
    folder: Path

    def __call__(self, part: tuple[str, int, int]) -> list[dict[str, Any]]:
        split, start, stop = part
        files = []
        for index in range(start, stop):
            label, frames = make_clip(self.config, split, index)
            path = self.folder / split / f"{index:05d}.mp4"
            path.write_bytes(encode_mp4(frames, _FPS))
            name = f"{split}/{path.name}"
            files.append({"path": name, "label": self.config.classes[label], "crc32": checksum(path)})
        return files


def generate(
    config: MotionConfig, folder: Path | str, *, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes the data set in `folder`, or finds it there. Returns the manifest.

    Args:
        config: what to make.
        folder: a new one, or one made by this function: of the same configuration it is kept.
        workers: processes (default: one per core).
        progress: see `progress_bar`.

    Raises:
        VideoDataError: the folder holds something else.
        ImportError: PyAV, or the package of the photographs, is missing.
        ValueError: bad configuration.
    """
    folder = Path(folder).expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = _record(config)
    with locked(folder.parent / f".{folder.name}.lock"):
        manifest = _finished(folder, record)
        if manifest is not None:
            return manifest
        return _generate(config, folder, record, workers, progress)


def _finished(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder with what would be made now; None: there is nothing, or another version."""
    if not folder.exists():
        return None
    if not (folder / MANIFEST).is_file():
        if not any(folder.iterdir()):
            return None
        raise VideoDataError(f"{folder}: holds something that `generate` has not made: name a new folder")
    manifest = read_json(folder / MANIFEST, "the manifest of generated clips")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VideoDataError(f"{folder / MANIFEST}: not a manifest of {FORMAT}: name a new folder")
    same = all(manifest.get(key) == value for key, value in record.items())
    return manifest if same else None


def _generate(
    config: MotionConfig, folder: Path, record: dict[str, Any], workers: int | None, progress: Progress | None
) -> dict[str, Any]:
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed: the lock is ours
    units = []
    for split in SPLITS:
        (temporary / split).mkdir(parents=True)
        count = config.count(split)
        units += [(split, i, min(i + _UNIT, count)) for i in range(0, count, _UNIT)]
    sizes = [stop - start for _, start, stop in units]
    if workers is None and sum(sizes) <= _FEW:
        workers = 1
    made = run_missing(_Unit(config, temporary), units, sizes, {}, workers, progress)
    files = [file for part in made for file in part]
    for split in SPLITS:
        rows = [f"{f['path']},{f['label']}\n" for f in files if f["path"].startswith(f"{split}/")]
        (temporary / f"{split}.csv").write_text("path,label\n" + "".join(rows), "utf-8")
    (temporary / CLASSES).write_text("".join(f"{name}\n" for name in config.classes), "utf-8")
    manifest = {**record, "classes": list(config.classes), "files": files}
    write_json(temporary / MANIFEST, manifest, indent=1)
    shutil.rmtree(folder, ignore_errors=True)  # of another version
    temporary.rename(folder)
    return manifest


def cached(
    config: MotionConfig, cache: Path, *, workers: int | None = None, progress: Progress | None = None
) -> Path:
    """The folder of the data set in a cache, made if it is not there. Raises as `generate`."""
    record = json.dumps(_record(config), sort_keys=True)
    folder = cache / f"motion-{blake2b(record.encode(), digest_size=8).hexdigest()}"
    generate(config, folder, workers=workers, progress=progress)
    return folder


def verify_generated(folder: Path) -> int:
    """Reads every file of a generated set and compares checksums; the number of files (0: another set).

    Raises:
        VideoDataError: names the first that is missing or damaged.
    """
    manifest = read_json(folder / MANIFEST, "the manifest of generated clips")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return 0
    for file in manifest["files"]:
        path = folder / file["path"]
        if not path.is_file() or checksum(path) != file["crc32"]:
            raise VideoDataError(f"{path}: missing or damaged: remove the folder and generate it again")
    return len(manifest["files"])
