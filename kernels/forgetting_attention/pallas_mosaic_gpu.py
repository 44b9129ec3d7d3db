"""Forgetting attention on Hopper GPUs: Pallas Mosaic GPU kernels (wgmma, TMA, warp specialisation).

This module turns `Operands` into what the raw kernels of `_mosaic_gpu_sm90_*` want: whole tiles, head-major
vectors of the decay bias relative to the bases of tiles, and the range of tiles of every block. The kernels
are bitwise deterministic: every gradient is summed by one CTA in a fixed order.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.dispatch import target
from kernels.common.tiling import ceil_div, pad_axis_to
from kernels.forgetting_attention import differentiable, schedules
from kernels.forgetting_attention._mosaic_gpu_sm90 import Plan
from kernels.forgetting_attention._mosaic_gpu_sm90_backward import BackwardInputs
from kernels.forgetting_attention._mosaic_gpu_sm90_backward_kv import backward_kv
from kernels.forgetting_attention._mosaic_gpu_sm90_backward_q import backward_q, forms_delta
from kernels.forgetting_attention._mosaic_gpu_sm90_forward import forward as forward_kernel
from kernels.forgetting_attention.config import Request, Tile, TileConfig
from kernels.forgetting_attention.differentiable import Saved
from kernels.forgetting_attention.operands import Operands, Static
from kernels.forgetting_attention.tile_ranges import (
    Decay,
    TileRange,
    column_tiles,
    pruned_tiles,
    row_tiles,
)
from kernels.forgetting_attention.work_lists import (
    WorkLists,
    causal_blocks,
    dynamic_lists,
    pruned_causal,
    static_lists,
)

LN2 = math.log(2)
HEAD_DIMS = (64, 128, 256)
TMA_ROWS = 8
# Exponent of rows that must give weight 0, divided by a scale; beyond any real score, far from overflow.
NEVER = -1e30
NO_KEY = jnp.iinfo(jnp.int32).max


def supports(request: Request) -> str | None:
    """Hopper, 16-bit inputs, head dims up to 256."""
    if request.platform != "gpu" or request.capability is None:
        return "needs an NVIDIA Hopper GPU"
    if request.capability != "9.0":
        return (
            "needs the wgmma instructions of compute capability 9.0 (Hopper);"
            f" this GPU has {request.capability}"
        )
    if request.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {request.dtype}"
    if request.head_dim > HEAD_DIMS[-1]:
        return f"takes head dims up to {HEAD_DIMS[-1]}, not {request.head_dim}"
    if request.tiles is not None:
        return schedules.refusal(_padded_head_dim(request.head_dim), request.tiles)
    return None


def default_tiles(request: Request) -> TileConfig:
    """Measured tile sizes for this device and head dim, see `tuned/`."""
    return schedules.default_tiles(request.device, _padded_head_dim(request.head_dim))


def _padded_head_dim(head_dim: int) -> int:
    return min(size for size in HEAD_DIMS if size >= head_dim)


class _Call(NamedTuple):
    """The operands as all three kernels read them, before tiles are known."""

    q: Array
    k: Array
    v: Array
    row_hi: Array
    col_hi: Array
    row_lo: Array
    col_lo: Array
    lanes: int
    sm_scale: float
    factor: float
    group: int
    causal_offset: int | None
    left_masks: bool


def _call(operands: Operands, static: Static) -> _Call:
    """Pads the head dim and moves the sign of the scale into q: kernels want a positive one."""
    o, scale = operands, static.options.sm_scale
    factor = float(math.copysign(1, scale)) if scale else 0.0
    head_dim = o.q.shape[3]
    missing = [(0, 0)] * 3 + [(0, _padded_head_dim(head_dim) - head_dim)]
    q, k, v = (x if missing[3][1] == 0 else jnp.pad(x, missing) for x in (o.q, o.k, o.v))
    q = q if factor == 1 else (q * factor).astype(q.dtype)
    row_lo = jnp.zeros_like(o.row_hi) if o.row_lo is None else o.row_lo
    col_lo = jnp.zeros_like(o.col_hi) if o.col_lo is None else o.col_lo
    row_hi, col_hi, row_lo, col_lo = (x.swapaxes(1, 2) for x in (o.row_hi, o.col_hi, row_lo, col_lo))
    offset = o.k.shape[1] - o.q.shape[1] if static.plain_causal else None
    return _Call(
        q, k, v, row_hi, col_hi, row_lo, col_lo,
        o.q.shape[0] * o.q.shape[2], abs(scale) if scale else 1.0, factor,
        o.q.shape[2] // o.k.shape[2], offset, static.left_masks,
    )  # fmt: skip


def forward(operands: Operands, static: Static) -> tuple[Array, Array]:
    """Out [B, T, N, H] and lse [B, T, N]."""
    call, tile = _call(operands, static), static.options.tiles.forward
    batch, rows, heads, head_dim = operands.q.shape
    plan = _plan(call, static, "forward", tile)
    row, row_base = _from_bases(call.row_hi, call.row_lo, tile[0])
    col, col_base = _from_bases(call.col_hi, call.col_lo, tile[1], at_end=True)
    lists = _lists(operands, static, call, tile, None, by_row=True)
    first, last = _spans(operands, static, tile[0]) or (lists.jobs, lists.jobs)
    out, lse = forward_kernel(
        _at_least(call.q, tile[0]), _at_least(call.k, tile[1]), _at_least(call.v, tile[1]),
        col / call.sm_scale, row_base, col_base, lists.jobs, first, last, plan=plan,
    )  # fmt: skip
    lse = (lse * LN2 + row)[:, :rows].reshape(batch, heads, rows)
    return out[:, :rows, :, :head_dim], lse.swapaxes(1, 2)


def backward(saved_and_cotangents: tuple[Saved, Array, Array], static: Static) -> dict[str, Array]:
    """Gradients by operand name."""
    (operands, out, lse), d_out, d_lse = saved_and_cotangents
    call = _call(operands, static)
    head_dim, padded_dim = operands.q.shape[3], call.q.shape[3]
    alive = lse > -jnp.inf
    # dS = P (dP - rowsum(O dO) + dlse); folding dlse into delta makes lse differentiable at no cost.
    minus_delta, plan = d_lse, _plan(call, static, "backward_q", static.options.tiles.backward_q)
    if forms_delta(plan, padded_dim):
        plan = dataclasses.replace(plan, delta=True)
    else:
        # Fused with its transposition below, the sum over rows takes nine times as long.
        products = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        minus_delta = jax.lax.optimization_barrier(d_lse - products)
    if not static.plain_causal:
        d_out = jnp.where(alive[..., None], d_out, 0)
    if padded_dim != head_dim:
        out, d_out = (jnp.pad(x, [(0, 0)] * 3 + [(0, padded_dim - head_dim)]) for x in (out, d_out))
    lse, minus_delta = (_head_major(x) for x in (lse, jnp.where(alive, minus_delta, 0)))
    inputs = _backward_inputs(operands, static, call, d_out, lse, minus_delta)
    of_q, minus_delta = _backward_q(operands, static, call, inputs, out, lse, plan)
    of_kv = _backward_kv(operands, static, call, inputs._replace(minus_delta=minus_delta), lse)
    return {name: (x[..., :head_dim] if name in "qkv" else x) for name, x in (of_q | of_kv).items()}


def _backward_q(
    operands: Operands,
    static: Static,
    call: _Call,
    inputs: BackwardInputs,
    out: Array,
    lse: Array,
    plan: Plan,
) -> tuple[dict[str, Array], Array]:
    """Gradients of q and of the rows' decay, and -delta."""
    tile = static.options.tiles.backward_q
    batch, rows, heads, _ = operands.q.shape
    inputs = _with_jobs(inputs, _lists(operands, static, call, tile, lse, by_row=True))
    minus_delta = inputs.minus_delta
    if plan.delta:
        padded = inputs.row.shape[1]
        d_q, d_row, minus_delta = backward_q(inputs, _at_least(out, _sizes(static)[0]), plan=plan)
        # Beyond the last block of rows nothing was written, but `backward_kv` may read as far as that.
        minus_delta = pad_axis_to(minus_delta[:, : ceil_div(rows, tile[0]) * tile[0]], 1, padded)
    else:
        d_q, d_row = backward_q(inputs, None, plan=plan)
    d_q = d_q if call.factor == 1 else (d_q * call.factor).astype(d_q.dtype)
    d_row = d_row[:, :rows].reshape(batch, heads, rows).swapaxes(1, 2)
    return {"q": d_q[:, :rows], "row_hi": d_row}, minus_delta


