"""Hopper kernels (sm_90a) of the RG-LRU: gates, recurrence and their gradients in one pass over memory.

With c = 8 softplus(Lambda): i = sigmoid(gate_x), r = sigmoid(gate_a), log a = -c r, h_t = a_t h_(t-1) +
sqrt(1 - a_t^2) i_t x_t; at a reset h_t = i_t x_t. The special functions of a step are six instructions of
the chip's slowest unit (`kernels.common.hopper_math`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kernels.common.hopper_math import LN2, inverse_root, one_minus_square, sigmoid
from kernels.linear_scan import _mosaic_gpu_stream as streams
from kernels.linear_scan._mosaic_gpu_stream import CHANNELS, LAYOUT, Chunk, Load, Plan, RowLoad, Store

# 1 / sqrt(z) of derivatives: the derivative of a root is 1000 at most.
MAX_INVERSE_ROOT = 2000.0


class Gates(NamedTuple):
    """What a step computes of its own inputs.

    Attributes:
      x: input.
      i, r: gates.
      a: decay.
      one_minus: 1 - a^2.
      inverse_root: 1 / sqrt(one_minus), finite.
      reset: 1 at a reset, else 0; None if nothing is reset.
    """

    x: Array
    i: Array
    r: Array
    a: Array
    one_minus: Array
    inverse_root: Array
    reset: Array | None

    @property
    def multiplier(self) -> Array:
        """Of the gated input."""
        root = self.one_minus * self.inverse_root
        return self.unless_reset(root, 1.0)

    def unless_reset(self, value: Array, otherwise: Array | float) -> Array:
        """`value`, or `otherwise` at a reset."""
        return value if self.reset is None else jnp.where(self.reset > 0.5, otherwise, value)


def _gates(slots: Any, slot: Array, row: Array, rate: Array) -> Gates:
    """Of a step; `rate` is c log2(e)."""
    x, gate_x, gate_a = (streams.read(ref.at[slot, row]) for ref in slots[:3])
    i, r = sigmoid(gate_x), sigmoid(gate_a)
    log2_a = -rate * r
    a = jnp.exp2(log2_a)
    one_minus = one_minus_square(log2_a, a)
    reset = None
    if len(slots) > 3:
        reset = plgpu.layout_cast(lax.broadcast_in_dim(slots[3][slot, row], (CHANNELS,), ()), LAYOUT)
    return Gates(x, i, r, a, one_minus, inverse_root(one_minus), reset)


def forward(
    arrays: tuple[Array, Array, Array], h0: Array | None, rate: Array, reset: Array | None, *, plan: Plan
) -> tuple[Array, Array]:
    """h [B, T, D] in x's dtype and h_last [B, Dp].

    Args:
      arrays: x, gate_x and gate_a [B, T, D].
      h0: float32 [B, Dp]; None: zeros.
      rate: 8 softplus(Lambda) log2(e), float32 [B or 1, Dp].
      reset: float32 [B, T'], 1 at a reset, T' a multiple of 8; None: nothing is reset.
      plan: descending for a recurrence that runs from the last step to the first.
    """
    x, by_row = arrays[0], [] if reset is None else [reset]
    loads = tuple((array.dtype, 0) for array in arrays)
    kernel = streams.launch(
        functools.partial(_forward, plan=plan),
        "rglru_forward",
        plan,
        [jax.ShapeDtypeStruct(x.shape, x.dtype), streams.per_strip(plan)],
        streams.shared(plan, loads, (x.dtype,), by_row=len(by_row)),
    )
    h, h_last = kernel(arrays, rate, h0, by_row)
    return h, h_last


def _forward(
    sources: Any, rate_ref: Any, h0_ref: Any, by_row: Any, h_ref: Any, last_ref: Any,
    *, plan: Plan, slots: Any, buffers: Any, ready: Any,
) -> None:  # fmt: skip
    def begin(chunk: Chunk, slot: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        del slot
        h, rate = carry
        return streams.started(chunk, h0_ref, h), streams.started(chunk, rate_ref, rate)

    def inputs(slot: Array, row: Array, carry: tuple[Array, Array]) -> tuple[Gates, Array]:
        gates = _gates(slots, slot, row, carry[1])
        return gates, gates.multiplier * (gates.i * gates.x)

    def update(values: Any, carry: tuple[Array, Array]) -> tuple[Any, tuple[Array]]:
        (gates, entering), (h, rate) = values, carry
        # A reset forgets the state, even NaN; and a state of 0 stays 0, whatever its decay.
        h = jnp.where(h == 0.0, entering, gates.a * h + entering)
        h = gates.unless_reset(h, entering)
        return (h, rate), (h,)

    def end(chunk: Chunk, carry: tuple[Array, Array]) -> None:
        @pl.when(chunk.is_last)
        def _() -> None:
            last_ref[chunk.entry, chunk.channels] = carry[0]

    loads: list[Load | RowLoad] = [Load(ref, ring) for ref, ring in zip(sources, slots[:3], strict=True)]
    loads += [RowLoad(ref, ring) for ref, ring in zip(by_row, slots[3:], strict=True)]
    start = (streams.zeros(), streams.zeros())
    streams.stream(plan, loads, (Store(h_ref, buffers[0]),), ready, begin, inputs, update, end, start)


def backward(
    arrays: tuple[Array, ...], h0: Array | None, d_last: Array | None, rate: Array, reset: Array | None,
    *, plan: Plan,
) -> tuple[Array, Array, Array, Array | None, Array]:  # fmt: skip
    """Gradients of x, gate_x and gate_a in their dtypes, of h0 [B, Dp] if there is one, and sums over time of
    r d(log a) [B, Dp].

    Args:
      arrays: x, gate_x, gate_a, h and d_h [B, T, D].
      h0, rate, reset: as in `forward`.
      d_last: float32 [B, Dp]; None: zeros.
      plan: descending for a recurrence that runs from the first step to the last.
    """
    inputs, (h, d_h), shift = arrays[:3], arrays[3:], -1 if plan.descending else 1
    by_row = [] if reset is None else [reset]
    loads = (*((array.dtype, 0) for array in (*inputs, d_h)), (h.dtype, shift))
    kernel = streams.launch(
        functools.partial(_backward, plan=plan, shift=shift),
        "rglru_backward",
        plan,
        [
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs],
            None if h0 is None else streams.per_strip(plan),
            streams.per_strip(plan),
        ],
        streams.shared(plan, loads, [x.dtype for x in inputs], by_row=len(by_row)),
    )
    gradients, d_h0, sums = kernel((*inputs, d_h, h), rate, h0, d_last, by_row)
    return *gradients, d_h0, sums


class _Pulled(NamedTuple):
    """Gradient that comes back to the state, sum of r d(log a) so far, and the strip's rate."""

    state: Array
    total: Array
    rate: Array


def _backward(
    sources: Any, rate_ref: Any, h0_ref: Any, dlast_ref: Any, by_row: Any, targets: Any, dh0_ref: Any,
    sum_ref: Any, *, plan: Plan, shift: int, slots: Any, buffers: Any, ready: Any,
) -> None:  # fmt: skip
    dh_slots, h_slots = slots[3:5]
    gate_slots = (*slots[:3], *slots[5:])

    def begin(chunk: Chunk, slot: Array, carry: _Pulled) -> _Pulled:
        streams.put_initial_state(chunk, slot, h0_ref, h_slots, shift)
        state = streams.started(chunk, dlast_ref, carry.state)
        total = streams.started(chunk, None, carry.total)
        return _Pulled(state, total, streams.started(chunk, rate_ref, carry.rate))

    def inputs(slot: Array, row: Array, carry: _Pulled) -> tuple[Gates, Array, Array]:
        before = streams.read(h_slots.at[slot, row + (shift > 0)])
        return _gates(gate_slots, slot, row, carry.rate), streams.read(dh_slots.at[slot, row]), before

    def update(values: Any, carry: _Pulled) -> tuple[_Pulled, tuple[Array, Array, Array]]:
        gates, d_h, before = values
        g = d_h + carry.state

        def where_used(value: Array) -> Array:
            # If nothing depends on this step, its inputs may be NaN.
            return jnp.where(g == 0.0, 0.0, value)

        gated, scaled, back = gates.i * gates.x, g * gates.multiplier, gates.a * g
        inverse = jnp.minimum(gates.inverse_root, MAX_INVERSE_ROOT)
        # r d(log a): through the decay of the state, and through the root, whose derivative is -a^2 / root.
        by_gate = back * (before - gated * gates.a * inverse) * gates.r
        # 1 - sigmoid is never formed: a multiply-add does both.
        d_gate_a = gates.unless_reset(where_used((by_gate - by_gate * gates.r) * (carry.rate * -LN2)), 0.0)
        by_gate = gates.unless_reset(where_used(by_gate), 0.0)
        d_x = where_used(scaled * gates.i)
        d_gate_x = where_used(scaled * (gated - gated * gates.i))
        back = gates.unless_reset(where_used(back), 0.0)
        return _Pulled(back, carry.total + by_gate, carry.rate), (d_x, d_gate_x, d_gate_a)

    def end(chunk: Chunk, carry: _Pulled) -> None:
        @pl.when(chunk.is_last)
        def _() -> None:
            if dh0_ref is not None:
                dh0_ref[chunk.entry, chunk.channels] = carry.state
            sum_ref[chunk.entry, chunk.channels] = carry.total

    shifts = (0, 0, 0, 0, shift)
    loads: list[Load | RowLoad] = [
        Load(ref, ring, by) for ref, ring, by in zip(sources, slots[:5], shifts, strict=True)
    ]
    loads += [RowLoad(ref, ring) for ref, ring in zip(by_row, slots[5:], strict=True)]
    stores = [Store(ref, ring) for ref, ring in zip(targets, buffers, strict=True)]
    start = _Pulled(streams.zeros(), streams.zeros(), streams.zeros())
    streams.stream(plan, loads, stores, ready, begin, inputs, update, end, start)
