"""What implementations share around their passes: gradients and the names that remat policies know.

With g_t the gradient that reaches h_t and c_t = a_t g_t what it hands to the step before,

    c_t = a_t dh_t + a_t c_(t+1)    from c_T = dh_last    g_t = dh_t + c_(t+1)
    dx_t = g_t    da_t = g_t h_(t-1)    dh0 = c_0

so the backward pass is the same scan in the opposite direction, with the same a. JAX's gradients of complex
arrays carry no conjugates. Nothing is saved but h, a and h0 (for the RG-LRU: its inputs, h and h0).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array

from kernels.common.manual import aligned_varying
from kernels.linear_scan.config import RESIDUAL_NAMES
from kernels.linear_scan.products import (
    carry_dtype,
    cast,
    decay_gradient,
    initial_state,
    placed_state,
    product,
    shifted,
    zeros_like,
)
from kernels.linear_scan.rglru import Gated, gates


@runtime_checkable
class Scan(Protocol):
    """One pass: h_t = a_t h_(t-1) + x_t."""

    def __call__(
        self, x: Array, a: Array, h0: Array | None, *, reverse: bool, out_dtype: jnp.dtype
    ) -> tuple[Array, Array]:
        """(h [B, T, D] in out_dtype, h_last [B, D] in the carry's dtype), with absorbing products."""


class Saved(NamedTuple):
    """Residuals of `linear_scan`."""

    h: Array
    a: Array
    h0: Array | None


class Passes(NamedTuple):
    """An implementation.

    Attributes:
      forward: (x, a, h0, reverse) -> (h in x's dtype, h_last in the carry's dtype).
      backward: (saved, dh, dh_last, reverse) -> (dx, da, dh0), in the dtypes of x, a and h_last. dh_last is
        None if nothing depends on h_last, and dh0 may be None if h0 is.
      gated_forward: (gated, h0, reverse) -> (h, h_last).
      gated_backward: (gated, h0, h, dh, dh_last, reverse) -> (gradients of gated, None for reset; dh0).
    """

    forward: Callable[[Array, Array, Array | None, bool], tuple[Array, Array]]
    backward: Callable[[Saved, Array, Array | None, bool], tuple[Array, Array, Array | None]]
    gated_forward: Callable[[Gated, Array | None, bool], tuple[Array, Array]]
    gated_backward: Callable[
        [Gated, Array | None, Array, Array, Array | None, bool], tuple[Gated, Array | None]
    ]


def composed(scan: Scan) -> Passes:
    """All passes of an implementation that has one scan and leaves the elementwise work to XLA."""

    def forward(x: Array, a: Array, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
        return scan(x, a, h0, reverse=reverse, out_dtype=x.dtype)

    def backward(saved: Saved, dh: Array, dh_last: Array | None, reverse: bool) -> tuple[Array, Array, Array]:
        g, dh0 = state_gradient(scan, saved.a, dh, dh_last, reverse)
        before = shifted(saved.h, initial_state(saved.h, saved.h0, g.dtype), reverse=reverse)
        da = decay_gradient(g, saved.a.astype(g.dtype), before.astype(g.dtype))
        return cast(g, dh.dtype), cast(da, saved.a.dtype), dh0

    def gated_forward(gated: Gated, h0: Array | None, reverse: bool) -> tuple[Array, Array]:
        u, a = gates(gated)
        return scan(u, a, h0, reverse=reverse, out_dtype=gated.x.dtype)

    def gated_backward(
        gated: Gated, h0: Array | None, h: Array, dh: Array, dh_last: Array | None, reverse: bool
    ) -> tuple[Gated, Array]:
        _, a = gates(gated)
        g, dh0 = state_gradient(scan, a, dh, dh_last, reverse)
        before = shifted(h, initial_state(h, h0, g.dtype), reverse=reverse).astype(g.dtype)
        return gate_gradients(gated, g, decay_gradient(g, a, before)), dh0

    return Passes(forward, backward, gated_forward, gated_backward)


def state_gradient(
    scan: Scan, a: Array, dh: Array, dh_last: Array | None, reverse: bool
) -> tuple[Array, Array]:
    """(g [B, T, D], dh0 [B, D]), both in the carry's dtype."""
    wide = carry_dtype(dh, a)
    dh, a = dh.astype(wide), a.astype(wide)
    c, dh0 = scan(product(a, dh), a, dh_last, reverse=not reverse, out_dtype=wide)
    return dh + shifted(c, initial_state(dh, dh_last, wide), reverse=not reverse), dh0


def gate_gradients(gated: Gated, du: Array, da: Array) -> Gated:
    """Gradients of x, gate_x, gate_a and a_param from those of u and a.

    Where du = 0 nothing depends on the inputs, so their values, which may be NaN, are not looked at.
    """
    x, gate_x, gate_a = (jnp.where(du == 0, 0, part) for part in gated[:3])

    def differentiable(x: Array, gate_x: Array, gate_a: Array, a_param: Array) -> tuple[Array, Array]:
        return gates(Gated(x, gate_x, gate_a, a_param, gated.reset))

    _, pullback = jax.vjp(differentiable, x, gate_x, gate_a, gated.a_param)
    dx, dgate_x, dgate_a, da_param = pullback((du, da))
    return Gated(dx, dgate_x, dgate_a, da_param, None)


def linear_scan(
    x: Array, a: Array, h0: Array | None, *, reverse: bool, passes: Passes
) -> tuple[Array, Array]:
    """`linear_scan` after its checks, differentiable."""
    if x.shape[1] == 1:
        passes = ONE_STEP
    # Replicated operands are cast outside of the custom gradient: the transpose of that sums over devices.
    return _linear(*aligned_varying((x, a, placed_state(x, h0))), reverse, passes)


def rglru_scan(gated: Gated, h0: Array | None, *, reverse: bool, passes: Passes) -> tuple[Array, Array]:
    """`rglru_scan` after its checks, differentiable."""
    if gated.x.shape[1] == 1:
        passes = ONE_STEP
    return _gated(*aligned_varying((gated, placed_state(gated.x, h0))), reverse, passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x: Array, a: Array, h0: Array | None, reverse: bool, passes: Passes) -> tuple[Array, Array]:
    return passes.forward(x, a, h0, reverse)


def _linear_fwd(x: Any, a: Any, h0: Any, reverse: bool, passes: Passes) -> tuple[tuple[Array, Array], Saved]:
    x, a, h0 = custom_vjp_primal_tree_values((x, a, h0))
    h, h_last = _named(passes.forward(x, a, h0, reverse))
    return (h, h_last), Saved(h, a, h0)


def _linear_bwd(
    reverse: bool, passes: Passes, saved: Saved, cotangents: tuple[Any, Any]
) -> tuple[Array, Array, Array | None]:
    dx, da, dh0 = passes.backward(saved, *_arriving(saved.h, cotangents), reverse)
    return dx, da, None if saved.h0 is None else dh0


_linear.defvjp(_linear_fwd, _linear_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated(gated: Gated, h0: Array | None, reverse: bool, passes: Passes) -> tuple[Array, Array]:
    return passes.gated_forward(gated, h0, reverse)


def _gated_fwd(
    gated: Any, h0: Any, reverse: bool, passes: Passes
) -> tuple[tuple[Array, Array], tuple[Gated, Array | None, Array]]:
    gated, h0 = custom_vjp_primal_tree_values((gated, h0))
    h, h_last = _named(passes.gated_forward(gated, h0, reverse))
    return (h, h_last), (gated, h0, h)


def _gated_bwd(
    reverse: bool,
    passes: Passes,
    saved: tuple[Gated, Array | None, Array],
    cotangents: tuple[Any, Any],
) -> tuple[Gated, Array | None]:
    gated, h0, h = saved
    gradients, dh0 = passes.gated_backward(gated, h0, h, *_arriving(h, cotangents), reverse)
    return gradients, None if h0 is None else dh0


_gated.defvjp(_gated_fwd, _gated_bwd, symbolic_zeros=True)


def _arriving(h: Array, cotangents: tuple[Any, Any]) -> tuple[Array, Array | None]:
    """Gradients of h and h_last, each an array or a symbolic zero, as passes take them."""
    dh, dh_last = cotangents
    dh = zeros_like(h, h.dtype) if isinstance(dh, SymbolicZero) else dh
    return dh, None if isinstance(dh_last, SymbolicZero) else dh_last


def _named(results: tuple[Array, Array]) -> tuple[Array, Array]:
    h, h_last = (checkpoint_name(x, name) for x, name in zip(results, RESIDUAL_NAMES, strict=True))
    return h, h_last


def _step(
    x: Array, a: Array, h0: Array | None, *, reverse: bool, out_dtype: jnp.dtype
) -> tuple[Array, Array]:
    """The closed form of one step: what decoding runs, whatever the implementation."""
    wide = carry_dtype(x, a)
    h = x[:, 0].astype(wide)
    if h0 is not None:
        h = h + product(a[:, 0].astype(wide), h0)
    return h[:, None].astype(out_dtype), h


ONE_STEP = composed(_step)
