"""Running layers one after the other: unrolled or scanned, rematerialised or not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from kernels.common.dispatch import target
from models.common.params import layer_keys, stack_layers
from models.common.shapes import Params

Remat = Literal["none", "full", "dots", "attention"]
# (params, x, context, key) -> x. The context is the same for all layers and has no gradient; the key is the
# layer's own, or None.
Layer = Callable[[Params, Array, Any, Any], Array]


def run_layers(
    layer: Layer,
    layers: Mapping[str, Params],
    x: Array,
    context: Any,
    *,
    remat: Remat,
    scan: bool,
    saved: Sequence[str],
    rng: Any = None,
) -> Array:
    """Applies `layer(params, x, context, key)` for every entry of `layers`, in order; see `read_layers`."""
    options: dict[str, Any] = {"remat": remat, "scan": scan, "saved": saved, "rng": rng}
    return read_layers(layer, layers, x, context, read=lambda x: None, **options)[0]


def read_layers[R](
    layer: Layer,
    layers: Mapping[str, Params],
    x: Array,
    context: Any,
    *,
    read: Callable[[Array], R],
    remat: Remat,
    scan: bool,
    saved: Sequence[str],
    rng: Any = None,
) -> tuple[Array, R]:
    """Applies `layer(params, x, context, key)` for every entry of `layers`, in order, and reads every result.

    Except on a GPU, scanned and unrolled runs compile to the same arithmetic (see `isolated`), so that a run
    may switch and reproduce its losses bit for bit.

    Args:
      read: what is kept of the output of every layer; None: nothing.
      remat, saved: see `rematerialized`.
      scan: run the layers as one `lax.scan`.
      rng: split into one key per layer; None gives every layer None.

    Returns:
      (the last layer's output, what was read, with a leading axis of layers).
    """
    step = rematerialized(layer, remat, saved)
    if target().platform != "gpu":  # there it would cost an eighth of all kernels, and matmuls differ anyway
        step = isolated(step)
    keys = None if rng is None else jax.random.split(rng, len(layers))
    if scan:

        def body(carry: Array, one: tuple[Params, Any]) -> tuple[Array, R]:
            params, key = one
            carry = step(params, carry, context, key)
            return carry, read(carry)

        return jax.lax.scan(body, x, (stack_layers(layers), keys))
    if isinstance(x, jax.core.Tracer):  # a function called once per layer is traced and lowered once
        step = jax.jit(step)
    kept = []
    for index, name in enumerate(layer_keys(layers)):
        x = step(layers[name], x, context, None if keys is None else keys[index])
        kept.append(read(x))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def rematerialized(layer: Layer, remat: Remat, saved: Sequence[str]) -> Layer:
    """`layer` whose backward pass recomputes what the policy does not save.

    Args:
      remat: "none" saves everything; "full" each layer's input; "dots" the results of matmuls and of the
        kernel; "attention" those of the kernel.
      saved: names of the kernel's residuals (`jax.ad_checkpoint.checkpoint_name`).
    """
    policies = jax.checkpoint_policies
    keep_kernel = policies.save_only_these_names(*saved)
    match remat:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer)
        case "dots":
            policy = policies.save_from_both_policies(policies.dots_saveable, keep_kernel)
            return jax.checkpoint(layer, policy=policy)
        case "attention":
            return jax.checkpoint(layer, policy=keep_kernel)


def isolated(layer: Layer) -> Layer:
    """`layer` as a unit of compilation: nothing is fused across its borders, forward, residuals and backward.

    XLA contracts multiply-adds and orders sums depending on what it fuses and how arrays lie in memory. In a
    scan the loop body is compiled by itself and what the backward pass needs goes through buffers; unrolled,
    XLA would fuse across layers and between forward and backward, and carry one operation's memory order over
    to the next.
    Barriers and plain row-major order on inputs, outputs, residuals and cotangents make both the same.
    """

    @jax.custom_vjp
    def call(params: Params, x: Array, context: Any, key: Any) -> Array:
        return _border(layer(*_border((params, x, context)), key))

    def forward(params: Params, x: Array, context: Any, key: Any) -> tuple[Array, Any]:
        params, x, context = _border((params, x, context))
        out, pullback = jax.vjp(lambda params, x: layer(params, x, context, key), params, x)
        return _border((out, pullback))

    def backward(pullback: Any, cotangent: Array) -> tuple[Params, Array, None, None]:
        pullback, cotangent = _border((pullback, cotangent))
        return *_border(pullback(cotangent)), None, None

    call.defvjp(forward, backward)
    return call


def _border[T](tree: T) -> T:
    """The same values, where no fusion and no choice of memory order passes. Random keys pass as they are."""

    leaves, structure = jax.tree.flatten(tree)
    is_key = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    fixed = iter(jax.lax.optimization_barrier([x for x, key in zip(leaves, is_key, strict=True) if not key]))

    def row_major(x: Any) -> Any:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    borders = [x if key else row_major(next(fixed)) for x, key in zip(leaves, is_key, strict=True)]
    return jax.tree.unflatten(structure, borders)
