"""Attention among all tokens of a frame, by XLA or cuDNN."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

AttentionImplementation = Literal["xla", "cudnn"]


Mask = Bool[Array, "B #Q P"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def attend(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B P N H"],
    v: Float[Array, "B P N H"],
    implementation: AttentionImplementation | None = None,
    mask: Mask | None = None,
    keys: int | None = None,
) -> Float[Array, "B Q N H"]:
    """softmax(q k^T / sqrt(H)) v.

    Args:
      implementation: of `jax.nn.dot_product_attention`; "cudnn" needs a GPU and a 16-bit dtype.
      mask: [B, queries or 1, keys], False where a query does not see a key: its weight is exactly 0. Every
        query must see a key. None: all are seen.
      keys: how many of the keys, the first ones, are seen at all; None: all.
    """
    return _attended(q, k, v, mask, implementation, _lengths(k, keys))


def _lengths(k: Array, keys: int | None) -> Array | None:
    return None if keys is None else jnp.full(k.shape[:1], keys, jnp.int32)


def _attended(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    implementation: AttentionImplementation | None,
    lengths: Array | None = None,
) -> Array:
    options: dict[str, Any] = {} if lengths is None else {"key_value_seq_lengths": lengths}
    if mask is not None:
        if implementation == "cudnn":  # it broadcasts over heads only
            mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
        options["mask"] = mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)


def _forward(
    q: Array,
    k: Array,
    v: Array,
    implementation: AttentionImplementation | None,
    mask: Array | None,
    keys: int | None,
) -> tuple[Array, Any]:
    queries, given = q.shape[1], k.shape[1]
    more = [size % 2 if implementation == "cudnn" else 0 for size in (queries, given)]

    def padded(q: Array, k: Array, v: Array) -> Array:
        if not any(more):
            return _attended(q, k, v, mask, implementation, _lengths(k, keys))
        # JAX has cuDNN differentiate even lengths only: one more token, which nothing attends to.
        q1, k1, v1 = (
            jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))
            for x, extra in ((q, more[0]), (k, more[1]), (v, more[1]))
        )
        wider = mask
        if wider is not None:
            full = jnp.broadcast_to(wider, (q.shape[0], queries, given))
            wider = jnp.pad(full, ((0, 0), (0, more[0]), (0, more[1])), constant_values=True)
        lengths = _lengths(k, given if keys is None else keys)
        return _attended(q1, k1, v1, wider, implementation, lengths)[:, :queries]

    return jax.vjp(padded, q, k, v)


def _backward(
    implementation: AttentionImplementation | None, keys: int | None, pullback: Any, cotangent: Array
) -> tuple[Array, Array, Array, None]:
    return *pullback(cotangent), None


attend.defvjp(_forward, _backward)
