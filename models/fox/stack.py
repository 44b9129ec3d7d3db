"""Running the layers one after the other: unrolled or scanned, rematerialised or not, bit for bit alike."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from models.common.params import layer_keys, stack_layers
from models.common.shapes import Activations, Params
from models.fox.config import FoxRuntime, Remat

Layer = Callable[[Params, Activations], Activations]

# Names that kernels give to what their backward pass needs (`jax.ad_checkpoint.checkpoint_name`).
ATTENTION_RESIDUALS = ("forgetting_attention_out", "forgetting_attention_lse")


def run_layers(layer: Layer, layers: dict[str, Params], x: Activations, runtime: FoxRuntime) -> Activations:
    """Applies `layer(params, x)` for every entry of `layers`, in order.

    Scanned and unrolled runs compile to the same arithmetic (see `isolated`), so that a run may switch
    `scan_layers` and reproduce its losses bit for bit.
    """
    step = isolated(rematerialized(layer, runtime.remat))
    if not runtime.scan_layers:
        for key in layer_keys(layers):
            x = step(layers[key], x)
        return x

    def body(carry: Array, params: Params) -> tuple[Array, None]:
        return step(params, carry), None

    return jax.lax.scan(body, x, stack_layers(layers))[0]


def rematerialized(layer: Layer, remat: Remat) -> Layer:
    """`layer` whose backward pass recomputes what the policy does not save (see `FoxRuntime.remat`)."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "dots":
            return jax.checkpoint(layer, policy=policies.dots_saveable)
        case "attention":
            return jax.checkpoint(layer, policy=policies.save_only_these_names(*ATTENTION_RESIDUALS))


def isolated(layer: Layer) -> Layer:
    """`layer` as a unit of compilation: nothing is fused across its borders, forward, residuals and backward.

    XLA contracts multiply-adds depending on what it fuses. In a scan the loop body is compiled by itself and
    what the backward pass needs goes through memory; unrolled, XLA would fuse across layers and between
    forward and backward, and round differently. Barriers on inputs, outputs, residuals and cotangents make
    both the same.
    """
    barrier = jax.lax.optimization_barrier

    @jax.custom_vjp
    def call(params: Params, x: Array) -> Array:
        return barrier(layer(*barrier((params, x))))

    def forward(params: Params, x: Array) -> tuple[Array, Any]:
        out, pullback = jax.vjp(layer, *barrier((params, x)))
        return barrier((out, pullback))

    def backward(pullback: Any, cotangent: Array) -> tuple[Params, Array]:
        pullback, cotangent = barrier((pullback, cotangent))
        return barrier(pullback(cotangent))

    call.defvjp(forward, backward)
    return call
