"""The gated product on Hopper GPUs: one Pallas Mosaic GPU kernel for product, bias, GELU and gating.

This module turns calls into what the raw kernel wants: a matrix of rows that TMA can address. Made for
inference: gradients are those of `xla`, computed from the inputs again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.common.dispatch import target
from kernels.common.hopper import not_hopper
from kernels.common.manual import aligned_varying
from kernels.common.tiling import pad_axis_to
from kernels.gated_matmul import _mosaic_gpu_sm90 as sm90
from kernels.gated_matmul import xla
from kernels.gated_matmul.config import Request

DTYPES = ("bfloat16", "float16")
BIAS_DTYPES = (*DTYPES, "float32")
# TMA takes rows in groups of as many.
ROW_GROUP = 8


def supports(request: Request) -> str | None:
    """Hopper, 16-bit x and matrix, whole tiles of channels and features; any number of rows."""
    if refusal := not_hopper(request.platform, request.capability):
        return refusal
    if request.dtype not in DTYPES or request.kernel_dtype != request.dtype:
        return (
            f"takes x and kernel of one dtype, bfloat16 or float16, not {request.dtype} and"
            f" {request.kernel_dtype}"
        )
    if request.bias_dtype not in BIAS_DTYPES:
        return f"takes a bias of {', '.join(BIAS_DTYPES)}, not {request.bias_dtype}"
    if request.width % sm90.DEPTH:
        return f"takes x of a multiple of {sm90.DEPTH} channels, not {request.width}"
    if request.features % sm90.Tile.columns:
        return f"takes a multiple of {sm90.Tile.columns} features, not {request.features}"
    return None


def gated_matmul(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D F2"],
    bias: Float[Array, " F2"],
    *,
    tile: sm90.Tile | None = None,
) -> Float[Array, "*B F"]:
    """gelu(x W_g + b_g) * (x W_v + b_v), float32 from the first product to the last, rounded once.

    Args:
      tile: what a CTA computes at a time; None: the default.
    """
    return _differentiable(tile, x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(tile: sm90.Tile | None, x: Array, kernel: Array, bias: Array) -> Array:
    @jax.custom_batching.custom_vmap
    def call(x: Array, kernel: Array, bias: Array) -> Array:
        return _run(x, kernel, bias, tile)

    @call.def_vmap
    def rule(axis_size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        if in_batched == [True, False, False]:  # more rows
            return call(*operands), True

        def one(index: Array) -> Array:
            entries = (y[index] if batched else y for y, batched in zip(operands, in_batched, strict=True))
            return call(*entries)

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return call(x, kernel, bias)


def _forward(tile: sm90.Tile | None, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return _differentiable(tile, *operands), operands


def _backward(tile: sm90.Tile | None, operands: tuple[Array, ...], cotangent: Array) -> Any:
    del tile
    return jax.vjp(xla.gated_matmul, *operands)[1](cotangent)


_differentiable.defvjp(_forward, _backward)


def _run(x: Array, kernel: Array, bias: Array, tile: sm90.Tile | None) -> Array:
    """All rows as one matrix, padded to what TMA addresses; beyond, it reads zeros and writes nothing."""
    flat = x.reshape(-1, x.shape[-1])
    rows, least = flat.shape[0], (tile or sm90.Tile()).rows
    flat = pad_axis_to(flat, 0, least if rows < least else ROW_GROUP)
    plan = sm90.make_plan(flat.shape[0], x.shape[-1], kernel.shape[1] // 2, target().cores, tile)
    # What a Pallas kernel returns has forgotten over which manual mesh axes its operands vary.
    out = aligned_varying((sm90.forward(flat, kernel, bias, plan=plan), flat, kernel, bias))[0]
    return out[:rows].reshape(*x.shape[:-1], -1)
