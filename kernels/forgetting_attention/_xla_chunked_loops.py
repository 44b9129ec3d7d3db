"""The three tile loops of `xla_chunked`: forward, dk/dv, dq.

Arrays are per lane (one batch entry and key/value head) with a group of query heads: q [L, R, T, H], k [L,
S, H]. A step takes `g` lanes x `r` heads of one row (or column) block and loops over its tiles with traced
bounds, so pruned, invisible and future tiles cost nothing. Every loop also counts the tiles it executes,
per query head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.manual import varying_zeros
from kernels.common.tiling import ceil_div, pad_axis_to
from kernels.forgetting_attention.config import Tile
from kernels.forgetting_attention.tile_ranges import Decay, TileRange


class Rows(NamedTuple):
    """Per-row arrays, [L, R, T, ...] or [L, T]; gradients only in the backward passes."""

    q: Array
    decay_hi: Array
    decay_lo: Array | None
    first: Array
    last: Array
    d_out: Array | None = None
    lse: Array | None = None
    delta: Array | None = None


class Columns(NamedTuple):
    """Per-key arrays: k, v [L, S, H], decays [L, R, S], and the first visible key per head [L, R]."""

    k: Array
    v: Array
    decay_hi: Array
    decay_lo: Array | None
    head_first: Array


class Plan(NamedTuple):
    """Static shape of a pass.

    Attributes:
      tile: (rows, columns).
      lanes, group: how many lanes and how many query heads of each a step takes.
      sm_scale: scale of the scores.
      left_masks: whether keys may be invisible on the left of a visible one.
      mixed_bounds: whether heads of one step can have different pruning bounds.
      accumulator: dtype of statistics and accumulators.
    """

    tile: Tile
    lanes: int
    group: int
    sm_scale: float
    left_masks: bool
    mixed_bounds: bool
    accumulator: Any


def padded_rows(rows: Rows, size: int) -> Rows:
    """Rows up to a multiple of `size`; extra ones repeat the last, with zero cotangents: they add nothing."""

    def pad(x: Array, axis: int = 2, edge: bool = True) -> Array:
        return pad_axis_to(x, axis, size, edge=edge)

    return Rows(
        q=pad(rows.q),
        decay_hi=pad(rows.decay_hi),
        decay_lo=None if rows.decay_lo is None else pad(rows.decay_lo),
        first=pad(rows.first, 1),
        last=pad(rows.last, 1),
        d_out=None if rows.d_out is None else pad(rows.d_out, edge=False),
        lse=None if rows.lse is None else pad(rows.lse),
        delta=None if rows.delta is None else pad(rows.delta, edge=False),
    )


def padded_columns(columns: Columns, size: int) -> Columns:
    """Columns up to a multiple of `size`; the extra ones lie beyond every row's last key."""
    lo = columns.decay_lo
    return columns._replace(
        k=pad_axis_to(columns.k, 1, size),
        v=pad_axis_to(columns.v, 1, size),
        decay_hi=pad_axis_to(columns.decay_hi, 2, size, edge=True),
        decay_lo=None if lo is None else pad_axis_to(lo, 2, size, edge=True),
    )


class Step(NamedTuple):
    """Where a step works: first lane, first head of the group."""

    lane: Array
    head: Array


def take_rows(rows: Rows, step: Step, block: Array, plan: Plan) -> Rows:
    """The row tile `block` of a step's lanes and heads."""
    at = block * plan.tile[0]

    def per_head(x: Array) -> Array:
        return _slice(x, (step.lane, step.head, at), (plan.lanes, plan.group, plan.tile[0]))

    def shared(x: Array) -> Array:
        return _slice(x, (step.lane, at), (plan.lanes, plan.tile[0]))

    return Rows(
        q=per_head(rows.q),
        decay_hi=per_head(rows.decay_hi),
        decay_lo=None if rows.decay_lo is None else per_head(rows.decay_lo),
        first=shared(rows.first),
        last=shared(rows.last),
        d_out=None if rows.d_out is None else per_head(rows.d_out),
        lse=None if rows.lse is None else per_head(rows.lse),
        delta=None if rows.delta is None else per_head(rows.delta),
    )


def take_columns(columns: Columns, step: Step, block: Array, plan: Plan) -> Columns:
    """The column tile `block` of a step's lanes and heads."""
    at = block * plan.tile[1]

    def per_head(x: Array | None) -> Array | None:
        return (
            None
            if x is None
            else _slice(x, (step.lane, step.head, at), (plan.lanes, plan.group, plan.tile[1]))
        )

    decay_hi = per_head(columns.decay_hi)
    assert decay_hi is not None
    return Columns(
        k=_slice(columns.k, (step.lane, at), (plan.lanes, plan.tile[1])),
        v=_slice(columns.v, (step.lane, at), (plan.lanes, plan.tile[1])),
        decay_hi=decay_hi,
        decay_lo=per_head(columns.decay_lo),
        head_first=_slice(columns.head_first, (step.lane, step.head), (plan.lanes, plan.group)),
    )


