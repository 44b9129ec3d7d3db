"""Hopper kernels (sm_90a) of the linear recurrence h_t = a_t h_(t-1) + x_t and of its gradient."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from kernels.linear_scan import _mosaic_gpu_stream as streams
from kernels.linear_scan._mosaic_gpu_stream import Chunk, Load, Plan, Store


def forward(arrays: tuple[Array, Array], h0: Array | None, *, plan: Plan) -> tuple[Array, Array]:
    """h [B, T, D] in x's dtype and h_last [B, Dp].

    Args:
      arrays: x and a [B, T, D].
      h0: float32 [B, Dp], D padded to whole strips of 128; None: zeros.
      plan: descending for a recurrence that runs from the last step to the first.
    """
    x, a = arrays
    kernel = streams.launch(
        functools.partial(_forward, plan=plan),
        "forward",
        plan,
        [jax.ShapeDtypeStruct(x.shape, x.dtype), streams.per_strip(plan)],
        streams.shared(plan, ((x.dtype, 0), (a.dtype, 0)), (x.dtype,)),
    )
    h, h_last = kernel(x, a, h0)
    return h, h_last


def _forward(
    x_ref: Any, a_ref: Any, h0_ref: Any, h_ref: Any, last_ref: Any, *, plan: Plan, slots: Any, buffers: Any,
    ready: Any,
) -> None:  # fmt: skip
    x_slots, a_slots = slots
    (h_buffers,) = buffers

    def begin(chunk: Chunk, slot: Array, h: Array) -> Array:
        del slot
        return streams.started(chunk, h0_ref, h)

    def inputs(slot: Array, row: Array, h: Array) -> tuple[Array, Array]:
        del h
        return streams.read(x_slots.at[slot, row]), streams.read(a_slots.at[slot, row])

    def update(values: tuple[Array, Array], h: Array) -> tuple[Array, tuple[Array]]:
        x, a = values
        # 0 absorbs NaN and infinity, as in `products.product`: a = 0 forgets the state, whatever it is.
        h = jnp.where(a == 0.0, x, jnp.where(h == 0.0, x, a * h + x))
        return h, (h,)

    def end(chunk: Chunk, h: Array) -> None:
        @pl.when(chunk.is_last)
        def _() -> None:
            last_ref[chunk.entry, chunk.channels] = h

    loads = (Load(x_ref, x_slots), Load(a_ref, a_slots))
    streams.stream(
        plan, loads, (Store(h_ref, h_buffers),), ready, begin, inputs, update, end, streams.zeros()
    )


def backward(
    arrays: tuple[Array, Array, Array], h0: Array | None, d_last: Array | None, *, plan: Plan
) -> tuple[Array, Array, Array | None]:
    """Gradients of x and a, in d_h's and a's dtype, and of h0 [B, Dp], if there is one.

    The gradient of the state runs the other way: g_t = d_h_t + a_(t+1) g_(t+1), dx_t = g_t, da_t =
    g_t h_(t-1).

    Args:
      arrays: a, h and d_h [B, T, D].
      h0, d_last: float32 [B, Dp]; None: zeros.
      plan: descending for a recurrence that runs from the first step to the last.
    """
    (a, h, d_h), shift = arrays, -1 if plan.descending else 1
    kernel = streams.launch(
        functools.partial(_backward, plan=plan, shift=shift),
        "backward",
        plan,
        [
            jax.ShapeDtypeStruct(d_h.shape, d_h.dtype),
            jax.ShapeDtypeStruct(a.shape, a.dtype),
            None if h0 is None else streams.per_strip(plan),
        ],
        streams.shared(plan, ((a.dtype, 0), (d_h.dtype, 0), (h.dtype, shift)), (d_h.dtype, a.dtype)),
    )
    d_x, d_a, d_h0 = kernel(a, h, h0, d_h, d_last)
    return d_x, d_a, d_h0


def _backward(
    a_ref: Any, h_ref: Any, h0_ref: Any, dh_ref: Any, dlast_ref: Any, dx_ref: Any, da_ref: Any, dh0_ref: Any,
    *, plan: Plan, shift: int, slots: Any, buffers: Any, ready: Any,
) -> None:  # fmt: skip
    a_slots, dh_slots, h_slots = slots
    dx_buffers, da_buffers = buffers

    def begin(chunk: Chunk, slot: Array, pulled: Array) -> Array:
        streams.put_initial_state(chunk, slot, h0_ref, h_slots, shift)
        return streams.started(chunk, dlast_ref, pulled)

    def inputs(slot: Array, row: Array, pulled: Array) -> tuple[Array, Array, Array]:
        del pulled
        before = streams.read(h_slots.at[slot, row + (shift > 0)])
        return streams.read(a_slots.at[slot, row]), streams.read(dh_slots.at[slot, row]), before

    def update(values: tuple[Array, Array, Array], pulled: Array) -> tuple[Array, tuple[Array, Array]]:
        a, d_h, before = values
        g = d_h + pulled
        d_a = jnp.where(g == 0.0, 0.0, g * before)
        # The state that a reset forgets may be anything.
        d_a = jnp.where(a == 0.0, jnp.where(jnp.abs(before) < jnp.inf, d_a, 0.0), d_a)
        back = jnp.where(g == 0.0, 0.0, jnp.where(a == 0.0, 0.0, a * g))
        return back, (g, d_a)

    def end(chunk: Chunk, pulled: Array) -> None:
        @pl.when(chunk.is_last)
        def _() -> None:
            if dh0_ref is not None:
                dh0_ref[chunk.entry, chunk.channels] = pulled

    loads = (Load(a_ref, a_slots), Load(dh_ref, dh_slots), Load(h_ref, h_slots, shift))
    stores = (Store(dx_ref, dx_buffers), Store(da_ref, da_buffers))
    streams.stream(plan, loads, stores, ready, begin, inputs, update, end, streams.zeros())
