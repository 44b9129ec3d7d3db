"""Times of matrix products on an accelerator, beside plain XLA (cuBLAS and its fusions), and a floor.

A call takes some 20 us, less than a host needs to start it: what is timed is its kernels, by a profiler's
trace, without the gaps between them. And it reads a matrix that nobody has read shortly before: a program
has several calls, each with a matrix of its own, which together do not fit the L2 cache. XLA has the options
that models are compiled with.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.bench import DeviceTiming, Rates, measure_rates, time_kernels
from kernels.common.compiler import compiler_options

# From x, a matrix and a bias to what the op returns.
Call = Callable[[Array, Array, Array], Any]
XLA, PRODUCT = "xla", "product"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call.

    Attributes:
      name: of the sizes.
      rows, width: of x [R, D].
      groups, features: of the matrix's columns [groups F].
      results: how many arrays of F columns are written.
      calls: how many a program has.
      dtype: of all arrays.
    """

    name: str
    rows: int
    width: int
    groups: int
    features: int
    results: int
    calls: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return self.groups * self.features

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """x, matrix, bias."""
        shapes = ((self.rows, self.width), (self.width, self.columns), (self.columns,))
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]

    @property
    def flops(self) -> float:
        """Of a call's product."""
        return 2.0 * self.rows * self.width * self.columns

    @property
    def moved(self) -> float:
        """Bytes of a call: x, matrix, result, each once."""
        numbers = (self.rows + self.columns) * self.width + self.rows * self.results * self.features
        return float(numbers * jnp.dtype(self.dtype).itemsize)


def rows(
    shapes: Sequence[Shape], runs: Callable[[Shape], Mapping[str, Call]], calls: int, only: str, seed: int
) -> list[dict[str, Any]]:
    """Times implementations, XLA's program, and its product alone, in turns.

    Args:
      shapes: what is timed.
      runs: of a shape, by name; among them XLA.
      calls: traces of each, see `kernels.common.bench.time_kernels`.
      only: part of a shape's name; "" is all of them.
      seed: of the inputs.

    Returns:
      Rows {case, implementation, us, spread, TFLOP/s, floor us, share, xla us, product us, ratio, measured}:
      the floor is what measured rates of matmul and copy leave no way around, the share the floor's of the
      time, the ratio the time over XLA's.

    Raises:
      ValueError: `only` names no shape.
    """
    chosen = [shape for shape in shapes if only in str(shape)]
    if not chosen:
        raise ValueError(f"only={only!r} is part of no shape: {', '.join(map(str, shapes))}")
    rates = measure_rates() if jax.default_backend() != "cpu" else measure_rates(256, 2**16)
    found = []
    for shape in chosen:
        for row in _table(shape, runs(shape), rates, calls, seed):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    return found


def verdict(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """What the implementation of this name takes of XLA's time, by case."""
    return "\n".join(
        f"{row['case']}: {name} takes {row['ratio']} of XLA's time"
        for row in rows
        if row["implementation"] == name
    )


def operands(shape: Shape, seed: int = 0) -> tuple[Array, list[Array], Array]:
    """x, a matrix for each call, bias; made on the device."""

    @jax.jit
    def draw(key: Array) -> tuple[Array, list[Array], Array]:
        keys = jax.random.split(key, 2 + shape.calls)
        x, matrix, bias = shape.arrays
        scale = jnp.asarray(shape.width**-0.5, shape.dtype)
        matrices = [scale * _normal(key, matrix) for key in keys[2:]]
        return _normal(keys[0], x), matrices, _normal(keys[1], bias)

    return draw(jax.random.key(seed))


def _normal(key: Array, like: jax.ShapeDtypeStruct) -> Array:
    return jax.random.normal(key, like.shape, like.dtype)


def _product(x: Array, matrix: Array, bias: Array) -> Array:
    return x @ matrix + bias


def _table(
    shape: Shape, runs: Mapping[str, Call], rates: Rates, traces: int, seed: int
) -> list[dict[str, Any]]:
    times = _times(shape, {**runs, PRODUCT: _product}, traces, seed)
    floor = max(shape.flops / rates.matmul, shape.moved / rates.copy)
    plain, product = (times[name].median_s / shape.calls for name in (XLA, PRODUCT))
    found = []
    for name in runs:
        seconds = times[name].median_s / shape.calls
        found.append(
            {
                "case": str(shape),
                "implementation": name,
                "us": round(seconds * 1e6, 2),
                "spread": f"{100 * times[name].spread:.1f} %",
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


def _times(shape: Shape, runs: Mapping[str, Call], traces: int, seed: int) -> dict[str, DeviceTiming]:
    """Of whole programs, by name."""
    arrays = operands(shape, seed)

    def program(run: Call) -> Any:
        def every(x: Array, matrices: Sequence[Array], bias: Array) -> list[Any]:
            return [run(x, matrix, bias) for matrix in matrices]

        return jax.jit(every, compiler_options=compiler_options()).lower(*arrays).compile()

    started = {name: functools.partial(program(run), *arrays) for name, run in runs.items()}
    return time_kernels(started, traces=traces)
