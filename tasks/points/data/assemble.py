"""From a PointsDataConfig to examples: the one function trainers and evaluators call."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps
from pathlib import Path
from typing import Any

from tasks.common.data import Batches
from tasks.common.data_command import progress_bar
from tasks.common.epochs import EpochOrder
from tasks.common.video.errors import VideoDataError
from tasks.common.video.skips import SkipReport
from tasks.points.data.annotated import find_own
from tasks.points.data.clip_records import RecordClips, prepare_clips
from tasks.points.data.clips import Clips, PointClip
from tasks.points.data.config import PointsDataConfig
from tasks.points.data.examples import ClipSubset, HeldOutExamples, Kept, LatestKept, TrainExamples
from tasks.points.data.generated import GeneratedClips
from tasks.points.data.npz_folder import find_npz
from tasks.points.data.point_odyssey import find_odyssey
from tasks.points.data.textures import open_photographs

TRAIN, VALIDATION = "train", "validation"
_ODYSSEY_POINTS = 1024  # most of a clip
_PART = re.compile(r"\[\d+(:\d+)?\]$")  # at the end of a clip's name: which part of a video it is
Splits = tuple[Clips, Clips | None]


@dataclass(frozen=True)
class PointsData:
    """What `open_points_data` returns.

    config: as given.
    seed: of order and draws.
    train_clips, held_out_clips: the sources; held_out_clips is None if nothing is held out.
    report: which clips could not be used so far.
    """

    config: PointsDataConfig
    seed: int
    train_clips: Clips
    held_out_clips: Clips | None
    report: SkipReport

    @property
    def train(self) -> TrainExamples:
        """Training examples by index: see `TrainExamples`."""
        c = self.config
        clips = self.train_clips if c.repeats == 1 else LatestKept(self.train_clips)
        return TrainExamples(clips, c.shape(), c.augment(), self.seed, self.report)

    @property
    def held_out(self) -> HeldOutExamples | None:
        """Held-out examples by index, the same every time; None: nothing is held out."""
        if self.held_out_clips is None:
            return None
        return HeldOutExamples(self.held_out_clips, self.config.shape(), self.report)

    def batches(self, batch_size: int) -> Batches:
        """The endless sequence of global training batches: every epoch shows every clip `repeats` times
        in a row, drawn anew each time.

        video uint8 [B, T, H, W, 3], query_tyx float32 [B, Q, 3], tracks_yx float32 [B, Q, T, 2], visible bool
        [B, Q, T], valid bool [B, Q]; see `examples.py`.
        """
        train = self.train
        order = EpochOrder(len(train), batch_size, self.seed, self.config.repeats)
        return Batches(train, batch_size, self.seed, order)


def open_points_data(config: PointsDataConfig, *, seed: int = 0, report: Path | None = None) -> PointsData:
    """Open a source; checks everything that can be checked without decoding.

    Args:
        config: what and how.
        seed: of the order and of all draws.
        report: file of JSON lines that names clips which cannot be used.

    Raises:
        ImportError: an optional package is missing.
        ValueError: folders that are missing, empty or damaged.
    """
    openers: dict[str, Callable[[PointsDataConfig], Splits]] = {
        "generated": _generated,
        "folder": lambda c: _split(c, lambda folder: _own(c, folder)),
        "npz": lambda c: _split(c, find_npz),
        "pointodyssey": lambda c: _split(c, lambda folder: _odyssey(c, folder)),
        "records": _records,
    }
    train, held_out = openers[config.source](config)
    return PointsData(config, seed, train, held_out, SkipReport(report))


def generated_clips(config: PointsDataConfig, split: str, count: int) -> GeneratedClips:
    """The embedded source of a configuration. Raises VideoDataError: no such photographs."""
    # A training clip that is shown again shows other points.
    points = config.tracks * (config.repeats if split == TRAIN else 1)
    span = (config.frames - 1) * config.stride + 1
    return GeneratedClips(
        open_photographs(split, config.generated_photographs), count, span, config.height, config.width,
        points, config.generated_seed, config.scene(), config.appearance(),
    )  # fmt: skip


def _generated(config: PointsDataConfig) -> Splits:
    count = config.generated_held_out
    held_out = Kept(generated_clips(config, VALIDATION, count)) if count else None
    if not config.generated_cached:
        return generated_clips(config, TRAIN, config.generated_clips), held_out
    clips = generated_clips(config, TRAIN, config.generated_cached)
    content = dumps([clips.key(0), len(clips)], sort_keys=True)
    folder = config.cache() / f"points-{blake2b(content.encode(), digest_size=8).hexdigest()}"
    with progress_bar("generating clips") as progress:
        prepare_clips(clips, folder, progress=progress)
    return RecordClips(folder, config.limits()), held_out


def _split(config: PointsDataConfig, find: Callable[[Path], Clips]) -> Splits:
    root = Path(config.path).expanduser()
    if (root / TRAIN).is_dir():
        held_out = root / VALIDATION
        return find(root / TRAIN), find(held_out) if held_out.is_dir() else None
    return hold_out(find(root), config.held_out_fraction)


def hold_out(clips: Clips, fraction: float) -> Splits:
    """Every n-th video apart, evenly over the list, so many that they are about `fraction` of all. Clips that
    are parts of one video stay together.

    Raises:
        VideoDataError: nothing would be left to train on.
    """
    if fraction == 0:
        return clips, None
    names = [_PART.sub("", clips.name(index)) for index in range(len(clips))]
    videos = {name: number for number, name in enumerate(dict.fromkeys(names))}
    every = min(max(2, round(1 / fraction)), max(2, len(videos)))
    held_out = tuple(i for i, name in enumerate(names) if videos[name] % every == every - 1)
    if not held_out:
        raise VideoDataError(
            f"{names[0]}: the only video; nothing can be held out of it: set data.held_out_fraction=0"
        )
    kept = tuple(sorted(set(range(len(clips))) - set(held_out)))
    return ClipSubset(clips, kept), ClipSubset(clips, held_out)


def _own(config: PointsDataConfig, folder: Path) -> Clips:
    span = (config.frames - 1) * config.stride + 1
    return find_own(folder, span, max(config.height, config.width))


def _odyssey(config: PointsDataConfig, folder: Path) -> Clips:
    span = (config.frames - 1) * config.stride + 1
    return find_odyssey(folder, span, _ODYSSEY_POINTS, config.limits())


def _records(config: PointsDataConfig) -> Splits:
    roots = [Path(part.strip()).expanduser() for part in config.path.split(",") if part.strip()]
    trains: list[Clips] = []
    held: list[Clips] = []
    for root in roots:
        if (root / TRAIN).is_dir():
            trains.append(RecordClips(root / TRAIN, config.limits()))
            if (root / VALIDATION).is_dir():
                held.append(RecordClips(root / VALIDATION, config.limits()))
        else:
            train, held_out = hold_out(RecordClips(root, config.limits()), config.held_out_fraction)
            trains.append(train)
            held += [] if held_out is None else [held_out]
    return join(trains), join(held) if held else None


@dataclass(frozen=True)
class JoinedClips:
    """Several sources one after the other."""

    parts: tuple[Clips, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _find(self, index: int) -> tuple[Clips, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(f"clip {index + len(self)} of {len(self)}")

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)

    def key(self, index: int) -> Any:
        part, place = self._find(index)
        return part.key(place)

    def open(self, index: int) -> PointClip:
        part, place = self._find(index)
        return part.open(place)


def join(parts: list[Clips]) -> Clips:
    """Sources as one."""
    return parts[0] if len(parts) == 1 else JoinedClips(tuple(parts))
