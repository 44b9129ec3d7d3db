"""Films of coloured squares whose places are known, and a tracker that finds squares by their colour.

It sees what a model would see - frames squashed to its size - so that everything around a model can be judged
by where its points end up in the video.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

HEIGHT, WIDTH, FRAMES, FPS = 96, 128, 24, 10
COLOURS = np.array([(230, 40, 40), (40, 220, 60), (60, 70, 240)], np.uint8)
HALF = 10  # half a side of a square, in pixels
HIDDEN = (1, range(9, 13))  # which square is not to be seen, and when
UNITS = (64, 64)


def places(frames: int = FRAMES) -> np.ndarray:
    """[3, T, 2]: (x, y) of the squares' middles, in raster coordinates."""
    t = np.arange(frames, dtype=np.float64)
    return np.stack(
        [
            np.stack([20 + 3 * t % 90, 20 + 0.5 * t % 50], -1),
            np.stack([100 - 2.5 * t % 80, 48 + 0 * t], -1),
            np.stack([64 + 20 * np.sin(t / 5), 78 - 0.25 * (t % 40)], -1),
        ]
    )


def film(frames: int = FRAMES) -> np.ndarray:
    """uint8 [T, 96, 128, 3]: squares on grey, anti-aliased at their edges."""
    x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
    video = np.full((frames, HEIGHT, WIDTH, 3), 120.0)
    for square, (path, colour) in enumerate(zip(places(frames), COLOURS, strict=True)):
        for t, (cx, cy) in enumerate(path):
            if square == HIDDEN[0] and t in HIDDEN[1]:
                continue
            across = np.clip(HALF + 0.5 - np.abs(x - cx), 0, 1)
            down = np.clip(HALF + 0.5 - np.abs(y - cy), 0, 1)
            cover = (down[:, None] * across)[..., None]
            video[t] = video[t] * (1 - cover) + colour.astype(float) * cover
    return np.round(video).astype(np.uint8)


class Seen(NamedTuple):
    """As `tasks.points.trackers.Found`."""

    tracks_yx: np.ndarray
    visible_logits: np.ndarray
    certainty: np.ndarray


class BlobTracker:
    """Says of each point where the pixels are that have the colour it had when it was asked for."""

    def __init__(self, model: "BlobModel", slots: int):
        self.model, self.frame, self.seen = model, 0, 0
        self.queries: list[Any] = [None] * slots
        self.colours: list[Any] = [None] * slots

    def add(self, query_tyx: np.ndarray) -> np.ndarray:
        free = [slot for slot, query in enumerate(self.queries) if query is None]
        assert len(query_tyx) <= len(free), "more points than slots"
        assert (query_tyx[:, 0] >= self.frame).all(), "a frame that has passed"
        assert (query_tyx[:, 1:] <= self.model.units).all(), "outside of the image"
        for slot, query in zip(free, query_tyx, strict=False):
            self.queries[slot] = query
        return np.array(free[: len(query_tyx)])

    def step(self, video: np.ndarray) -> Seen:
        assert video.dtype == np.uint8
        assert video.shape[1:] == (*self.model.frame_size, 3)
        self.model.shapes.append(video.shape)
        slots, count = len(self.queries), len(video)
        tracks = np.full((slots, count, 2), np.nan, np.float32)
        logits, sure = (np.full((slots, count), np.nan, np.float32) for _ in range(2))
        for index, frame in enumerate(video):
            for slot, query in enumerate(self.queries):
                if query is not None and self.frame >= query[0]:
                    found = self._find(slot, query, frame.astype(np.float64))
                    tracks[slot, index], logits[slot, index] = found
                    sure[slot, index] = self.model.certainty(self.frame)
            self.frame += 1
        return Seen(tracks, logits, sure)

    def _find(self, slot: int, query: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, float]:
        scale = np.array(self.model.frame_size) / self.model.units
        if self.frame == int(query[0]):
            row, column = (query[1:] * scale).astype(int)
            self.colours[slot] = frame[row, column]
        weight = np.clip(1 - np.abs(frame - self.colours[slot]).max(axis=-1) / 80, 0, 1)
        if weight.sum() < 4:
            return np.zeros(2), -5.0
        y, x = np.indices(weight.shape) + 0.5
        place = np.array([(y * weight).sum(), (x * weight).sum()]) / weight.sum()
        return place / scale, 5.0


@dataclasses.dataclass
class BlobModel:
    """Makes such trackers; remembers with how many slots, and the shapes of what they were shown."""

    frame_size: tuple[int, int] = UNITS
    units: tuple[int, int] = UNITS
    certainty: Callable[[int], float] = lambda frame: 0.9
    slots: list[int] = dataclasses.field(default_factory=list)
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def tracker(self, slots: int) -> BlobTracker:
        self.slots.append(slots)
        return BlobTracker(self, slots)
