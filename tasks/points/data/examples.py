"""Training and held-out examples by index, whatever the source.

An example is a dict:

video       uint8 [T, H, W, 3]     RGB
query_tyx   float32 [Q, 3]         frame, then (y, x) in pixels of the video, raster
tracks_yx   float32 [Q, T, 2]      where the point is, hidden or not
visible     bool [Q, T]            inside the frame and not occluded
valid       bool [Q]               False in the rows that fill up a clip of fewer points

A training index counts draws as well as clips: index = draw * clips + clip; (seed, draw, clip) decides
everything else. A clip that cannot be read is replaced by the next one that can; both are reported.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.skips import SkipReport, use_first
from tasks.points.data.augment import AugmentConfig, augment, crop_resize
from tasks.points.data.clips import ANY_FRAME, Clips, ClipsBehind, PointClip, check_clip
from tasks.points.data.point_budget import early_share

_ATTEMPTS = 4
_TRAINING, _HELD_OUT = 0x747261, 0x68656C  # so that no two kinds of draws are the same


@dataclass(frozen=True)
class Shape:
    """Of an example.

    frames: T, every `stride`-th of the clip's.
    height, width: of the frames, which are squashed to it.
    tracks: Q.
    stride: frames from one to the next.
    """

    frames: int
    height: int
    width: int
    tracks: int
    stride: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "tracks", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if min(self.height, self.width) < 16:
            raise ValueError(f"frames of {self.height} x {self.width} pixels: need at least 16 x 16")


def cut_frames(clip: PointClip, shape: Shape, start: float, name: str) -> PointClip:
    """The frames of an example out of a clip.

    Args:
        clip: of any length.
        shape: of the example.
        start: where in the clip, 0 (as early as possible) to 1.
        name: for messages.

    Raises:
        VideoError: the clip is too short.
    """
    frames, span = len(clip.video), (shape.frames - 1) * shape.stride + 1
    if frames < span:
        raise VideoError(name, f"{frames} frames; {shape.frames} at stride {shape.stride} need {span}")
    first = min(int(start * (frames - span + 1)), frames - span)
    if (first, span, shape.stride) == (0, frames, 1):
        return clip
    kept = slice(first, first + span, shape.stride)
    at, rest = np.divmod(clip.query_frames - first, shape.stride)
    within = (clip.query_frames >= first) & (rest == 0) & (at < shape.frames)
    return PointClip(
        clip.video[kept], clip.tracks_yx[:, kept], clip.visible[:, kept],
        np.where(within, at, ANY_FRAME).astype(np.int32),
    )  # fmt: skip


def draw_query_frames(rng: np.random.Generator, clip: PointClip) -> Int[np.ndarray, " N"]:
    """The frame each point is asked for at: the clip's own, or one where it is visible, mostly an early one;
    -1 for a point that is never visible."""
    counts = clip.visible.sum(axis=1)
    place = np.minimum((counts * early_share(rng, len(counts))).astype(np.int64), np.maximum(counts - 1, 0))
    # The place-th visible frame of each.
    drawn = (np.cumsum(clip.visible, axis=1) > place[:, None]).argmax(axis=1)
    asked = np.where(clip.query_frames == ANY_FRAME, drawn, clip.query_frames)
    return np.where(counts > 0, asked, ANY_FRAME)


def make_example(rng: np.random.Generator, clip: PointClip, tracks: int) -> dict[str, np.ndarray]:
    """An example of a clip whose frames are as they should be; no point is valid where none is visible."""
    query_frames = draw_query_frames(rng, clip)
    chosen = np.sort(rng.permutation(np.flatnonzero(query_frames >= 0))[:tracks])
    at, count, frames = query_frames[chosen], len(chosen), len(clip.video)
    query_tyx = np.zeros((tracks, 3), np.float32)
    tracks_yx = np.zeros((tracks, frames, 2), np.float32)
    visible, valid = np.zeros((tracks, frames), bool), np.arange(tracks) < count
    query_tyx[:count, 0] = at
    query_tyx[:count, 1:] = clip.tracks_yx[chosen, at]
    tracks_yx[:count], visible[:count] = clip.tracks_yx[chosen], clip.visible[chosen]
    return {
        "video": np.ascontiguousarray(clip.video), "query_tyx": query_tyx, "tracks_yx": tracks_yx,
        "visible": visible, "valid": valid,
    }  # fmt: skip


@dataclass(frozen=True)
class TrainExamples:
    """Training examples: index = draw * len(clips) + clip, any draw.

    clips: the source.
    shape: of an example.
    augment: what is done to clips.
    seed: of all draws.
    report: gets what cannot be read.
    """

    clips: Clips
    shape: Shape
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    seed: int = 0
    report: SkipReport = field(default_factory=SkipReport)

    def __post_init__(self) -> None:
        if len(self.clips) == 0:
            raise VideoDataError("no clips to train on")

    def __len__(self) -> int:
        """Clips: an epoch. Indices go on beyond it."""
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example.

        Raises:
            VideoDataError: neither the clip nor any of the 100 after it can be used.
            VideoTimeout: reading took too long.
        """
        draw, first = divmod(int(index), len(self.clips))

        def use(number: int) -> dict[str, np.ndarray]:
            name = self.clips.name(number)
            return self._example(check_clip(self.clips.open(number), name), name, draw, first)

        failed = "clips after it cannot be used"
        return use_first(use, self.report, self.clips.name, len(self.clips), first, failed=failed)

    def _example(self, clip: PointClip, name: str, draw: int, first: int) -> dict[str, np.ndarray]:
        """Drawn again, at last without augmentations, where no point is visible: this is no fault of the
        clip, and what a batch holds must not depend on which clips were found wanting before."""
        size = (self.shape.height, self.shape.width)
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([_TRAINING, self.seed % 2**63, draw, first, attempt])
            window = cut_frames(clip, self.shape, float(rng.random()), name)
            config = self.augment if attempt < _ATTEMPTS - 1 else AugmentConfig()
            example = make_example(rng, augment(window, rng, config, size), self.shape.tracks)
            if example["valid"].any():
                break
        return example


