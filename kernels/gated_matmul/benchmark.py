"""The gated product on an accelerator: times beside plain XLA (cuBLAS and a fusion), and a floor.

    python -m launch.bench kernels.gated_matmul --output=benchmarks/results/gated-matmul-h100.json

A call takes some 20 us, less than a host needs to start it, and reads a matrix that nobody has read shortly
before. So what is timed is a program of several calls, each with a matrix of its own, divided by their
number: together the matrices do not fit the L2 cache. XLA has the options that models are compiled with.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.bench import DeviceTiming, Rates, measure_rates, time_bursts
from kernels.common.compiler import compiler_options
from kernels.common.dispatch import target
from kernels.gated_matmul import pallas_mosaic_gpu, xla
from kernels.gated_matmul._mosaic_gpu_sm90 import Tile
from kernels.gated_matmul.api import request

NOTHING = "-"
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


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of x [R, D], features F; how many calls a program has."""

    rows: int
    width: int
    features: int
    calls: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"R{self.rows} D{self.width} F{self.features} {self.dtype}"

    @property
    def flops(self) -> float:
        """Of a call's product."""
        return 4.0 * self.rows * self.width * self.features

    @property
    def moved(self) -> float:
        """Bytes of a call: x, matrix, result, each once."""
        numbers = (self.rows + 2 * self.features) * self.width + self.rows * self.features
        return float(numbers * jnp.dtype(self.dtype).itemsize)


# TAPNext-B: a frame with 256 points, with 257 slots, with 1024 points, and a clip of 48 frames.
SHAPES = (
    Shape(1280, 768, 3072, 12),
    Shape(1288, 768, 3072, 12),
    Shape(2048, 768, 3072, 12),
    Shape(61440, 768, 3072, 2),
)


def rows(
    *, calls: int = 7, only: str = "", shapes: Sequence[Shape] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Times the kernel's tiles, XLA's program, and its product alone, in turns.

    Args:
      calls: timed bursts of each, see `kernels.common.bench.time_bursts`.
      only: part of a shape's name, such as "R1280"; "" is all of them.
      shapes: what is timed.
      seed: of the inputs.

    Returns:
      Rows {case, implementation, us, spread, TFLOP/s, floor us, share, xla us, product us, ratio, measured}:
      the floor is what measured rates of matmul and copy leave no way around, the share the floor's of the
      time, the ratio the time over XLA's. Where the kernel does not run, XLA's rows alone.

    Raises:
      ValueError: `only` names no shape.
    """
    chosen = [shape for shape in shapes if only in str(shape)]
    if not chosen:
        raise ValueError(f"only={only!r} is part of no shape: {', '.join(map(str, shapes))}")
    rates = measure_rates() if jax.default_backend() != "cpu" else measure_rates(256, 2**16)
    found = []
    for shape in chosen:
        for row in _table(shape, rates, calls, seed):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the default tile is faster than XLA, by case."""
    name = _name(DEFAULT)
    return "\n".join(
        f"{row['case']}: {row['implementation']} takes {row['ratio']} of XLA's time"
        for row in rows
        if row["implementation"] == name
    )


def _name(tile: Tile) -> str:
    return f"pallas_mosaic_gpu {tile}"


def _product(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel + bias


def _table(shape: Shape, rates: Rates, bursts: int, seed: int) -> list[dict[str, Any]]:
    times = _times(shape, bursts, seed)
    floor = max(shape.flops / rates.matmul, shape.moved / rates.copy)
    plain, product = times["xla"].median_s / shape.calls, times["product"].median_s / shape.calls
    found = []
    for name, timing in times.items():
        if name == "product":
            continue
        seconds = timing.median_s / shape.calls
        found.append(
            {
                "case": str(shape),
                "implementation": name,
                "us": round(seconds * 1e6, 2),
                "spread": f"{100 * timing.spread:.1f} %",
                "TFLOP/s": round(shape.flops / seconds / 1e12, 1),
                "floor us": round(floor * 1e6, 2),
                "share": round(floor / seconds, 3),
                "xla us": round(plain * 1e6, 2),
                "product us": round(product * 1e6, 2),
                "ratio": round(seconds / plain, 3),
                "measured": str(rates),
            }
        )
    return found


def _times(shape: Shape, bursts: int, seed: int) -> dict[str, DeviceTiming]:
    """Of whole programs, by name."""
    operands = _operands(shape, seed)
    runs: dict[str, Callable[..., Array]] = {"xla": xla.gated_matmul, "product": _product}
    if pallas_mosaic_gpu.supports(request(operands[0], operands[1][0], operands[2])) is None:
        runs |= {_name(tile): functools.partial(pallas_mosaic_gpu.gated_matmul, tile=tile) for tile in TILES}

    def program(run: Callable[..., Array]) -> Any:
        def every(x: Array, kernels: Sequence[Array], bias: Array) -> list[Array]:
            return [run(x, kernel, bias) for kernel in kernels]

        return jax.jit(every, compiler_options=compiler_options()).lower(*operands).compile()

    compiled = {name: program(run) for name, run in runs.items()}
    started = {name: functools.partial(compiled[name], *operands) for name in compiled}
    return time_bursts(started, bursts=bursts, seconds=0.05 if target().platform != "cpu" else 0.001)


def _operands(shape: Shape, seed: int) -> tuple[Array, list[Array], Array]:
    """x, a matrix for each call, bias; made on the device."""

    @jax.jit
    def draw(key: Array) -> tuple[Array, list[Array], Array]:
        keys = jax.random.split(key, 2 + shape.calls)
        columns = 2 * shape.features
        x = jax.random.normal(keys[0], (shape.rows, shape.width), shape.dtype)
        bias = jax.random.normal(keys[1], (columns,), shape.dtype)
        scale = jnp.asarray(shape.width**-0.5, shape.dtype)
        return x, [scale * jax.random.normal(k, (shape.width, columns), shape.dtype) for k in keys[2:]], bias

    return draw(jax.random.key(seed))
