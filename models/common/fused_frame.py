"""One frame through a recurrent block as one kernel, where there is one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.recurrent_frame import Frame, FrameParams, has_kernel, recurrent_frame
from models.common.joined import BLOCKS, BRANCHES, GATES, JOINT, RATE
from models.common.layers import at_least_float32, linear
from models.common.recurrent_state import RecurrentState
from models.common.shapes import Params
from models.common.sharding import active_mesh


def fused_frame(
    x: Float[Array, "B T *P D"],
    params: Params,
    positions: Int[Array, "B T"],
    state: RecurrentState,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T *P E"], RecurrentState] | None:
    """RG-LRU(conv(x W_x + b_x)) * gelu(x W_y + b_y), and the memory after it.

    Args:
      params: of the recurrent block.

    Returns:
      None where no kernel does that: of several frames, under a mesh, of canonical parameters, and where
      `kernels.recurrent_frame` takes no such call.
    """
    joint, gates = JOINT.join(BRANCHES), params["rglru"].get(JOINT.join(GATES), {})
    joined = joint in params and BLOCKS in gates and RATE in params["rglru"]
    if x.shape[1] != 1 or not joined or active_mesh() is not None:
        return None
    width, tubes = state.lru.shape[-1], math.prod(x.shape[2:-1])
    unknown: Any = jax.ShapeDtypeStruct((x.shape[0] * tubes, 2 * width), jnp.dtype(dtype))
    memory = Frame(
        unknown,
        tuple(tap.reshape(-1, width) for tap in state.conv),
        at_least_float32(state.lru).reshape(-1, width),
        jnp.repeat(positions[:, 0], tubes),
    )
    conv, blocks = params["conv"], gates[BLOCKS].astype(dtype)
    weights = FrameParams(conv["kernel"], conv["bias"], blocks, gates["bias"], params["rglru"][RATE])
    if not has_kernel(memory, weights):
        return None
    branches = linear(x, params[joint], dtype).reshape(-1, 2 * width)
    result = recurrent_frame(memory._replace(branches=branches), weights)
    shape = (x.shape[0], *x.shape[2:-1], width)
    newest = result.newest.reshape(shape).astype(state.conv[0].dtype)
    after = RecurrentState(result.h.reshape(shape), (*state.conv[1:], newest))
    return result.gated.reshape(*x.shape[:-1], width), after
