"""What the kernel contract does not ask of the Hopper kernel, on such a GPU: every tile, and frames of a
TAPNext-B, whose CTAs share what they load.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.split_matmul import pallas_mosaic_gpu as kernel
from kernels.split_matmul import split_matmul
from kernels.split_matmul.benchmark import TILES

pytestmark = pytest.mark.gpu

# Rounding of the result to 8 bits of mantissa, and sums in another order.
ROUNDED = 2.0**-8


@pytest.mark.parametrize("tile", [None, *TILES], ids=str)
@pytest.mark.parametrize("size", [(1280, 768, 768, 3), (2048, 768, 768, 3), (777, 192, 768, 1)])
def test_every_tile_equals_reference_and_itself(
    size: tuple[int, int, int, int], tile: kernel.sm90.Tile | None
) -> None:
    rows, width, features, parts = size
    keys = jax.random.split(jax.random.key(rows), 3)
    shapes = ((rows, width), (width, parts * features), (parts * features,))
    x, matrix, bias = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
    operands = (x, matrix * jnp.bfloat16(width**-0.5), bias)
    run = jax.jit(functools.partial(kernel.split_matmul, parts=parts, tile=tile))
    first = np.asarray(jnp.stack(run(*operands)), np.float32)
    with jax.default_matmul_precision("highest"):
        wanted = jnp.stack(split_matmul(*operands, parts, implementation="reference"))
    error = np.abs(first - np.asarray(wanted, np.float32)) / np.maximum(np.abs(wanted), 2.0**-6)
    assert np.isfinite(first).all()
    assert error.max() <= 2 * ROUNDED
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(jnp.stack(run(*operands)), np.float32), first)
