"""Kernel of the product in parts for Hopper (sm_90a): a tile lies in one part, and is written to that part's
array (`kernels.common.hopper_product`).
"""

import functools

import jax
from jaxtyping import Array, Float

from kernels.common import hopper_product
from kernels.common.hopper_product import DEPTH, Plan, Tile

__all__ = ["COLUMNS", "DEPTH", "SIZES", "Plan", "Tile", "make_plan", "product_in_parts"]

# Rows and columns of tiles, the first ones preferred where as much is left to do.
SIZES = ((128, 192), (192, 192), (128, 256), (128, 128), (192, 128), (128, 64))
COLUMNS = min(columns for _, columns in SIZES)


def make_plan(rows: int, width: int, features: int, parts: int, cores: int, tile: Tile | None = None) -> Plan:
    """The plan for x [rows, width] and a matrix [width, parts features], see `hopper_product.make_plan`.

    Args:
      rows: at least a tile's; sizes of tiles that are larger are left out.
      tile: None: what leaves the CTAs least to do.

    Raises:
      ValueError: a part that is no whole tiles.
    """
    if tile is None:
        sizes = [size for size in SIZES if size[0] <= rows and features % size[1] == 0]
        return hopper_product.best_plan(rows, width, parts * features, cores, sizes, 1)
    if features % tile.columns:
        raise ValueError(f"tiles of {tile} take a multiple of {tile.columns} features, not {features}")
    return hopper_product.make_plan(rows, width, parts * features, cores, tile, 1)


@functools.partial(jax.jit, static_argnames=("parts", "plan"))  # traced once for all layers of a model
def product_in_parts(
    x: Float[Array, "R D"], kernel: Float[Array, "D PF"], bias: Float[Array, " PF"], *, parts: int, plan: Plan
) -> list[Float[Array, "R F"]]:
    """x W_i + b_i, rounded once.

    Args:
      x: 16 bits; R a multiple of 8 and no less than a tile's rows.
      kernel: of x's dtype, [W_0 | W_1 | ...].
      bias: [b_0 | b_1 | ...], of 16 or 32 bits.
      plan: for these sizes.
    """
    return hopper_product.call(
        x, kernel, bias, plan=plan, finish=lambda groups: groups[0], parts=parts, name="split_matmul"
    )