def _backward_kv(
    operands: Operands, static: Static, call: _Call, inputs: BackwardInputs, lse: Array
) -> dict[str, Array]:
    tile, keys = static.options.tiles.backward_kv, operands.k.shape[1]
    batch, _, heads, _ = operands.q.shape
    plan = _plan(call, static, "backward_kv", tile)
    inputs = _with_jobs(inputs, _lists(operands, static, call, tile, lse, by_row=False))
    if call.q.shape[3] <= 128:
        d_k, d_v, d_col = backward_kv(inputs, plan=plan)
    else:
        d_k, d_col = backward_kv(inputs, plan=dataclasses.replace(plan, dv=False))
        (d_v,) = backward_kv(inputs, plan=dataclasses.replace(plan, dk=False))
    d_col = d_col[:, :keys].reshape(batch, heads, keys).swapaxes(1, 2)
    return {"k": d_k[:, :keys], "v": d_v[:, :keys], "col_hi": d_col}


def _with_jobs(inputs: BackwardInputs, lists: WorkLists) -> BackwardInputs:
    unread = {name: lists.jobs for name in ("first", "last") if getattr(inputs, name) is None}
    return inputs._replace(jobs=lists.jobs, **unread)


def _sizes(static: Static) -> tuple[int, int]:
    """Rows and keys in whole tiles of both backward kernels."""
    by_kv, by_q = static.options.tiles.backward_kv, static.options.tiles.backward_q
    return math.lcm(by_kv[0], by_q[0]), math.lcm(by_kv[1], by_q[1])


