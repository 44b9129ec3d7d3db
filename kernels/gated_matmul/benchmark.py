"""The gated product on an accelerator: times beside plain XLA, and a floor (`kernels.common.product_bench`).

python -m launch.bench kernels.gated_matmul --output=benchmarks/results/gated-matmul-h100.json
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kernels.common import product_bench
from kernels.common.product_bench import XLA, Call, Shape
from kernels.gated_matmul import pallas_mosaic_gpu, xla
from kernels.gated_matmul._mosaic_gpu_sm90 import Tile
from kernels.gated_matmul.api import request

DEFAULT = Tile()
TILES = (
    DEFAULT,
    dataclasses.replace(DEFAULT, staggered=True),
    dataclasses.replace(DEFAULT, shared="x"),
    dataclasses.replace(DEFAULT, shared="nothing"),
    Tile(128, 64),
    Tile(192, 64),
    Tile(192, 128),
)


def shape(rows: int, width: int, features: int, calls: int) -> Shape:
    """Of a call with x [R, D] and features F."""
    return Shape(f"R{rows} D{width} F{features}", rows, width, 2, features, 1, calls)


# TAPNext-B: a frame with 256 points, with 257 slots, with 1024 points, and a clip of 48 frames.
SHAPES = (
    shape(1280, 768, 3072, 12),
    shape(1288, 768, 3072, 12),
    shape(2048, 768, 3072, 12),
    shape(61440, 768, 3072, 2),
)


def rows(
    *, calls: int = 3, only: str = "", shapes: Sequence[Shape] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Times the kernel's tiles, XLA's program, and its product alone, see `product_bench.rows`.

    Where the kernel does not run, XLA's rows alone.
    """
    return product_bench.rows(shapes, _runs, calls, only, seed)


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the default tile takes of XLA's time, by case."""
    return product_bench.verdict(rows, _name(DEFAULT))


def _name(tile: Tile) -> str:
    return f"pallas_mosaic_gpu {tile}"


def _runs(shape: Shape) -> dict[str, Call]:
    runs: dict[str, Call] = {XLA: xla.gated_matmul}
    if pallas_mosaic_gpu.supports(request(*shape.arrays)) is None:
        whole = [tile for tile in TILES if shape.features % tile.whole == 0]
        runs |= {_name(tile): functools.partial(pallas_mosaic_gpu.gated_matmul, tile=tile) for tile in whole}
    return runs
