"""Kernel of the gated product for Hopper (sm_90a): gate and value are two groups of the matrix's columns, and
what leaves registers is gelu(gate) * value only (`kernels.common.hopper_product`).
"""

import functools
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from kernels.common import hopper_product
from kernels.common.hopper_math import gelu
from kernels.common.hopper_product import DEPTH, Plan, Tile

HALVES = 2  # gate, value
COLUMNS = Tile.columns  # of each half

__all__ = ["COLUMNS", "DEPTH", "Plan", "Tile", "gated_product", "make_plan"]


def make_plan(rows: int, width: int, features: int, cores: int, tile: Tile | None = None) -> Plan:
    """The plan for x [rows, width] and a matrix [width, 2 features], see `hopper_product.make_plan`.

    Args:
      tile: None: the default's size, sharing what leaves the CTAs least to do.

    Raises:
      ValueError: features that are no whole tiles.
    """
    if tile is None:
        sizes = ((Tile.rows, Tile.columns),)
        return hopper_product.best_plan(rows, width, features, cores, sizes, HALVES)
    return hopper_product.make_plan(rows, width, features, cores, tile, HALVES)


@functools.partial(jax.jit, static_argnames="plan")  # traced once for all layers of a model
def gated_product(
    x: Float[Array, "R D"], kernel: Float[Array, "D F2"], bias: Float[Array, " F2"], *, plan: Plan
) -> Float[Array, "R F"]:
    """gelu(x W_g + b_g) * (x W_v + b_v), rounded once.

    Args:
      x: 16 bits; R a multiple of 8 and no less than a tile's rows.
      kernel: of x's dtype, [W_g | W_v].
      bias: [b_g | b_v], of 16 or 32 bits.
      plan: for these sizes.
    """

    def finish(halves: Sequence[Array]) -> Array:
        gate, value = halves
        return gelu(gate) * value

    return hopper_product.call(x, kernel, bias, plan=plan, finish=finish, parts=1, name="gated_matmul")[0]
