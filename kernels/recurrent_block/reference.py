"""The definition, in float32 throughout (float64 for float64), rounded once; differentiated by JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.recurrent_block.clips import frame_by_frame
from kernels.recurrent_block.config import BlockParams, Clip, ClipResult, Frame, FrameResult, Request


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def recurrent_frame(frame: Frame, params: BlockParams) -> FrameResult:
    """Convolution, gates, recurrence and output gate of one frame."""
    wide = jnp.promote_types(frame.h.dtype, jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    branches, taps, h, conv_kernel, conv_bias, blocks, bias, rate = jax.tree.map(
        lambda array: array.astype(wide), (frame.branches, frame.taps, frame.h, *params)
    )
    x, y = jnp.split(branches, 2, axis=-1)
    v = conv_bias
    for age, tap in enumerate((x, *reversed(taps))):
        v = v + conv_kernel[len(taps) - age] * jnp.where((frame.positions >= age)[:, None], tap, 0)
    grouped = v.reshape(len(v), *blocks.shape[:2])
    gate_x, gate_a = jnp.split(jnp.einsum("rgs,gst->rgt", grouped, blocks, precision=exact), 2, axis=-1)
    gate_x, gate_a = (gate.reshape(v.shape) for gate in (gate_x, gate_a))
    bias_x, bias_a = jnp.split(bias, 2)
    start = (frame.positions == 0)[:, None]
    log_a = jnp.where(start, 0, -rate * jax.nn.sigmoid(gate_a + bias_a))
    # 1 - a^2 is 0 where nothing is left of the input: its root has no derivative there.
    scale = jnp.where(start, 1, _root(-jnp.expm1(2 * log_a)))
    entering = scale * jax.nn.sigmoid(gate_x + bias_x) * v
    after = entering + jnp.where(start, 0, jnp.exp(log_a) * jnp.where(start, 0, h))
    gated = after * jax.nn.gelu(y, approximate=True)
    dtype = frame.branches.dtype
    return FrameResult(gated.astype(dtype), after.astype(frame.h.dtype), x.astype(dtype))


def recurrent_clip(clip: Clip, params: BlockParams) -> ClipResult:
    """All frames, one after the other."""
    return frame_by_frame(recurrent_frame, clip, params)


def _root(z: Any) -> Any:
    return jnp.where(z > 0, jnp.sqrt(jnp.where(z > 0, z, 1)), 0)
