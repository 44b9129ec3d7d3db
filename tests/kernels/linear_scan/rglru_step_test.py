"""One step of the RG-LRU on arrays of any shape is one step of the scan."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear_scan import rglru_scan, rglru_step


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_step_is_a_scan_of_one_step():
    """With and without a state; a reset forgets even NaN, and does not look at the recurrence gate."""
    x, gate_x, gate_a, h0 = (normal(2, 3, 8, seed=seed) for seed in range(4))
    a_param, reset = normal(8, seed=4), jnp.array([False, True])
    h0, gate_a = h0.at[1].set(jnp.nan), gate_a.at[1].set(jnp.nan)
    found = rglru_step(x, gate_x, gate_a, a_param, h0, reset[:, None, None])

    def flat(x):
        return x.reshape(2, 1, 24)

    for implementation in ("reference", "xla_scan"):
        expected, _ = rglru_scan(
            flat(x), flat(gate_x), flat(gate_a), jnp.tile(a_param, 3), h0.reshape(2, 24), reset[:, None],
            implementation=implementation,
        )  # fmt: skip
        np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-6)
    assert np.isfinite(found).all()
    fresh = rglru_step(x[:1], gate_x[:1], gate_a[:1], a_param, None, reset[:1, None, None])
    zero = rglru_step(x[:1], gate_x[:1], gate_a[:1], a_param, 0 * x[:1], reset[:1, None, None])
    np.testing.assert_array_equal(fresh, zero)
    # A rate that is given stands for a_param, which is not looked at.
    given = rglru_step(
        x, gate_x, gate_a, jnp.nan * a_param, h0, reset[:, None, None], 8 * jax.nn.softplus(a_param)
    )
    np.testing.assert_array_equal(given, found)


def test_the_state_is_wide():
    half = normal(2, 4).astype(jnp.bfloat16)
    out = rglru_step(half, half, half, normal(4), None, jnp.zeros((2, 1), bool))
    assert out.dtype == jnp.float32
