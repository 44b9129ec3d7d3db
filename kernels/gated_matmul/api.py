"""Public function of the gated product: argument checks and choice of implementation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning, target
from kernels.gated_matmul import pallas_mosaic_gpu, reference, xla
from kernels.gated_matmul.config import Request

OP = "gated_matmul"
DTYPES = ("float16", "bfloat16", "float32", "float64")


class GatedMatmulImplementation(NamedTuple):
    """An implementation: whether it can take a call, and its differentiable entry point."""

    supports: Callable[[Request], str | None]
    gated_matmul: Callable[..., Array]


IMPLEMENTATIONS: Mapping[str, GatedMatmulImplementation] = {
    name: GatedMatmulImplementation(module.supports, module.gated_matmul)
    for name, module in (("pallas_mosaic_gpu", pallas_mosaic_gpu), ("xla", xla), ("reference", reference))
}
# The automatic choice: the first that takes a call.
PREFERENCE = ("pallas_mosaic_gpu", "xla")


def gated_matmul(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D F2"],
    bias: Float[Array, " F2"],
    *,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*B F"]:
    """gelu(x W_g + b_g) * (x W_v + b_v), the GELU by tanh: what a gated MLP computes before its last map.

    Made for inference. Differentiable in all arguments; gradients of every implementation but `reference` are
    XLA's, computed from the inputs.

    Args:
      x: inputs, of any float dtype.
      kernel: [W_g | W_v], gate and value side by side, F columns each.
      bias: [b_g | b_v].
      implementation: None (automatic), a name (that one or an error), or names tried in order.

    Returns:
      In x's dtype. `xla` rounds the product, the GELU and the result to it; the others only the result.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
      ImplementationError: the named implementation cannot take the call; the message says why.
    """
    _check(x, kernel, bias)
    call = request(x, kernel, bias)
    _, chosen = choose(OP, IMPLEMENTATIONS, call, implementation, PREFERENCE)
    return chosen.gated_matmul(x, kernel, bias)


def explain(
    x: Array | jax.ShapeDtypeStruct,
    kernel: Array | jax.ShapeDtypeStruct,
    bias: Array | jax.ShapeDtypeStruct,
    *,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """Says which implementation would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.

    Raises:
      ValueError: as in the call.
    """
    _check(x, kernel, bias)
    return explain_choice(OP, IMPLEMENTATIONS, request(x, kernel, bias), implementation, PREFERENCE)


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter (R rows, D, F; the rest is default), for the command line.

    Raises:
      ValueError: a letter is not a size of this op, or pruning is asked for.
    """
    check_sizes(OP, sizes, "RDF")
    refuse_pruning(OP, pruning)
    rows, width, features = sizes.get("R", 1280), sizes.get("D", 768), sizes.get("F", 3072)
    shapes = ((rows, width), (width, 2 * features), (2 * features,))
    return explain(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), implementation=implementation)


def request(x: Any, kernel: Any, bias: Any) -> Request:
    """What dispatch needs to know of a call."""
    device = target()
    return Request(
        device.platform, device.capability, device.kind, str(x.dtype), str(kernel.dtype), str(bias.dtype),
        rows=math.prod(x.shape[:-1]), width=x.shape[-1], features=kernel.shape[1] // 2,
    )  # fmt: skip


def _check(x: Any, kernel: Any, bias: Any) -> None:
    """Raises ValueError unless these fit together."""
    arrays = {"x": x, "kernel": kernel, "bias": bias}
    for name, array in arrays.items():
        if str(getattr(array, "dtype", None)) not in DTYPES:
            got = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"{OP}: {name} has dtype {got}; use one of {', '.join(DTYPES)}.")
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"{OP}: x must be [..., D] without an empty axis; got shape {x.shape}.")
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1] or kernel.shape[1] % 2 or not kernel.shape[1]:
        raise ValueError(
            f"{OP}: kernel must be [D, 2 F] = [{x.shape[-1]}, an even number]; got shape {kernel.shape}."
        )
    if bias.shape != kernel.shape[1:]:
        raise ValueError(f"{OP}: bias must be [2 F] = {kernel.shape[1:]}; got shape {bias.shape}.")
