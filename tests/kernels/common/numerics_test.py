"""Compensated sums: exactness of the pair arithmetic, and that the compiler leaves the error terms alone."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.common.numerics import (
    _by_narrow_product,
    _by_product,
    add_pairs,
    compensated_cumsum,
    reverse_segment_cumsum,
    two_sum,
)


def test_two_sum_is_exact_also_when_compiled() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        (rng.standard_normal(4096) * 10.0 ** rng.integers(-6, 6, 4096)).astype(np.float32) for _ in range(2)
    )
    hi, lo = (np.asarray(x, np.float64) for x in jax.jit(two_sum)(jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_array_equal(hi + lo, a.astype(np.float64) + b.astype(np.float64))
    assert np.abs(lo).max() > 0


def test_add_pairs_keeps_what_one_float_would_lose() -> None:
    big, small = (jnp.float32(2.0**24), jnp.float32(0)), (jnp.float32(1), jnp.float32(2.0**-20))
    hi, lo = add_pairs(add_pairs(big, small), small)
    assert float(hi) + float(lo) == 2.0**24 + 2 + 2.0**-19


def test_cumsum_of_one_element_and_odd_lengths() -> None:
    rng = np.random.default_rng(1)
    for length in (1, 2, 3, 17):
        x = rng.standard_normal((2, length, 3)).astype(np.float32)
        hi, lo = compensated_cumsum(jnp.asarray(x))
        exact = np.cumsum(x.astype(np.float64), axis=1)
        np.testing.assert_allclose(np.asarray(hi, np.float64) + np.asarray(lo), exact, rtol=0, atol=1e-12)


def test_narrow_products_sum_as_accurately_as_wide_ones() -> None:
    """What a GPU's tensor cores form of three bfloat16 parts: exact where the sums of float32 are."""
    rng = np.random.default_rng(2)
    whole = rng.integers(-(2**15), 2**15, (4, 128)).astype(np.float32)
    np.testing.assert_array_equal(_by_narrow_product(jnp.asarray(whole)), np.cumsum(whole, axis=1))
    x = rng.standard_normal((64, 128)).astype(np.float32)
    exact = np.cumsum(x.astype(np.float64), axis=1)
    wide, narrow = (
        np.abs(np.asarray(jax.jit(f)(x)) - exact).max() for f in (_by_product, _by_narrow_product)
    )
    assert narrow <= 2 * wide < 1e-4


def test_reverse_sum_does_not_cancel() -> None:
    """Small late terms behind a huge early one survive; total - cumsum would lose them."""
    x = jnp.asarray([[[1e8], [1e-3], [2e-3]]], jnp.float32)
    ends = jnp.asarray([[False, False, True]])
    np.testing.assert_allclose(reverse_segment_cumsum(x, ends)[0, 1:, 0], [3e-3, 2e-3], rtol=1e-6)
