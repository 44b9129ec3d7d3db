"""Functions of registers, against their definitions in float64."""

import jax.numpy as jnp
import numpy as np

from kernels.common.hopper_math import gelu, inverse_root, one_minus_square, sigmoid


def test_one_minus_square_keeps_its_digits_near_one() -> None:
    """Relative to float64, with what the GPU's exp2 may add: two units in the last place of a."""
    log2_a = -np.logspace(-12, 2, 20001, dtype=np.float32)
    exact = np.exp2(log2_a.astype(np.float64))
    wanted = -np.expm1(2 * np.log(2) * log2_a.astype(np.float64))
    for error in (-(2.0**-22), 2.0**-22):
        a = (exact * (1 + error)).astype(np.float32)
        found = np.asarray(one_minus_square(jnp.asarray(log2_a), jnp.asarray(a)), np.float64)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_gelu_keeps_its_digits_where_it_is_small() -> None:
    """1 + tanh would lose them; below -10 the float32 result may be 0."""
    x = np.linspace(-12, 12, 4801)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    wanted = x / (1 + np.exp(-2 * inner))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), wanted, rtol=2e-5, atol=1e-30)
    far = gelu(jnp.asarray([-1e30, 1e30, 0.0], jnp.float32))
    np.testing.assert_array_equal(far, np.asarray([0, 1e30, 0], np.float32))


def test_sigmoid_and_inverse_root() -> None:
    y = np.linspace(-80, 80, 4001)
    found = np.asarray(sigmoid(jnp.asarray(y, jnp.float32)), np.float64)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-y)), rtol=2e-5, atol=1e-30)
    z = np.asarray([0.0, 1e-12, 0.25, 1.0])
    found = np.asarray(inverse_root(jnp.asarray(z, jnp.float32)), np.float64)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1:], z[1:] ** -0.5, rtol=1e-6)
