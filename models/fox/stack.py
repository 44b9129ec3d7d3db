"""Running the layers one after the other: unrolled or scanned, rematerialised or not."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from kernels.common.dispatch import target
from kernels.forgetting_attention import RESIDUAL_NAMES
from models.common.params import layer_keys, stack_layers
from models.common.shapes import Activations, Params
from models.fox.config import FoxRuntime, Remat
from models.fox.span import Span

Layer = Callable[[Params, Activations, Span], Activations]


def run_layers(
    layer: Layer, layers: dict[str, Params], x: Activations, span: Span, runtime: FoxRuntime
) -> Activations:
    """Applies `layer(params, x, span)` for every entry of `layers`, in order.

    Except on a GPU, scanned and unrolled runs compile to the same arithmetic (see `isolated`), so that a run
    may switch `scan_layers` and reproduce its losses bit for bit.
    """
    step = rematerialized(layer, runtime.remat)
    if target().platform != "gpu":  # there it would cost an eighth of all kernels, and matmuls differ anyway
        step = isolated(step)
    if not runtime.scan_layers:
        if isinstance(x, jax.core.Tracer):  # a function called once per layer is traced and lowered once
            step = jax.jit(step)
        for key in layer_keys(layers):
            x = step(layers[key], x, span)
        return x

    def body(carry: Array, params: Params) -> tuple[Array, None]:
        return step(params, carry, span), None

    return jax.lax.scan(body, x, stack_layers(layers))[0]


def rematerialized(layer: Layer, remat: Remat) -> Layer:
    """`layer` whose backward pass recomputes what the policy does not save (see `FoxRuntime.remat`)."""
    policies = jax.checkpoint_policies
    keep_attention = policies.save_only_these_names(*RESIDUAL_NAMES)
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "dots":
            saved = policies.save_from_both_policies(policies.dots_saveable, keep_attention)
            return jax.checkpoint(layer, policy=saved)
        case "attention":
            return jax.checkpoint(layer, policy=keep_attention)


def isolated(layer: Layer) -> Layer:
    """`layer` as a unit of compilation: nothing is fused across its borders, forward, residuals and backward.

    XLA contracts multiply-adds and orders sums depending on what it fuses and how arrays lie in memory. In a
    scan the loop body is compiled by itself and what the backward pass needs goes through buffers; unrolled,
    XLA would fuse across layers and between forward and backward, and carry one operation's memory order over
    to the next.
    Barriers and plain row-major order on inputs, outputs, residuals and cotangents make both the same.
    """

    @jax.custom_vjp
    def call(params: Params, x: Array, span: Span) -> Array:
        return _border(layer(*_border((params, x, span))))

    def forward(params: Params, x: Array, span: Span) -> tuple[Array, Any]:
        params, x, span = _border((params, x, span))
        out, pullback = jax.vjp(lambda params, x: layer(params, x, span), params, x)
        return _border((out, pullback))

    def backward(pullback: Any, cotangent: Array) -> tuple[Params, Array, None]:
        pullback, cotangent = _border((pullback, cotangent))
        return *_border(pullback(cotangent)), None

    call.defvjp(forward, backward)
    return call


def _border[T](tree: T) -> T:
    """The same values, where no fusion and no choice of memory order passes."""
    tree = jax.lax.optimization_barrier(tree)
    return jax.tree.map(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), tree)
