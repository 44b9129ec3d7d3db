"""From a VideoDataConfig to examples: the one function trainers and evaluators call."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.common.data import Batches
from tasks.common.data_command import progress_bar
from tasks.common.video.errors import VideoDataError
from tasks.common.video.skips import SkipReport
from tasks.video.data import generated, layouts, lists
from tasks.video.data.config import VideoDataConfig
from tasks.video.data.examples import TestViews, TrainClips, train_batches
from tasks.video.data.lists import Listing
from tasks.video.data.records import RecordVideos
from tasks.video.data.sources import FileVideos, TfdsVideos, Videos, VideoSubset

_LIST_NAMES = {
    "train": ("train.csv", "train.json", "train.txt"),
    "validation": ("validation.csv", "validation.json", "validation.txt", "val.csv", "val.json", "val.txt"),
    "test": ("test.csv", "test.json", "test.txt"),
}


@dataclass(frozen=True)
class VideoData:
    """What `open_video_data` returns.

    config: as given.
    seed: of order and draws.
    train_videos, eval_videos: the labelled videos; eval_videos is None if nothing is held out.
    report: which videos could not be read so far.
    """

    config: VideoDataConfig
    seed: int
    train_videos: Videos
    eval_videos: Videos | None
    report: SkipReport

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, by label."""
        return self.train_videos.classes

    @property
    def train(self) -> TrainClips:
        """Training examples by index: see `TrainClips`."""
        c = self.config
        return TrainClips(
            self.train_videos, c.clip_sampling(), c.height, c.width, c.fit, self.seed, self.report,
            shuffled=c.order == "shuffled",
        )  # fmt: skip

    def batches(self, batch_size: int) -> Batches:
        """Global training batches: frames uint8 [B, T, H, W, 3], label int32 [B], clip int32 [B]."""
        return train_batches(self.train, batch_size, repeats=self.config.repeats)

    def views(
        self,
        batch_size: int = 1,
        *,
        clips: int = 0,
        crops: int = 0,
        videos: Videos | None = None,
        most: int = 0,
    ) -> TestViews:
        """Test views by index, filled up to whole batches: see `TestViews`.

        Args:
            batch_size: rows of a batch.
            clips, crops: views of a video (default: the configuration's).
            videos: of these (default: eval_videos).
            most: so many of them, drawn once (lists may be sorted by class); 0: all.

        Raises:
            VideoDataError: nothing is held out.
        """
        c, videos = self.config, videos or self.eval_videos
        if videos is None:
            raise VideoDataError(
                "no videos are held out: give a validation list or split, or data.validation_fraction > 0"
            )
        if 0 < most < len(videos):
            drawn = np.random.default_rng(0).permutation(len(videos))[:most]
            videos = VideoSubset(videos, np.sort(drawn))
        return TestViews(
            videos, c.clip_sampling(), c.height, c.width, c.fit, self.report,
            clips=clips or c.eval_clips, crops=crops or c.eval_crops, multiple=batch_size,
            shuffled=c.order == "shuffled",
        )  # fmt: skip


Splits = tuple[Videos, Videos | None]


def open_video_data(
    config: VideoDataConfig, *, seed: int = 0, num_classes: int | None = None, report: Path | None = None
) -> VideoData:
    """Open a source; checks everything that can be checked without decoding. Generated clips are made first.

    Args:
        config: what and how.
        seed: of the order and of all draws.
        num_classes: the model's; it must have an output for every class.
        report: file of JSON lines that names videos which cannot be read.

    Raises:
        ImportError: an optional package is missing.
        ValueError: lists or folders that are missing or damaged, unknown classes, too few outputs, ...
    """
    openers: dict[str, Callable[[VideoDataConfig], Splits]] = {
        "generated": _generated,
        "folder": _folder,
        "ssv2": _ssv2,
        "kinetics": _kinetics,
        "records": _records,
        "tfds": _tfds,
    }
    train, held_out = openers[config.source](config)
    if held_out is not None and held_out.classes != train.classes:
        raise VideoDataError(
            f"{config.path}: {len(train.classes)} classes for training, {len(held_out.classes)} held out, or "
            "others: a label must mean the same on both sides"
        )
    if num_classes is not None and num_classes < len(train.classes):
        raise VideoDataError(
            f"model.num_classes={num_classes} is smaller than the {len(train.classes)} classes of the data: "
            f"set it to {len(train.classes)} or more"
        )
    if len(train) == 0:
        raise VideoDataError(f"{config.path}: no videos to train on")
    if held_out is not None and len(held_out) == 0:
        held_out = None
    return VideoData(config, seed, train, held_out, SkipReport(report))


