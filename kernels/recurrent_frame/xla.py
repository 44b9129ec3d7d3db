"""Plain XLA: sums and gates in float32, what lies between them in the branches' dtype, as in layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from kernels.linear_scan import rglru_step
from kernels.recurrent_frame.config import Frame, FrameParams, FrameResult, Request


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def recurrent_frame(frame: Frame, params: FrameParams) -> FrameResult:
    """Convolution, gates, recurrence and output gate of one frame."""
    x, y = jnp.split(frame.branches, 2, axis=-1)
    v = _convolved(frame, x, params)
    gate_x, gate_a = _pre_activations(v, params)
    start = (frame.positions == 0)[:, None]
    h = rglru_step(v, gate_x, gate_a, params.rate, frame.h, start, params.rate).astype(frame.h.dtype)
    gelu = jax.nn.gelu(y.astype(h.dtype), approximate=True)
    return FrameResult(h.astype(x.dtype) * gelu.astype(x.dtype), h, x)


def _convolved(frame: Frame, x: Array, params: FrameParams) -> Float[Array, "R E"]:
    wide = frame.h.dtype
    total = params.conv_bias.astype(wide)
    for age, tap in enumerate((x, *reversed(frame.taps))):
        weight = params.conv_kernel[len(frame.taps) - age].astype(wide)
        total = total + weight * jnp.where((frame.positions >= age)[:, None], tap.astype(wide), 0)
    return total.astype(x.dtype)


def _pre_activations(v: Array, params: FrameParams) -> tuple[Float[Array, "R E"], Float[Array, "R E"]]:
    groups, size, _ = params.gate_blocks.shape
    wide = jnp.promote_types(v.dtype, jnp.float32)
    grouped, blocks = v.reshape(-1, groups, size), params.gate_blocks.astype(v.dtype)
    if target().platform == "cpu":  # XLA there has no product of bfloat16 into float32; this is the same
        grouped, blocks = grouped.astype(wide), blocks.astype(wide)
    both = jnp.einsum("rgs,gst->rgt", grouped, blocks, preferred_element_type=wide)
    gates = (gate.reshape(v.shape) for gate in jnp.split(both, 2, axis=-1))
    gate_x, gate_a = (g + b for g, b in zip(gates, jnp.split(params.gate_bias, 2), strict=True))
    return gate_x, gate_a