@dataclass(frozen=True)
class HeldOutExamples:
    """Held-out examples: the first frames of every clip, whole, the same points every time.

    A clip that cannot be used is reported; its example is black, with no valid point.

    clips, shape, report: as of `TrainExamples`.
    """

    clips: Clips
    shape: Shape
    report: SkipReport = field(default_factory=SkipReport)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example. Raises VideoTimeout."""
        name, shape = self.clips.name(index), self.shape
        rng = np.random.default_rng([_HELD_OUT, index])
        size = (shape.height, shape.width)
        try:
            clip = cut_frames(check_clip(self.clips.open(index), name), shape, 0.0, name)
            whole = (0.0, 0.0, float(clip.video.shape[1]), float(clip.video.shape[2]))
            return make_example(rng, crop_resize(clip, whole, size), shape.tracks)
        except VideoError as error:
            self.report.add(VideoError(name, error.reason))
        black = np.zeros((shape.frames, *size, 3), np.uint8)
        places = np.zeros((1, shape.frames, 2), np.float32)
        hidden = np.zeros((1, shape.frames), bool)
        return make_example(rng, PointClip(black, places, hidden, np.zeros(1, np.int32)), shape.tracks)


@dataclass(frozen=True)
class LatestKept(ClipsBehind):
    """Clips of which each thread keeps the one it opened last: for clips shown several times in a row."""

    _latest: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    def __reduce__(self) -> Any:
        return LatestKept, (self.clips,)

    def open(self, index: int) -> PointClip:
        if getattr(self._latest, "index", None) != index:
            self._latest.index = None  # a clip that cannot be opened leaves none
            self._latest.clip = self.clips.open(index)
            self._latest.index = index
        return self._latest.clip


@dataclass(frozen=True)
class Kept(ClipsBehind):
    """Clips that stay in memory once they have been opened, as many as fit.

    For a few that are looked at again and again, where opening takes long.

    most_bytes: of all videos that are kept.
    """

    most_bytes: int = 2**29
    _kept: dict[int, PointClip] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __reduce__(self) -> Any:
        return Kept, (self.clips, self.most_bytes)

    def open(self, index: int) -> PointClip:
        if (kept := self._kept.get(index)) is not None:
            return kept
        clip = self.clips.open(index)
        clip.video.flags.writeable = False
        with self._lock:
            if (
                sum(other.video.nbytes for other in self._kept.values()) + clip.video.nbytes
                <= self.most_bytes
            ):
                self._kept[index] = clip
        return clip


@dataclass(frozen=True)
class ClipSubset:
    """Some clips of a source."""

    clips: Clips
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.clips.name(self.indices[index])

    def key(self, index: int) -> Any:
        return self.clips.key(self.indices[index])

    def open(self, index: int) -> PointClip:
        return self.clips.open(self.indices[index])
