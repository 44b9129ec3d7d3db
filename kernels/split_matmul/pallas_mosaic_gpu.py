"""The product in parts on Hopper GPUs: one Pallas Mosaic GPU kernel that writes several arrays.

Made for inference: gradients are those of `xla`, computed from the inputs again.
"""

import functools

from jaxtyping import Array, Float

from kernels.common import hopper_rows
from kernels.common.dispatch import target
from kernels.split_matmul import _mosaic_gpu_sm90 as sm90
from kernels.split_matmul import xla
from kernels.split_matmul.config import Request


def supports(request: Request) -> str | None:
    """Hopper, 16-bit x and matrix, whole tiles of channels and features; any number of rows and parts."""
    return hopper_rows.refusal(request, sm90.COLUMNS)


def split_matmul(
    x: Float[Array, "*B D"],
    kernel: Float[Array, "D PF"],
    bias: Float[Array, " PF"],
    parts: int,
    *,
    tile: sm90.Tile | None = None,
) -> list[Float[Array, "*B F"]]:
    """x W_i + b_i, float32 until it is rounded once.

    Args:
      tile: what a CTA computes at a time; None: the one that leaves least to do.
    """
    plain = functools.partial(xla.split_matmul, parts=parts)
    return hopper_rows.for_inference(functools.partial(_run, parts, tile), plain, x, kernel, bias)


def _run(parts: int, tile: sm90.Tile | None, x: Array, kernel: Array, bias: Array) -> list[Array]:
    def rows(flat: Array, kernel: Array, bias: Array) -> list[Array]:
        features = kernel.shape[1] // parts
        plan = sm90.make_plan(flat.shape[0], x.shape[-1], features, parts, target().cores, tile)
        return sm90.product_in_parts(flat, kernel, bias, parts=parts, plan=plan)

    least = min(size[0] for size in sm90.SIZES) if tile is None else tile.rows
    return hopper_rows.over_rows(rows, least, x, kernel, bias)
