"""The memory of a streaming pass: fixed shapes, whatever the length of the stream and of its chunks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.common.dispatch import target
from kernels.common.hopper_rows import ROW_GROUP
from kernels.common.tiling import ceil_div
from models.common.recurrent_state import RecurrentState, init_recurrent_state
from models.trecvit.config import TRecViTConfig


class ReadoutState(NamedTuple):
    """Softmax pooling over all tokens of the clip so far, as running sums that stay in range.

    Attributes:
      highest: [B, N], the largest score.
      total: [B, N], sum of exp(score - highest).
      values: [B, N, H], sum of exp(score - highest) v.
    """

    highest: Float[Array, "B *T N"]
    total: Float[Array, "B *T N"]
    values: Float[Array, "B *T N H"]


class TRecViTState(NamedTuple):
    """Memory of a whole model. Every leaf has the batch first: select or reorder rows by tree.map.

    Attributes:
      length: [B] int32, frames of the current clip seen so far.
      layers: "0", "1", ... -> the recurrent block's memory, leaves [B, P', E]: h, and the J - 1 last inputs,
        of `padded_tokens`.
      head: [B, R], the mean of the features so far ("classes"); a `ReadoutState` ("readout"); None for heads
        without memory.
    """

    length: Int[Array, " B"]
    layers: dict[str, RecurrentState]
    head: Float[Array, "B R"] | ReadoutState | None


def padded_tokens(tokens: int) -> int:
    """Tokens of a frame inside the layers: on a GPU whole groups of them, for products and kernels to take
    them as they lie. Those that are added nobody attends to, and they are dropped behind the last layer.
    """
    return ceil_div(tokens, ROW_GROUP) * ROW_GROUP if target().platform == "gpu" else tokens


def init_layers(
    config: TRecViTConfig, batch: int, tokens: int, dtype: DTypeLike
) -> dict[str, RecurrentState]:
    """Empty memory of the layers for `tokens` tubes."""
    return {
        str(layer): init_recurrent_state(
            batch, config.recurrent_width, config.conv_width, (tokens,), jnp.dtype(dtype)
        )
        for layer in range(config.depth)
    }


def init_state(config: TRecViTConfig, batch: int, dtype: DTypeLike = jnp.float32) -> TRecViTState:
    """Empty memory of fixed shapes: a few frames per layer, whatever the length of the stream.

    Args:
      batch: B.
      dtype: of the convolution's inputs (the compute dtype). Recurrence and head are float32.

    Raises:
      ValueError: batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch}; it must be at least 1")
    wide = jnp.promote_types(dtype, jnp.float32)
    head: Array | ReadoutState | None = None
    if config.head == "classes":
        head = jnp.zeros((batch, config.rep_size), wide)
    elif config.head == "readout":
        heads, size = config.num_heads, config.width // config.num_heads
        head = ReadoutState(
            highest=jnp.full((batch, heads), -jnp.inf, wide),
            total=jnp.zeros((batch, heads), wide),
            values=jnp.zeros((batch, heads, size), wide),
        )
    return TRecViTState(
        length=jnp.zeros((batch,), jnp.int32),
        layers=init_layers(config, batch, padded_tokens(config.num_tokens), dtype),
        head=head,
    )