def _plan(call: _Call, static: Static, kernel: str, tile: Tile) -> Plan:
    schedule, tiles = schedules.schedule(kernel, call.q.shape[3], tile), static.options.tiles
    return Plan(
        tile[0], tile[1], schedule.stages, schedule.buffers, call.group, call.sm_scale, call.left_masks,
        call.causal_offset, schedule.turns, schedule.overlap,
        row_span=tiles.backward_kv[0], column_span=tiles.backward_q[1],
    )  # fmt: skip


def _lists(
    operands: Operands, static: Static, call: _Call, tile: Tile, lse: Array | None, *, by_row: bool
) -> WorkLists:
    """Jobs of a kernel that owns rows, or columns: then each of all query heads of a group.

    In the forward kernel, which has no `lse` yet, rows that see nothing still get one masked tile.
    """
    o, ctas, group = operands, target().cores, 1 if by_row else call.group
    rows, keys = o.q.shape[1], o.k.shape[1]
    lse = None if lse is None else lse.reshape(call.row_hi.shape)
    decay = Decay(call.row_hi, call.col_hi, call.row_lo, call.col_lo)
    pruned = pruned_tiles(decay, o.threshold, o.norms, static.options.tight_log_eps, tile, lse)
    kept = None if pruned is None else pruned[0 if by_row else 1]
    blocks = None
    if static.plain_causal:
        blocks = causal_blocks(rows, keys, tile, by_row=by_row)
        if kept is None:
            return static_lists(blocks, call.lanes, group, ctas)
        ranges = pruned_causal(blocks, kept, by_row=by_row)
    else:
        find = column_tiles if by_row else row_tiles
        ranges = find(o.first, o.last, o.head_first, kept, tile, keys)
    if lse is None:
        ranges = _never_empty(ranges, ceil_div(keys, tile[1]))
    return dynamic_lists(ranges, group, ctas, blocks)


