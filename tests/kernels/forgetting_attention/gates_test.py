"""Precision of the gate sums at long context, and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import gate_sums
from kernels.forgetting_attention._xla_chunked_loops import relative_decay
from kernels.forgetting_attention.gates import segment_gate_sums
from kernels.forgetting_attention.tile_ranges import Decay

NEAR = 64


def log_gates(length: int, mean: float) -> np.ndarray:
    logits = mean + np.random.default_rng(0).standard_normal((1, length, 1))
    return -np.logaddexp(0, -logits).astype(np.float32)


def near_errors(log_fgate: np.ndarray) -> tuple[float, float, float]:
    """Largest error of D over distances <= 64 near the end: sequential float32, ours by entry, ours as a
    tile forms it.
    """
    exact = np.cumsum(log_fgate.astype(np.float64), axis=1)[0, :, 0]
    plain = np.cumsum(log_fgate, axis=1, dtype=np.float32)[0, :, 0]
    hi, lo = (x[0, :, 0] for x in gate_sums(jnp.asarray(log_fgate)))
    length = exact.size
    rows = np.arange(length - NEAR, length)
    cols = np.arange(length - 2 * NEAR, length - NEAR)
    near = (rows[:, None] - cols) <= NEAR
    wanted = exact[rows][:, None] - exact[cols]

    def error(decay: np.ndarray) -> float:
        return float(np.abs(np.asarray(decay, np.float64) - wanted)[near].max())

    r, c = jnp.asarray(rows), jnp.asarray(cols)
    entry = (hi[r][:, None] - hi[c]) + (lo[r][:, None] - lo[c])
    row, col = relative_decay(Decay(hi[r], -hi[c], lo[r], -lo[c]))
    return error(plain[rows][:, None] - plain[cols]), error(entry), error(row[:, None] + col)


@pytest.mark.parametrize(
    ("length", "mean"),
    [
        (65536, -5.0), (65536, 0.0), (65536, 2.0),
        *(pytest.param(262144, mean, marks=pytest.mark.slow) for mean in (-5.0, 0.0, 2.0)),
    ],
)  # fmt: skip
def test_a_hundred_times_better_than_a_float32_cumsum(length: int, mean: float) -> None:
    plain, entry, tile = near_errors(log_gates(length, mean))
    assert entry <= plain / 100, f"by entry {entry:.1e}, float32 cumsum {plain:.1e}"
    assert tile <= plain / 100, f"by tile {tile:.1e}, float32 cumsum {plain:.1e}"


def test_pair_is_normalised_and_exact() -> None:
    log_fgate = log_gates(4097, 0.0)
    hi, lo = (np.asarray(x, np.float64) for x in gate_sums(jnp.asarray(log_fgate)))
    exact = np.cumsum(log_fgate.astype(np.float64), axis=1)
    assert np.abs(hi + lo - exact).max() < 1e-9
    assert (np.abs(lo) <= np.spacing(np.abs(hi).astype(np.float32))).all()


def test_gradient_is_the_reverse_sum_inside_each_segment() -> None:
    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal((2, 11, 3)).astype(np.float32)
    ends = np.zeros((2, 11), bool)
    ends[0, [3, 4, 10]] = True
    ends[1, [0, 10]] = True
    _, pullback = jax.vjp(lambda g: segment_gate_sums(g, jnp.asarray(ends)), jnp.zeros((2, 11, 3)))
    (actual,) = pullback((jnp.asarray(cotangent), jnp.ones((2, 11, 3))))
    wanted = np.zeros_like(cotangent)
    for b in range(2):
        for t in range(11):
            end = t + int(ends[b, t:].argmax())
            wanted[b, t] = cotangent[b, t : end + 1].sum(axis=0)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)
