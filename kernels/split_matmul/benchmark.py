"""The product in parts on an accelerator: times beside XLA, and a floor (`kernels.common.product_bench`).

python -m launch.bench kernels.split_matmul --output=benchmarks/results/split-matmul-h100.json
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kernels.common import product_bench
from kernels.common.product_bench import XLA, Call, Shape
from kernels.split_matmul import pallas_mosaic_gpu, xla
from kernels.split_matmul._mosaic_gpu_sm90 import Tile
from kernels.split_matmul.api import request

CHOSEN = "pallas_mosaic_gpu"
TILES = (
    Tile(128, 192),
    Tile(128, 192, shared="x"),
    Tile(128, 192, shared="nothing"),
    Tile(192, 192),
    Tile(192, 192, shared="x"),
    Tile(128, 256),
    Tile(128, 128),
    Tile(192, 128),
    Tile(128, 64),
)


def shape(rows: int, width: int, features: int, parts: int, calls: int) -> Shape:
    """Of a call with x [R, D] and P parts of F features."""
    return Shape(f"R{rows} D{width} F{features} P{parts}", rows, width, parts, features, parts, calls)


# Queries, keys and values. TAPNext-B: a frame with 256 points, with 257 slots, with 1024 points; TRecViT-B: a
# frame; the small TAPNext that ships. Then two maps as of a recurrent block, and one.
SHAPES = (
    shape(1280, 768, 768, 3, 12),
    shape(1288, 768, 768, 3, 12),
    shape(2048, 768, 768, 3, 12),
    shape(197, 768, 768, 3, 12),
    shape(512, 192, 192, 3, 12),
    shape(1280, 768, 768, 2, 12),
    shape(1280, 768, 768, 1, 24),
)


def rows(
    *, calls: int = 3, only: str = "", shapes: Sequence[Shape] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Times the kernel, some of its tiles, XLA's program, and its product alone, see `product_bench.rows`.

    Where the kernel does not run, XLA's rows alone.
    """
    return product_bench.rows(shapes, _runs, calls, only, seed)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the kernel with tiles of its choice takes of XLA's time, by case."""
    return product_bench.verdict(rows, CHOSEN)


def _runs(shape: Shape) -> dict[str, Call]:
    parts = shape.groups
    runs: dict[str, Call] = {XLA: functools.partial(xla.split_matmul, parts=parts)}
    x, matrix, bias = shape.arrays
    if pallas_mosaic_gpu.supports(request(x, matrix, bias, parts)) is None:
        kernel = functools.partial(pallas_mosaic_gpu.split_matmul, parts=parts)
        runs[CHOSEN] = kernel
        for tile in TILES:
            if shape.features % tile.columns == 0 and shape.columns % tile.whole == 0:
                runs[f"{CHOSEN} {tile}"] = functools.partial(kernel, tile=tile)
    return runs
