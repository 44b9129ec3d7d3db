"""The "tight" rule is safe entry by entry: what it prunes has a normalised weight of at most eps / keys."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels.forgetting_attention.pruning import score_norms
from kernels.forgetting_attention.tile_ranges import Decay, pruned_tiles

QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM, SCALE = 75, 101, 4, 2, 8, -0.4
TILES = ((16, 16), (8, 32), (24, 8))
LOG_EPS = -6.0


@jax.jit
def bounds(
    q: jax.Array, k: jax.Array, row: jax.Array, col: jax.Array, start: jax.Array, lse: jax.Array
) -> dict[str, list[tuple[jax.Array, jax.Array]]]:
    """First kept column tile and kept row tiles for each tile size, before and after the forward pass."""
    at = jnp.arange(KEYS - QUERIES, KEYS)[None]
    norms = score_norms(q, k, at, at >= start, SCALE)
    decay, limit = Decay(row, col, None, None), LOG_EPS - float(np.log(KEYS))
    rules = {"forward": norms, "backward": norms.after_forward(lse)}
    return {n: [pruned_tiles(decay, None, rule, limit, t) for t in TILES] for n, rule in rules.items()}  # type: ignore[misc]


def log_weights(q: np.ndarray, k: np.ndarray, decay: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """log A [N, T, S] in float64, -inf where invisible, and log Z [N, T]."""
    k = np.repeat(k[0], HEADS // KV_HEADS, axis=1).astype(np.float64)
    scores = SCALE * np.einsum("tnh,snh->nts", q[0].astype(np.float64), k)
    row, col = decay[0][:, -QUERIES:, None], decay[0][:, None, :]
    at, row_at = np.arange(KEYS), np.arange(KEYS - QUERIES, KEYS)
    visible = (at <= row_at[:, None]) & (at >= start)
    scores = np.where(visible, scores + np.where(visible, row - col, 0), -np.inf)
    with np.errstate(divide="ignore"):
        norm = np.logaddexp.reduce(scores, axis=-1)
    dead = ~visible.any(axis=-1)
    return np.where(dead[:, None], -np.inf, scores - np.where(dead, 0, norm)[..., None]), norm


def heaviest(log_weight: np.ndarray, first_tile: np.ndarray, end_tile: np.ndarray, tile: tuple) -> list:
    """Largest pruned log-weight and number of pruned visible entries, by rows and by columns."""
    rows, columns = tile
    begin = np.repeat(first_tile * columns, rows, axis=-1)[:, :QUERIES, None]
    until = np.repeat(end_tile * rows, columns, axis=-1)[:, None, :KEYS]
    found = []
    for pruned in (np.arange(KEYS) < begin, np.arange(QUERIES)[:, None] >= until):
        lost = log_weight[pruned & np.isfinite(log_weight)]
        found.append((lost.max(initial=-np.inf), lost.size))
    return found


def pruned_entries(
    q_size: float, k_size: float, turn: float, gate_mean: float, start: int, seed: int
) -> dict[str, list]:
    """By rule, for every tile and direction: largest pruned log-weight and how many entries are pruned."""
    rng = np.random.default_rng(seed)
    k = (k_size * rng.standard_normal((1, KEYS, KV_HEADS, HEAD_DIM))).astype(np.float32)
    # Queries that point along their own key, or against it, make the diagonal score extreme.
    own = np.repeat(k[:, -QUERIES:], HEADS // KV_HEADS, axis=2)
    noise = rng.standard_normal((1, QUERIES, HEADS, HEAD_DIM))
    q = (q_size * (turn * own / max(k_size, 1e-3) + noise)).astype(np.float32)
    log_fgate = -np.logaddexp(0, -(gate_mean + 2 * rng.standard_normal((1, KEYS, HEADS)))).astype(np.float32)
    decay = np.cumsum(log_fgate.astype(np.float64), axis=1).swapaxes(1, 2)
    log_weight, norm = log_weights(q, k, decay, start)
    row, col = (jnp.asarray(x, jnp.float32) for x in (decay[:, :, -QUERIES:], -decay))
    found = bounds(
        *map(jnp.asarray, (q, k)), row, col, jnp.int32(start), jnp.asarray(norm[None], jnp.float32)
    )
    return {
        name: [
            part
            for tile, (first, end) in zip(TILES, ranges, strict=True)
            for part in heaviest(log_weight, np.asarray(first)[0], np.asarray(end)[0], tile)
        ]
        for name, ranges in found.items()
    }


@pytest.mark.parametrize("rule", ["forward", "backward"])
@hypothesis.given(
    st.floats(0.01, 4), st.floats(0.01, 4), st.floats(-2, 2), st.floats(-6, 4), st.integers(0, 60),
    st.integers(0, 10**6),
)  # fmt: skip
@hypothesis.settings(max_examples=60)
def test_no_pruned_entry_weighs_more_than_its_share_of_eps(
    rule: str, q_size: float, k_size: float, turn: float, gate_mean: float, start: int, seed: int
) -> None:
    """`start`: rows before it are dead; the bound is computed in float32, hence the margin."""
    for lost, _ in pruned_entries(q_size, k_size, turn, gate_mean, start, seed)[rule]:
        assert lost <= LOG_EPS - np.log(KEYS) + 1e-3


def test_the_rules_prune_and_the_later_one_prunes_more() -> None:
    found = pruned_entries(0.5, 0.5, 0.0, -1.0, 0, 0)
    forward, backward = ([count for _, count in found[rule]] for rule in ("forward", "backward"))
    assert min(forward) > 100
    assert all(more >= some for more, some in zip(backward, forward, strict=True))
