"""Which frames of a video make a clip: frames x stride, or one frame from each of equal segments.

`dense` (Kinetics): T frames, `stride` apart, at a random place in training, at evenly spaced ones at test.
`uniform` (TSN; Something-Something): the video is cut into T equal segments, one frame of each: a random one
in training, evenly spaced ones at test.

A video shorter than the clip repeats its last frame (`pad="repeat"`) or starts again (`pad="loop"`). All
draws are a pure function of (seed, draw, index): what is read does not depend on who reads it, or when.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

Mode = Literal["dense", "uniform"]
Pad = Literal["repeat", "loop"]


@dataclass(frozen=True)
class Sampling:
    """How clips are cut from videos.

    frames: T.
    stride: frames from one to the next, for `dense`.
    mode, pad: see the module.
    """

    frames: int = 16
    stride: int = 1
    mode: Mode = "dense"
    pad: Pad = "repeat"

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1:
            raise ValueError(f"need frames >= 1 and stride >= 1, got {self.frames} x {self.stride}")
        if self.mode not in ("dense", "uniform") or self.pad not in ("repeat", "loop"):
            raise ValueError(
                f"sampling {self.mode!r}, padding {self.pad!r}: must be dense or uniform, repeat or loop"
            )

    @property
    def span(self) -> int:
        """Frames from the first to the last of a dense clip, both counted."""
        return (self.frames - 1) * self.stride + 1

    def train(self, count: int, rng: np.random.Generator) -> Int[np.ndarray, " T"]:
        """Frame indices of a training clip of a video of `count` frames, drawn from `rng`."""
        if self.mode == "uniform":
            return self._segments(count, rng.random(self.frames))
        return self._dense(count, int(rng.integers(max(count - self.span, 0) + 1)))

    def test(self, count: int, clip: int = 0, clips: int = 1) -> Int[np.ndarray, " T"]:
        """Frame indices of the `clip`-th of `clips` evenly spaced test clips.

        Dense clips begin at evenly spaced places from the first possible one to the last (a single one lies
        in the middle); uniform ones take frames at (clip + 1/2) / clips of each segment.
        """
        if not 0 <= clip < clips:
            raise ValueError(f"clip {clip} of {clips}")
        if self.mode == "uniform":
            return self._segments(count, np.full(self.frames, (clip + 0.5) / clips))
        room = max(count - self.span, 0)
        return self._dense(count, round(room * (clip / (clips - 1) if clips > 1 else 0.5)))

    def _dense(self, count: int, first: int) -> Int[np.ndarray, " T"]:
        indices = first + self.stride * np.arange(self.frames, dtype=np.int64)
        return indices % count if self.pad == "loop" else np.minimum(indices, count - 1)

    def _segments(self, count: int, places: np.ndarray) -> Int[np.ndarray, " T"]:
        if count < self.frames and self.pad == "loop":
            return np.arange(self.frames, dtype=np.int64) % count
        # Shorter videos give the same frame to neighbouring segments: in order, evenly.
        return np.minimum((np.arange(self.frames) + places) * count / self.frames, count - 1).astype(np.int64)


def draw_rng(seed: int, draw: int, index: int) -> np.random.Generator:
    """The generator of one training clip: the `draw`-th time that example `index` is shown."""
    return np.random.default_rng([seed % 2**63, draw, index])


def crop_position(crop: int, crops: int) -> float:
    """Where the `crop`-th of `crops` test windows lies along the longer side: 0, 0.5, 1 for three."""
    if not 0 <= crop < crops:
        raise ValueError(f"crop {crop} of {crops}")
    return crop / (crops - 1) if crops > 1 else 0.5
