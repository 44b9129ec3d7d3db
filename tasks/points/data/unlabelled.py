"""Clips of real videos without tracks, each twice: clean for a teacher, cut and compressed for a student.

What the student sees is a window of the picture that wanders and zooms over the clip, brought to the same
size (BootsTAP's smoothly varying crop), through JPEG. The map between the two clips' pixels is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tasks.common.data import Source
from tasks.common.optional import need
from tasks.common.video.decoding import VIDEO_ENDINGS, Limits
from tasks.common.video.errors import VideoDataError, VideoError, VideoTimeout
from tasks.common.video.frames import FileClip, Window, read_window
from tasks.common.video.skips import SkipReport
from tasks.points.data.appearance import through_jpeg
from tasks.points.data.paths import wander

_TRIES = 20  # other videos that are tried for one that cannot be read
_LONGEST_STRIDE = 3  # frames between those of a clip: slow and fast motion alike


@dataclass(frozen=True)
class StudentView:
    """How the student's window and compression are drawn; see `selftraining.SelfTrainingConfig`."""

    zoom: tuple[float, float] = (0.6, 1.0)
    drift: float = 1.0
    quality: tuple[int, int] = (20, 90)


@dataclass(frozen=True)
class UnlabelledClips:
    """Examples by index, without end: a pure function of (seed, index) and the files.

    videos: files.
    frames, height, width: of a clip; frames are squashed to the size, as everywhere with points.
    tracks: Q, random queries of a clip.
    seed: of everything.
    view: of the student.
    limits: on a file.
    report: where videos that cannot be read are named.
    """

    videos: Sequence[Path]
    frames: int
    height: int
    width: int
    tracks: int
    seed: int = 0
    view: StudentView = field(default_factory=StudentView)
    limits: Limits = field(default_factory=Limits)
    report: SkipReport = field(default_factory=SkipReport)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """real_video, student_video uint8 [T, H, W, 3]; student_affine [T, 2, 3]; real_query_tyx [Q, 3].

        Raises:
          VideoDataError: one video after the other cannot be read.
        """
        rng = np.random.default_rng([self.seed % 2**63, 0x756E6C61, index])
        clean = self._read(rng)
        boxes = student_boxes(rng, self.frames, self.height, self.width, self.view)
        quality = int(rng.integers(self.view.quality[0], self.view.quality[1] + 1))
        frame = rng.integers(0, self.frames, (self.tracks, 1))
        place = rng.uniform((0, 0), (self.height, self.width), (self.tracks, 2))
        return {
            "real_video": clean,
            "student_video": cut(clean, boxes, quality),
            "student_affine": affine_of(boxes, self.height, self.width),
            "real_query_tyx": np.concatenate([frame, place], axis=1).astype(np.float32),
        }

    def _read(self, rng: np.random.Generator) -> UInt8[np.ndarray, "T H W 3"]:
        last: VideoError | VideoTimeout | None = None
        for _ in range(_TRIES):
            path = self.videos[int(rng.integers(len(self.videos)))]
            start, stride = rng.random(), int(rng.integers(1, _LONGEST_STRIDE + 1))
            try:
                with FileClip(path, limits=self.limits) as clip:
                    stride = max(1, min(stride, (clip.frames - 1) // max(self.frames - 1, 1)))
                    span = (self.frames - 1) * stride + 1
                    first = int(start * max(clip.frames - span + 1, 1))
                    indices = np.minimum(first + stride * np.arange(self.frames), clip.frames - 1)
                    return read_window(clip, indices.tolist(), Window(self.height, self.width, "stretch"))
            except VideoError as error:
                self.report.add(error)
                last = error
            except VideoTimeout as error:
                last = error
        raise VideoDataError(f"{_TRIES} unlabelled videos in a row could not be read, the last: {last}")


@dataclass(frozen=True)
class WithUnlabelled:
    """Labelled examples, each with an unlabelled one of the same index."""

    labelled: Source
    unlabelled: UnlabelledClips

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.labelled[index] | self.unlabelled[index]


def find_videos(folder: Path) -> list[Path]:
    """Video files below a folder, in order.

    Raises:
      VideoDataError: no folder, or no video in it.
    """
    if not folder.is_dir():
        raise VideoDataError(f"{folder}: no such folder of videos")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_ENDINGS and p.is_file())
    if not found:
        raise VideoDataError(f"{folder}: no video files in it ({', '.join(VIDEO_ENDINGS)})")
    return found


def student_boxes(
    rng: np.random.Generator, frames: int, height: int, width: int, view: StudentView
) -> Float[np.ndarray, "T 4"]:
    """(top, left, bottom, right) of the window in every frame, in pixels; always inside the frame."""
    low, high = np.log(view.zoom)
    # Share of height and of width on one smooth path, and the place of the window on another.
    walk = np.full(2, 0.3 * (high - low))
    sizes = np.exp(
        wander(rng, frames, max(frames / 3, 1.0), walk, np.full(2, low), np.full(2, high))(np.arange(frames))
    )
    margin = (1 - view.drift) / 2
    start, end = np.full(2, margin), np.full(2, 1 - margin)
    places = wander(rng, frames, max(frames / 3, 1.0), np.full(2, 0.3 * view.drift), start, end)(
        np.arange(frames)
    )
    extent = sizes * (height, width)
    corner = places * (np.array([height, width]) - extent)
    return np.concatenate([corner, corner + extent], axis=1)


def affine_of(boxes: Float[np.ndarray, "T 4"], height: int, width: int) -> Float[np.ndarray, "T 2 3"]:
    """The map from (y, x) in the clean frame to (y, x) in the student's: out = A[:, :2] yx + A[:, 2]."""
    scale = np.array([height, width]) / (boxes[:, 2:] - boxes[:, :2])
    affine = np.zeros((len(boxes), 2, 3), np.float32)
    affine[:, 0, 0], affine[:, 1, 1] = scale[:, 0], scale[:, 1]
    affine[:, :, 2] = -boxes[:, :2] * scale
    return affine


def cut(
    video: UInt8[np.ndarray, "T H W 3"], boxes: Float[np.ndarray, "T 4"], quality: int
) -> UInt8[np.ndarray, "T H W 3"]:
    """The windows of the frames, each brought to the frame's size and through JPEG of that quality."""
    image_module = need("PIL.Image", "cutting frames")
    size, bilinear = (video.shape[2], video.shape[1]), image_module.Resampling.BILINEAR
    frames = [
        np.asarray(image_module.fromarray(frame).resize(size, bilinear, box=(left, top, right, bottom)))
        for frame, (top, left, bottom, right) in zip(video, boxes.tolist(), strict=True)
    ]
    return np.stack([through_jpeg(frame, quality) for frame in frames])
