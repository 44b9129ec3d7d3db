"""Public function of the product in parts: argument checks and choice of implementation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from kernels.common.dispatch import check_sizes, choose, explain_choice, refuse_pruning
from kernels.common.product_request import check_product
from kernels.split_matmul import pallas_mosaic_gpu, reference, xla
from kernels.split_matmul.config import Request

OP = "split_matmul"


class SplitMatmulImplementation(NamedTuple):
    """An implementation: whether it can take a call, and its differentiable entry point."""

    supports: Callable[[Request], str | None]
    split_matmul: Callable[..., list[Array]]


IMPLEMENTATIONS: Mapping[str, SplitMatmulImplementation] = {
    name: SplitMatmulImplementation(module.supports, module.split_matmul)
    for name, module in (("pallas_mosaic_gpu", pallas_mosaic_gpu), ("xla", xla), ("reference", reference))
}
# The automatic choice: the first that takes a call.
PREFERENCE = ("pallas_mosaic_gpu", "xla")


def split_matmul(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D PF"],
    bias: Float[Array, " PF"],
    parts: int,
    *,
    implementation: str | Sequence[str] | None = None,
) -> list[Float[Array, "*B F"]]:
    """x W_i + b_i for P maps of one input, in one product, each result in memory of its own.

    For what reads them by themselves, such as kernels of attention: of a joint result each part is copied
    first. Made for inference. Differentiable in all arguments; gradients of every implementation but
    `reference` are XLA's, computed from the inputs.

    Args:
      x: inputs, of any float dtype.
      kernel: [W_0 | W_1 | ...] side by side, F columns each.
      bias: [b_0 | b_1 | ...].
      parts: P, how many.
      implementation: None (automatic), a name (that one or an error), or names tried in order.

    Returns:
      The P results in x's dtype. `xla` rounds the product and the sum to it; the others only the sum.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
      ImplementationError: the named implementation cannot take the call; the message says why.
    """
    _check(x, kernel, bias, parts)
    call = request(x, kernel, bias, parts)
    _, chosen = choose(OP, IMPLEMENTATIONS, call, implementation, PREFERENCE)
    return chosen.split_matmul(x, kernel, bias, parts)


def explain(
    x: Array | jax.ShapeDtypeStruct,
    kernel: Array | jax.ShapeDtypeStruct,
    bias: Array | jax.ShapeDtypeStruct,
    parts: int,
    *,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """Says which implementation would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.

    Raises:
      ValueError: as in the call.
    """
    _check(x, kernel, bias, parts)
    return explain_choice(OP, IMPLEMENTATIONS, request(x, kernel, bias, parts), implementation, PREFERENCE)


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter (R rows, D, F, P; the rest is default), for the command line.

    Raises:
      ValueError: a letter is not a size of this op, or pruning is asked for.
    """
    check_sizes(OP, sizes, "RDFP")
    refuse_pruning(OP, pruning)
    rows, width, features, parts = (
        sizes.get(letter, default) for letter, default in (("R", 1280), ("D", 768), ("F", 768), ("P", 3))
    )
    shapes = ((rows, width), (width, parts * features), (parts * features,))
    x, kernel, bias = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return explain(x, kernel, bias, parts, implementation=implementation)


def request(x: Any, kernel: Any, bias: Any, parts: int) -> Request:
    """What dispatch needs to know of a call."""
    return Request.of(x, kernel, bias, parts)


def _check(x: Any, kernel: Any, bias: Any, parts: Any) -> None:
    """Raises ValueError unless these fit together."""
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"{OP}: parts must be a whole number, at least 1; got {parts!r}.")
    check_product(OP, x, kernel, bias, parts, "P F", f"a multiple of {parts}")
