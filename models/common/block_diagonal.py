"""Linear maps of groups of channels, each by a matrix of its own: the gates of the RG-LRU."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from models.common.layers import at_least_float32
from models.common.shapes import Params
from models.common.sharding import gathered, per_shard


def block_diagonal(x: Float[Array, "*B E"], params: Params, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """Affine map of each of G contiguous groups of channels by a matrix of its own: [G, E/G, F/G].

    The product runs in `dtype` and leaves in float32, where the bias is added: gates saturate, and what is
    left of 1 - gate must survive.
    """
    kernel, bias = gathered(params["kernel"].astype(dtype)), gathered(params["bias"])
    # Axis 0 must be the batch for `per_shard`, so the kernel gets one copy per row.
    rows = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))

    def local(x: Array, rows: Array) -> Array:
        groups = x.reshape(-1, *rows.shape[1:3])
        if target().platform == "cpu":  # XLA there has no product of bfloat16 into float32; this is the same
            groups, rows = at_least_float32(groups), at_least_float32(rows)
        return _grouped_product(groups, rows[0]).reshape(*x.shape[:-1], -1)

    return per_shard(local)(x.astype(dtype), rows) + bias.ravel()


# One axis of rows and the groups in the middle: cuBLAS reads and writes that as it is. Of more axes, or in an
# order of its own, XLA makes transposed copies.
@jax.custom_vjp
def _grouped_product(x: Float[Array, "N G I"], kernel: Float[Array, "G I O"]) -> Float[Array, "N G O"]:
    """At least float32, of operands in any dtype. Its cotangent is cast to theirs, as that of `linear` is."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dims = (((2,), (1,)), ((1,), (0,)))
    return jnp.swapaxes(jax.lax.dot_general(x, kernel, dims, preferred_element_type=wide), 0, 1)


def _grouped_product_backward(
    operands: tuple[Array, Array], cotangent: Float[Array, "N G O"]
) -> tuple[Float[Array, "N G I"], Float[Array, "G I O"]]:
    x, kernel = operands
    if cotangent.dtype != x.dtype:  # behind the barrier it is cast once, not by each of its readers
        cotangent = jax.lax.optimization_barrier(cotangent.astype(x.dtype))
    dx = jax.lax.dot_general(cotangent, kernel, (((2,), (2,)), ((1,), (0,))))
    return jnp.swapaxes(dx, 0, 1), jax.lax.dot_general(x, cotangent, (((0,), (0,)), ((1,), (1,))))


_grouped_product.defvjp(
    lambda x, kernel: (_grouped_product(x, kernel), (x, kernel)), _grouped_product_backward
)