def _never_empty(ranges: TileRange, tiles: int) -> TileRange:
    """Gives blocks that see nothing one tile, all masked."""
    begin = jnp.minimum(ranges.begin, tiles - 1)
    full_begin, full_end = (jnp.maximum(x, begin) for x in (ranges.full_begin, ranges.full_end))
    empty = ranges.end <= ranges.begin
    full_begin, full_end = (jnp.where(empty, begin, x) for x in (full_begin, full_end))
    return TileRange(begin, full_begin, full_end, jnp.maximum(ranges.end, begin + 1))


def _backward_inputs(
    operands: Operands, static: Static, call: _Call, d_out: Array, lse: Array, minus_delta: Array
) -> BackwardInputs:
    """What both backward kernels read, but for their jobs; `lse` and `minus_delta` [G, T]."""
    size, columns = _sizes(static)
    tiles = static.options.tiles
    row, row_base = _from_bases(call.row_hi, call.row_lo, tiles.backward_kv[0], size)
    col, col_base = _from_bases(call.col_hi, call.col_lo, tiles.backward_q[1], columns, at_end=True)
    lse = jnp.pad(lse, ((0, 0), (0, row.shape[1] - lse.shape[1])), constant_values=-jnp.inf)
    row = jnp.where(lse > -jnp.inf, (row - lse) / call.sm_scale, NEVER)
    first, last = _spans(operands, static, size) or (None, None)
    return BackwardInputs(
        _at_least(call.q, size), _at_least(call.k, columns), _at_least(call.v, columns),
        _at_least(d_out, size), row, col / call.sm_scale, pad_axis_to(minus_delta, 1, size),
        row_base, col_base, None, first, last,
    )  # fmt: skip


def _at_least(x: Array, size: int) -> Array:
    """Pads the sequence axis of [B, L, N, H] to what TMA can address; beyond it, TMA reads zeros and writes
    nothing.
    """
    return pad_axis_to(x, 1, TMA_ROWS if x.shape[1] >= size else size)


def _head_major(x: Array) -> Array:
    """[B, L, N] -> [B * N, L]."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1])


def _from_bases(
    hi: Array, lo: Array, span: int, size: int | None = None, *, at_end: bool = False
) -> tuple[Array, Array]:
    """One side of the bias [B, N, L] relative to the bases of its spans [G, padded L], and those [2, G, M].

    A base is the first entry of a span, or the last: rows count from their first one and keys from their last
    one, which are next to each other where a tile's bias is small. Lengths are padded to multiples of `size`,
    itself one of `span`.
    """
    hi, lo = (pad_axis_to(x.reshape(-1, x.shape[2]), 1, size or span, edge=True) for x in (hi, lo))
    hi, lo = (x.reshape(x.shape[0], -1, span) for x in (hi, lo))
    at = -1 if at_end else 0
    local = (hi - hi[:, :, at, None]) + (lo - lo[:, :, at, None])
    return local.reshape(local.shape[0], -1), jnp.stack([hi[:, :, at], lo[:, :, at]])


def _spans(operands: Operands, static: Static, size: int) -> tuple[Array, Array] | None:
    """First visible key per lane [G, T] and last per batch entry [B, T]; padding rows see nothing.

    None in plain causal attention, where kernels do not read them: any array may take their place.
    """
    if static.plain_causal:
        return None
    missing = -operands.first.shape[1] % size
    last = jnp.pad(operands.last, ((0, 0), (0, missing)), constant_values=-1)
    first = jnp.maximum(operands.first[:, None, :], operands.head_first[:, :, None])
    first = first.reshape(-1, first.shape[2])
    return jnp.pad(first, ((0, 0), (0, missing)), constant_values=NO_KEY), last


PASSES = differentiable.Passes(forward, backward)
attention: Any = functools.partial(differentiable.attention, passes=PASSES)
partial: Any = functools.partial(differentiable.partial, passes=PASSES)
