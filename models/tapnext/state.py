"""The memory of a streaming pass: fixed shapes, whatever the length of the stream and of its chunks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Num

from models.common.recurrent_state import RecurrentState, init_recurrent_state
from models.common.vit import Grid, grid_of
from models.tapnext.config import TAPNextConfig
from models.tapnext.queries import Queries, make_queries


class TAPNextState(NamedTuple):
    """Memory of a whole model. Every leaf has the batch first: select or reorder rows by tree.map.

    Attributes:
      step: [B] int32, frames of the current clip seen so far.
      queries: what is tracked; frames count from the start of the clip.
      layers: "0", "1", ... -> the recurrent block's memory, leaves [B, P, E]: h in float32, and the J - 1
        last inputs. Of the P tokens the image's come first, row-major, then one per track.
    """

    step: Int[Array, " B"]
    queries: Queries
    layers: dict[str, RecurrentState]


def init_state(
    config: TAPNextConfig,
    query_tyx: Num[Array, "B Q *K 3"],
    query_valid: Bool[Array, "B Q *K"] | None = None,
    *,
    image_size: Grid | None = None,
    dtype: DTypeLike = jnp.float32,
) -> TAPNextState:
    """Empty memory for these queries: the number of tracks is fixed from here on.

    Late queries are given here with their future frame, as in the official code; `slots` fills them later.

    Args:
      query_tyx, query_valid: see `make_queries`.
      image_size: (height, width) of the video, if it is not the native one.
      dtype: of the convolution's inputs (the compute dtype). The recurrence is float32.

    Raises:
      ValueError: queries of a wrong shape, or a size that the patches do not divide.
    """
    queries = make_queries(query_tyx, query_valid)
    batch, tracks = queries.frame.shape[:2]
    rows, columns = grid_of(image_size or config.image_size, config.patch_size)
    tokens = rows * columns + tracks
    return TAPNextState(
        step=jnp.zeros((batch,), jnp.int32),
        queries=queries,
        layers={
            str(layer): init_recurrent_state(
                batch, config.recurrent_width, config.conv_width, (tokens,), jnp.dtype(dtype)
            )
            for layer in range(config.depth)
        },
    )
