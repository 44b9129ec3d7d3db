"""Training examples and test views by index, whatever the source.

A training index counts draws as well as videos: index = draw * videos + video. Batch k is thus a pure
function of (seed, k): the order names the draw, and the draw, the video and the seed decide which frames and
which window are taken. A video that cannot be read is replaced by the next in the list that can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.common.data import Batches
from tasks.common.epochs import EpochOrder
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import Fit, Window, read_window
from tasks.common.video.skips import SkipReport, use_first
from tasks.video.data.sampling import Sampling, crop_position, draw_rng
from tasks.video.data.sources import Videos


@dataclass(frozen=True)
class TrainClips:
    """Training examples: index = draw * len(videos) + video, any draw.

    frames uint8 [T, H, W, 3]; label int32; clip int32, the video the frames come from.

    videos: the source.
    sampling: which frames.
    height, width, fit: size of the frames, see `Window`; the window lies at a random place.
    seed: of all draws.
    report: gets what cannot be read.
    shuffled: frames come in a random order, drawn anew each time.
    """

    videos: Videos
    sampling: Sampling
    height: int
    width: int
    fit: Fit
    seed: int
    report: SkipReport
    shuffled: bool = False

    def __post_init__(self) -> None:
        if len(self.videos) == 0:
            raise VideoDataError("no videos to train on")

    def __len__(self) -> int:
        """Videos: an epoch. Indices go on beyond it."""
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example.

        Raises:
            VideoDataError: neither the video nor any of the 100 after it can be read.
            VideoTimeout: reading took too long.
        """
        draw, first = divmod(int(index), len(self.videos))

        def use(video: int) -> dict[str, Any]:
            frames = self._frames(video, draw_rng(self.seed, draw, first))
            return {"frames": frames, "label": self.videos.labels[video], "clip": np.int32(video)}

        # The next in the list: of lists in the order of classes, it is of the same class.
        failed = "videos after it cannot be read"
        return use_first(use, self.report, self.videos.name, len(self.videos), first, failed=failed)

    def _frames(self, video: int, rng: np.random.Generator) -> np.ndarray:
        with self.videos.open(video) as clip:
            indices = self.sampling.train(clip.frames, rng).tolist()
            window = Window(self.height, self.width, self.fit, float(rng.random()))
            frames = read_window(clip, indices, window)
        return rng.permutation(frames) if self.shuffled else frames


def train_batches(clips: TrainClips, batch_size: int, *, repeats: int = 1) -> Batches:
    """The endless sequence of global batches of training clips.

    Args:
        clips: the examples.
        batch_size: rows of a global batch.
        repeats: see `EpochOrder`.

    Raises:
        ValueError: batch_size or repeats below 1.
    """
    order = EpochOrder(len(clips), batch_size, clips.seed, repeats)
    return Batches(clips, batch_size, clips.seed, order)


@dataclass(frozen=True)
class TestViews:
    """Every test view of every video, in order: index = (video * clips + clip) * crops + crop.

    frames uint8 [T, H, W, 3]; label int32; clip int32, the video (mean over its views is its prediction);
    view int32, clip * crops + crop; valid bool: False where the video cannot be read (frames are black), and
    in the rows that fill up the last batch (clip -1).

    videos, sampling, height, width, fit, report: as `TrainClips`.
    clips: temporal clips, evenly spaced.
    crops: windows, from one end of the longer side to the other; one: the middle.
    multiple: the length is filled up to a multiple of this, the batch size.
    shuffled: frames come in a random order, every view in its own, the same each time it is read.
    """

    __test__ = False  # for pytest, this is no test

    videos: Videos
    sampling: Sampling
    height: int
    width: int
    fit: Fit
    report: SkipReport
    clips: int = 1
    crops: int = 1
    multiple: int = 1
    shuffled: bool = False

    def __post_init__(self) -> None:
        if len(self.videos) == 0:
            raise VideoDataError("no videos to evaluate on")
        if min(self.clips, self.crops, self.multiple) < 1:
            raise ValueError(
                f"{self.clips} clips x {self.crops} crops, multiples of {self.multiple}: at least 1 of each"
            )
        if self.crops > 1 and self.fit == "stretch":
            raise ValueError(
                f"{self.crops} crops of frames that are shown whole (fit='stretch') are all the same: set "
                "crops=1, or fit='crop'"
            )

    @property
    def views(self) -> int:
        """Of a video."""
        return self.clips * self.crops

    def __len__(self) -> int:
        return -(-len(self.videos) * self.views // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One view. Raises VideoTimeout."""
        return {key: value[0] for key, value in self.read([index]).items()}

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several views stacked; those of one video take one decoding. Raises VideoTimeout, IndexError."""
        rows: list[dict[str, Any]] = [{} for _ in indices]
        places: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"view {index} of {len(self)}")
            video, view = divmod(int(index), self.views)
            places.setdefault(video, []).append((place, view))
        for video, wanted in places.items():
            for (place, view), frames in zip(
                wanted, self._frames(video, [v for _, v in wanted]), strict=True
            ):
                rows[place] = self._row(video, view, frames)
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, video: int, view: int, frames: np.ndarray | None) -> dict[str, Any]:
        exists = video < len(self.videos)
        black = np.zeros((self.sampling.frames, self.height, self.width, 3), np.uint8)
        return {
            "frames": black if frames is None else frames,
            "label": self.videos.labels[video] if exists else np.int32(0),
            "clip": np.int32(video if exists else -1),
            "view": np.int32(view),
            "valid": np.bool_(frames is not None),
        }

    def _frames(self, video: int, views: list[int]) -> list[np.ndarray] | list[None]:
        if video >= len(self.videos):
            return [None] * len(views)
        try:
            with self.videos.open(video) as clip:
                wanted = [self.sampling.test(clip.frames, v // self.crops, self.clips) for v in views]
                distinct = np.unique(np.concatenate(wanted))
                frames = dict(zip(distinct.tolist(), clip.read(distinct.tolist()), strict=True))
            shown = []
            for view, indices in zip(views, wanted, strict=True):
                position = crop_position(view % self.crops, self.crops)
                window = Window(self.height, self.width, self.fit, position)
                if self.shuffled:
                    indices = draw_rng(0, view, video).permutation(indices)
                cut = {i: window.apply(frames[i]) for i in set(indices.tolist())}
                shown.append(np.stack([cut[i] for i in indices.tolist()]))
            return shown
        except VideoError as error:
            self.report.add(VideoError(self.videos.name(video), error.reason))
            return [None] * len(views)
