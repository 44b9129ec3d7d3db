"""The data section of a configuration."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.common.video.decoding import Limits
from tasks.common.video.frames import Fit
from tasks.video.data.generated import MotionConfig
from tasks.video.data.motion import DEFAULT_PAIRS
from tasks.video.data.sampling import Mode, Pad, Sampling

SourceName = Literal["generated", "folder", "ssv2", "kinetics", "records", "tfds"]
_CHOICES = {
    "source": ("generated", "folder", "ssv2", "kinetics", "records", "tfds"),
    "eval_split": ("validation", "test"),
    "missing": ("skip", "fail"),
    "order": ("time", "shuffled"),
    "fit": ("crop", "stretch"),
}


@dataclass(frozen=True)
class VideoDataConfig:
    """Which videos, cut how. Validates itself.

    source:  generated (embedded, made once into the cache), folder (video files with lists, or a folder per
             class), ssv2, kinetics (official layouts), records (what `prepare` made), tfds.
    path:    the folder. tfds: data_dir (default: TFDS's own), or the folder of one prepared data set.
    train_list, validation_list: folder: CSV or JSON lists, below path or anywhere (default: train.csv,
             validation.csv and so on in path, if they are there).
    class_list: folder: class names, one a line (default: classes.txt in path; else what the training list
             implies).
    validation_fraction: folder, tfds: share held out by name, where there is no validation list or split.
    eval_split: ssv2, kinetics, folder, records: validation or test.
    missing: skip (leave out, count and name) or fail, for listed files that are not there.
    frames, stride, sampling, pad: T frames of a clip, see `sampling.py`.
    height, width, fit: of the frames that leave the loader, in pixels, see `Window`.
    eval_clips, eval_crops: test views of a video.
    repeats: times a video is shown in a row, drawn anew each time.
    order:   of a clip's frames: time, or shuffled (in training and at test): a control for what needs time.
    max_pixels, max_frames, max_seconds: limits on one file, see `Limits`.
    generated_pairs, generated_train, generated_validation, generated_size, generated_frames, generated_seed:
             see `MotionConfig`.
    tfds_name, tfds_split, tfds_eval_split, video_field, label_field: tfds: the data set, its splits and
             features; an empty tfds_eval_split holds out validation_fraction of tfds_split.
    cache_dir: where generated clips go (default: $FOXTROT_CACHE or ~/.cache/foxtrot).
    """

    source: SourceName = "generated"
    path: str = ""
    train_list: str = ""
    validation_list: str = ""
    class_list: str = ""
    validation_fraction: float = 0.1
    eval_split: Literal["validation", "test"] = "validation"
    missing: Literal["skip", "fail"] = "skip"
    frames: int = 16
    stride: int = 1
    sampling: Mode = "dense"
    pad: Pad = "repeat"
    height: int = 64
    width: int = 64
    fit: Fit = "crop"
    eval_clips: int = 1
    eval_crops: int = 1
    repeats: int = 1
    order: Literal["time", "shuffled"] = "time"
    max_pixels: int = Limits.pixels
    max_frames: int = Limits.frames
    max_seconds: float = Limits.seconds
    generated_pairs: tuple[str, ...] = DEFAULT_PAIRS
    generated_train: int = 2000
    generated_validation: int = 400
    generated_size: int = 64
    generated_frames: int = 16
    generated_seed: int = 0
    tfds_name: str = ""
    tfds_split: str = "train"
    tfds_eval_split: str = ""
    video_field: str = "video"
    label_field: str = "label"
    cache_dir: str = ""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"data.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("height", "width", "eval_clips", "eval_crops", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"data.validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if self.fit == "stretch" and self.eval_crops > 1:
            raise ValueError("data.fit='stretch' shows whole frames: set data.eval_crops=1")
        if self.source in ("folder", "ssv2", "kinetics", "records") and not self.path:
            raise ValueError(f"data.source={self.source!r} needs data.path")
        if self.source == "tfds" and not (self.tfds_name or self.path):
            raise ValueError(
                "data.source='tfds' needs data.tfds_name, or data.path=<folder of a prepared data set>"
            )
        lists = self.train_list or self.validation_list or self.class_list
        if self.source != "folder" and lists:
            raise ValueError(f"data.source={self.source!r} has lists of its own: {lists!r} has no meaning")
        self.clip_sampling()
        self.limits()
        self.motion()

    def clip_sampling(self) -> Sampling:
        """Which frames make a clip."""
        return Sampling(self.frames, self.stride, self.sampling, self.pad)

    def limits(self) -> Limits:
        """On one file."""
        return Limits(pixels=self.max_pixels, frames=self.max_frames, seconds=self.max_seconds)

    def motion(self) -> MotionConfig:
        """What is generated."""
        return MotionConfig(
            self.generated_pairs, self.generated_train, self.generated_validation, self.generated_size,
            self.generated_frames, self.generated_seed,
        )  # fmt: skip

    def cache(self) -> Path:
        """The folder for things made once."""
        return Path(self.cache_dir or os.environ.get("FOXTROT_CACHE") or "~/.cache/foxtrot").expanduser()
