"""Public function of the gated product: argument checks and choice of implementation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning
from kernels.common.product_request import check_product
from kernels.gated_matmul import pallas_mosaic_gpu, reference, xla
from kernels.gated_matmul.config import Request

OP = "gated_matmul"


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
    return Request.of(x, kernel, bias, 2)


def _check(x: Any, kernel: Any, bias: Any) -> None:
    """Raises ValueError unless these fit together."""
    check_product(OP, x, kernel, bias, 2, "2 F", "an even number")
