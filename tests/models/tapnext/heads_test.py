"""Decoding and certainty by their definitions, bin by bin. The official values are in golden/."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import certainty, decode_tracks, is_visible, read_out
from models.tapnext.heads import soft_argmax
from tests.models.tapnext.small_tapnext import QUICK_COMPILE, random_params, small

RNG = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def brute_force(logits: np.ndarray, radius: int, temperature: float) -> float:
    p, best = softmax(temperature * logits), int(np.argmax(logits))
    near = [k for k in range(len(logits)) if abs(k - best) <= radius]
    return sum(p[k] * k for k in near) / sum(p[k] for k in near) + 0.5


@pytest.mark.parametrize(("radius", "temperature"), [(0, 0.5), (3, 0.5), (20, 0.5), (2, 1.7), (99, 1.0)])
def test_soft_argmax_is_its_definition(radius, temperature):
    logits = RNG.normal(size=(40, 30)) * 4
    logits[0], logits[1, [3, 17]] = 0, 50  # flat; two maxima far apart: the first counts
    logits[2, 0], logits[3, 29] = 60, 60
    expected = [brute_force(row, radius, temperature) for row in logits]
    found = soft_argmax(jnp.asarray(logits, jnp.float32), radius, temperature)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gradient_takes_the_window_as_constant():
    """Finite differences within one window; nothing outside of it, though the full softmax would see it."""
    logits = RNG.normal(size=20)
    logits[9] = 8
    gradient = jax.grad(lambda x: soft_argmax(x, 4, 0.5))(jnp.asarray(logits, jnp.float32))
    assert not gradient[:5].any()
    assert not gradient[14:].any()
    for k in range(5, 14):
        up, down = logits.copy(), logits.copy()
        up[k] += 1e-5
        down[k] -= 1e-5
        slope = (brute_force(up, 4, 0.5) - brute_force(down, 4, 0.5)) / 2e-5
        assert abs(slope - gradient[k]) < 1e-5, k


def test_y_comes_first():
    config = small(coordinate_bins=(8, 12), decode_radius=0)
    logits = jnp.concatenate([8.0 * jax.nn.one_hot(5, 8), 8.0 * jax.nn.one_hot(11, 12)])
    np.testing.assert_array_equal(decode_tracks(config, logits), [5.5, 11.5])
    with pytest.raises(ValueError, match=r"track_logits has 20 bins; this TAPNextConfig has \(8, 8\)"):
        decode_tracks(small(coordinate_bins=(8, 8)), logits)


@pytest.mark.parametrize("radius", [0.4, 2, 6.5, 8, 300])
def test_certainty_is_the_mass_within_the_radius(radius):
    """All bins of the joint distribution, one by one; places inside, at corners, edges and outside."""
    config = small(coordinate_bins=(31, 24))
    places = [(0.5, 0.5), (30.5, 23.5), (0.5, 12.0), (15.2, 23.5), (15.5, 11.5), (29.0, 3.3), (-4.0, 40.0)]
    logits = RNG.normal(size=(len(places), 55)) * 3
    found = certainty(config, jnp.asarray(logits, jnp.float32), jnp.array(places), radius)
    for row, place, value in zip(logits, places, found, strict=True):
        joint = np.outer(softmax(row[:31]), softmax(row[31:]))
        mass = 0.0
        for k, m in itertools.product(range(31), range(24)):
            if (k + 0.5 - place[0]) ** 2 + (m + 0.5 - place[1]) ** 2 <= radius**2 + 1e-8:
                mass += joint[k, m]
        assert abs(value - mass) < 1e-6, place
    with pytest.raises(ValueError, match="radius = 0; it must be positive"):
        certainty(config, jnp.zeros(55), jnp.zeros(2), 0)


def test_visibility_with_and_without_certainty():
    logits = jnp.array([-0.1, 0.1, 3.0, 3.0])
    np.testing.assert_array_equal(is_visible(logits), [False, True, True, True])
    gated = is_visible(logits, jnp.array([1.0, 0.9, 0.9, 0.5]))
    np.testing.assert_array_equal(gated, [False, False, True, False])


def test_final_norm_comes_before_the_heads_of_the_answer_only():
    config, params = small(), random_params(small())
    features = jnp.asarray(RNG.normal(size=(1, 2, 3, 16)) * 5 + 1, jnp.bfloat16)
    read = jax.jit(read_out, static_argnums=(0, 3), compiler_options=QUICK_COMPILE)
    last, raw = read(config, params, features), read(config, params, features, False)
    assert last.track_logits.dtype == raw.visible_logits.dtype == jnp.float32
    assert last.track_logits.shape == (1, 2, 3, 20)
    assert last.visible_logits.shape == (1, 2, 3)
    wide = features.astype(jnp.float32)
    normed = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    expected = read(config, params, normed, False)
    np.testing.assert_allclose(last.track_logits, expected.track_logits, atol=1e-5)
    assert float(jnp.abs(last.track_logits - raw.track_logits).max()) > 0.05
