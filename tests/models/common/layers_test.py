"""Plain layer functions against NumPy, in values and in dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.layers import embed, gated_mlp, linear, rms_norm, rotate

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scale_shape", [(6,), (3, 6)])
def test_rms_norm(scale_shape):
    x, scale = normal(2, 4, 3, 6), normal(*scale_shape)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, atol=1e-6)


def test_rms_norm_takes_its_statistics_in_float32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(64.0)
    y = rms_norm(x, jnp.ones(4096), 1e-6)
    assert y.dtype == jnp.bfloat16
    # Mean square (4095 + 4096) / 4096: a bfloat16 sum of ones stops at 256.
    np.testing.assert_allclose(float(y[0, 1]), np.sqrt(4096 / 8191), rtol=4e-3)


def test_linear_computes_in_the_given_dtype():
    x, params = jnp.asarray(normal(2, 3, 8)), {"kernel": jnp.asarray(normal(8, 5)), "bias": jnp.ones(5)}
    np.testing.assert_allclose(linear(x, params, "float32"), x @ params["kernel"] + 1, atol=1e-6)
    assert linear(x, params, "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("act", ["silu", "sigmoid"])
def test_gated_mlp_has_its_gate_half_first(act):
    x, up, down = normal(1, 2, 4), normal(4, 6), normal(3, 4)
    gate, value = (x @ up)[..., :3], (x @ up)[..., 3:]
    sigmoid = 1 / (1 + np.exp(-gate))
    expected = ((gate * sigmoid if act == "silu" else sigmoid) * value) @ down
    params = {"gate_proj": {"kernel": jnp.asarray(up)}, "down_proj": {"kernel": jnp.asarray(down)}}
    np.testing.assert_allclose(gated_mlp(jnp.asarray(x), params, act, "float32"), expected, atol=1e-5)


def test_embedding_rows_and_ids_outside_the_vocabulary():
    table = jnp.asarray(normal(7, 3))
    rows = embed(jnp.array([[0, 6], [7, -1]]), table)
    np.testing.assert_array_equal(rows[0], table[jnp.array([0, 6])])
    assert bool(jnp.isnan(rows[1]).all())


def test_rotation_matches_complex_multiplication_and_keeps_length():
    x = normal(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]], np.int32)
    angles = positions[..., None] * 500.0 ** (-np.arange(4) / 4)
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    y = rotate(jnp.asarray(x), jnp.asarray(positions), 500.0)
    np.testing.assert_allclose(y, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    with pytest.raises(ValueError, match="even head dim, got 7"):
        rotate(jnp.zeros((1, 1, 1, 7)), jnp.zeros((1, 1), jnp.int32), 500.0)


def test_rotation_angles_are_float32_even_for_bfloat16():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    position = 65537  # not a bfloat16 number
    y = rotate(x, jnp.full((1, 1), position), 500.0)
    expected = np.array([np.cos(position) - np.sin(position), np.cos(position) + np.sin(position)])
    np.testing.assert_allclose(np.asarray(y, np.float64)[0, 0, 0], expected, atol=2e-2)


def test_layers_keep_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.full((1, 1, 2, 4), 1.0))
        assert rms_norm(x, jnp.ones(4), 1e-6).dtype == jnp.float64
        assert rotate(x, jnp.zeros((1, 1), jnp.int32), 10.0).dtype == jnp.float64
