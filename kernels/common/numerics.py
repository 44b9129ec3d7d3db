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
    x = x.swapaxes(1, 2)
    hi, lo = _blocked_cumsum(x, jnp.zeros_like(x))
    return hi.swapaxes(1, 2), lo.swapaxes(1, 2)


def reverse_cumsum(x: Float[Array, "B S N"]) -> Float[Array, "B S N"]:
    """Sum of x over [s, S) along axis 1, accurate to one rounding."""
    hi, lo = compensated_cumsum(x[:, ::-1])
    return (hi + lo)[:, ::-1]


def _blocked_cumsum(hi: Float[Array, "B N S"], lo: Float[Array, "B N S"]) -> tuple[Array, Array]:
    """Along the last axis, so that what XLA makes of it reads and writes whole rows."""
    length = hi.shape[2]
    block = min(_BLOCK, length)
    hi, lo = (pad_axis_to(x, 2, block).reshape(*x.shape[:2], -1, block) for x in (hi, lo))
    # Adding and subtracting sigma rounds to multiples of half its ulp at least: 128 of them cannot overflow
    # the mantissa.
    sigma = 4 * _BLOCK * jnp.max(jnp.abs(hi), axis=3, keepdims=True)
    leading = (hi + sigma) - sigma
    # One product for both: they share the triangle, and are small.
    sums = two_sum(*_triangle_sums(jnp.stack([leading, (hi - leading) + lo])))
    if hi.shape[2] > 1:
        totals = _blocked_cumsum(*(part[..., -1] for part in sums))
        before = (jnp.pad(part, ((0, 0), (0, 0), (1, 0)))[:, :, :-1, None] for part in totals)
        sums = add_pairs(tuple(before), sums)  # type: ignore[arg-type]
    out_hi, out_lo = (part.reshape(*part.shape[:2], -1)[..., :length] for part in sums)
    return out_hi, out_lo


def _triangle_sums(x: Array) -> Array:
    """Inclusive sums along the last axis as one product."""
    if x.dtype != jnp.float32:
        return _by_product(x)
    return jax.lax.platform_dependent(x, cuda=_by_narrow_product, default=_by_product)


def _by_product(x: Array) -> Array:
    triangle = jnp.triu(jnp.ones((x.shape[-1],) * 2, x.dtype))
    return jnp.einsum("...j,ji->...i", x, triangle, precision=jax.lax.Precision.HIGHEST)


def _by_narrow_product(x: Array) -> Array:
    """The same by tensor cores: three bfloat16 numbers make up a float32, ones are exact, sums float32."""
    parts = []
    for _ in range(3):
        # Not a conversion to bfloat16 and back, which the compiler may leave out.
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    narrow = jnp.concatenate(parts, axis=-1).astype(jnp.bfloat16)
    triangle = jnp.tile(jnp.triu(jnp.ones((x.shape[-1],) * 2, jnp.bfloat16)), (3, 1))
    return jnp.einsum("...j,ji->...i", narrow, triangle, preferred_element_type=jnp.float32)


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