def _slice(x: Array, at: tuple[Any, ...], size: tuple[int, ...]) -> Array:
    zeros = [jnp.int32(0)] * (x.ndim - len(at))
    return jax.lax.dynamic_slice(x, (*at, *zeros), (*size, *x.shape[len(at) :]))


def tile_scores(
    rows: Rows, cols: Columns, first_col: Array, alive: Array | None, masked: bool, plan: Plan
) -> Array:
    """Decayed scores of one tile, [g, r, rows, columns]; -inf where `masked` finds an entry invisible.

    A fully visible tile takes both decays relative to its last key, which keeps them small wherever D is
    small; a masked tile, which may straddle the diagonal, forms every difference of hi parts by itself.
    """
    dtype = plan.accumulator
    g, r, n_rows, head_dim = rows.q.shape
    scores = jax.lax.dot_general(
        rows.q.reshape(g, r * n_rows, head_dim),
        cols.k,
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=dtype,
    )
    scores = scores.reshape(g, r, n_rows, -1) * jnp.asarray(plan.sm_scale, dtype)
    decay = Decay(rows.decay_hi, cols.decay_hi, rows.decay_lo, cols.decay_lo)
    if not masked:
        row, col = relative_decay(decay)
        return scores + (row[..., None] + col[..., None, :])
    bias = decay.row_hi[..., None] + decay.col_hi[..., None, :]
    if decay.row_lo is not None and decay.col_lo is not None:
        bias += decay.row_lo[..., None] + decay.col_lo[..., None, :]
    at = first_col + jnp.arange(cols.k.shape[1], dtype=jnp.int32)
    visible = (at <= rows.last[..., None])[:, None]
    if plan.left_masks:
        visible &= (at >= rows.first[..., None])[:, None] & (at >= cols.head_first[..., None, None])
    if alive is not None:
        visible &= alive[..., None, None]
    return jnp.where(visible, scores + bias, -jnp.inf)


def relative_decay(decay: Decay) -> tuple[Array, Array]:
    """Row and column parts of D, relative to the last key of the tile; unchanged if there are no lo parts."""
    if decay.row_lo is None or decay.col_lo is None:
        return decay.row_hi, decay.col_hi
    hi, lo = decay.col_hi[..., -1:], decay.col_lo[..., -1:]
    return (decay.row_hi + hi) + (decay.row_lo + lo), (decay.col_hi - hi) + (decay.col_lo - lo)


def loop_tiles(
    bounds: TileRange,
    step: Step,
    block: Array,
    plan: Plan,
    body: Callable[[Any, Any, Any, bool], Any],
    carry: Any,
    diagonal_first: bool,
) -> tuple[Any, Array]:
    """Runs body(tile, alive, carry, masked) over the tiles of one block; returns the carry and tiles per
    head.

    Heads of one step share the loop over the union of their ranges; `alive` tells which of them own the tile.
    `diagonal_first`: the causal boundary lies at the begin of the range (looping over rows), not at its end.
    """
    other_side = plan.left_masks or plan.mixed_bounds
    mine = TileRange(
        *(_slice(x, (step.lane, step.head, block), (plan.lanes, plan.group, 1))[..., 0] for x in bounds)
    )
    begin, end = mine.begin.min(), mine.end.max()
    full_begin = jnp.clip(mine.full_begin.max(), begin, end)
    full_end = jnp.clip(mine.full_end.min(), full_begin, end)

    def run(low: Array, high: Array, state: Any, masked: bool) -> Any:
        def one(tile: Array, state: Any) -> Any:
            carry, count = state
            owned = (tile >= mine.begin) & (tile < mine.end)
            alive = owned if plan.mixed_bounds and masked else None
            return body(tile, alive, carry, masked), count + owned.astype(jnp.int32)

        return jax.lax.fori_loop(low, high, one, state)

    state = (carry, varying_zeros(mine.begin.shape, like=mine.begin + mine.end, dtype=jnp.int32))
    if diagonal_first or other_side:
        state = run(begin, full_begin, state, True)
    state = run(full_begin, full_end, state, False)
    if not diagonal_first or other_side:
        state = run(full_end, end, state, True)
    return state


