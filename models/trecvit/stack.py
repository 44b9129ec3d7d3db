"""Running the layers one after the other: unrolled or scanned, rematerialised or not."""

from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array

from kernels.linear_scan import RESIDUAL_NAMES
from models.common.params import layer_keys, stack_layers
from models.common.shapes import Params
from models.common.vit import Key
from models.trecvit.config import Remat, TRecViTRuntime

Layer = Callable[[Params, Array, Array, Key | None], Array]


def run_layers(
    layer: Layer,
    layers: Mapping[str, Params],
    x: Array,
    positions: Array,
    runtime: TRecViTRuntime,
    rng: Key | None = None,
) -> Array:
    """Applies `layer(params, x, positions, key)` for every entry of `layers`, in order.

    Args:
      rng: split into one key per layer; None gives every layer None.
    """
    step = rematerialized(layer, runtime.remat)
    keys = None if rng is None else jax.random.split(rng, len(layers))
    if runtime.scan_layers:

        def body(carry: Array, one: tuple[Params, Key | None]) -> tuple[Array, None]:
            params, key = one
            return step(params, carry, positions, key), None

        return jax.lax.scan(body, x, (stack_layers(layers), keys))[0]
    if isinstance(x, jax.core.Tracer):  # a function called once per layer is traced and lowered once
        step = jax.jit(step)
    for i, name in enumerate(layer_keys(layers)):
        x = step(layers[name], x, positions, None if keys is None else keys[i])
    return x


def rematerialized(layer: Layer, remat: Remat) -> Layer:
    """`layer` whose backward pass recomputes what the policy does not save (see `TRecViTRuntime.remat`)."""
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "dots":
            keep_scan = policies.save_only_these_names(*RESIDUAL_NAMES)
            return jax.checkpoint(
                layer, policy=policies.save_from_both_policies(policies.dots_saveable, keep_scan)
            )
