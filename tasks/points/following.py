"""A group of points followed through frames: from frames to chunks, from what the model says to rows."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from models import tapnext
from tasks.common.errors import RunError
from tasks.points.frame_sources import FrameSource
from tasks.points.resize import resize_frame
from tasks.points.strokes import Size
from tasks.points.track_spool import HIDDEN, UNKNOWN, VISIBLE, Rows, track_rows
from tasks.points.trackers import TrackerModel

_WINDOW = 128 << 20  # bytes of frames held to turn them round


class Follower:
    """One group of points in one stream of frames, from the first on.

    Args:
      model: the tracker is made of it.
      slots: of the tracker, at least as many as points: the same number for all groups, so that they share
        a program.
      query_tyx: the points, in pixels of the model's image.
      height, width: of the video, in pixels: what tracks are brought to.
      gate: whether a point counts as visible only where the model is certain of its place, too.
      chunk: most frames of a call.

    Attributes:
      seconds: spent in the model.
    """

    def __init__(
        self,
        model: TrackerModel,
        slots: int,
        query_tyx: Float[np.ndarray, "n 3"],
        height: int,
        width: int,
        *,
        gate: bool,
        chunk: int,
    ):
        self.seconds, self._next = 0.0, 0
        self._chunk, self._gate = chunk, gate
        self._first, self._asked_yx = query_tyx[:, 0].astype(np.int64), query_tyx[:, None, 1:]
        self._scale_xy = np.array([width / model.units[1], height / model.units[0]], np.float32)
        self._tracker = model.tracker(slots)
        self._slots = self._tracker.add(query_tyx)

    def __call__(self, frames: UInt8[np.ndarray, "T h w 3"]) -> list[Rows]:
        """Rows of the points in each of the next frames, which have the model's size.

        Raises:
          RunError: what the model says is not finite.
        """
        count = len(frames)
        if count < self._chunk:
            # What fills up the last chunk comes after all that counts, and the model is causal.
            frames = np.concatenate([frames, np.repeat(frames[-1:], self._chunk - count, axis=0)])
        begin = time.perf_counter()
        found = self._tracker.step(frames)
        self.seconds += time.perf_counter() - begin
        tracks_yx, logits, certainty = (
            leaf[self._slots, :count] for leaf in (found.tracks_yx, found.visible_logits, found.certainty)
        )
        age = self._next + np.arange(count) - self._first[:, None]
        known, given = age >= 0, age == 0
        finite = np.isfinite(tracks_yx).all(axis=-1) & np.isfinite(logits) & np.isfinite(certainty)
        if not finite[known].all():
            raise RunError(
                f"the model's output is not finite from frame {self._next} on: are its weights good?"
            )
        sure = jnp.asarray(certainty) if self._gate else None
        # At its own frame a point is where it was asked for: what the model makes of that (TAP-Vid does not
        # count it) would draw a line across the picture.
        visible = np.asarray(tapnext.is_visible(jnp.asarray(logits), sure)) | given
        tracks_yx = np.where(given[..., None], self._asked_yx, tracks_yx)
        rows = [track_rows(len(self._first)) for _ in range(count)]
        for number, row in enumerate(rows):
            row["xy"] = np.where(known[:, number, None], tracks_yx[:, number, ::-1] * self._scale_xy, np.nan)
            row["certainty"] = np.where(known[:, number], certainty[:, number], np.nan)
            state = np.where(visible[:, number], VISIBLE, HIDDEN)
            row["state"] = np.where(known[:, number], state, UNKNOWN)
        self._next += count
        return rows


class Chunk(NamedTuple):
    """Frames for one call of the model.

    Attributes:
      frames: of the model's size.
      kept: what else is to be kept of each.
    """

    frames: UInt8[np.ndarray, "T h w 3"]
    kept: list


def chunks[T](frames: Iterable[tuple[np.ndarray, T]], length: int) -> Iterator[Chunk]:
    """Frames, each with what goes with it, `length` at a time; the last time those that are left."""
    for batch in itertools.batched(frames, length):
        yield Chunk(np.stack([frame for frame, _ in batch]), [kept for _, kept in batch])


def reversed_frames(source: FrameSource, count: int, size: Size) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The first `count` frames of a video, the last of them first, at a size (height, width).

    Videos can only be decoded forwards: windows of so many frames as fit a fixed amount of memory at that
    size are decoded one after the other, the last first, and each is turned round. So every frame is decoded
    once, and those between a window's begin and the key frame before it once more.

    Raises:
      VideoDataError: a frame cannot be decoded.
    """
    window = max(1, _WINDOW // (3 * size[0] * size[1]))
    for start in range((count - 1) // window * window, -1, -window):
        pictures = itertools.islice(source.stream(start), min(window, count - start))
        held = [resize_frame(picture.frame, *size) for picture in pictures]
        while held:
            yield held.pop()
