"""The gated product on Hopper GPUs: one Pallas Mosaic GPU kernel for product, bias, GELU and gating.

Made for inference: gradients are those of `xla`, computed from the inputs again.
"""

import functools

from jaxtyping import Array, Float

from kernels.common import hopper_rows
from kernels.common.dispatch import target
from kernels.gated_matmul import _mosaic_gpu_sm90 as sm90
from kernels.gated_matmul import xla
from kernels.gated_matmul.config import Request


def supports(request: Request) -> str | None:
    """Hopper, 16-bit x and matrix, whole tiles of channels and features; any number of rows."""
    return hopper_rows.refusal(request, sm90.COLUMNS)


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
    return hopper_rows.for_inference(functools.partial(_run, tile), xla.gated_matmul, x, kernel, bias)


def _run(tile: sm90.Tile | None, x: Array, kernel: Array, bias: Array) -> Array:
    def rows(flat: Array, kernel: Array, bias: Array) -> list[Array]:
        features = kernel.shape[1] // sm90.HALVES
        plan = sm90.make_plan(flat.shape[0], x.shape[-1], features, target().cores, tile)
        return [sm90.gated_product(flat, kernel, bias, plan=plan)]

    return hopper_rows.over_rows(rows, (tile or sm90.Tile()).rows, x, kernel, bias)[0]
