"""Forgetting attention in plain XLA: linear in memory, skips pruned tiles, runs on any platform.

Online softmax over tiles (FlashAttention-2 order) and two backward passes that recompute the weights tile
by tile: no array ever has two sequence axes. Loop bounds are data: causality, buffers, left padding,
segments and ACP all become per-head ranges of tiles, in the forward pass and in both backward passes. Gate
sums, softmax statistics and accumulators are float32 (float64 for float64 inputs); weights are cast to the
input dtype before each product.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from kernels.forgetting_attention import differentiable
from kernels.forgetting_attention._xla_chunked_loops import (
    Columns,
    Plan,
    Rows,
    backward_kv_pass,
    backward_q_pass,
    forward_pass,
)
from kernels.forgetting_attention.config import Request, Tile, TileConfig
from kernels.forgetting_attention.differentiable import Saved
from kernels.forgetting_attention.operands import Operands, Static, accumulator
from kernels.forgetting_attention.tile_ranges import Decay, column_tiles, pruned_tiles, row_tiles

# Scores held at a time on an accelerator: 2^26 float32 values are 256 MiB.
_SCORES_AT_A_TIME = 1 << 26


def supports(request: Request) -> str | None:
    """Takes every shape, dtype, option and platform."""
    return None


def default_tiles(request: Request) -> TileConfig:
    """Tile sizes used when the caller gives none.

    On a CPU heads run one after the other over tiles that stay in its caches. On an accelerator every step of
    the loops is a handful of launches, so all heads go together and tiles are large (README.md, "Measured").
    """
    if request.platform == "cpu":
        return TileConfig()
    longest, lanes = max(request.queries, request.keys), request.batch * request.heads
    side = 1024
    while side > 128 and (side >= 2 * longest or lanes * side * side > _SCORES_AT_A_TIME):
        side //= 2
    tile = (side, side)
    return TileConfig(tile, tile, tile, heads_per_step=lanes)


def forward(operands: Operands, static: Static) -> tuple[Array, Array, Array]:
    """Out [B, T, N, H], lse [B, T, N], and tiles executed per head [B, N], counted in the loops."""
    lanes = _Lanes.of(operands)
    tile = static.options.tiles.forward
    rows, columns, head_first, plan = _inputs(operands, static, tile)
    pruned = _pruned(operands, lanes, static, tile)
    bounds = column_tiles(
        rows.first, rows.last, head_first, None if pruned is None else pruned[0], tile, operands.k.shape[1]
    )
    out, lse, executed = forward_pass(rows, columns, bounds, plan)
    return lanes.join(out).astype(operands.q.dtype), lanes.join(lse), executed.reshape(lanes.batch, -1)


def backward(
    saved_and_cotangents: tuple[Saved, Array, Array], static: Static
) -> tuple[dict[str, Array], tuple[Array, Array]]:
    """Returns gradients by operand name, and the tiles executed per head [B, N] by the kv and the q pass."""
    (operands, out, lse), d_out, d_lse = saved_and_cotangents
    lanes, tiles = _Lanes.of(operands), static.options.tiles
    alive = lse > -jnp.inf
    # dS = P (dP - rowsum(O dO) + dlse); folding dlse into delta makes lse differentiable at no cost.
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - jnp.where(alive, d_lse, 0)
    extra = {
        "d_out": lanes.split(jnp.where(alive[..., None], d_out, 0)),
        "lse": lanes.split(jnp.where(alive, lse, 0)),
        "delta": lanes.split(jnp.where(alive, delta, 0)),
    }
    keys = operands.k.shape[1]

    rows, columns, head_first, plan = _inputs(operands, static, tiles.backward_kv)
    pruned = _pruned(operands, lanes, static, tiles.backward_kv, lse)
    until = None if pruned is None else pruned[1]
    bounds = row_tiles(rows.first, rows.last, head_first, until, plan.tile, keys)
    d_k, d_v, d_col, executed_kv = backward_kv_pass(rows._replace(**extra), columns, bounds, plan)

    rows, columns, head_first, plan = _inputs(operands, static, tiles.backward_q)
    pruned = _pruned(operands, lanes, static, tiles.backward_q, lse)
    start = None if pruned is None else pruned[0]
    bounds = column_tiles(rows.first, rows.last, head_first, start, plan.tile, keys)
    d_q, d_row, executed_q = backward_q_pass(rows._replace(**extra), columns, bounds, plan)

    dtype = operands.q.dtype
    grads = {
        "q": lanes.join(d_q).astype(dtype),
        "k": lanes.join(d_k[:, None]).astype(dtype),
        "v": lanes.join(d_v[:, None]).astype(dtype),
        "row_hi": lanes.join(d_row),
        "col_hi": lanes.join(d_col),
    }
    return grads, (executed_kv.reshape(lanes.batch, -1), executed_q.reshape(lanes.batch, -1))


class _Lanes(NamedTuple):
    """Axis order of the loops: a lane is one (batch entry, key/value head); its query heads form a group."""

    batch: int
    kv_heads: int

    @classmethod
    def of(cls, operands: Operands) -> "_Lanes":
        return cls(operands.k.shape[0], operands.k.shape[2])

    def split(self, x: Array) -> Array:
        """[B, L, N, ...] -> [B * K, N // K, L, ...]."""
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(self.batch * self.kv_heads, -1, *x.shape[2:])

    def join(self, x: Array) -> Array:
        """[B * K, R, L, ...] -> [B, L, K * R, ...]."""
        x = x.reshape(self.batch, self.kv_heads * x.shape[1], *x.shape[2:])
        return jnp.moveaxis(x, 1, 2)

    def per_head(self, x: Array) -> Array:
        """[B, N, ...] -> [B * K, N // K, ...]."""
        return x.reshape(self.batch * self.kv_heads, -1, *x.shape[2:])

    def shared(self, x: Array) -> Array:
        """[B, L] -> [B * K, L]."""
        return jnp.repeat(x, self.kv_heads, axis=0)


def _inputs(operands: Operands, static: Static, tile: Tile) -> tuple[Rows, Columns, Array, Plan]:
    lanes = _Lanes.of(operands)
    o, dtype = operands, accumulator(operands.q)
    rows = Rows(
        lanes.split(o.q), lanes.split(o.row_hi), None if o.row_lo is None else lanes.split(o.row_lo),
        lanes.shared(o.first), lanes.shared(o.last),
    )  # fmt: skip
    columns = Columns(
        lanes.split(o.k)[:, 0], lanes.split(o.v)[:, 0], lanes.split(o.col_hi),
        None if o.col_lo is None else lanes.split(o.col_lo), lanes.per_head(o.head_first),
    )  # fmt: skip
    n_lanes, n_group = rows.q.shape[:2]
    group = _largest_divisor(n_group, static.options.tiles.heads_per_step)
    together = (
        _largest_divisor(n_lanes, static.options.tiles.heads_per_step // n_group) if group == n_group else 1
    )
    mixed = group * together > 1
    plan = Plan(tile, together, group, static.options.sm_scale, static.left_masks, mixed, dtype)
    return rows, columns, columns.head_first, plan


def _largest_divisor(n: int, at_most: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(at_most, 1))


def _pruned(
    operands: Operands, lanes: _Lanes, static: Static, tile: Tile, lse: Array | None = None
) -> tuple[Array, Array] | None:
    """Bounds that `pruned_tiles` finds; `lse` [B, T, N] is known to backward passes."""
    o = operands
    row_lo, col_lo = (None if x is None else x.swapaxes(1, 2) for x in (o.row_lo, o.col_lo))
    decay = Decay(o.row_hi.swapaxes(1, 2), o.col_hi.swapaxes(1, 2), row_lo, col_lo)
    lse = None if lse is None else lse.swapaxes(1, 2)
    bounds = pruned_tiles(decay, o.threshold, o.norms, static.options.tight_log_eps, tile, lse)
    return None if bounds is None else (lanes.per_head(bounds[0]), lanes.per_head(bounds[1]))


PASSES = differentiable.Passes(
    lambda operands, static: forward(operands, static)[:2],
    lambda saved_and_cotangents, static: backward(saved_and_cotangents, static)[0],
)
attention = functools.partial(differentiable.attention, passes=PASSES)
partial = functools.partial(differentiable.partial, passes=PASSES)
