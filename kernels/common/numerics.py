"""Sums that stay accurate over long sequences, in parallel.

A plain float32 running sum of log-gates loses everything below one ulp of its value: at 64k tokens of fast
gates that is 0.03 in the exponent. Here a running sum is an unevaluated pair hi + lo of the same dtype,
about 48 bits for float32. Error terms come from additions alone, so contraction of multiply-adds cannot break
them; the only products are those with ones, which are exact.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.common.tiling import pad_axis_to


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


# Entries summed by one product with a triangle of ones. With 128, sums of 17-bit terms are exact in float32.
_BLOCK = 128


def compensated_cumsum(x: Float[Array, "B S N"]) -> tuple[Float[Array, "B S N"], Float[Array, "B S N"]]:
    """Inclusive cumulative sum along axis 1 as a pair (hi, lo), by products with triangles of ones.

    Every block of 128 is split into leading bits, whose sums are exact in whatever order they are taken, and
    a remainder, whose rounding lies 2^-31 below the block's largest entry. The block totals are summed alike.
    """
    return _blocked_cumsum(x, jnp.zeros_like(x))


def reverse_cumsum(x: Float[Array, "B S N"]) -> Float[Array, "B S N"]:
    """Sum of x over [s, S) along axis 1, accurate to one rounding."""
    hi, lo = compensated_cumsum(x[:, ::-1])
    return (hi + lo)[:, ::-1]


def _blocked_cumsum(hi: Array, lo: Array) -> tuple[Array, Array]:
    batch, length, lanes = hi.shape
    block = min(_BLOCK, length)
    hi, lo = (pad_axis_to(x, 1, block).reshape(batch, -1, block, lanes) for x in (hi, lo))
    # Adding and subtracting sigma rounds to multiples of half its ulp at least: 128 of them cannot overflow
    # the mantissa.
    sigma = 4 * _BLOCK * jnp.max(jnp.abs(hi), axis=2, keepdims=True)
    leading = (hi + sigma) - sigma
    triangle = jnp.tril(jnp.ones((block, block), hi.dtype))
    # One product for both: they share the triangle, and are small.
    parts = jnp.concatenate([leading, (hi - leading) + lo], axis=-1)
    both = jnp.einsum("ij,bcjn->bcin", triangle, parts, precision=jax.lax.Precision.HIGHEST)
    exact, rest = both[..., :lanes], both[..., lanes:]
    sums = two_sum(exact, rest)
    if hi.shape[1] > 1:
        totals = _blocked_cumsum(*(part[:, :, -1] for part in sums))
        before = (jnp.pad(part, ((0, 0), (1, 0), (0, 0)))[:, :-1, None] for part in totals)
        sums = add_pairs(tuple(before), sums)  # type: ignore[arg-type]
    out_hi, out_lo = (part.reshape(batch, -1, lanes)[:, :length] for part in sums)
    return out_hi, out_lo


def reverse_segment_cumsum(x: Float[Array, "B S N"], ends: Bool[Array, "B S"]) -> Float[Array, "B S N"]:
    """Sum of x over [s, end of the segment of s], along axis 1; `ends` marks the last position of a segment.

    Summed directly from the end, pairwise: nothing is subtracted, so nothing cancels.
    """

    def combine(later: tuple[Array, Array], here: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(here[1], here[0], later[0] + here[0]), here[1] | later[1]

    stops = jnp.broadcast_to(ends[:, ::-1, None], x.shape)
    return _doubling_scan(combine, (x[:, ::-1], stops))[0][:, ::-1]


def _doubling_scan(combine: Callable[[Any, Any], Any], elements: Any) -> Any:
    """Inclusive scan along axis 1 by doubling distances (Hillis and Steele), as one loop.

    It does log2(S) times the additions of a work-efficient scan, but those are few here, and one loop body
    compiles in a tenth of the time of an unrolled tree. Elements from before the start count as zeros.
    """
    length = jax.tree.leaves(elements)[0].shape[1]

    def step(level: Array, elements: Any) -> Any:
        distance = jnp.left_shift(jnp.int32(1), level)

        def earlier(x: Array) -> Array:
            padded = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
            return jax.lax.dynamic_slice_in_dim(padded, length - distance, length, axis=1)

        return combine(jax.tree.map(earlier, elements), elements)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32((length - 1).bit_length()), step, elements)
