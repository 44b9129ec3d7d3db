"""Sums that stay accurate over long sequences, as parallel scans.

A plain float32 running sum of log-gates loses everything below one ulp of its value: at 64k tokens of fast gates that is
0.03 in the exponent. Here a running sum is an unevaluated pair hi + lo of the same dtype, about 48 bits for float32.
Only additions are used, so contraction of multiply-adds cannot break the error terms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of a and b, and its exact rounding error (Knuth)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Sum of two hi/lo pairs as a normalised hi/lo pair (|lo| at most half an ulp of hi)."""
    total, error = two_sum(a[0], b[0])
    error += a[1] + b[1]
    hi = total + error
    return hi, error - (hi - total)


def compensated_cumsum(x: Float[Array, "B S N"]) -> tuple[Float[Array, "B S N"], Float[Array, "B S N"]]:
    """Inclusive cumulative sum along axis 1 as a pair (hi, lo); log2(S) parallel steps."""
    return jax.lax.associative_scan(add_pairs, (x, jnp.zeros_like(x)), axis=1)


def reverse_segment_cumsum(x: Float[Array, "B S N"], ends: Bool[Array, "B S"]) -> Float[Array, "B S N"]:
    """Sum of x over [s, end of the segment of s], along axis 1; `ends` marks the last position of every segment.

    Summed directly from the end, pairwise: nothing is subtracted, so nothing cancels.
    """

    def combine(later: tuple[Array, Array], here: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(here[1], here[0], later[0] + here[0]), later[1] | here[1]

    stops = jnp.broadcast_to(ends[:, :, None], x.shape)
    return jax.lax.associative_scan(combine, (x, stops), reverse=True, axis=1)[0]
