"""ACP: bounds against brute force, the guarantee, and that loops execute exactly the tiles the bounds
allow.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels.forgetting_attention import (
    TileConfig,
    acp_threshold,
    differentiable,
    forgetting_attention,
    prune_bounds,
    threshold_from_bound,
    visited_fraction,
    xla_chunked,
)
from kernels.forgetting_attention import reference as reference_module
from kernels.forgetting_attention.config import Options
from kernels.forgetting_attention.differentiable import Passes, Saved
from kernels.forgetting_attention.operands import Operands, Static
from kernels.forgetting_attention.pruning import kept_tiles_tight, score_norms
from kernels.forgetting_attention.workloads import gates

LOG_EPS = -10.0


def kept_by_hand(
    log_fgate: np.ndarray, threshold: np.ndarray, queries: int, tile: tuple[int, int]
) -> np.ndarray:
    """Tiles [B, N, Mr, Mc] that have a causal entry and are not prunable, from entries in float64."""
    batch, keys, heads = log_fgate.shape
    decay = np.cumsum(log_fgate.astype(np.float64), axis=1)
    n_rows, n_cols = -(-queries // tile[0]), -(-keys // tile[1])
    kept = np.zeros((batch, heads, n_rows, n_cols), bool)
    for m in range(n_rows):
        first, last = (keys - queries + r for r in (m * tile[0], min((m + 1) * tile[0], queries) - 1))
        for n in range(n_cols):
            end = min((n + 1) * tile[1], keys) - 1
            if n * tile[1] <= last:
                kept[:, :, m, n] = decay[:, first] - decay[:, end] >= threshold
    return kept


@pytest.mark.slow
@hypothesis.given(
    st.integers(1, 3),
    st.integers(0, 60),
    st.sampled_from([(16, 16), (16, 8), (8, 32)]),
    st.integers(0, 10**6),
)
@hypothesis.settings(max_examples=15)
def test_bounds_and_fraction_equal_brute_force(
    heads: int, more: int, tile: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    heads, queries, keys = 3, 50, 50 + more
    log_fgate = (gates("mixed", rng, (2, keys, heads)) * 2).astype(np.float32)
    threshold = -rng.uniform(1, 40, (2, heads)).astype(np.float32)
    start, end = prune_bounds(jnp.asarray(log_fgate), jnp.asarray(threshold), q_length=queries, tile=tile)
    kept = kept_by_hand(log_fgate, threshold, queries, tile)
    np.testing.assert_array_equal(start, kept.argmax(axis=3) * tile[1])
    rows = np.arange(1, kept.shape[2] + 1)[:, None]
    has_row = kept.any(axis=2)
    last = np.minimum((kept * rows).max(axis=2) * tile[0], queries)
    np.testing.assert_array_equal(np.asarray(end)[has_row], last[has_row])
    total = (kept_by_hand(log_fgate * 0, threshold, queries, tile)[0, 0]).sum()
    fraction = visited_fraction(jnp.asarray(log_fgate), jnp.asarray(threshold), q_length=queries, tile=tile)
    np.testing.assert_allclose(fraction, kept.sum(axis=(2, 3)) / total, rtol=1e-6)


def attention_weights(q: np.ndarray, k: np.ndarray, log_fgate: np.ndarray, scale: float) -> np.ndarray:
    """A [B, N, T, T] in float64 with max-subtracted softmax."""
    decay = np.cumsum(log_fgate, axis=1).swapaxes(1, 2)
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k) + decay[..., None] - decay[..., None, :]
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


PROPERTY_TILE = (16, 16)


@jax.jit
def bounds_of_both_rules(
    q: jax.Array, k: jax.Array, log_fgate: jax.Array, row: jax.Array, col: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First kept column by the published rule; first kept column tile and kept row tiles by the tight one."""
    length, scale, zero = q.shape[1], q.shape[3] ** -0.5, jnp.zeros_like(row)
    auto = acp_threshold(q, k, sm_scale=scale, num_keys=length)
    at = jnp.arange(length)[None]
    norms = score_norms(q, k, at, at >= 0, scale)
    tight = kept_tiles_tight(row, zero, col, zero, norms, LOG_EPS - float(np.log(length)), PROPERTY_TILE)
    return prune_bounds(log_fgate, auto, tile=PROPERTY_TILE)[0], *tight


