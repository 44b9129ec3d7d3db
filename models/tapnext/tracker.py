"""A tracker for users: points in one stream of frames, added, corrected and dropped as it runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.common.compiler import jit_for_target
from models.common.recurrent_state import handed_over, taken_over
from models.common.shapes import Params
from models.common.vit import Grid
from models.tapnext.config import TAPNextConfig, TAPNextRuntime
from models.tapnext.heads import certainty, is_visible
from models.tapnext.inference import prepare_params
from models.tapnext.model import Video
from models.tapnext.queries import NEVER, check_queries
from models.tapnext.slots import SlotState, advance, edit_slots, init_slots


class SlotTracks(NamedTuple):
    """Of a stretch of T frames; NaN and False in slots that are free or whose frame is still to come.

    Attributes:
      tracks_yx: [S, T, 2] float32, (y, x) in pixels of the native image.
      visible: [S, T] bool, by the visibility logit alone.
      certainty: [S, T] float32, probability of being within the tracker's radius of the track.
      visible_logits: [S, T] float32.
    """

    tracks_yx: np.ndarray
    visible: np.ndarray
    certainty: np.ndarray
    visible_logits: np.ndarray


def _step(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    radius: float,
    params: Params,
    video: Video,
    state: SlotState,
) -> tuple[Array, SlotState]:
    """([S, T, 4] (y, x), certainty, visibility logit, NaN where nothing is tracked; the memory).

    Args:
      state: handed over.
    """
    readout, tracked, state = advance(config, runtime, params, video, taken_over(state))
    sure = certainty(config, readout.track_logits, readout.tracks_yx, radius)
    # One array: fetching one takes as long as the step of a small model.
    found = jnp.concatenate([readout.tracks_yx, sure[..., None], readout.visible_logits[..., None]], axis=-1)
    return jnp.where(tracked[..., None], found, jnp.nan)[0], state


_edit_program = jit_for_target(edit_slots, donate_argnums=0)
# Config, runtime and radius are hashable: one program for all trackers of one resolution, number of slots and
# number of frames per call.
_step_program = jit_for_target(_step, static_argnums=(0, 1, 2), donate_argnums=5)


class SlotTracker:
    """Follows points in one stream of frames, whatever its length; slots are numbered 0 .. S - 1.

        tracker = SlotTracker(config, params, slots=64)
        tracker.add([[0, 120.5, 80.5]])            # (t, y, x): from frame 0 on
        for frame in frames:                        # uint8 [height, width, 3]
            tracks = tracker.step(frame[None])
            if clicked: tracker.add([[tracker.frame, *yx]])

    Coordinates are in pixels of the native image (`config.image_size`), whatever the size of the frames: the
    caller scales. Every number of frames per call is compiled once, so feed equal chunks.
    """

    def __init__(
        self,
        config: TAPNextConfig,
        params: Params,
        slots: int,
        *,
        runtime: TAPNextRuntime | None = None,
        image_size: Grid | None = None,
        radius: float = 8.0,
    ):
        """Makes a tracker before its first frame, all slots free.

        Args:
          params: canonical tree of `config`, or what `prepare_params` made of it, which saves doing so here.
          slots: S, the most points at a time. All are computed, used or not.
          image_size: (height, width) of the frames, if it is not the native one.
          radius: of `SlotTracks.certainty`, pixels.

        Raises:
          ValueError: no slots, or a size that the patches do not divide.
        """
        self.config, self.runtime = config, runtime or TAPNextRuntime()
        self.image_size, self.radius = tuple(image_size or config.image_size), float(radius)
        self.frame = 0
        self._params = prepare_params(params, self.runtime.compute_dtype)
        self._in_use = np.zeros(slots, bool)
        self._state = init_slots(
            config, slots, image_size=image_size, dtype=jnp.dtype(self.runtime.compute_dtype)
        )

    @property
    def slots(self) -> int:
        """S."""
        return len(self._in_use)

    @property
    def in_use(self) -> np.ndarray:
        """[S] bool."""
        return self._in_use.copy()

    @property
    def state(self) -> SlotState:
        """The memory after the last call; the next step, and filling, moving or freeing slots, consume it."""
        return self._state

    def add(self, query_tyx: Any) -> np.ndarray:
        """Fills the lowest free slots.

        Args:
          query_tyx: [n, 3], the frame (`self.frame`, the next one, or a later one), y, x.

        Returns:
          [n] the slots.

        Raises:
          ValueError: more queries than free slots, or queries that `fill` refuses.
        """
        rows = check_queries(np.asarray(query_tyx), self.config.image_size)
        free = np.flatnonzero(~self._in_use)
        if len(rows) > len(free):
            raise ValueError(
                f"{len(rows)} queries, but only {len(free)} of {self.slots} slots are free; free some, or"
                " make the tracker with more"
            )
        chosen = free[: len(rows)]
        self.fill(chosen, query_tyx)
        return chosen

    def fill(self, slots: Sequence[int] | np.ndarray, query_tyx: Any) -> None:
        """Gives slots new points; what they tracked before is forgotten.

        Raises:
          ValueError: slots that are not there or given twice, frames that have passed, or places outside the
            image (`check_queries`).
        """
        rows = check_queries(np.asarray(query_tyx), self.config.image_size)
        index = self._index(slots, len(rows))
        frames = np.asarray(query_tyx, np.float64)[:, 0].astype(np.int64)
        if (frames < self.frame).any():
            first = int(np.flatnonzero(frames < self.frame)[0])
            raise ValueError(
                f"query_tyx[{first}] is for frame {frames[first]}, which has passed: the next is {self.frame}"
            )
        self._edit(index, "fill", np.minimum(frames, NEVER), rows[:, 1:])
        self._in_use[index] = True

    def move(self, slots: Sequence[int] | np.ndarray, yx: Any) -> None:
        """Corrects points: they are at these places in the next frame.

        Raises:
          ValueError: slots that are free, not there or given twice, or places outside the image.
        """
        places = np.asarray(yx, np.float64)
        if places.ndim != 2 or places.shape[1] != 2:
            raise ValueError(f"yx has shape {places.shape}; it must be [n, 2], (y, x)")
        now = np.full((len(places), 1), float(self.frame))
        rows = check_queries(np.concatenate([now, places], axis=1), self.config.image_size)
        index = self._index(slots, len(rows))
        if not self._in_use[index].all():
            raise ValueError(f"slot {index[~self._in_use[index]][0]} is free; fill it first")
        self._edit(index, "move", None, rows[:, 1:])

    def free(self, slots: Sequence[int] | np.ndarray) -> None:
        """Stops tracking.

        Raises:
          ValueError: slots that are not there or given twice.
        """
        index = self._index(slots, None)
        self._edit(index, "free", None, None)
        self._in_use[index] = False

    def step(self, video: np.ndarray) -> SlotTracks:
        """The tracks in the next frames.

        Args:
          video: [T, height, width, 3], uint8, or floating point in [-1, 1].

        Raises:
          ValueError: frames of another shape than the tracker's.
        """
        video = np.asarray(video)
        if video.ndim != 4 or video.shape[1:] != (*self.image_size, 3) or not len(video):
            raise ValueError(
                f"video has shape {video.shape}; this tracker takes [T, {self.image_size[0]},"
                f" {self.image_size[1]}, 3] with T >= 1"
            )
        found, self._state = _step_program()(
            self.config, self.runtime, self.radius, self._params, video[None], handed_over(self._state)
        )
        self.frame += len(video)
        tracks, sure, logits = np.split(np.asarray(found), (2, 3), axis=-1)
        return SlotTracks(
            tracks_yx=tracks,
            visible=np.asarray(is_visible(logits[..., 0])),  # NaN is not
            certainty=sure[..., 0],
            visible_logits=logits[..., 0],
        )

    def _index(self, slots: Sequence[int] | np.ndarray, count: int | None) -> np.ndarray:
        index = np.atleast_1d(np.asarray(slots))
        if not np.issubdtype(index.dtype, np.integer) or index.ndim != 1:
            raise ValueError(f"slots = {slots!r}; they must be whole numbers from 0 to {self.slots - 1}")
        if ((index < 0) | (index >= self.slots)).any() or len(set(index.tolist())) != len(index):
            raise ValueError(
                f"slots = {index.tolist()}; they must be different numbers from 0 to {self.slots - 1}"
            )
        if count is not None and count != len(index):
            raise ValueError(f"{len(index)} slots, but {count} queries")
        return index

    def _edit(self, index: np.ndarray, what: str, frame: np.ndarray | None, yx: np.ndarray | None) -> None:
        flags = {name: np.zeros((1, self.slots), bool) for name in ("fill", "move", "free")}
        flags[what][0, index] = True
        frames, places = np.zeros((1, self.slots), np.int32), np.zeros((1, self.slots, 2), np.float32)
        if frame is not None:
            frames[0, index] = frame
        if yx is not None:
            places[0, index] = yx
        arguments = (frames, places, flags["fill"], flags["move"], flags["free"])
        self._state = _edit_program()(self._state, *arguments)