def map_steps(count: tuple[int, int, int], plan: Plan, one: Callable[[Step, Array], Any]) -> Any:
    """Runs one(step, block) for all (lane chunk, head chunk, block), one after the other, and stacks the
    results.
    """
    _, heads, n_blocks = count

    def body(_: None, item: Array) -> tuple[None, Any]:
        chunk, block = item // n_blocks, item % n_blocks
        return None, one(Step(chunk // heads * plan.lanes, chunk % heads * plan.group), block)

    total = count[0] * heads * n_blocks
    return jax.lax.scan(body, None, jnp.arange(total, dtype=jnp.int32))[1]


def gather_blocks(x: Array, count: tuple[int, int, int], plan: Plan, length: int) -> Array:
    """[steps, g, r, size, ...] as `map_steps` stacks it -> [L, R, length, ...]."""
    lane_chunks, head_chunks, n_blocks = count
    g, r, size = x.shape[1:4]
    rest = x.shape[4:]
    x = x.reshape(lane_chunks, head_chunks, n_blocks, g, r, size, *rest)
    x = jnp.moveaxis(x, (3, 4), (1, 3))
    return x.reshape(lane_chunks * g, head_chunks * r, n_blocks * size, *rest)[:, :, :length]


def forward_pass(rows: Rows, columns: Columns, bounds: TileRange, plan: Plan) -> tuple[Array, Array, Array]:
    """Returns out [L, R, T, H] (accumulator dtype), lse [L, R, T] and the tiles executed [L, R]."""
    lanes, group, length, head_dim = rows.q.shape
    rows, columns = padded_rows(rows, plan.tile[0]), padded_columns(columns, plan.tile[1])
    count = (lanes // plan.lanes, group // plan.group, ceil_div(length, plan.tile[0]))
    shape = (plan.lanes, plan.group, plan.tile[0])
    zeros = functools.partial(varying_zeros, like=rows.q, dtype=plan.accumulator)

    def one(step: Step, block: Array) -> tuple[Array, Array, Array]:
        mine = take_rows(rows, step, block, plan)

        def tile(index: Array, alive: Array | None, carry: Any, masked: bool) -> Any:
            acc, top, total = carry
            cols = take_columns(columns, step, index, plan)
            scores = tile_scores(mine, cols, index * plan.tile[1], alive, masked, plan)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            # A row that has seen no key yet has top = -inf; 0 keeps exp(-inf - top) at 0 instead of NaN.
            safe_top = jnp.where(new_top == -jnp.inf, 0, new_top) if masked else new_top
            weights = jnp.exp(scores - safe_top[..., None])
            shrink = jnp.exp(top - safe_top)
            acc = acc * shrink[..., None] + _weighted(weights.astype(cols.v.dtype), cols.v, plan)
            return acc, new_top, total * shrink + weights.sum(axis=-1)

        start = (zeros((*shape, head_dim)), zeros(shape) - jnp.inf, zeros(shape))
        (acc, top, total), tiles = loop_tiles(bounds, step, block, plan, tile, start, False)
        alive = total > 0
        total = jnp.where(alive, total, 1)
        return acc / total[..., None], jnp.where(alive, top + jnp.log(total), -jnp.inf), tiles

    out, lse, tiles = map_steps(count, plan, one)
    executed = gather_blocks(tiles[..., None], count, plan, count[2]).sum(axis=-1)
    return gather_blocks(out, count, plan, length), gather_blocks(lse, count, plan, length), executed


def _weighted(weights: Array, values: Array, plan: Plan) -> Array:
    """weights [g, r, rows, columns] @ values [g, columns, H]."""
    g, r, n_rows, n_cols = weights.shape
    product = jax.lax.dot_general(
        weights.reshape(g, r * n_rows, n_cols), values, (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=plan.accumulator,
    )  # fmt: skip
    return product.reshape(g, r, n_rows, -1)


def _transposed_weighted(weights: Array, values: Array, plan: Plan) -> Array:
    """weights^T @ values, summed over the heads of the group: [g, r, rows, columns], [g, r, rows, H] -> [g,
    columns, H].
    """
    g, r, n_rows, n_cols = weights.shape
    return jax.lax.dot_general(
        weights.reshape(g, r * n_rows, n_cols),
        values.reshape(g, r * n_rows, -1),
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=plan.accumulator,
    )


def _weights_and_d_scores(
    rows: Rows, cols: Columns, first_col: Array, alive: Array | None, masked: bool, plan: Plan
) -> tuple[Array, Array]:
    """P and dS = P (dP - delta) of one tile; `delta` already holds rowsum(O dO) - dlse."""
    assert rows.d_out is not None
    assert rows.lse is not None
    assert rows.delta is not None
    scores = tile_scores(rows, cols, first_col, alive, masked, plan)
    weights = jnp.exp(scores - rows.lse[..., None])
    g, r, n_rows, head_dim = rows.d_out.shape
    d_weights = jax.lax.dot_general(
        rows.d_out.reshape(g, r * n_rows, head_dim), cols.v, (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=plan.accumulator,
    )  # fmt: skip
    return weights, weights * (d_weights.reshape(weights.shape) - rows.delta[..., None])


def backward_kv_pass(
    rows: Rows, columns: Columns, bounds: TileRange, plan: Plan
) -> tuple[Array, Array, Array, Array]:
    """Returns dk, dv [L, S, H], the column part of d decay [L, R, S] and the tiles executed [L, R]."""
    lanes, group = rows.q.shape[:2]
    keys, head_dim = columns.k.shape[1:]
    rows, columns = padded_rows(rows, plan.tile[0]), padded_columns(columns, plan.tile[1])
    head_chunks = group // plan.group
    # Heads of a group add to the same dk, so a step goes through all of them: no head axis to map over.
    count = (lanes // plan.lanes, 1, ceil_div(keys, plan.tile[1]))
    shape = (plan.lanes, plan.tile[1])
    zeros = functools.partial(varying_zeros, like=rows.q, dtype=plan.accumulator)

    def one(step: Step, block: Array) -> tuple[Array, Array, Array, Array]:
        def head_chunk(carry: Any, chunk: Array) -> tuple[Any, Any]:
            here = Step(step.lane, chunk * plan.group)
            cols = take_columns(columns, here, block, plan)

            def tile(index: Array, alive: Array | None, carry: Any, masked: bool) -> Any:
                d_k, d_v, d_col = carry
                mine = take_rows(rows, here, index, plan)
                weights, d_scores = _weights_and_d_scores(
                    mine, cols, block * plan.tile[1], alive, masked, plan
                )
                assert mine.d_out is not None
                d_v += _transposed_weighted(weights.astype(mine.q.dtype), mine.d_out, plan)
                d_k += _transposed_weighted(d_scores.astype(mine.q.dtype), mine.q, plan)
                return d_k, d_v, d_col + d_scores.sum(axis=2)

            d_col = zeros((plan.lanes, plan.group, plan.tile[1]))
            (d_k, d_v, d_col), tiles = loop_tiles(bounds, here, block, plan, tile, (*carry, d_col), True)
            return (d_k, d_v), (d_col, tiles)

        start = (zeros((*shape, head_dim)), zeros((*shape, head_dim)))
        (d_k, d_v), (d_col, tiles) = jax.lax.scan(head_chunk, start, jnp.arange(head_chunks, dtype=jnp.int32))
        merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(plan.lanes, group, *x.shape[3:])  # noqa: E731
        return d_k * plan.sm_scale, d_v, merge(d_col), merge(tiles)

    d_k, d_v, d_col, tiles = map_steps(count, plan, one)
    executed = gather_blocks(tiles[..., None], count, plan, count[2]).sum(axis=-1)
    d_k, d_v = (gather_blocks(x[:, :, None], count, plan, keys)[:, 0] for x in (d_k, d_v))
    return d_k, d_v, gather_blocks(d_col, count, plan, keys), executed


def backward_q_pass(
    rows: Rows, columns: Columns, bounds: TileRange, plan: Plan
) -> tuple[Array, Array, Array]:
    """Returns dq [L, R, T, H], the row part of d decay [L, R, T] and the tiles executed [L, R]."""
    lanes, group, length, head_dim = rows.q.shape
    rows, columns = padded_rows(rows, plan.tile[0]), padded_columns(columns, plan.tile[1])
    count = (lanes // plan.lanes, group // plan.group, ceil_div(length, plan.tile[0]))
    shape = (plan.lanes, plan.group, plan.tile[0])
    zeros = functools.partial(varying_zeros, like=rows.q, dtype=plan.accumulator)

    def one(step: Step, block: Array) -> tuple[Array, Array, Array]:
        mine = take_rows(rows, step, block, plan)

        def tile(index: Array, alive: Array | None, carry: Any, masked: bool) -> Any:
            d_q, d_row = carry
            cols = take_columns(columns, step, index, plan)
            _, d_scores = _weights_and_d_scores(mine, cols, index * plan.tile[1], alive, masked, plan)
            d_q += _weighted(d_scores.astype(mine.q.dtype), cols.k, plan)
            return d_q, d_row + d_scores.sum(axis=-1)

        start = (zeros((*shape, head_dim)), zeros(shape))
        (d_q, d_row), tiles = loop_tiles(bounds, step, block, plan, tile, start, False)
        return d_q * plan.sm_scale, d_row, tiles

    d_q, d_row, tiles = map_steps(count, plan, one)
    executed = gather_blocks(tiles[..., None], count, plan, count[2]).sum(axis=-1)
    return gather_blocks(d_q, count, plan, length), gather_blocks(d_row, count, plan, length), executed
