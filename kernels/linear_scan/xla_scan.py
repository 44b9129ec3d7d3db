"""One loop over time in plain XLA: what CPUs run.

A step reads its slices where they are, without moving the time axis to the front, and writes its results in
place; gates and gradients are computed inside the loop, so nothing of size B T D is held but inputs and
results.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.linear_scan import differentiable
from kernels.linear_scan.config import Request
from kernels.linear_scan.differentiable import Passes, Saved
from kernels.linear_scan.products import carry_dtype, cast, decay_gradient, initial_state, product, zeros_like
from kernels.linear_scan.rglru import Gated, gates, wide_dtype


def supports(request: Request) -> str | None:
    """Takes every call."""
    return None


def forward(x: Array, a: Array, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    """(h, h_last)."""
    wide = carry_dtype(x, a)

    def step(t: Array, h: Array) -> tuple[Array, tuple[Array]]:
        h = _at(x, t).astype(wide) + product(_at(a, t).astype(wide), h)
        return h, (h,)

    h_last, (h,) = _over_time(x, reverse, step, initial_state(x, h0, wide), [x.dtype])
    return h, h_last


def backward(saved: Saved, dh: Array, dh_last: Array | None, reverse: bool) -> tuple[Array, Array, Array]:
    """(dx, da, dh0)."""
    a, wide = saved.a, carry_dtype(dh, saved.a)
    before = _state_before(saved.h, saved.h0, wide, reverse)

    def step(t: Array, c: Array) -> tuple[Array, tuple[Array, Array]]:
        a_t = _at(a, t).astype(wide)
        g = _at(dh, t).astype(wide) + c
        return product(a_t, g), (g, decay_gradient(g, a_t, before(t)))

    dh0, (dx, da) = _over_time(dh, not reverse, step, initial_state(dh, dh_last, wide), [dh.dtype, a.dtype])
    return dx, da, dh0


def gated_forward(gated: Gated, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
    """(h, h_last)."""
    x = gated.x

    def step(t: Array, h: Array) -> tuple[Array, tuple[Array]]:
        u, a = (part[:, 0] for part in gates(_gated_at(gated, t)))
        h = u + product(a, h)
        return h, (h,)

    state = initial_state(x, h0, wide_dtype(x, gated.gate_x, gated.gate_a))
    h_last, (h,) = _over_time(x, reverse, step, state, [x.dtype])
    return h, h_last


def gated_backward(
    gated: Gated, h0: Array | None, h: Array, dh: Array, dh_last: Array | None, reverse: bool
) -> tuple[Gated, Array]:
    """(gradients of gated, dh0); the sum over time of da_param is part of the carry."""
    wide = wide_dtype(gated.x, gated.gate_x, gated.gate_a)
    before = _state_before(h, h0, wide, reverse)

    def step(t: Array, carry: tuple[Array, Array]) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        c, da_param = carry
        now = _gated_at(gated, t)._replace(a_param=gated.a_param.astype(wide))
        a_t = gates(now)[1][:, 0]
        g = _at(dh, t).astype(wide) + c
        da = decay_gradient(g, a_t, before(t))
        grads = differentiable.gate_gradients(now, g[:, None], da[:, None])
        slices = (grads.x[:, 0], grads.gate_x[:, 0], grads.gate_a[:, 0])
        return (product(a_t, g), da_param + grads.a_param), slices

    start = (initial_state(dh, dh_last, wide), zeros_like(gated.a_param, wide, dh))
    dtypes = [part.dtype for part in gated[:3]]
    (dh0, da_param), (dx, dgate_x, dgate_a) = _over_time(dh, not reverse, step, start, dtypes)
    return Gated(dx, dgate_x, dgate_a, da_param.astype(gated.a_param.dtype), None), dh0


PASSES = Passes(forward, backward, gated_forward, gated_backward)
linear_scan = functools.partial(differentiable.linear_scan, passes=PASSES)
rglru_scan = functools.partial(differentiable.rglru_scan, passes=PASSES)


def _over_time(
    like: Array,
    reverse: bool,
    step: Callable[[Array, Any], tuple[Any, Sequence[Array]]],
    carry: Any,
    dtypes: Sequence[Any],
) -> tuple[Any, list[Array]]:
    """Runs step(t, carry) -> (carry, slices [B, D]) over the time axis of `like`; slices fill [B, T, D]
    arrays of these dtypes.
    """
    length = like.shape[1]

    def body(index: Array, state: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
        carry, filled = state
        t = length - 1 - index if reverse else index
        carry, slices = step(t, carry)
        pairs = zip(filled, slices, strict=True)
        put = jax.lax.dynamic_update_index_in_dim
        return carry, [put(whole, cast(part, whole.dtype), t, 1) for whole, part in pairs]

    empty = [zeros_like(like, dtype) for dtype in dtypes]
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(length), body, (carry, empty))


def _at(x: Array, t: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _gated_at(gated: Gated, t: Array) -> Gated:
    def part(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)

    reset = None if gated.reset is None else part(gated.reset)
    return Gated(part(gated.x), part(gated.gate_x), part(gated.gate_a), gated.a_param, reset)


def _state_before(h: Array, h0: Array | None, dtype: Any, reverse: bool) -> Callable[[Array], Array]:
    """t -> the state that step t started from."""
    start = initial_state(h, h0, dtype)
    first, towards_past = (h.shape[1] - 1, 1) if reverse else (0, -1)

    def before(t: Array) -> Array:
        return jnp.where(t == first, start, _at(h, t + towards_past).astype(dtype))

    return before
