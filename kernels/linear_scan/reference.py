"""The definition: one step after the other, differentiated by JAX.

The carry is float32, or float64 for float64 inputs (complex64 and complex128 for complex ones); in those
dtypes everything is computed in the inputs' own. It saves a state per step and reads time with strides, so
it runs only when asked for by name.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from kernels.common.manual import aligned_varying
from kernels.linear_scan.config import Request
from kernels.linear_scan.products import carry_dtype, decayed, initial_state, placed_state
from kernels.linear_scan.rglru import Gated, gates


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def linear_scan(
    x: Inexact[Array, "B T D"], a: Inexact[Array, "B T D"], h0: Inexact[Array, "B D"] | None, *, reverse: bool
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """h_t = a_t h_(t-1) + x_t; returns (h in x's dtype, h_last in the carry's)."""
    wide = carry_dtype(x, a)
    x, a, h0 = aligned_varying((x, a, placed_state(x, h0)))

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x_t, a_t = inputs
        h = x_t.astype(wide) + decayed(a_t.astype(wide), h)
        return h, h.astype(x.dtype)

    steps = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(a, 1, 0))
    h_last, h = jax.lax.scan(step, initial_state(x, h0, wide), steps, reverse=reverse)
    return jnp.moveaxis(h, 0, 1), h_last


def rglru_scan(
    gated: Gated, h0: Float[Array, "B D"] | None, *, reverse: bool
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The gates' formulas, then the scan."""
    u, a = gates(gated)
    h, h_last = linear_scan(u, a, h0, reverse=reverse)
    return h.astype(gated.x.dtype), h_last
