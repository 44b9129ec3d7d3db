"""Forgetting attention in plain XLA: linear in memory, skips pruned tiles, runs on any platform.

Online softmax over tiles (FlashAttention-2 order) with a custom gradient that recomputes the weights tile
by tile: no array ever has two sequence axes. Loop bounds are data: causality, buffers, left padding,
segments and ACP all become per-head ranges of tiles, in the forward pass and in both backward passes. Gate
sums, softmax statistics and accumulators are float32 (float64 for float64 inputs); weights are cast to the
input dtype before each product.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels.common.manual import aligned_varying
from kernels.forgetting_attention._xla_chunked_bounds import Decay, column_tiles, pruned_tiles, row_tiles
from kernels.forgetting_attention._xla_chunked_loops import (
    Columns,
    Plan,
    Rows,
    backward_kv_pass,
    backward_q_pass,
    forward_pass,
)
from kernels.forgetting_attention.config import RESIDUAL_NAMES, Options, Request, Tile
from kernels.forgetting_attention.gates import segment_gate_sums
from kernels.forgetting_attention.pruning import ScoreNorms, score_norms
from kernels.forgetting_attention.spans import KeySpans, live_keys, positions, run_starts


class Operands(NamedTuple):
    """One call with every option reduced to arrays; all have the batch axis first, so vmap can fold into
    it.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    row_hi: Float[Array, "B T N"]
    col_hi: Float[Array, "B S N"]
    row_lo: Float[Array, "B T N"] | None
    col_lo: Float[Array, "B S N"] | None
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    head_first: Int[Array, "B N"]
    threshold: Float[Array, "B N"] | None
    norms: ScoreNorms | None


class Static(NamedTuple):
    """What the loops must know when traced."""

    options: Options
    left_masks: bool


class Saved(NamedTuple):
    """Residuals of the forward pass: linear in T and S."""

    operands: Operands
    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


def supports(request: Request) -> str | None:
    """Takes every shape, dtype, option and platform."""
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    seq_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B S"] | None,
    kv_length: Int[Array, " B"] | None,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The public function's arguments after checks; returns (out, lse)."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    q, k, v, log_fgate, seq_start, segment_ids, kv_length, threshold = aligned_varying(
        (q, k, v, log_fgate, seq_start, segment_ids, kv_length, threshold)
    )
    live = live_keys(batch, keys, seq_start, kv_length)
    starts = run_starts(batch, keys, seq_start, segment_ids)
    spans = KeySpans.of(batch, queries, keys, causal=True, kv_length=kv_length, seq_start=seq_start)
    row_at = positions(batch, queries, keys, kv_length)
    at = jnp.clip(row_at, 0, keys - 1)
    if segment_ids is not None:
        run_start = jax.lax.cummax(jnp.where(starts, jnp.arange(keys, dtype=jnp.int32), 0), axis=1)
        spans = spans.in_runs(run_start, at)

    # The first gate of a run decays no key of the run, and dead positions may hold anything: both count as
    # 0, with an exactly zero gradient.
    silent = starts if options.zero_first_gate else starts & (jnp.arange(keys) > 0)
    gates = jnp.where((live & ~silent)[:, :, None], log_fgate, 0)
    ends = jnp.roll(starts, -1, axis=1)  # key 0 is always a start, so the last key is always an end
    hi, lo = segment_gate_sums(gates.astype(_accumulator(q)), ends)
    if kv_length is None:
        row_hi, row_lo = hi[:, keys - queries :], lo[:, keys - queries :]
    else:
        row_hi, row_lo = (jnp.take_along_axis(x, at[:, :, None], axis=1) for x in (hi, lo))

    if not spans.all_filled:
        q, k, v = _without_unused(q, k, v, spans)
    norms = None
    if options.tight_log_eps is not None:
        live_row = row_at >= (0 if seq_start is None else seq_start[:, None])
        norms = score_norms(q, k, row_at, live_row, options.sm_scale)
    return _run(q, k, v, Decay(row_hi, -hi, row_lo, -lo), spans, threshold, norms, options)


def partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    row_decay: Float[Array, "B T N"],
    col_decay: Float[Array, "B S N"],
    *,
    spans: KeySpans,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`attend_partial` after checks; returns (out, lse)."""
    intervals = (spans.first, spans.last, spans.head_first)
    (q, k, v, row_decay, col_decay, threshold), (first, last, head_first) = aligned_varying(
        ((q, k, v, row_decay, col_decay, threshold), intervals)
    )
    spans = spans._replace(first=first, last=last, head_first=head_first)
    if not spans.all_filled:
        q, k, v = _without_unused(q, k, v, spans)
        used_row, used_key = _used(spans, k.shape[1])
        row_decay = jnp.where(used_row[:, :, None], row_decay, 0)
        col_decay = jnp.where(used_key[:, :, None], col_decay, 0)
    dtype = _accumulator(q)
    decay = Decay(row_decay.astype(dtype), col_decay.astype(dtype), None, None)
    return _run(q, k, v, decay, spans, threshold, None, options)


def _accumulator(q: Array) -> Any:
    return jnp.promote_types(q.dtype, jnp.float32)


def _used(spans: KeySpans, keys: int) -> tuple[Array, Array]:
    """Rows that see a key, and keys between the first and the last visible one of their batch entry."""
    start = spans.first
    if spans.head_first is not None:
        start = jnp.maximum(start, spans.head_first.min(axis=1)[:, None])
    at = jnp.arange(keys)
    used_key = (at >= start.min(axis=1)[:, None]) & (at <= spans.last.max(axis=1)[:, None])
    return start <= spans.last, used_key


def _without_unused(q: Array, k: Array, v: Array, spans: KeySpans) -> tuple[Array, Array, Array]:
    """Zeros where nothing is read: those places may hold NaN, and 0 * NaN would reach the result."""
    used_row, used_key = (used[:, :, None, None] for used in _used(spans, k.shape[1]))
    return jnp.where(used_row, q, 0), jnp.where(used_key, k, 0), jnp.where(used_key, v, 0)


def _run(
    q: Array, k: Array, v: Array, decay: Decay, spans: KeySpans,
    threshold: Array | None, norms: ScoreNorms | None, options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    head_first = spans.head_first
    if head_first is None:
        head_first = jnp.broadcast_to(spans.first[:, :1] * 0, (q.shape[0], q.shape[2]))
    operands = Operands(q, k, v, *decay, spans.first, spans.last, head_first, threshold, norms)
    return _attend(operands, Static(options, not spans.keeps_left))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(operands: Operands, static: Static) -> tuple[Array, Array]:
    return _folded(forward, static)(operands)[:2]


def _attend_fwd(operands: Operands, static: Static) -> tuple[tuple[Array, Array], Saved]:
    out, lse, _ = _folded(forward, static)(operands)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), RESIDUAL_NAMES, strict=True))
    return (out, lse), Saved(operands, out, lse)


def _attend_bwd(static: Static, saved: Saved, cotangents: tuple[Array, Array]) -> tuple[Operands]:
    grads, _ = _folded(backward, static)((saved, *cotangents))
    nothing = Operands(*([None] * len(Operands._fields)))  # type: ignore[arg-type]
    return (nothing._replace(**grads),)


_attend.defvjp(_attend_fwd, _attend_bwd)


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
    pruned = _pruned(operands, lanes, static, tiles.backward_kv)
    until = None if pruned is None else pruned[1]
    bounds = row_tiles(rows.first, rows.last, head_first, until, plan.tile, keys)
    d_k, d_v, d_col, executed_kv = backward_kv_pass(rows._replace(**extra), columns, bounds, plan)

    rows, columns, head_first, plan = _inputs(operands, static, tiles.backward_q)
    pruned = _pruned(operands, lanes, static, tiles.backward_q)
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
    o, dtype = operands, _accumulator(operands.q)
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


def _pruned(operands: Operands, lanes: _Lanes, static: Static, tile: Tile) -> tuple[Array, Array] | None:
    o = operands
    row_lo, col_lo = (None if x is None else x.swapaxes(1, 2) for x in (o.row_lo, o.col_lo))
    decay = Decay(o.row_hi.swapaxes(1, 2), o.col_hi.swapaxes(1, 2), row_lo, col_lo)
    bounds = pruned_tiles(decay, o.threshold, o.norms, static.options.tight_log_eps, tile)
    return None if bounds is None else (lanes.per_head(bounds[0]), lanes.per_head(bounds[1]))


def _folded(function: Any, static: Static) -> Any:
    """`function` with a vmap rule that folds the mapped axis into the batch, so every entry skips its own
    tiles.
    """

    @jax.custom_batching.custom_vmap
    def call(operands: Any) -> Any:
        return function(operands, static)

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[Any], operands: Any) -> tuple[Any, Any]:
        def fold(x: Any, batched: bool) -> Array:
            x = jnp.asarray(x)  # constants arrive as literals
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        results = call(jax.tree.map(fold, operands, in_batched[0]))
        unfold = lambda x: x.reshape(axis_size, -1, *x.shape[1:])  # noqa: E731
        return jax.tree.map(unfold, results), jax.tree.map(lambda _: True, results)

    return call
