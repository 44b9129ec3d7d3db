"""What the kernel contract does not ask of the Hopper kernel, on such a GPU: every tile, and the frame of a
TAPNext-B, whose CTAs share what they load.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_matmul import gated_matmul
from kernels.gated_matmul import pallas_mosaic_gpu as kernel
from kernels.gated_matmul.benchmark import TILES

pytestmark = pytest.mark.gpu

# Rounding of the result to 8 bits of mantissa, and sums in another order.
ROUNDED = 2.0**-8


def draw(rows: int, width: int, features: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(rows), 3)
    shapes = ((rows, width), (width, 2 * features), (2 * features,))
    x, matrix, bias = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
    return x, matrix * jnp.bfloat16(width**-0.5), bias


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("size", [(1280, 768, 3072), (2048, 768, 3072), (777, 192, 384), (9000, 256, 640)])
def test_every_tile_equals_reference_and_itself(size: tuple[int, int, int], tile: kernel.sm90.Tile) -> None:
    rows, width, features = size
    if tile.shared == "x":  # takes pairs of tiles
        features += features % (2 * tile.columns)
    operands = draw(rows, width, features)
    run = jax.jit(functools.partial(kernel.gated_matmul, tile=tile))
    first = np.asarray(run(*operands), np.float32)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(gated_matmul(*operands, implementation="reference"), np.float32)
    assert np.isfinite(first).all()
    error = np.abs(first - wanted) / np.maximum(np.abs(wanted), 2.0**-6)
    assert error.max() <= 2 * ROUNDED
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(run(*operands), np.float32), first)


def test_calls_in_a_row_do_not_disturb_each_other() -> None:
    """A layer's call starts while the one before ends, each with its own matrix."""
    x, matrix, bias = draw(1280, 768, 3072)
    matrices = [jnp.roll(matrix, shift, axis=1) for shift in range(0, 6144, 512)]

    @jax.jit
    def every(x: jax.Array, matrices: list[jax.Array], bias: jax.Array) -> list[jax.Array]:
        return [kernel.gated_matmul(x, matrix, bias) for matrix in matrices]

    alone = [np.asarray(jax.jit(kernel.gated_matmul)(x, one, bias), np.float32) for one in matrices]
    for _ in range(10):
        for found, wanted in zip(every(x, matrices, bias), alone, strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)