@hypothesis.given(
    st.floats(0.05, 8), st.floats(0.05, 8), st.floats(0.3, 3), st.floats(-6, 4), st.integers(0, 10**6)
)
@hypothesis.settings(max_examples=40)
def test_pruned_weight_is_below_eps_in_every_row(
    q_size: float, k_size: float, spread: float, gate_mean: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    length, head_dim, tile, scale = 96, 8, PROPERTY_TILE, 8**-0.5

    def vectors(size: float) -> np.ndarray:
        each = np.exp(spread * rng.standard_normal((1, length, 2, 1)) - spread**2)
        return (size * each * rng.standard_normal((1, length, 2, head_dim))).astype(np.float32)

    q, k = vectors(q_size), vectors(k_size)
    log_fgate = -np.logaddexp(0, -(gate_mean + rng.standard_normal((1, length, 2)))).astype(np.float32)
    weights = attention_weights(
        q.astype(np.float64), k.astype(np.float64), log_fgate.astype(np.float64), scale
    )
    decay = np.cumsum(log_fgate.astype(np.float64), axis=1).swapaxes(1, 2)
    row, col = jnp.asarray(decay, jnp.float32), jnp.asarray(-decay, jnp.float32)
    start, tight_start, tight_end = bounds_of_both_rules(*map(jnp.asarray, (q, k, log_fgate)), row, col)
    starts = {"auto": np.asarray(start), "tight": np.asarray(tight_start) * tile[1]}
    for name, start in starts.items():
        pruned = np.arange(length) < np.repeat(start, tile[0], axis=2)[..., None]
        mass = np.where(pruned, weights, 0).sum(axis=-1).max()
        assert mass < np.exp(LOG_EPS), f"{name}: a row loses {mass:.2e}"
    assert (starts["tight"] >= starts["auto"]).all(), "the tight bound prunes less than the published one"
    # The kv pass keeps rows up to the last kept tile: what it leaves out is below eps too.
    until = np.repeat(np.asarray(tight_end) * tile[0], tile[1], axis=2)[:, :, None, :]
    left_out = np.arange(length)[:, None] >= until
    assert np.where(left_out, weights, 0).sum(axis=-1).max() < np.exp(LOG_EPS)


def test_published_threshold_formula() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 9, n, 16)).astype(np.float32) for n in (4, 2))
    norm = lambda x: np.linalg.norm(x.astype(np.float64), axis=-1).max(axis=1)  # noqa: E731
    bound = 0.3 * norm(q) * np.repeat(norm(k), 2, axis=1)
    wanted = -(2 * bound + np.log(1000)) - 10
    actual = acp_threshold(jnp.asarray(q), jnp.asarray(k), sm_scale=0.3, num_keys=1000)
    np.testing.assert_allclose(actual, wanted, rtol=1e-6)
    np.testing.assert_allclose(
        threshold_from_bound(jnp.asarray(bound, jnp.float32), num_keys=1000), wanted, rtol=1e-6
    )
    half = acp_threshold(
        jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16), sm_scale=0.3, num_keys=1000
    )
    assert half.dtype == jnp.float32


