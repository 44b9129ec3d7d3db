"""Loop bounds: which tiles each block visits, and which of them need entry masks.

Everything is per lane, where a lane is one (batch entry, key/value head), and per query head r of the
lane's group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.common.tiling import blocks, ceil_div
from kernels.forgetting_attention.config import Tile
from kernels.forgetting_attention.pruning import ScoreNorms, kept_tiles, kept_tiles_tight


class TileRange(NamedTuple):
    """Tiles [begin, end) along the looped axis; those in [full_begin, full_end) see every entry.

    All int32 [lanes, group, blocks], begin <= full_begin <= full_end <= end.
    """

    begin: Int[Array, "L R Nb"]
    full_begin: Int[Array, "L R Nb"]
    full_end: Int[Array, "L R Nb"]
    end: Int[Array, "L R Nb"]


class Decay(NamedTuple):
    """D_ij = (row_hi + col_hi) + (row_lo + col_lo); without lo parts the caller vouches for the precision
    of hi.
    """

    row_hi: Array
    col_hi: Array
    row_lo: Array | None
    col_lo: Array | None


def pruned_tiles(
    decay: Decay,
    threshold: Array | None,
    norms: ScoreNorms | None,
    log_eps: float | None,
    tile: Tile,
    lse: Array | None = None,
) -> tuple[Array, Array] | None:
    """First kept column tile per row tile and number of kept row tiles per column tile, or None without
    pruning. `lse` [B, N, T] is known to backward passes, where the tight rule uses it.
    """
    if threshold is None and norms is None:
        return None
    row_lo = jnp.zeros_like(decay.row_hi) if decay.row_lo is None else decay.row_lo
    col_lo = jnp.zeros_like(decay.col_hi) if decay.col_lo is None else decay.col_lo
    sums = jax.lax.stop_gradient((decay.row_hi, row_lo, decay.col_hi, col_lo))
    if threshold is not None:
        return kept_tiles(*sums, threshold, tile)
    assert norms is not None
    assert log_eps is not None
    return kept_tiles_tight(*sums, norms if lse is None else norms.after_forward(lse), log_eps, tile)


def column_tiles(
    first: Int[Array, "L T"], last: Int[Array, "L T"], head_first: Int[Array, "L R"],
    kept_from: Int[Array, "L R Mr"] | None, tile: Tile, keys: int,
) -> TileRange:  # fmt: skip
    """Column tiles visited by every row block."""
    rows, columns = tile
    first_b, last_b = blocks(first, rows, None)[:, None], blocks(last, rows, None)[:, None]
    start = head_first[:, :, None]
    begin = jnp.maximum(first_b.min(-1), start) // columns
    if kept_from is not None:
        begin = jnp.maximum(begin, kept_from)
    end = jnp.clip(last_b.max(-1) // columns + 1, 0, ceil_div(keys, columns))
    full_begin = ceil_div_array(jnp.maximum(first_b.max(-1), start), columns)
    full_end = (last_b.min(-1) + 1) // columns
    return _ordered(begin, full_begin, full_end, end)


def row_tiles(
    first: Int[Array, "L T"], last: Int[Array, "L T"], head_first: Int[Array, "L R"],
    kept_until: Int[Array, "L R Mc"] | None, tile: Tile, keys: int,
) -> TileRange:  # fmt: skip
    """Row tiles visited by every column block; spans never decrease, so each bound is a count."""
    rows, columns = tile
    first_b, last_b = blocks(first, rows, None), blocks(last, rows, None)
    begin_of = jnp.arange(ceil_div(keys, columns), dtype=jnp.int32) * columns
    end_of = begin_of + columns - 1

    def count(values: Array, below: Array) -> Array:
        return (values[:, None, :] < below[:, None]).sum(axis=-1, dtype=jnp.int32)[:, None]

    seen = head_first[:, :, None] <= end_of
    whole = head_first[:, :, None] <= begin_of
    begin = count(last_b.max(-1), begin_of)
    end = jnp.where(seen, count(first_b.min(-1), end_of + 1), 0)
    if kept_until is not None:
        end = jnp.minimum(end, kept_until)
    full_begin = count(last_b.min(-1), end_of)
    full_end = jnp.where(whole, count(first_b.max(-1), begin_of + 1), 0)
    return _ordered(begin, full_begin, full_end, end)


def ceil_div_array(a: Array, b: int) -> Array:
    """a / b rounded up."""
    return -(-a // b)


def _ordered(begin: Array, full_begin: Array, full_end: Array, end: Array) -> TileRange:
    """Broadcasts and clips: the three stretches follow each other and are never of negative length."""
    begin, full_begin, full_end, end = jnp.broadcast_arrays(begin, full_begin, full_end, end)
    end = jnp.maximum(end, begin)
    full_begin = jnp.clip(full_begin, begin, end)
    full_end = jnp.clip(full_end, full_begin, end)
    return TileRange(*(x.astype(jnp.int32) for x in (begin, full_begin, full_end, end)))
