"""Plain XLA: sums and gates in float32, what lies between them in the branches' dtype, as in layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from kernels.recurrent_block.clips import frame_by_frame
from kernels.recurrent_block.config import BlockParams, Clip, ClipResult, Frame, FrameResult, Request


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def recurrent_frame(frame: Frame, params: BlockParams) -> FrameResult:
    """Convolution, gates, recurrence and output gate of one frame."""
    x, y = jnp.split(frame.branches, 2, axis=-1)
    v = _convolved(frame, x, params)
    gate_x, gate_a = _pre_activations(v, params)
    h = _recurrence(frame, v.astype(frame.h.dtype), gate_x, gate_a, params.rate)
    gelu = jax.nn.gelu(y.astype(h.dtype), approximate=True)
    return FrameResult(h.astype(x.dtype) * gelu.astype(x.dtype), h, x)


def recurrent_clip(clip: Clip, params: BlockParams) -> ClipResult:
    """All frames, one after the other."""
    return frame_by_frame(recurrent_frame, clip, params)


def _convolved(frame: Frame, x: Array, params: BlockParams) -> Float[Array, "R E"]:
    wide = frame.h.dtype
    total = params.conv_bias.astype(wide)
    for age, tap in enumerate((x, *reversed(frame.taps))):
        weight = params.conv_kernel[len(frame.taps) - age].astype(wide)
        total = total + weight * jnp.where((frame.positions >= age)[:, None], tap.astype(wide), 0)
    return total.astype(x.dtype)


def _pre_activations(v: Array, params: BlockParams) -> tuple[Float[Array, "R E"], Float[Array, "R E"]]:
    groups, size, _ = params.gate_blocks.shape
    wide = jnp.promote_types(v.dtype, jnp.float32)
    grouped, blocks = v.reshape(-1, groups, size), params.gate_blocks.astype(v.dtype)
    if target().platform == "cpu":  # XLA there has no product of bfloat16 into float32; this is the same
        grouped, blocks = grouped.astype(wide), blocks.astype(wide)
    both = jnp.einsum("rgs,gst->rgt", grouped, blocks, preferred_element_type=wide)
    gates = (gate.reshape(v.shape) for gate in jnp.split(both, 2, axis=-1))
    gate_x, gate_a = (g + b for g, b in zip(gates, jnp.split(params.gate_bias, 2), strict=True))
    return gate_x, gate_a


def _recurrence(frame: Frame, v: Array, gate_x: Array, gate_a: Array, rate: Array) -> Float[Array, "R E"]:
    start, wide = (frame.positions == 0)[:, None], frame.h.dtype
    # At a start the recurrence gate is not used, and may be NaN.
    gate_x, gate_a = gate_x.astype(wide), jnp.where(start, 0, gate_a.astype(wide))
    log_a = -jax.nn.sigmoid(gate_a) * rate.astype(wide)
    a = jnp.where(start, 0, jnp.exp(log_a))
    one_minus = -jnp.expm1(2 * log_a)
    is_positive = one_minus > 0  # else a root has no derivative, and nothing is left of the input
    root = jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, one_minus, 1)), 0)
    entering = jnp.where(start, 1, root) * (jax.nn.sigmoid(gate_x) * v)
    forgets = (a == 0) | (frame.h == 0)
    return entering + jnp.where(forgets, 0, a * jnp.where(forgets, 0, frame.h))
