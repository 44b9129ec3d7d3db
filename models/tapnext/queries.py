"""Queries: when and where each point is given, and the tokens that say so to the model.

A query is (t, y, x): the frame, and raster coordinates in pixels of the native image, (0, 0) being the outer
corner of the top-left pixel. Frames count from the start of the clip. Everything here is float32: bfloat16
rounds coordinates above 128 to whole pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from models.common.shapes import Params
from models.common.sharding import constrain, gathered
from models.common.vit import Grid
from models.tapnext.config import TAPNextConfig

NEVER = 2**30  # the frame of a query that no clip reaches


class Queries(NamedTuple):
    """K hints for each of Q tracks.

    Attributes:
      frame: [B, Q, K] int32, the frame a hint is for, counted from the start of the clip.
      yx: [B, Q, K, 2] float32, (y, x) in pixels of the native image.
      valid: [B, Q, K] bool, False for hints that are not there.
    """

    frame: Int[Array, "B Q K"]
    yx: Float[Array, "B Q K 2"]
    valid: Bool[Array, "B Q K"]


def make_queries(
    query_tyx: Num[Array, "B Q *K 3"], query_valid: Bool[Array, "B Q *K"] | None = None
) -> Queries:
    """Queries from the (t, y, x) of users and files; times are cut to whole frames, toward zero.

    Args:
      query_tyx: one query per track, [B, Q, 3], or several, [B, Q, K, 3], in any order of time.
      query_valid: False where a hint is padding; None: all are valid. (The official JAX code's
        `query_padding`, 1 for valid.) A track whose hints are all padding gets mask tokens throughout.

    Raises:
      ValueError: wrong shapes, or no track at all.
    """
    shape = query_tyx.shape
    if len(shape) not in (3, 4) or shape[-1] != 3 or min(shape) < 1:
        raise ValueError(
            f"query_tyx has shape {shape}; it must be [B, Q, 3] or [B, Q, K, 3], (t, y, x) of at least one"
            " track"
        )
    if query_valid is None:
        query_valid = jnp.ones(shape[:-1], bool)
    if query_valid.shape != shape[:-1]:
        raise ValueError(
            f"query_valid has shape {query_valid.shape}; it must be query_tyx's without the last axis,"
            f" {shape[:-1]}"
        )
    hints = (*shape[:2], shape[2] if len(shape) == 4 else 1)
    tyx = query_tyx.astype(jnp.float32).reshape(*hints, 3)
    # Truncation, as the official code casts: -0.5 is frame 0. Here it precedes the subtraction of the frames
    # seen, so that a query between two frames acts once, whatever the chunks.
    frame = jnp.clip(jnp.trunc(tyx[..., 0]), -NEVER, NEVER).astype(jnp.int32)
    return Queries(frame, tyx[..., 1:], query_valid.reshape(hints))


def query_embedding(config: TAPNextConfig, yx: Float[Array, "*B 2"]) -> Float[Array, "*B D"]:
    """P(y, x): sine and cosine positions of the pixels around a place, interpolated bilinearly (sheet 1.3).

    The weights were trained with values read from a table [H, W, D] of [sin c w, cos c w, sin r w, cos r w]
    at whole rows r and columns c, w_k = 10000^(-k / (D/4 - 1)), sampled at (y - 0.5, x - 0.5); sine and
    cosine of the place itself would be something else. Only four entries are needed, and they split into two
    rows and two columns, so no table is made.

    Args:
      yx: pixels of the native image, float32. Beyond the outermost pixel centres the numerics differ:
        "jax" clamps to the edge, "torch" fades to zero within a pixel.
    """
    count = config.width // 4
    frequencies = 10000.0 ** (-np.arange(count) / (count - 1))
    parts, weights = [], []
    for axis in (1, 0):
        entries = config.image_size[axis] * config.query_scale
        place = yx[..., axis] * config.query_scale - 0.5
        low = jnp.floor(place)
        part: Array | float = 0.0
        total: Array | float = 0.0
        for entry, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            if config.numerics == "torch":
                weight = jnp.where((entry >= 0) & (entry <= entries - 1), weight, 0)
            angle = jnp.clip(entry, 0, entries - 1)[..., None] * jnp.asarray(frequencies, jnp.float32)
            waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
            part, total = part + weight[..., None] * waves, total + weight
        parts.append(part)
        weights.append(jnp.asarray(total)[..., None])
    return jnp.concatenate([parts[0] * weights[1], parts[1] * weights[0]], axis=-1)


def point_tokens(
    config: TAPNextConfig,
    params: Params,
    queries: Queries,
    positions: Int[Array, "B T"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T Q D"]:
    """What the model is told of each point in each frame (sheet 1.3).

    At the frame of a hint: the query token plus P(y, x); of several hints for one frame the last counts.
    Before the frame of the first hint, if that is valid: the unknown token. Everywhere else, so also
    throughout a clip that starts after the query: the mask token.

    Args:
      params: "query", "mask" and "unknown".
      positions: frames since the start of the clip.
      dtype: of the tokens; what they are made of is float32.
    """
    query, mask, unknown = (gathered(params[name]) for name in ("query", "mask", "unknown"))
    hints = (query + query_embedding(config, queries.yx)).astype(dtype)
    now = positions[:, :, None]
    pending = is_pending(queries, positions)[..., None]
    tokens = jnp.where(pending, unknown.astype(dtype), mask.astype(dtype))
    for k in range(hints.shape[2]):
        here = (now == queries.frame[:, None, :, k]) & queries.valid[:, None, :, k]
        tokens = jnp.where(here[..., None], hints[:, None, :, k], tokens)
    return constrain(tokens, ("batch", "length", None, None))


def is_pending(queries: Queries, positions: Int[Array, "B T"]) -> Bool[Array, "B T Q"]:
    """Where the first hint of a track is still to come."""
    return (positions[:, :, None] < queries.frame[:, None, :, 0]) & queries.valid[:, None, :, 0]


_ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "(t, x, y)": lambda rows: rows[:, [0, 2, 1]],
    "(y, x, t)": lambda rows: rows[:, [2, 0, 1]],
    "(x, y, t)": lambda rows: rows[:, [2, 1, 0]],
}


def check_queries(
    query_tyx: np.ndarray | Sequence[Sequence[float]], image_size: Grid, frames: int | None = None
) -> np.ndarray:
    """The queries of a user as float32 [Q, 3], or an error that says what is wrong with them.

    `apply` does not check values (under `jax.jit` they are not known); the trackers do, with this.

    Args:
      query_tyx: [Q, 3], (t, y, x): frame, then pixels in 0 .. height and 0 .. width.
      image_size: (height, width) that the coordinates are in pixels of.
      frames: of the clip; None: any frame from 0 on.

    Raises:
      ValueError: no queries, another shape, a value that is not finite, a place outside the image or a frame
        outside the clip; if another order of the three numbers would fit, the message says so.
    """
    rows = np.asarray(query_tyx, np.float64)
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise ValueError(
            f"query_tyx has shape {rows.shape}; it must be [Q, 3], (t, y, x) of at least one point"
        )
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"query_tyx[{row}] = {rows[row].tolist()}; t, y and x must be finite numbers")
    limits = np.array([np.inf if frames is None else frames, *image_size], np.float64)

    def outside(rows: np.ndarray) -> np.ndarray:
        late = np.trunc(rows[:, 0]) >= limits[0]
        return (rows < 0).any(axis=1) | (rows[:, 1:] > limits[1:]).any(axis=1) | late

    wrong = outside(rows)
    if not wrong.any():
        return rows.astype(np.float32)
    row = int(np.flatnonzero(wrong)[0])
    fits = [name for name, reorder in _ORDERS.items() if not outside(reorder(rows)).any()]
    hint = f"; as {' or '.join(fits)} all would fit: is the order right?" if fits else ""
    last = "" if frames is None else f" below {frames}"
    raise ValueError(
        f"query_tyx[{row}] = {rows[row].tolist()} is (t, y, x) with t from 0{last}, y in 0 .. {image_size[0]}"
        f" and x in 0 .. {image_size[1]} (pixels); {int(wrong.sum())} of {len(rows)} are outside{hint}"
    )
