"""Plain XLA: one product, then the GELU in float32; every result in x's dtype, as layers compute it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.gated_matmul.config import Request


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def gated_matmul(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F2"], bias: Float[Array, " F2"]
) -> Float[Array, "*B F"]:
    """gelu(x W_g + b_g) * (x W_v + b_v); the backward pass computes the GELU again."""
    gate, value = jnp.split(x @ kernel.astype(x.dtype) + bias.astype(x.dtype), 2, axis=-1)

    def gated(gate: Array, value: Array) -> Array:
        wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        return jax.nn.gelu(wide, approximate=True).astype(gate.dtype) * value

    # Writing the float32 values in between for the backward pass, and reading them, would take longer.
    return jax.checkpoint(gated, prevent_cse=False)(gate, value)
