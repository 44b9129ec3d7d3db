"""Attention among all tokens of a frame, by XLA or cuDNN."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AttentionImplementation = Literal["xla", "cudnn"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: Float[Array, "B P N H"],
    k: Float[Array, "B P N H"],
    v: Float[Array, "B P N H"],
    implementation: AttentionImplementation | None = None,
) -> Float[Array, "B P N H"]:
    """softmax(q k^T / sqrt(H)) v, unmasked.

    Args:
      implementation: of `jax.nn.dot_product_attention`; "cudnn" needs a GPU and a 16-bit dtype.
    """
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _forward(
    q: Array, k: Array, v: Array, implementation: AttentionImplementation | None
) -> tuple[Array, Any]:
    tokens = q.shape[1]
    odd = implementation == "cudnn" and tokens % 2

    def padded(q: Array, k: Array, v: Array) -> Array:
        if not odd:
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
        # JAX has cuDNN differentiate even lengths only: one more token, which nothing attends to.
        longer = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(q.shape[:1], tokens, jnp.int32)
        return jax.nn.dot_product_attention(
            *longer, key_value_seq_lengths=lengths, implementation=implementation
        )[:, :tokens]

    return jax.vjp(padded, q, k, v)


def _backward(
    implementation: AttentionImplementation | None, pullback: Any, cotangent: Array
) -> tuple[Array, Array, Array]:
    return pullback(cotangent)


attend.defvjp(_forward, _backward)