def _pair(train: Listing, held_out: Listing | None, config: VideoDataConfig) -> Splits:
    limits = config.limits()
    return FileVideos(train, limits), None if held_out is None else FileVideos(held_out, limits)


def _generated(config: VideoDataConfig) -> Splits:
    with progress_bar("generating clips") as progress:
        folder = generated.cached(config.motion(), config.cache(), progress=progress)
    return _folder(config, folder)


def _folder(config: VideoDataConfig, folder: Path | None = None) -> Splits:
    root = folder or Path(config.path).expanduser()
    if not root.is_dir():
        raise VideoDataError(f"{root}: no such folder of videos")
    train_list = _list(root, config.train_list, "train")
    held_list = _list(root, config.validation_list, config.eval_split)
    if train_list is None:
        if held_list is not None:
            raise VideoDataError(f"{held_list}: there is no training list beside it: add train.csv")
        return _pair(*_held_out(lists.folder_listing(root), root, config), config)
    entries = lists.read_entries(train_list)
    class_list = _list(root, config.class_list, "classes")
    classes = lists.read_classes(class_list) if class_list else lists.classes_of(entries)
    train = lists.resolve(entries, classes, root, train_list, missing=config.missing)
    if held_list is None:
        return _pair(*_held_out(train, root, config), config)
    entries = lists.read_entries(held_list)
    return _pair(train, lists.resolve(entries, classes, root, held_list, missing=config.missing), config)


def _held_out(listing: Listing, root: Path, config: VideoDataConfig) -> tuple[Listing, Listing | None]:
    if config.validation_fraction == 0:
        return listing, None
    return lists.split_by_name(listing, root, config.validation_fraction)


def _list(root: Path, given: str, kind: str) -> Path | None:
    """The list a configuration names, below the folder or from here; or the one of the usual name."""
    if given:
        path = Path(given).expanduser()
        return path if path.is_file() or not (root / given).is_file() else root / given
    names = _LIST_NAMES.get(kind, (generated.CLASSES,))
    return next((root / name for name in names if (root / name).is_file()), None)


def _ssv2(config: VideoDataConfig) -> Splits:
    root = Path(config.path).expanduser()
    train, held_out = (
        layouts.ssv2_listing(root, split, missing=config.missing) for split in ("train", config.eval_split)
    )
    return _pair(train, held_out, config)


def _kinetics(config: VideoDataConfig) -> Splits:
    splits = ("train", config.eval_split)
    found = layouts.kinetics_listings(Path(config.path).expanduser(), splits, missing=config.missing)
    return _pair(found["train"], found[config.eval_split], config)


def _records(config: VideoDataConfig) -> Splits:
    root, limits = Path(config.path).expanduser(), config.limits()
    if not (root / "train").is_dir():
        raise VideoDataError(
            f"{root}: no folder train of prepared videos in it: make it by `python -m tasks.video.data "
            f"prepare --output={root} ...`"
        )
    held_out = root / config.eval_split
    return RecordVideos(root / "train", limits), RecordVideos(held_out, limits) if held_out.is_dir() else None


def _tfds(config: VideoDataConfig) -> Splits:
    def opened(split: str) -> TfdsVideos:
        fields = (config.video_field, config.label_field, config.limits())
        return TfdsVideos(config.tfds_name, config.path, split, *fields)

    train = opened(config.tfds_split)
    if config.tfds_eval_split:
        return train, opened(config.tfds_eval_split)
    if config.validation_fraction == 0:
        return train, None
    every = max(round(1 / config.validation_fraction), 2)
    held = [i for i in range(len(train)) if i % every == every - 1]
    kept = [i for i in range(len(train)) if i % every != every - 1]
    return VideoSubset(train, kept), VideoSubset(train, held)
