"""Adaptive computation pruning (ACP, arXiv 2504.06949): thresholds, tile bounds, and what they leave to
compute.

A tile of rows x columns is prunable if its largest decay bias D, at its first row and last column, is below
a threshold. D falls along rows and rises along columns, so prunable tiles form a prefix of every row block,
and the first kept column is found for all row blocks at once by binary search in the block-end sums (the
official code walks the blocks one by one).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.common.numerics import compensated_cumsum
from kernels.common.tiling import blocks
from kernels.forgetting_attention.config import Tile
from kernels.forgetting_attention.spans import live_keys, positions


def acp_threshold(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    sm_scale: float,
    num_keys: int,
    log_pruning_tolerance: float = -10.0,
) -> Float[Array, "B N"]:
    """The published threshold -(2 U + ln L) + log eps (arXiv 2504.06949 section 3.1), U from the norms of q
    and k.

    U_bn = |sm_scale| max_i |q_i| max_j |k_j|, computed in float32 whatever the input dtype (bfloat16 norms
    can come out 1 % low, which would break the guarantee). No gradient flows through it.

    Args:
      q: queries.
      k: keys; heads are shared by groups of N / K query heads.
      sm_scale: scale of the scores.
      num_keys: L, the number of keys of a row at most (the padded length).
      log_pruning_tolerance: log eps; the weight pruned from any row is less than eps in total.

    Returns:
      Threshold per batch entry and head, negative; entries with D below it may be pruned.
    """
    q_norm, k_norm = (_norms(jax.lax.stop_gradient(x)).max(axis=1) for x in (q, k))
    bound = abs(sm_scale) * q_norm * jnp.repeat(k_norm, q.shape[2] // k.shape[2], axis=1)
    return threshold_from_bound(bound, num_keys=num_keys, log_pruning_tolerance=log_pruning_tolerance)


def threshold_from_bound(
    score_bound: Float[Array, "*any"], *, num_keys: int, log_pruning_tolerance: float = -10.0
) -> Float[Array, "*any"]:
    """The published threshold for a known bound U of |sm_scale q.k|, for instance from QK-norm weights.

    Raises:
      ValueError: log_pruning_tolerance is positive, or num_keys is not.
    """
    if log_pruning_tolerance > 0:
        raise ValueError(
            f"log_pruning_tolerance is log eps and must be <= 0; got {log_pruning_tolerance}; -10 is usual."
        )
    if num_keys < 1:
        raise ValueError(f"num_keys must be at least 1; got {num_keys}.")
    return -(2 * score_bound + jnp.log(jnp.asarray(num_keys, score_bound.dtype))) + log_pruning_tolerance


def without_dead(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    seq_start: Int[Array, " B"] | None,
    kv_length: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
    """q and k with rows and keys outside of [seq_start, kv_length) set to 0: they may hold anything."""
    if seq_start is None and kv_length is None:
        return q, k
    batch, keys = k.shape[:2]
    live = live_keys(batch, keys, seq_start, kv_length)
    at = positions(batch, q.shape[1], keys, kv_length)
    live_row = at >= (0 if seq_start is None else seq_start[:, None])
    return jnp.where(live_row[:, :, None, None], q, 0), jnp.where(live[:, :, None, None], k, 0)


def _norms(x: Float[Array, "B L N H"]) -> Float[Array, "B L N"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide * wide, axis=-1))


def prune_bounds(
    log_fgate: Float[Array, "B S N"],
    threshold: Float[Array, "B N"],
    *,
    q_length: int | None = None,
    tile: Tile = (128, 128),
) -> tuple[Int[Array, "B N Mr"], Int[Array, "B N Mc"]]:
    """First kept column of every row block, and first pruned row of every column block, in tokens.

    Row i of q_length rows sits at key position S - q_length + i. The official search of the second bound
    reads the sums at the row offset instead of that position, and so prunes less when q_length < S; this
    one is exact.

    Args:
      log_fgate: log forget gates, <= 0.
      threshold: per head, <= 0.
      q_length: number of query rows; default S.
      tile: (rows, columns) of a tile.

    Returns:
      (start, end): start[b, n, m] is the first kept column of row block m, a multiple of the tile's
      columns; end[b, n, c] the first row offset, a multiple of the tile's rows capped at q_length, from
      which column block c is pruned.
    """
    length = log_fgate.shape[1]
    rows = length if q_length is None else q_length
    hi, lo = (part.swapaxes(1, 2) for part in compensated_cumsum(log_fgate))
    row_hi, row_lo = hi[:, :, length - rows :], lo[:, :, length - rows :]
    start, end = kept_tiles(row_hi, row_lo, -hi, -lo, threshold, tile)
    return start * tile[1], jnp.minimum(end * tile[0], rows)


def kept_tiles(
    row_hi: Float[Array, "B N T"],
    row_lo: Float[Array, "B N T"],
    col_hi: Float[Array, "B N S"],
    col_lo: Float[Array, "B N S"],
    threshold: Float[Array, "B N"],
    tile: Tile,
) -> tuple[Int[Array, "B N Mr"], Int[Array, "B N Mc"]]:
    """First kept column tile per row tile, and count of kept row tiles per column tile, for D = row + col."""
    # Comparing all pairs of blocks at once is quicker on a GPU than a binary search, which is many small
    # steps.
    gaps = functools.partial(_block_gaps, row_hi, row_lo, col_hi, col_lo, tile)
    return _kept_range(lambda pair: ~(gaps(pair) < threshold[:, :, None, None]))


# Broadcasts one value per row block and one per column block against each other.
_Pair = Callable[[Array, Array], tuple[Array, Array]]


def _row_by_row(row: Array, col: Array) -> tuple[Array, Array]:
    return row[..., :, None], col[..., None, :]


def _column_by_column(row: Array, col: Array) -> tuple[Array, Array]:
    return row[..., None, :], col[..., :, None]


def _block_gaps(row_hi: Array, row_lo: Array, col_hi: Array, col_lo: Array, tile: Tile, pair: _Pair) -> Array:
    """Largest D of every tile: of its first row and last column."""
    first_row = jnp.arange(0, row_hi.shape[2], tile[0])
    keys, columns = col_hi.shape[2], tile[1]
    last_col = jnp.minimum(jnp.arange(columns, keys + columns, columns), keys) - 1
    (hi_row, hi_col), (lo_row, lo_col) = (
        pair(row[:, :, first_row], col[:, :, last_col]) for row, col in ((row_hi, col_hi), (row_lo, col_lo))
    )
    return (hi_row + hi_col) + (lo_row + lo_col)


def _kept_range(kept: Callable[[_Pair], Array]) -> tuple[Int[Array, "B N Mr"], Int[Array, "B N Mc"]]:
    """First kept column tile per row tile, and end of the kept row tiles per column tile.

    Each is reduced along the last axis of its own comparisons, so that a GPU reads along rows.
    """
    of_rows, of_columns = kept(_row_by_row), kept(_column_by_column)
    rows, columns = of_rows.shape[2:]
    start = jnp.where(of_rows, jnp.arange(columns, dtype=jnp.int32), columns).min(axis=3)
    end = jnp.where(of_columns, jnp.arange(1, rows + 1, dtype=jnp.int32), 0).max(axis=3)
    return start, end


class ScoreNorms(NamedTuple):
    """What the "tight" rule needs to know of q and k, per query head.

    Attributes:
      q_norm: abs(sm_scale) * |q_i|.
      k_norm: |k_j|.
      normaliser: a lower bound of the row's log-normaliser, +inf on dead rows: the score of a row with its
        own key, or in a backward pass the log-normaliser itself, which prunes more.
    """

    q_norm: Float[Array, "B N T"]
    k_norm: Float[Array, "B N S"]
    normaliser: Float[Array, "B N T"]

    def after_forward(self, lse: Float[Array, "B N T"]) -> "ScoreNorms":
        """For a backward pass, which knows the log-normaliser; -inf on dead rows."""
        return self._replace(normaliser=jnp.where(lse > -jnp.inf, lse, jnp.inf))


def score_norms(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    row_at: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    sm_scale: float,
) -> ScoreNorms:
    """Norms and diagonal scores in float32; `row_at` is the key position of every row."""
    q, k = jax.lax.stop_gradient((q, k))
    group = q.shape[2] // k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    own = jnp.take_along_axis(k, jnp.clip(row_at, 0, k.shape[1] - 1)[:, :, None, None], axis=1)
    own = jnp.repeat(own, group, axis=2)
    diagonal = sm_scale * jnp.sum(q.astype(dtype) * own.astype(dtype), axis=-1)
    diagonal = jnp.where(live[:, :, None], diagonal, jnp.inf)
    k_norm = jnp.repeat(_norms(k), group, axis=2)
    return ScoreNorms(
        (abs(sm_scale) * _norms(q)).swapaxes(1, 2), k_norm.swapaxes(1, 2), diagonal.swapaxes(1, 2)
    )


def kept_tiles_tight(
    row_hi: Float[Array, "B N T"],
    row_lo: Float[Array, "B N T"],
    col_hi: Float[Array, "B N S"],
    col_lo: Float[Array, "B N S"],
    norms: ScoreNorms,
    log_eps: float,
    tile: Tile,
) -> tuple[Int[Array, "B N Mr"], Int[Array, "B N Mc"]]:
    """As `kept_tiles`, with a bound on the weights of each tile instead of one threshold per head.

    log Z_i >= L_i (`ScoreNorms.normaliser`: Z_i >= exp(s_ii), or log Z_i itself) and s_ij <= |sm_scale| |q_i|
    |k_j|, so A_ij <= exp(max |q_i| max |k_j| - L_i + D_ij)
    over the tile; if that is below eps / keys everywhere, the tile may go. Tiles that may go need not form
    a prefix: the first one that must stay decides (and the last row tile that must stay, for the second
    bound).
    """
    q_norm = blocks(norms.q_norm, tile[0], 0.0).max(-1)
    k_norm = blocks(norms.k_norm, tile[1], 0.0).max(-1)
    reach = _tile_reach(row_hi, row_lo, norms.normaliser, tile[0])

    # Block pairs, not token pairs; the comparisons are reduced without being stored.
    def kept(pair: _Pair) -> Array:
        (q_size, k_size), (own, _) = pair(q_norm, k_norm), pair(reach, k_norm)
        return q_size * k_size + own + _block_gaps(row_hi, row_lo, col_hi, col_lo, tile, pair) >= log_eps

    return _kept_range(kept)


def _tile_reach(row_hi: Array, row_lo: Array, normaliser: Array, rows: int) -> Float[Array, "B N Mr"]:
    """Per row tile: max over its rows of (lambda_i - lambda_first - normaliser_i)."""
    hi, lo = (blocks(x, rows, None) for x in (row_hi, row_lo))
    since_first = (hi - hi[..., :1]) + (lo - lo[..., :1])
    return (since_first - blocks(normaliser, rows, jnp.inf)).max(axis=-1)


def visited_fraction(
    log_fgate: Float[Array, "B S N"],
    threshold: Float[Array, "B N"],
    *,
    q_length: int | None = None,
    tile: Tile = (128, 128),
) -> Float[Array, "B N"]:
    """Share of the causal tiles that the forward pass computes, per batch entry and head (1 = nothing
    pruned).

    Args are those of `prune_bounds`. Model FLOP counts leave pruning out; this is reported beside them.
    """
    length = log_fgate.shape[1]
    rows = length if q_length is None else q_length
    start, _ = prune_bounds(log_fgate, threshold, q_length=rows, tile=tile)
    block_end = jnp.minimum(jnp.arange(tile[0], rows + tile[0], tile[0]), rows)
    causal = (length - rows + block_end - 1) // tile[1] + 1
    visited = jnp.maximum(causal - start // tile[1], 0)
    return visited.sum(axis=-1) / causal.sum()
