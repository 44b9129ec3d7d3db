"""Gates of the RG-LRU (Griffin, arXiv 2402.19427, section 2.4; TRecViT, arXiv 2412.14294): from their
pre-activations to what the scan runs on.

    i = sigmoid(gate_x)    r = sigmoid(gate_a)    log a = -8 r softplus(a_param)
    u = (x i) sqrt(1 - a^2), or x i at a reset, where a = 0
    h_t = a_t h_(t-1) + u_t

Everything here is float32 (float64 for float64 inputs): in bfloat16, a in (0.996, 1) would round to 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.linear_scan.config import DECAY_SCALE, MAX_SQRT_GRADIENT
from kernels.linear_scan.products import decayed


class Gated(NamedTuple):
    """Inputs of `rglru_scan`.

    Attributes:
      x: [B, T, D].
      gate_x, gate_a: pre-activations of the input gate and of the recurrence gate, [B, T, D].
      a_param: [D].
      reset: [B, T], or None.
    """

    x: Array
    gate_x: Array
    gate_a: Array
    a_param: Array
    reset: Array | None


@jax.custom_jvp
def sqrt_clip(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(z), z >= 0, with its derivative clipped at 1000: at z = 0 it is 1000, not infinity."""
    return jnp.sqrt(z)


@sqrt_clip.defjvp
def _sqrt_clip_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (dz,) = primals, tangents
    return jnp.sqrt(z), dz * (0.5 / jnp.sqrt(jnp.maximum(z, 0.25 / MAX_SQRT_GRADIENT**2)))


def log_decay(gate_a: Float[Array, "*B D"], a_param: Float[Array, "*C D"]) -> Float[Array, "*B D"]:
    """log a = -8 sigmoid(gate_a) softplus(a_param), in the dtype of its arguments."""
    return -jax.nn.sigmoid(gate_a) * decay_rate(a_param)


def decay_rate(a_param: Float[Array, "*C D"]) -> Float[Array, "*C D"]:
    """8 softplus(a_param): the most that log a can fall below 0."""
    return DECAY_SCALE * jax.nn.softplus(a_param)


def input_scale(log_a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sqrt(1 - a^2) by `sqrt_clip`, accurate for a near 1 too."""
    return sqrt_clip(-jnp.expm1(2 * log_a))


def wide_dtype(x: Array, gate_x: Array, gate_a: Array) -> jnp.dtype:
    """float32, or float64 if x or a gate is."""
    return jnp.result_type(x.dtype, gate_x.dtype, gate_a.dtype, jnp.float32)


def gates(gated: Gated) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(u, a): what enters the state and how the state decays, in the wide dtype. At resets a = 0, exactly."""
    reset = None if gated.reset is None else gated.reset[..., None]
    rate = decay_rate(gated.a_param.astype(wide_dtype(*gated[:3])))
    return _gates(*gated[:3], rate, reset)


def rglru_step(
    x: Float[Array, "*shape"],
    gate_x: Float[Array, "*shape"],
    gate_a: Float[Array, "*shape"],
    a_param: Float[Array, "..."],
    h0: Float[Array, "*shape"] | None,
    reset: Bool[Array, "..."],
    rate: Float[Array, "..."] | None = None,
) -> Float[Array, "*shape"]:
    """One step of `rglru_scan`, for arrays of any shape: XLA fuses it with what comes before and after.

    Args:
      a_param, reset: broadcast against the others.
      rate: `decay_rate(a_param)` where it has been computed before: XLA for GPUs has a kernel for it alone.

    Returns:
      The state after the step, in the wide dtype.
    """
    wide = wide_dtype(x, gate_x, gate_a)
    rate = decay_rate(a_param.astype(wide)) if rate is None else rate.astype(wide)
    u, a = _gates(x, gate_x, gate_a, rate, reset)
    return u if h0 is None else u + decayed(a, h0.astype(a.dtype))


def _gates(x: Array, gate_x: Array, gate_a: Array, rate: Array, reset: Array | None) -> tuple[Array, Array]:
    x, gate_x, gate_a = (part.astype(rate.dtype) for part in (x, gate_x, gate_a))
    if reset is not None:
        gate_a = jnp.where(reset, 0, gate_a)  # unused there, so it may be NaN
    log_a = -jax.nn.sigmoid(gate_a) * rate
    a, scale = jnp.exp(log_a), input_scale(log_a)
    if reset is not None:
        a, scale = jnp.where(reset, 0, a), jnp.where(reset, 1, scale)
    return decayed(decayed(jax.nn.sigmoid(gate_x), x), scale), a


def total_log_decay(gated: Gated) -> Float[Array, "B D"]:
    """Sum over time of log a; -inf after a reset, without a gradient there."""
    wide = wide_dtype(gated.x, gated.gate_x, gated.gate_a)
    total = jnp.sum(log_decay(gated.gate_a.astype(wide), gated.a_param.astype(wide)), axis=1)
    if gated.reset is None:
        return total
    return jnp.where(jnp.any(gated.reset, axis=1)[:, None], -jnp.inf, total)
