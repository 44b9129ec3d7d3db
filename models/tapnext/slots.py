"""Tracking points in a stream: a fixed number of slots, filled, moved and freed at any frame.

The model cannot take on tracks in mid-stream: a new token would lack the memory of the frames before it. So
the slots are there from the first frame on, S for points and one more, the virgin slot, which never gets any.

- Free slots are not attended to: tracks do not depend on how many slots are free, nor on what is in them.
- A slot in use whose frame is still to come is fed the unknown token and seen by the others, as a late query
  is in the official model.
- The virgin slot is fed the unknown token for ever, and is seen by no other. It sees what a late query would:
  the image, the slots in use, and itself unless a late query, whose memory equals its own, is among them.
- Filling a slot copies the virgin's memory into it. So it goes on exactly, bit for bit, as a late query for
  that frame that was there from the start.
- Moving a slot feeds it the query token again and keeps its memory: a further hint for the same point.
- Behind the virgin slot lie free ones that fill the tokens of a frame up to a multiple of `ALIGNMENT`.

All functions are pure, of fixed shapes, for `jax.jit`; `models.tapnext.tracker.SlotTracker` is what to use.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.common.shapes import Params
from models.common.vit import Grid, grid_of
from models.tapnext.config import TAPNextConfig, TAPNextRuntime
from models.tapnext.heads import Readout, read_out
from models.tapnext.model import TokenMask, Video, count_patches, point_features
from models.tapnext.queries import NEVER, is_pending
from models.tapnext.state import TAPNextState, init_state

# Of 1,281 tokens XLA for GPUs pads what enters every product, in a kernel of its own, and cuts the results.
ALIGNMENT = 8


class SlotState(NamedTuple):
    """Memory of a tracker of B streams with S slots.

    Attributes:
      model: the model's, for S + 1 tracks or some more, with one hint each; track S is the virgin slot.
      in_use: [B, S].
    """

    model: TAPNextState
    in_use: Bool[Array, "B S"]


def init_slots(
    config: TAPNextConfig,
    slots: int,
    batch: int = 1,
    *,
    image_size: Grid | None = None,
    dtype: DTypeLike = jnp.float32,
) -> SlotState:
    """Empty memory with all slots free; `image_size` and `dtype` as in `init_state`.

    Raises:
      ValueError: no slots or no batch.
    """
    for name, value in (("slots", slots), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")
    rows, columns = grid_of(image_size or config.image_size, config.patch_size)
    tracks = slots + 1 + -(rows * columns + slots + 1) % ALIGNMENT
    never = jnp.zeros((batch, tracks, 3)).at[..., 0].set(NEVER)
    model = init_state(config, never, image_size=image_size, dtype=dtype)
    return SlotState(model, jnp.zeros((batch, slots), bool))


def slot_mask(state: SlotState, patches: int, positions: Int[Array, "B T"]) -> TokenMask:
    """Which tokens see which, [B, T, P, P]: the rules at the head of this module."""
    slots, tracks = state.in_use.shape[1], state.model.queries.frame.shape[1]
    pending = is_pending(state.model.queries, positions)[:, :, :slots] & state.in_use[:, None]
    alone = ~jnp.any(pending, axis=-1)
    keys = jnp.pad(state.in_use, ((0, 0), (patches, 0)), constant_values=True)
    keys = jnp.pad(keys, ((0, 0), (0, tracks - slots)))
    virgin = jnp.arange(keys.shape[1]) == patches + slots
    itself = virgin[:, None] & virgin[None, :]
    return keys[:, None, None, :] | (alone[:, :, None, None] & itself)


def advance(
    config: TAPNextConfig, runtime: TAPNextRuntime, params: Params, video: Video, state: SlotState
) -> tuple[Readout, Bool[Array, "B S T"], SlotState]:
    """The next T frames of every stream.

    Args:
      params: canonical tree.
      video: as in `models.tapnext.apply`.

    Returns:
      (what the model says of the S slots, where that means something - slots in use, from their query's frame
      on -, state after the frames).
    """
    frames = jnp.arange(video.shape[1], dtype=jnp.int32)
    positions = state.model.step[:, None] + frames
    mask = slot_mask(state, count_patches(config, video), positions)
    features, model = point_features(
        config, runtime, params, video, state.model.queries, state.model, mask=mask
    )
    assert model is not None
    slots = state.in_use.shape[1]
    pending = is_pending(state.model.queries, positions)[:, :, :slots]
    tracked = state.in_use[:, None] & ~pending
    readout = read_out(config, params, features.last[:, :slots])
    return readout, jnp.swapaxes(tracked, 1, 2), SlotState(model, state.in_use)


def edit_slots(
    state: SlotState,
    frame: Int[Array, "B S"],
    yx: Float[Array, "B S 2"],
    fill: Bool[Array, "B S"],
    move: Bool[Array, "B S"],
    free: Bool[Array, "B S"],
) -> SlotState:
    """Fills, moves and frees slots before the next frame.

    Args:
      frame: where `fill`, the frame of the query: the next one (the model's step) or a later one.
      yx: where `fill` or `move`, the place, in pixels of the native image.
      fill: the slot forgets what it tracked and takes the virgin's memory.
      move: the slot is given a place in the next frame and keeps its memory.
      free: nothing attends to the slot any more.
    """
    slots, tracks = state.in_use.shape[1], state.model.queries.frame.shape[1]

    def refilled(leaf: Array) -> Array:
        """[B, P, E] with the virgin's row over those of the filled slots."""
        first = leaf.shape[1] - tracks
        virgin, points = leaf[:, first + slots, None], leaf[:, first : first + slots]
        points = jnp.where(fill[..., None], virgin, points)
        return jax.lax.dynamic_update_slice_in_dim(leaf, points, first, 1)

    layers = jax.tree.map(refilled, state.model.layers)
    old = state.model.queries
    when = jnp.where(fill, frame, jnp.where(move, state.model.step[:, None], old.frame[:, :slots, 0]))
    where = jnp.where((fill | move)[..., None], yx, old.yx[:, :slots, 0])
    queries = old._replace(frame=old.frame.at[:, :slots, 0].set(when), yx=old.yx.at[:, :slots, 0].set(where))
    model = state.model._replace(queries=queries, layers=layers)
    return SlotState(model, (state.in_use | fill) & ~free)
