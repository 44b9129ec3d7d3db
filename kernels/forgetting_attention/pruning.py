"""Adaptive computation pruning (ACP, arXiv 2504.06949): thresholds, tile bounds, and what they leave to compute.

A tile of rows x columns is prunable if its largest decay bias D, at its first row and last column, is below a threshold.
D falls along rows and rises along columns, so prunable tiles form a prefix of every row block, and the first kept column
is found for all row blocks at once by binary search in the block-end sums (the official code walks the blocks one by one).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.common.numerics import compensated_cumsum
from kernels.forgetting_attention.config import Tile


def acp_threshold(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    sm_scale: float,
    num_keys: int,
    log_pruning_tolerance: float = -10.0,
) -> Float[Array, "B N"]:
    """The published threshold -(2 U + ln L) + log eps (arXiv 2504.06949 section 3.1), U from the norms of q and k.

    U_bn = |sm_scale| max_i |q_i| max_j |k_j|, computed in float32 whatever the input dtype (bfloat16 norms can come out
    1 % low, which would break the guarantee). No gradient flows through it.

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
            f"log_pruning_tolerance is log eps and must be <= 0; got {log_pruning_tolerance}. The recommended value is -10."
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
    """q and k with rows and keys outside of [seq_start, kv_length) set to 0: they may hold anything, NaN included."""
    if seq_start is None and kv_length is None:
        return q, k
    length = jnp.full((q.shape[0],), k.shape[1]) if kv_length is None else kv_length
    first = jnp.zeros_like(length) if seq_start is None else seq_start
    at = jnp.arange(k.shape[1])
    row_at = length[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    live = (at >= first[:, None]) & (at < length[:, None])
    live_row = row_at >= first[:, None]
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

    Row i of q_length rows sits at key position S - q_length + i. The official search of the second bound reads the sums
    at the row offset instead of that position, and so prunes less when q_length < S; this one is exact.

    Args:
      log_fgate: log forget gates, <= 0.
      threshold: per head, <= 0.
      q_length: number of query rows; default S.
      tile: (rows, columns) of a tile.

    Returns:
      (start, end): start[b, n, m] is the first kept column of row block m, a multiple of the tile's columns; end[b, n, c]
      the first row offset, a multiple of the tile's rows capped at q_length, from which column block c is pruned.
    """
    length = log_fgate.shape[1]
    rows = length if q_length is None else q_length
    hi, lo = (part.swapaxes(1, 2) for part in compensated_cumsum(log_fgate))
    start, end = kept_tiles(
        *((part[:, :, length - rows :]) for part in (hi, lo)), -hi, -lo, threshold, tile
    )  # fmt: skip
    return start * tile[1], jnp.minimum(end * tile[0], rows)


def kept_tiles(
    row_hi: Float[Array, "B N T"],
    row_lo: Float[Array, "B N T"],
    col_hi: Float[Array, "B N S"],
    col_lo: Float[Array, "B N S"],
    threshold: Float[Array, "B N"],
    tile: Tile,
) -> tuple[Int[Array, "B N Mr"], Int[Array, "B N Mc"]]:
    """First kept column tile per row tile, and number of kept row tiles per column tile, for D = row + col."""
    first_row = jnp.arange(0, row_hi.shape[2], tile[0])
    last_col = jnp.minimum(jnp.arange(tile[1], col_hi.shape[2] + tile[1], tile[1]), col_hi.shape[2]) - 1

    def one_head(r_hi: Array, r_lo: Array, c_hi: Array, c_lo: Array, limit: Array) -> tuple[Array, Array]:
        # kept iff row + col >= limit; both row and col are monotone, so each bound is one binary search.
        start = _count_pruned(c_hi, c_lo, r_hi, r_lo, limit)
        end = r_hi.shape[0] - _count_pruned(r_hi[::-1], r_lo[::-1], c_hi, c_lo, limit)
        return start, end

    per_head = jax.vmap(jax.vmap(one_head))
    return per_head(
        row_hi[:, :, first_row], row_lo[:, :, first_row], col_hi[:, :, last_col], col_lo[:, :, last_col], threshold
    )  # fmt: skip


def _count_pruned(
    rising_hi: Array, rising_lo: Array, other_hi: Array, other_lo: Array, limit: Array
) -> Int[Array, " M"]:
    """For each `other`, how many leading entries of `rising` have rising + other < limit (binary search)."""
    count = rising_hi.shape[0]
    low = jnp.zeros_like(other_hi, jnp.int32)
    high = jnp.full_like(low, count)
    for _ in range(count.bit_length()):
        middle = (low + high) // 2
        probe = jnp.minimum(middle, count - 1)
        pruned = (rising_hi[probe] + other_hi) + (rising_lo[probe] + other_lo) < limit
        searching = low < high
        low = jnp.where(searching & pruned, middle + 1, low)
        high = jnp.where(searching & ~pruned, middle, high)
    return low


def visited_fraction(
    log_fgate: Float[Array, "B S N"],
    threshold: Float[Array, "B N"],
    *,
    q_length: int | None = None,
    tile: Tile = (128, 128),
) -> Float[Array, "B N"]:
    """Share of the causal tiles that the forward pass computes, per batch entry and head (1 = nothing pruned).

    Args are those of `prune_bounds`. Model FLOP counts leave pruning out; this is reported beside them.
    """
    length = log_fgate.shape[1]
    rows = length if q_length is None else q_length
    start, _ = prune_bounds(log_fgate, threshold, q_length=rows, tile=tile)
    block_end = jnp.minimum(jnp.arange(tile[0], rows + tile[0], tile[0]), rows)
    causal = (length - rows + block_end - 1) // tile[1] + 1
    visited = jnp.maximum(causal - start // tile[1], 0)
    return visited.sum(axis=-1) / causal.sum()
