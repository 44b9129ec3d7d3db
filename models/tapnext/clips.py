"""Points through recorded videos of any length: chunk by chunk, in groups, forwards and backwards.

The device holds one chunk of frames and the memory of one group of points, however long the video and however
many the points. Coordinates are in pixels of the native image (`config.image_size`), whatever the frames'.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.common.compiler import jit_for_target
from models.common.shapes import Params
from models.tapnext.config import TAPNextConfig, TAPNextRuntime
from models.tapnext.heads import certainty, is_visible
from models.tapnext.inference import prepare_params
from models.tapnext.model import Video, apply
from models.tapnext.queries import check_queries
from models.tapnext.state import TAPNextState, init_state


@runtime_checkable
class Frames(Protocol):
    """A recorded video: an array [T, height, width, 3], or anything that gives stretches of one.

    uint8, or floating point in [-1, 1].
    """

    def __len__(self) -> int:
        """T."""
        ...

    def __getitem__(self, index: slice, /) -> np.ndarray:
        """Frames index.start to index.stop (both given, step 1)."""
        ...


class Tracks(NamedTuple):
    """Of Q points in T frames; where a point is not tracked (before its query, one way): NaN, not visible.

    Attributes:
      tracks_yx: [Q, T, 2] float32, (y, x) in pixels of the native image.
      visible: [Q, T] bool, by the visibility logit alone.
      certainty: [Q, T] float32, probability of being within the asked radius of the track.
      visible_logits: [Q, T] float32.
    """

    tracks_yx: np.ndarray
    visible: np.ndarray
    certainty: np.ndarray
    visible_logits: np.ndarray


class _Raw(NamedTuple):
    """Tracks, certainty and visibility logits of all frames, whether the query has come or not."""

    tracks_yx: np.ndarray
    certainty: np.ndarray
    visible_logits: np.ndarray


def _step(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    radius: float,
    params: Params,
    video: Video,
    state: TAPNextState,
    in_use: Array | None,
) -> tuple[tuple[Array, Array, Array], TAPNextState]:
    output, after = apply(config, runtime, params, video, state=state, in_use=in_use)
    assert after is not None
    sure = certainty(config, output.track_logits, output.tracks_yx, radius)
    return (output.tracks_yx, sure, output.visible_logits), after


# One program for all groups and chunks; the memory is updated in place.
_step_program = jit_for_target(_step, static_argnums=(0, 1, 2), donate_argnums=5)
_start_program = jit_for_target(init_state, static_argnums=0, static_argnames=("image_size", "dtype"))


def track_clip(
    config: TAPNextConfig,
    params: Params,
    video: Frames,
    query_tyx: np.ndarray,
    *,
    runtime: TAPNextRuntime | None = None,
    both_ways: bool = True,
    group_size: int | None = None,
    chunk: int = 16,
    radius: float = 8.0,
    fill: int = 1,
    anywhere: bool = False,
) -> Tracks:
    """Tracks in a recorded clip, before the queries too.

    The model is causal. `both_ways` runs it again on the reversed clip, with t' = T - 1 - t, and takes from
    there what lies before each query: the official evaluation's strided mode (sheet 6.2). It is skipped where
    all queries are for the first frame.

    Args:
      params: canonical tree of `config`, or what `prepare_params` made of it, which saves doing so here.
      video: [T, height, width, 3], read a chunk at a time.
      query_tyx: [Q, 3], frame, y, x.
      group_size: most points at a time; None: all. Points of one group see each other, those of different
        groups do not, so the size of the groups changes the results (a little, as the number of points in a
        video does). Rows that fill up the last group are seen by none.
      chunk: frames at a time; changes nothing but rounding.
      radius: of `certainty`, pixels.
      fill: without groups, the number of rows is rounded up to a multiple of this: videos with different
        numbers of points share a program. Rows that fill up are seen by none.
      anywhere: queries outside the image are let through; what they mean depends on the numerics
        (`query_embedding`). Annotations of evaluation sets hold some.

    Raises:
      ValueError: an empty video, frames of a wrong shape, or queries that `check_queries` refuses.
    """
    length = len(video)
    if length < 1:
        raise ValueError("the video has no frames")
    _check_sizes(group_size, chunk)
    rows = (
        np.asarray(query_tyx, np.float32) if anywhere else check_queries(query_tyx, config.image_size, length)
    )
    runtime = runtime or TAPNextRuntime()
    params = prepare_params(params, runtime.compute_dtype)
    chunk = min(chunk, length)

    def forward(start: int) -> np.ndarray:
        return video[start : min(start + chunk, length)]

    def backward(start: int) -> np.ndarray:
        return video[max(length - start - chunk, 0) : length - start][::-1]

    starts, first = range(0, length, chunk), np.trunc(rows[:, 0]).astype(int)
    parts = []
    for group, in_use in _groups(rows, group_size, fill):
        # While the device is busy with a chunk the host reads and sends the next.
        run = functools.partial(_run, config, runtime, radius, params, in_use=in_use, chunk=chunk, ahead=1)
        found = _joined(run(map(forward, starts), group))
        if both_ways and first.any():
            turned = group.copy()
            turned[:, 0] = length - 1 - np.trunc(group[:, 0])
            reverse = _joined(run(map(backward, starts), turned))
            before = np.arange(length) < np.trunc(group[:, :1])
            found = _Raw(*(_choose(before, r[:, ::-1], f) for r, f in zip(reverse, found, strict=True)))
        parts.append(found)
    raw = _Raw(*(np.concatenate(leaves)[: len(rows)] for leaves in zip(*parts, strict=True)))
    return _known(raw, np.ones((len(rows), length), bool) if both_ways else _since(first, 0, length))


def track_stream(
    config: TAPNextConfig,
    params: Params,
    video: Iterable[np.ndarray],
    query_tyx: np.ndarray,
    *,
    runtime: TAPNextRuntime | None = None,
    chunk: int = 16,
    radius: float = 8.0,
) -> Iterator[Tracks]:
    """Tracks chunk by chunk, in constant memory: for videos too long to hold, or that have no end.

    Forwards only; queries may be for any frame. To add points as the stream goes on use `SlotTracker`.

    Args:
      params, query_tyx, chunk, radius: as in `track_clip`.
      video: frames [height, width, 3], one at a time.

    Yields:
      Tracks of the next `chunk` frames (the last time, of those that are left).

    Raises:
      ValueError: frames of a wrong shape, or queries that `check_queries` refuses.
    """
    _check_sizes(None, chunk)
    rows = check_queries(query_tyx, config.image_size)
    runtime = runtime or TAPNextRuntime()
    params = prepare_params(params, runtime.compute_dtype)
    first, done = np.trunc(rows[:, 0]).astype(int), 0
    batches = map(np.stack, itertools.batched(video, chunk))
    for raw in _run(config, runtime, radius, params, batches, rows, in_use=None, chunk=chunk, ahead=0):
        frames = raw.certainty.shape[1]
        yield _known(raw, _since(first, done, frames))
        done += frames


def _run(
    config: TAPNextConfig,
    runtime: TAPNextRuntime,
    radius: float,
    params: Params,
    chunks: Iterable[np.ndarray],
    query_tyx: np.ndarray,
    *,
    in_use: Array | None,
    chunk: int,
    ahead: int,
) -> Iterator[_Raw]:
    """What the model says of each chunk. A short one, the last, is filled up: nothing is compiled anew.

    Args:
      ahead: chunks that are sent to the device before the results of an earlier one are waited for.
    """
    state: TAPNextState | None = None
    sent: collections.deque[tuple[tuple[Array, Array, Array], int]] = collections.deque()

    def received() -> _Raw:
        found, count = sent.popleft()
        return _Raw(*(np.asarray(leaf)[0][:, :count] for leaf in found))

    for frames in chunks:
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"the video gave an array of shape {frames.shape}, not [T, height, width, 3]")
        if state is None:
            dtype, size = jnp.dtype(runtime.compute_dtype), (frames.shape[1], frames.shape[2])
            state = _start_program()(config, query_tyx[None], image_size=size, dtype=dtype)
        count = len(frames)
        if count < chunk:
            frames = np.concatenate([frames, np.repeat(frames[-1:], chunk - count, axis=0)])
        found, state = _step_program()(config, runtime, radius, params, frames[None], state, in_use)
        sent.append((found, count))
        if len(sent) > ahead:
            yield received()
    while sent:
        yield received()


def _groups(rows: np.ndarray, group_size: int | None, fill: int) -> Iterator[tuple[np.ndarray, Array | None]]:
    """Queries in groups of one size, and which of a group's rows are there (None: all, in one group)."""
    if group_size is None or group_size >= len(rows):
        group_size = -(-len(rows) // fill) * fill
    if group_size == len(rows):
        yield rows, None
        return
    for start in range(0, len(rows), group_size):
        group = rows[start : start + group_size]
        missing = group_size - len(group)
        filler = np.zeros((missing, 3), rows.dtype)
        yield np.concatenate([group, filler]), jnp.arange(group_size)[None] < len(group)


def _joined(parts: Iterable[_Raw]) -> _Raw:
    return _Raw(*(np.concatenate(leaves, axis=1) for leaves in zip(*parts, strict=True)))


def _choose(which: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(which.reshape(*which.shape, *[1] * (no.ndim - 2)), yes, no)


def _since(first: np.ndarray, start: int, frames: int) -> np.ndarray:
    """[Q, frames] whether each frame, from `start` on, is the query's or a later one."""
    return start + np.arange(frames) >= first[:, None]


def _known(raw: _Raw, known: np.ndarray) -> Tracks:
    logits = np.where(known, raw.visible_logits, np.nan)
    return Tracks(
        tracks_yx=np.where(known[..., None], raw.tracks_yx, np.nan),
        visible=np.asarray(is_visible(raw.visible_logits)) & known,
        certainty=np.where(known, raw.certainty, np.nan),
        visible_logits=logits,
    )


def _check_sizes(group_size: int | None, chunk: int) -> None:
    for name, value in (("group_size", group_size), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