def operands_of(mode: str, heads_per_step: int) -> tuple[Operands, Static, jax.Array]:
    """The inside of one call, through the very function that the public one runs."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 200, 4, 16)), jnp.float32) for _ in range(3))
    log_fgate = jnp.asarray(gates("mix", rng, (2, 200, 4)), jnp.float32)
    tiles = TileConfig((16, 32), (32, 16), (16, 16), heads_per_step)
    tight = LOG_EPS - float(np.log(200)) if mode == "tight" else None
    threshold = acp_threshold(q, k, sm_scale=0.25, num_keys=200) if mode == "auto" else None
    seen = {}

    def record(operands: Operands, static: Static, passes: Passes) -> tuple[jax.Array, jax.Array]:
        seen.update(operands=operands, static=static)
        return operands.q, operands.row_hi

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differentiable, "_attend", record)
        xla_chunked.attention(
            q, k, v, log_fgate, seq_start=None, segment_ids=None, kv_length=None, threshold=threshold,
            options=Options(0.25, tight, tiles),
        )  # fmt: skip
    return seen["operands"], seen["static"], log_fgate


@pytest.mark.parametrize("mode", ["none", "auto", "tight"])
@pytest.mark.parametrize("heads_per_step", [1, 64])
def test_executed_tiles_equal_the_bounds(mode: str, heads_per_step: int) -> None:
    operands, static, _ = operands_of(mode, heads_per_step)
    tiles = static.options.tiles

    @jax.jit
    def count(operands: Operands) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        out, lse, forward = xla_chunked.forward(operands, static)
        _, (kv, q) = xla_chunked.backward((Saved(operands, out, lse), out, lse), static)
        return lse, (forward, kv, q)

    sums = [np.asarray(x, np.float64).swapaxes(1, 2) for x in operands[3:7]]
    row, col = sums[0] + sums[2], sums[1] + sums[3]
    lse, counts = count(operands)
    # The tight rule knows each row's score with its own key, and behind the forward pass its log-normaliser.
    own_score = 0.25 * (operands.q * operands.k).sum(axis=-1)
    passes = (
        (tiles.forward, "q", own_score),
        (tiles.backward_kv, "kv", lse),
        (tiles.backward_q, "q", lse),
    )
    for executed, (tile, direction, normaliser) in zip(counts, passes, strict=True):
        kept = np.ones((2, 4, 200, 200), bool)
        if mode == "auto":
            assert operands.threshold is not None
            kept = np.asarray(
                reference_module.kept_by_threshold(*map(jnp.asarray, (row, col)), operands.threshold, tile)
            )
        if mode == "tight":
            q, k = (operands[i].swapaxes(1, 2) for i in (0, 1))
            assert static.options.tight_log_eps is not None
            kept = np.asarray(
                reference_module.kept_by_tile_bound(
                    *(q, k, jnp.asarray(row), jnp.asarray(col), 0.25, static.options.tight_log_eps),
                    *(normaliser.swapaxes(1, 2), tile, direction),
                )
            )
        entries = kept & np.tri(200, dtype=bool)
        padded = np.pad(entries, ((0, 0), (0, 0), (0, -200 % tile[0]), (0, -200 % tile[1])))
        blocks = padded.reshape(2, 4, padded.shape[2] // tile[0], tile[0], -1, tile[1]).any(axis=(3, 5))
        np.testing.assert_array_equal(np.asarray(executed), blocks.sum(axis=(2, 3)))
        if mode != "none":
            assert executed[0, 0] < executed[0, -1], "the fast head must skip tiles"


def test_executed_tiles_equal_the_visited_fraction() -> None:
    operands, static, log_fgate = operands_of("auto", 1)
    executed = jax.jit(lambda o: xla_chunked.forward(o, static)[2])(operands)
    assert operands.threshold is not None
    tile = static.options.tiles.forward
    # The first gate decays nothing; the op switches it off, so it is off here too.
    fraction = visited_fraction(log_fgate.at[:, 0].set(0), operands.threshold, tile=tile)
    everything = visited_fraction(log_fgate * 0, operands.threshold, tile=tile)
    total = kept_by_hand(np.zeros((2, 200, 4)), np.full((2, 4), -1.0), 200, tile)[0, 0].sum()
    np.testing.assert_allclose(everything, 1)
    np.testing.assert_allclose(np.asarray(executed), np.asarray(fraction) * total, rtol=1e-6)


def test_threshold_carries_no_gradient() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 40, 1, 8)), jnp.float32) for _ in range(3))
    log_fgate = jnp.full((1, 40, 1), -0.5)
    tiles = TileConfig((16, 16), (16, 16), (16, 16))

    def loss(limit: jax.Array) -> jax.Array:
        return forgetting_attention(q, k, v, log_fgate, adaptive_threshold=limit, tiles=tiles).sum()

    for implementation in ("xla_chunked", "reference"):
        gradient = jax.grad(
            lambda x: forgetting_attention(
                q,
                k,
                v,
                log_fgate,
                adaptive_threshold=x,
                tiles=tiles,
                implementation=implementation,  # noqa: B023
            ).sum()
        )(jnp.float32(-2.0))
        assert gradient == 0
    assert loss(jnp.float32(-2.0)) != loss(jnp.float32(-200.0)), "pruning had no effect"
