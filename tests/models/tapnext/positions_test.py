"""Positions for other resolutions. PyTorch's own resampling is compared in golden/."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext.positions import CUBIC, cubic_weights, resample_positions


def brute_force(row: np.ndarray, size: int) -> np.ndarray:
    """Cubic convolution of one row, place by place, with the border repeated."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
        return CUBIC * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    out = np.zeros(size)
    for i in range(size):
        place = (i + 0.5) * len(row) / size - 0.5
        for k in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            out[i] += kernel(place - k) * row[min(max(k, 0), len(row) - 1)]
    return out


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 7), (8, 3), (1, 5), (5, 5)])
def test_weights_are_cubic_convolution(old, new):
    row = np.random.default_rng(0).normal(size=old)
    np.testing.assert_allclose(cubic_weights(old, new) @ row, brute_force(row, new), atol=1e-6)
    np.testing.assert_allclose(cubic_weights(old, new).sum(axis=1), 1, atol=1e-6)


def test_axes_are_not_confused():
    table = jnp.asarray(np.random.default_rng(1).normal(size=(12, 5)), jnp.float32)
    found = resample_positions(table, (3, 4), (5, 6)).reshape(5, 6, 5)
    expected = np.einsum("ih,jw,hwd->ijd", cubic_weights(3, 5), cubic_weights(4, 6), table.reshape(3, 4, 5))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert resample_positions(table, (3, 4), (3, 4)) is table
    with pytest.raises(ValueError, match=r"the table has 12 positions; grid \(3, 3\) needs 9"):
        resample_positions(table, (3, 3), (4, 4))
