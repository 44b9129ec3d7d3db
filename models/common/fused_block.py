"""Frames through a recurrent block as one kernel, where there is one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.common.hopper_rows import ROW_GROUP
from kernels.common.tiling import pad_axis_to
from kernels.recurrent_block import (
    BlockParams,
    Clip,
    Frame,
    Memory,
    has_kernel,
    recurrent_clip,
    recurrent_frame,
)
from models.common.joined import BLOCKS, BRANCHES, GATES, JOINT, RATE
from models.common.layers import at_least_float32, linear
from models.common.recurrent_state import RecurrentState
from models.common.shapes import Params
from models.common.sharding import active_mesh
from models.common.temporal_conv import last_inputs


def fused_block(
    x: Float[Array, "B T *P D"],
    params: Params,
    positions: Int[Array, "B T"],
    state: RecurrentState | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T *P D"], RecurrentState] | None:
    """(RG-LRU(conv(x W_x + b_x)) * gelu(x W_y + b_y)) W_o + b_o, and the memory after it.

    Args:
      params: of the recurrent block.

    Returns:
      None where no kernel does that: under a mesh, of canonical parameters, and where
      `kernels.recurrent_block` takes no such call.
    """
    joint, gates = JOINT.join(BRANCHES), params["rglru"].get(JOINT.join(GATES), {})
    if joint not in params or BLOCKS not in gates or RATE not in params["rglru"] or active_mesh() is not None:
        return None
    conv, blocks = params["conv"], gates[BLOCKS].astype(dtype)
    weights = BlockParams(conv["kernel"], conv["bias"], blocks, gates["bias"], params["rglru"][RATE])
    if x.shape[1] == 1 and state is not None:
        return _frame(x, params, weights, positions, state, dtype)
    return _clip(x, params, weights, positions, state, dtype) if x.ndim == 4 else None


def _frame(
    x: Array, params: Params, weights: BlockParams, positions: Array, state: RecurrentState, dtype: DTypeLike
) -> tuple[Array, RecurrentState] | None:
    width, tubes = state.lru.shape[-1], math.prod(x.shape[2:-1])
    unknown: Any = jax.ShapeDtypeStruct((x.shape[0] * tubes, 2 * width), jnp.dtype(dtype))
    memory = Frame(
        unknown,
        tuple(tap.reshape(-1, width) for tap in state.conv),
        at_least_float32(state.lru).reshape(-1, width),
        jnp.repeat(positions[:, 0], tubes),
    )
    if not has_kernel(memory, weights):
        return None
    branches = linear(x, params[JOINT.join(BRANCHES)], dtype).reshape(-1, 2 * width)
    result = recurrent_frame(memory._replace(branches=branches), weights)
    shape = (x.shape[0], *x.shape[2:-1], width)
    newest = result.newest.reshape(shape).astype(state.conv[0].dtype)
    after = RecurrentState(result.h.reshape(shape), (*state.conv[1:], newest))
    return linear(result.gated.reshape(*x.shape[:-1], width), params["linear_out"], dtype), after


def _clip(
    x: Array,
    params: Params,
    weights: BlockParams,
    positions: Array,
    state: RecurrentState | None,
    dtype: DTypeLike,
) -> tuple[Array, RecurrentState] | None:
    tokens, width = x.shape[2], weights.rate.shape[0]
    memory = None
    if state is not None:
        padded = [pad_axis_to(y, 1, ROW_GROUP) for y in (*state.conv, at_least_float32(state.lru))]
        memory = Memory(tuple(padded[:-1]), padded[-1])
    # Before the product, so that XLA has the padding written by what writes x.
    x = pad_axis_to(x, 2, ROW_GROUP)
    unknown: Any = jax.ShapeDtypeStruct((*x.shape[:-1], 2 * width), jnp.dtype(dtype))
    if not has_kernel(Clip(unknown, positions, memory), weights):
        return None
    branches = linear(x, params[JOINT.join(BRANCHES)], dtype)
    gated, h = recurrent_clip(Clip(branches, positions, memory), weights)
    entered, taps = branches[:, :, :tokens, :width], len(weights.conv_kernel) - 1
    after = last_inputs(entered, taps, None if state is None else state.conv)
    return linear(gated, params["linear_out"], dtype)[:, :, :tokens], RecurrentState(h[:, :tokens], after)
