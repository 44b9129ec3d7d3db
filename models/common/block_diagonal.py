"""Linear maps of groups of channels, each by a matrix of its own: the gates of the RG-LRU."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from models.common.joined import GATES, JOINT
from models.common.layers import at_least_float32
from models.common.shapes import Params
from models.common.sharding import gathered, per_shard


def block_diagonal(x: Float[Array, "*B E"], params: Params, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """Affine map of each of G contiguous groups of channels by a matrix of its own: [G, E/G, F/G].

    The product runs in `dtype` and leaves in float32, where the bias is added: gates saturate, and what is
    left of 1 - gate must survive.

    Args:
      params: "kernel" [G, E/G, F/G], "bias" [G, F/G] or none.
    """
    kernel = gathered(params["kernel"].astype(dtype))
    # Axis 0 must be the batch for `per_shard`, so the kernel gets one copy per row.
    rows = jnp.broadcast_to(kernel, (x.shape[0], *kernel.shape))

    def local(x: Array, rows: Array) -> Array:
        groups = x.reshape(-1, *rows.shape[1:3])
        if target().platform == "cpu":  # XLA there has no product of bfloat16 into float32; this is the same
            groups, rows = at_least_float32(groups), at_least_float32(rows)
        return _grouped_product(groups, rows[0]).reshape(*x.shape[:-1], -1)

    product = per_shard(local)(x.astype(dtype), rows)
    return product + gathered(params["bias"]).ravel() if "bias" in params else product


def pre_activations(
    x: Float[Array, "B T *P E"], params: Params, dtype: DTypeLike
) -> tuple[Float[Array, "B T *P F"], Float[Array, "B T *P F"]]:
    """Of the input gate and of the recurrence gate, at least float32.

    Args:
      params: "input_gate" and "a_gate", or both joined (`models.common.joined`).
    """
    both = params.get(JOINT.join(GATES))
    if both is None:
        gate_x, gate_a = (block_diagonal(x, params[name], dtype) for name in GATES)
        return gate_x, gate_a
    if x.shape[1] == 1:  # what reads it is element-wise
        gate_x, gate_a = jnp.split(_wide_linear(x, both["kernel"], both["bias"], dtype), 2, axis=-1)
        return gate_x, gate_a
    # The scan's kernels read arrays that lie by themselves.
    kernels, biases = (jnp.split(both[leaf], 2, axis=-1) for leaf in ("kernel", "bias"))
    gate_x, gate_a = (_wide_linear(x, *half, dtype) for half in zip(kernels, biases, strict=True))
    return gate_x, gate_a


def _wide_linear(x: Array, kernel: Array, bias: Array, dtype: DTypeLike) -> Array:
    x, kernel = x.astype(dtype), gathered(kernel.astype(dtype))
    wide = jnp.promote_types(dtype, jnp.float32)
    if target().platform == "cpu":  # as above
        x, kernel = at_least_float32(x), at_least_float32(kernel)
    return jnp.matmul(x, kernel, preferred_element_type=wide) + gathered(bias)


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
