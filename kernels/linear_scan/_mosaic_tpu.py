"""Bodies of the TPU kernels: what one grid step does with the blocks that are in VMEM.

A block holds some batch rows, some steps and some channels. It is worked through in tiles of 8 steps (16 for
16-bit arrays) by all its channels, time along sublanes: a tile is scanned by doubling distances, rolling rows
(3 or 4 levels), and only then meets the state, so that tiles depend on each other by one multiply-add. The
state of every batch row is float32 and stays in VMEM scratch between the blocks of a sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels.linear_scan.config import MAX_SQRT_GRADIENT
from kernels.linear_scan.products import decay_gradient, product


class Steps(NamedTuple):
    """How a kernel walks through time: static.

    Attributes:
      tile: steps of a tile.
      reverse: whether the pass runs from the last step to the first.
      blocks: sequence blocks of the grid, its innermost axis.
    """

    tile: int
    reverse: bool
    blocks: int


def _rows(steps: Steps, like: Array) -> Array:
    """Age of each row of a tile in the direction of the pass: 0 comes first."""
    rows = jax.lax.broadcasted_iota(jnp.int32, like.shape, 0)
    return steps.tile - 1 - rows if steps.reverse else rows


def _later(x: Array, distance: int, steps: Steps) -> Array:
    """Rows moved `distance` steps on in the direction of the pass; what wraps around must not be used."""
    return pltpu.roll(x, steps.tile - distance if steps.reverse else distance, 0)


def _newest(x: Array, steps: Steps) -> Array:
    return x[:1] if steps.reverse else x[steps.tile - 1 :]


def shift_tile(x: Array, entering: Array, steps: Steps) -> Array:
    """A tile one step later; the row `entering` [1, D] comes first."""
    return jnp.where(_rows(steps, x) == 0, entering, _later(x, 1, steps))


def scan_tile(x: Array, a: Array, state: Array, steps: Steps) -> tuple[Array, Array]:
    """(h of the tile, state after it), all float32; `state` [1, D]."""
    age, distance = _rows(steps, x), 1
    while distance < steps.tile:
        reaches = age >= distance
        x_before, a_before = _later(x, distance, steps), _later(a, distance, steps)
        x = jnp.where(reaches, x + product(a, x_before), x)
        a = jnp.where(reaches, product(a, a_before), a)
        distance *= 2
    h = x + product(a, state)
    return h, _newest(h, steps)


def _wide(ref: Any, row: Array, at: Array, tile: int) -> Array:
    return ref[row, pl.ds(at, tile), :].astype(jnp.float32)


def _for_each_tile(
    steps: Steps, shape: tuple[int, ...], carries: Sequence[Any], visit: Callable[..., Sequence[Array]]
) -> None:
    """Calls visit(batch row, first step, *carries) for all tiles of a block in the order of the pass.

    carries: references [batch rows, 1, D] whose rows pass through the calls of that batch row.
    """
    count = shape[1] // steps.tile

    def over_rows(row: Array, nothing: Array) -> Array:
        def over_tiles(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            tile = count - 1 - index if steps.reverse else index
            return tuple(visit(row, pl.multiple_of(tile * steps.tile, steps.tile), *state))

        state = jax.lax.fori_loop(0, count, over_tiles, tuple(ref[row] for ref in carries))
        for ref, value in zip(carries, state, strict=True):
            ref[row] = value
        return nothing

    jax.lax.fori_loop(0, shape[0], over_rows, 0)


def _starting(start: Callable[[], None]) -> None:
    pl.when(pl.program_id(2) == 0)(start)


def _finishing(steps: Steps, finish: Callable[[], None]) -> None:
    pl.when(pl.program_id(2) == steps.blocks - 1)(finish)


def forward_kernel(steps: Steps, x: Any, a: Any, h0: Any, h: Any, h_last: Any, state: Any) -> None:
    """h_t = a_t h_(t-1) + x_t."""

    @_starting
    def _() -> None:
        state[...] = h0[...]

    def visit(row: Array, at: Array, before: Array) -> tuple[Array]:
        tile, after = scan_tile(_wide(x, row, at, steps.tile), _wide(a, row, at, steps.tile), before, steps)
        h[row, pl.ds(at, steps.tile), :] = tile.astype(h.dtype)
        return (after,)

    _for_each_tile(steps, x.shape, (state,), visit)

    def finish() -> None:
        h_last[...] = state[...]

    _finishing(steps, finish)


class TileGates(NamedTuple):
    """Gates of a tile; `rate` = -8 softplus(a_param) [1, D]. At resets a = 0 and scale = 1."""

    i: Array
    r: Array
    a: Array
    a_squared: Array
    z: Array
    scale: Array


def tile_gates(gate_x: Array, gate_a: Array, rate: Array, reset: Array | None) -> TileGates:
    """The formulas of `rglru.gates`; 1 - a^2 = -tanh(log a) (1 + a^2), as Mosaic has no expm1."""
    if reset is not None:
        gate_a = jnp.where(reset, 0, gate_a)
    r = jax.nn.sigmoid(gate_a)
    log_a = rate * r
    a = jnp.exp(log_a)
    a_squared = a * a
    z = -jnp.tanh(log_a) * (1 + a_squared)
    scale = jnp.sqrt(z)
    if reset is not None:
        a, scale = jnp.where(reset, 0, a), jnp.where(reset, 1, scale)
    return TileGates(jax.nn.sigmoid(gate_x), r, a, a_squared, z, scale)


def _reset_tile(reset: Any, row: Array, at: Array, like: Array) -> Array | None:
    if reset is None:
        return None
    return jnp.broadcast_to(reset[row, pl.ds(at, like.shape[0]), :], like.shape) != 0


def gated_forward_kernel(
    steps: Steps, x: Any, gate_x: Any, gate_a: Any, rate: Any, reset: Any, h0: Any, h: Any, h_last: Any,
    state: Any,
) -> None:  # fmt: skip
    """The RG-LRU; `reset` is a reference [batch rows, steps, 1] or None."""

    @_starting
    def _() -> None:
        state[...] = h0[...]

    def visit(row: Array, at: Array, before: Array) -> tuple[Array]:
        x_tile, gate = _wide(x, row, at, steps.tile), _wide(gate_a, row, at, steps.tile)
        resets = _reset_tile(reset, row, at, gate)
        gates = tile_gates(_wide(gate_x, row, at, steps.tile), gate, rate[...], resets)
        u = product(product(gates.i, x_tile), gates.scale)
        tile, after = scan_tile(u, gates.a, before, steps)
        h[row, pl.ds(at, steps.tile), :] = tile.astype(h.dtype)
        return (after,)

    _for_each_tile(steps, x.shape, (state,), visit)

    def finish() -> None:
        h_last[...] = state[...]

    _finishing(steps, finish)


def _gradient_tile(dh: Array, a: Array, c: Array, steps: Steps) -> tuple[Array, Array]:
    """(g of a tile, c after it): c_t = a_t (dh_t + c_(t+1)), g_t = dh_t + c_(t+1)."""
    handed, after = scan_tile(product(a, dh), a, c, steps)
    return dh + shift_tile(handed, c, steps), after


def _before(steps: Steps, at_start: Array, h: Any, edge: Any, h0: Any, row: Array, at: Array) -> Array:
    """The states that the steps of a tile started from. `steps` is that of the gradient, against time.

    The step before the tile lies in this block, at the border of the one before (`edge`: one tile of it),
    or is the start, h0 (if the block is the first in time: `at_start`).
    """
    tile, length = steps.tile, h.shape[1]
    forwards = Steps(tile, not steps.reverse, steps.blocks)
    previous = at + tile if forwards.reverse else at - tile
    outside = (previous < 0) | (previous >= length)
    inside = _wide(h, row, pl.multiple_of(jnp.clip(previous, 0, length - tile), tile), tile)
    border = jnp.where(at_start, h0[row], _newest(edge[row].astype(jnp.float32), forwards))
    entering = jnp.where(outside, border, _newest(inside, forwards))
    return shift_tile(_wide(h, row, at, tile), entering, forwards)


def backward_kernel(
    steps: Steps, dh: Any, a: Any, h: Any, edge: Any, h0: Any, dh_last: Any, dx: Any, da: Any, dh0: Any,
    state: Any,
) -> None:  # fmt: skip
    """Gradients of x, a and h0."""

    at_start = pl.program_id(2) == steps.blocks - 1

    @_starting
    def _() -> None:
        state[...] = dh_last[...]

    def visit(row: Array, at: Array, c: Array) -> tuple[Array]:
        here = (row, pl.ds(at, steps.tile), slice(None))
        a_tile = _wide(a, row, at, steps.tile)
        g, after = _gradient_tile(_wide(dh, row, at, steps.tile), a_tile, c, steps)
        dx[here] = g.astype(dx.dtype)
        da[here] = decay_gradient(g, a_tile, _before(steps, at_start, h, edge, h0, row, at)).astype(da.dtype)
        return (after,)

    _for_each_tile(steps, dh.shape, (state,), visit)

    def finish() -> None:
        dh0[...] = state[...]

    _finishing(steps, finish)


def gated_backward_kernel(
    steps: Steps, dh: Any, x: Any, gate_x: Any, gate_a: Any, rate: Any, reset: Any, h: Any, edge: Any,
    h0: Any, dh_last: Any, dx: Any, dgate_x: Any, dgate_a: Any, drate: Any, dh0: Any, state: Any, total: Any,
) -> None:  # fmt: skip
    """Gradients of the RG-LRU's inputs; that of `rate` is summed over time for every batch row."""

    at_start = pl.program_id(2) == steps.blocks - 1

    @_starting
    def _() -> None:
        state[...] = dh_last[...]
        total[...] = jnp.zeros(total.shape, total.dtype)

    def visit(row: Array, at: Array, c: Array, rate_sum: Array) -> tuple[Array, Array]:
        here = (row, pl.ds(at, steps.tile), slice(None))
        gate = _wide(gate_a, row, at, steps.tile)
        resets = _reset_tile(reset, row, at, gate)
        gates = tile_gates(_wide(gate_x, row, at, steps.tile), gate, rate[...], resets)
        g, after = _gradient_tile(_wide(dh, row, at, steps.tile), gates.a, c, steps)
        da = decay_gradient(g, gates.a, _before(steps, at_start, h, edge, h0, row, at))
        grads = gate_gradients(gates, _wide(x, row, at, steps.tile), rate[...], g, da, resets)
        for ref, grad in zip((dx, dgate_x, dgate_a), grads, strict=False):
            ref[here] = grad.astype(ref.dtype)
        return after, rate_sum + jnp.sum(grads[3], axis=0, keepdims=True)

    _for_each_tile(steps, dh.shape, (state, total), visit)

    def finish() -> None:
        dh0[...] = state[...]
        drate[...] = total[...]

    _finishing(steps, finish)


def gate_gradients(
    gates: TileGates, x: Array, rate: Array, du: Array, da: Array, reset: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Gradients of x, gate_x, gate_a and, per step, of rate; 0 where du is, whatever the inputs hold."""
    di = du * x * gates.scale
    slope = 0.5 / jnp.sqrt(jnp.maximum(gates.z, 0.25 / MAX_SQRT_GRADIENT**2))
    dlog_a = da * gates.a - 2 * gates.a_squared * slope * (du * gates.i * x)
    unused = du == 0
    stopped = unused if reset is None else unused | reset
    dr = dlog_a * rate
    return (
        jnp.where(unused, 0, du * gates.i * gates.scale),
        jnp.where(unused, 0, di * gates.i * (1 - gates.i)),
        jnp.where(stopped, 0, dr * gates.r * (1 - gates.r)),
        jnp.where(stopped, 0, dlog_a * gates.r),
    )
