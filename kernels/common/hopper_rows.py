"""From calls of models to the products of `kernels.common.hopper_product`, and back.

Which calls they take, rows as one matrix that TMA can address, mapped axes, gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common.hopper import not_hopper
from kernels.common.hopper_product import DEPTH
from kernels.common.manual import aligned_varying
from kernels.common.product_request import ProductRequest
from kernels.common.tiling import pad_axis_to

DTYPES = ("bfloat16", "float16")
BIAS_DTYPES = (*DTYPES, "float32")
# TMA takes rows in groups of as many.
ROW_GROUP = 8


def refusal(request: ProductRequest, columns: int) -> str | None:
    """Why such a product cannot be computed; None: it can.

    It takes Hopper, 16-bit x and matrix, whole tiles of channels and features, any number of rows.

    Args:
      request: of an op.
      columns: of the narrowest tile.
    """
    if why := not_hopper(request.platform, request.capability):
        return why
    if request.dtype not in DTYPES or request.kernel_dtype != request.dtype:
        return (
            f"takes x and kernel of one dtype, bfloat16 or float16, not {request.dtype} and"
            f" {request.kernel_dtype}"
        )
    if request.bias_dtype not in BIAS_DTYPES:
        return f"takes a bias of {', '.join(BIAS_DTYPES)}, not {request.bias_dtype}"
    if request.width % DEPTH:
        return f"takes x of a multiple of {DEPTH} channels, not {request.width}"
    if request.features % columns:
        return f"takes a multiple of {columns} features, not {request.features}"
    return None


def over_rows(
    run: Callable[[Array, Array, Array], list[Array]],
    least: int,
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D F"],
    bias: Float[Array, " F"],
) -> list[Float[Array, "*B part"]]:
    """`run(rows of x, kernel, bias)`, whose results are rows too, with x's leading axes.

    Args:
      least: rows that `run` takes; missing ones are zeros, as are those up to a multiple of ROW_GROUP.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    flat = pad_axis_to(flat, 0, least if rows < least else ROW_GROUP)
    results = run(flat, kernel, bias)
    # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
    aligned = aligned_varying((*results, flat, kernel, bias))[: len(results)]
    return [y[:rows].reshape(*x.shape[:-1], -1) for y in aligned]


def for_inference(run: Callable[..., Any], plain: Callable[..., Any], *operands: Float[Array, "..."]) -> Any:
    """`run(x, kernel, bias)`; mapped over x alone it has more rows, else calls follow one another; its
    gradients are those of `plain`, computed from the operands again.
    """

    @jax.custom_batching.custom_vmap
    def call(*operands: Array) -> Any:
        return run(*operands)

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *operands: Array) -> tuple[Any, Any]:
        if in_batched == [True, False, False]:  # more rows
            result = call(*operands)
        else:

            def one(index: Array) -> Any:
                pairs = zip(operands, in_batched, strict=True)
                return call(*(y[index] if batched else y for y, batched in pairs))

            result = jax.lax.map(one, jnp.arange(axis_size))
        return result, jax.tree.map(lambda _: True, result)

    return with_gradients_of(plain, call, *operands)


def with_gradients_of(plain: Callable[..., Any], run: Callable[..., Any], *operands: Any) -> Any:
    """`run(*operands)`, whose gradients are those of `plain`, computed from the operands again."""

    @jax.custom_vjp
    def differentiable(*operands: Any) -> Any:
        return run(*operands)

    def forward(*operands: Any) -> tuple[Any, tuple[Any, ...]]:
        return differentiable(*operands), operands

    def backward(operands: tuple[Any, ...], cotangent: Any) -> Any:
        return jax.vjp(plain, *operands)[1](cotangent)

    differentiable.defvjp(forward, backward)
    return differentiable(*operands)
