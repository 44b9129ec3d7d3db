"""The definition, in float32 throughout (float64 for float64), rounded once; differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.split_matmul.config import Request


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def split_matmul(
    x: Float[Array, "*B D"], kernel: Float[Array, "D PF"], bias: Float[Array, " PF"], parts: int
) -> list[Float[Array, "*B F"]]:
    """x W_i + b_i, in x's dtype."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pairs = zip(jnp.split(kernel, parts, axis=1), jnp.split(bias, parts), strict=True)
    return [
        (
            jnp.matmul(x.astype(wide), matrix.astype(wide), precision=jax.lax.Precision.HIGHEST)
            + offset.astype(wide)
        ).astype(x.dtype)
        for matrix, offset in pairs
    ]
