"""One step of the recurrence on tiles in registers: what the Hopper kernels of frames and of clips share."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from kernels.common import hopper
from kernels.common.hopper import WARPGROUP
from kernels.common.hopper_math import LOG2E, inverse_root, one_minus_square

COLUMNS = 64  # of a tile
SHAPE = (WARPGROUP, COLUMNS)
SIZES = (64, 128)  # of the gates' groups, in channels


def next_state(
    before: Float[Array, "64 64"],
    v: Float[Array, "64 64"],
    i: Float[Array, "64 64"],
    r: Float[Array, "64 64"],
    rate: Float[Array, "64 64"],
    is_start: Bool[Array, "64 64"],
) -> Float[Array, "64 64"]:
    """h_t = a h_(t-1) + sqrt(1 - a^2) i v_t, log a = -rate r; i v_t at a start.

    Args:
      before: h_(t-1), whatever it is at a start.
    """
    log2_a = r * (rate * -LOG2E)
    a = jnp.exp2(log2_a)
    one_minus = one_minus_square(log2_a, a)
    scale = jnp.where(is_start, 1.0, one_minus * inverse_root(one_minus))
    entering = scale * (i * v)
    return jnp.where(is_start, entering, a * before + entering)


def tile(ref: Any) -> Float[Array, "64 64"]:
    """As accumulators lie, float32."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def by_column(ref: Any) -> Float[Array, "64 64"]:
    """One value per column."""
    return hopper.by_column(ref, SHAPE)


def by_row(ref: Any) -> Float[Array, "64 64"]:
    """One value per row."""
    values = plgpu.load(ref, layout=hopper.BY_ROW, optimized=False)
    return lax.broadcast_in_dim(values, SHAPE, [0])
