"""Linear scans on an accelerator: shares of the rate at which it copies, and times beside plain XLA.

    python -m launch.bench kernels.linear_scan --output=benchmarks/results/scan-h200.json

A scan reads and writes each number once and computes next to nothing, so that the rate of a copy, measured in
the same run, is the floor. `rglru_scan` is timed beside the same gates left to XLA around the same scan.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.common.bench import DeviceTiming, Rates, compile_all, measure_rates, time_bursts, time_kernels
from kernels.common.dispatch import choose
from kernels.linear_scan import api
from kernels.linear_scan.api import IMPLEMENTATIONS, linear_scan, rglru_scan
from kernels.linear_scan.rglru import Gated, gates

NOTHING = "-"
PLAIN = "associative"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes B, T, D of all arrays, and their dtype."""

    batch: int
    length: int
    width: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} D{self.width} {self.dtype}"

    @property
    def array_bytes(self) -> float:
        """Of one of them."""
        return float(self.batch * self.length * self.width * jnp.dtype(self.dtype).itemsize)


SHAPES = (
    Shape(8, 4096, 2048),
    Shape(1568, 32, 1536),
    Shape(1568, 16, 768),
    Shape(1280, 48, 768),
    Shape(8, 4096, 2048, "float32"),
    Shape(1568, 32, 1536, "float32"),
)
# Arrays that an op reads and writes: forward x, a, h or x, gates, h; backward a, h, dh, dx, da, and so on.
ARRAYS = {("scan", "fwd"): 3, ("scan", "bwd"): 5, ("rglru", "fwd"): 4, ("rglru", "bwd"): 8}
REQUIRED_SHARE, TARGET_SHARE = 0.65, 0.80
# Of the time of forward and backward pass by `associative_scan`; of the gates left to XLA.
REQUIRED_RATIO = {"scan": 1 / 3, "rglru": 1.0}


class Inputs(NamedTuple):
    """Arrays [B, T, D] of one dtype, a_param [D] float32; decays of 1 to some 1000 steps."""

    x: Array
    a: Array
    gate_x: Array
    gate_a: Array
    a_param: Array
    cotangent: Array

    @classmethod
    def draw(cls, shape: Shape, seed: int) -> "Inputs":
        """Random inputs, made on the device."""

        @jax.jit
        def draw(key: Array) -> Inputs:
            keys = jax.random.split(key, 6)
            size = (shape.batch, shape.length, shape.width)
            normal = [jax.random.normal(k, size, jnp.float32).astype(shape.dtype) for k in keys[:4]]
            a = jax.random.uniform(keys[4], size, jnp.float32, 0.5, 1.0).astype(shape.dtype)
            a_param = jax.random.uniform(keys[5], (shape.width,), jnp.float32, -7.0, 0.0)
            return Inputs(normal[0], a, normal[1], normal[2], a_param, normal[3])

        return draw(jax.random.key(seed))


def rows(
    *,
    bursts: int = 7,
    only: str = "",
    shapes: Sequence[Shape] = SHAPES,
    implementation: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Times both ops at every shape, and what they are compared with, in turns.

    Args:
      bursts: timed traces of each on a GPU, see `kernels.common.bench.time_kernels`; elsewhere bursts.
      only: part of a shape's name, such as "T4096"; "" is all of them.
      shapes: what is timed.
      implementation: None is the automatic choice.
      seed: of the inputs.

    Returns:
      Rows {case, pass, implementation, ms, spread, TB/s, share, required share, target share, baseline,
      baseline_ms, ratio, required ratio, met, measured}: share is that of the copy rate, each array of the op
      counted once; the pass "bwd" is (fwd+bwd) - fwd.

    Raises:
      ValueError: `only` names no shape.
    """
    chosen = [shape for shape in shapes if only in str(shape)]
    if not chosen:
        raise ValueError(f"only={only!r} is part of no shape: {', '.join(map(str, shapes))}")
    rates = measure_rates() if jax.default_backend() != "cpu" else measure_rates(256, 2**16)
    found = []
    for shape in chosen:
        table = _Table(shape, Inputs.draw(shape, seed), rates, implementation)
        for row in table.rows(bursts):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which required and target figures hold."""
    judged = [row for row in rows if row["met"] != NOTHING]
    failed = [f"{row['case']} {row['pass']}" for row in judged if row["met"] == "no"]
    hit = sum(row["met"] == "target" for row in judged)
    summary = f"required: {len(judged) - len(failed)} of {len(judged)} hold; target: {hit} of {len(judged)}"
    return "\n  ".join([summary, *(f"not met: {name}" for name in failed)])


def _scan(implementation: str | None, inputs: Inputs) -> Callable[..., Any]:
    def run(x: Array, a: Array) -> Array:
        return linear_scan(x, a, implementation=implementation)[0]

    return functools.partial(_passes, run, (inputs.x, inputs.a), inputs.cotangent)


def _rglru(implementation: str | None, inputs: Inputs) -> Callable[..., Any]:
    def run(x: Array, gate_x: Array, gate_a: Array, a_param: Array) -> Array:
        return rglru_scan(x, gate_x, gate_a, a_param, implementation=implementation)[0]

    return functools.partial(_passes, run, (*_gate_inputs(inputs),), inputs.cotangent)


def _unfused(implementation: str | None, inputs: Inputs) -> Callable[..., Any]:
    """Gates by XLA, float32, then the scan alone."""

    def run(x: Array, gate_x: Array, gate_a: Array, a_param: Array) -> Array:
        entering, a = gates(Gated(x, gate_x, gate_a, a_param, None))
        return linear_scan(entering, a, implementation=implementation)[0].astype(x.dtype)

    return functools.partial(_passes, run, (*_gate_inputs(inputs),), inputs.cotangent)


def _gate_inputs(inputs: Inputs) -> tuple[Array, Array, Array, Array]:
    return inputs.x, inputs.gate_x, inputs.gate_a, inputs.a_param


def _passes(run: Callable[..., Array], arrays: tuple[Array, ...], cotangent: Array) -> dict[str, Any]:
    """Function and arguments of the forward pass, and of both."""

    def both(*operands: Array) -> Any:
        out, pullback = jax.vjp(run, *operands[:-1])
        return out, pullback(operands[-1])

    return {"fwd": (run, arrays), "fwd+bwd": (both, (*arrays, cotangent))}


@dataclasses.dataclass(frozen=True)
class _Table:
    """The rows of one shape."""

    shape: Shape
    inputs: Inputs
    rates: Rates
    implementation: str | None

    def rows(self, bursts: int) -> Iterator[dict[str, Any]]:
        timed = self._times(bursts)
        for op, baseline in (("scan", PLAIN), ("rglru", "unfused")):
            for direction in ("fwd", "bwd", "fwd+bwd"):
                yield self._row(op, direction, timed[op], timed[f"{op} {baseline}"], baseline)

    def _times(self, bursts: int) -> dict[str, dict[str, DeviceTiming]]:
        """Of every op and what it is compared with, by pass."""
        made = {
            "scan": _scan(self.implementation, self.inputs)(),
            f"scan {PLAIN}": _scan(PLAIN, self.inputs)(),
            "rglru": _rglru(self.implementation, self.inputs)(),
            "rglru unfused": _unfused(self.implementation, self.inputs)(),
        }
        programs = {f"{name}|{pass_}": call for name, calls in made.items() for pass_, call in calls.items()}
        compiled = compile_all(programs)
        started = {name: functools.partial(compiled[name], *programs[name][1]) for name in programs}
        for name, run in started.items():
            if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(run())):
                raise FloatingPointError(f"{self.shape} {name}: the result holds NaN or infinity")
        timed = _timed(started, bursts)
        return {name: {pass_: timed[f"{name}|{pass_}"] for pass_ in calls} for name, calls in made.items()}

    def _row(
        self, op: str, direction: str, ours: Mapping[str, DeviceTiming], theirs: Mapping[str, DeviceTiming],
        baseline: str,
    ) -> dict[str, Any]:  # fmt: skip
        seconds, plain = _seconds(ours, direction), _seconds(theirs, direction)
        parts = ("fwd", "bwd") if direction == "fwd+bwd" else (direction,)
        moved = sum(ARRAYS[op, part] for part in parts) * self.shape.array_bytes
        share, ratio = moved / seconds / self.rates.copy, seconds / plain
        has_share = direction == "fwd" or op == "rglru"
        limit = REQUIRED_RATIO[op] if direction == "fwd+bwd" or op == "rglru" else None
        return {
            "case": f"{op} {self.shape}",
            "pass": direction,
            "implementation": self._name(),
            "ms": round(seconds * 1e3, 4),
            "spread": f"{100 * ours['fwd' if direction == 'fwd' else 'fwd+bwd'].spread:.1f} %",
            "TB/s": round(moved / seconds / 1e12, 2),
            "share": round(share, 3),
            "required share": REQUIRED_SHARE if has_share else NOTHING,
            "target share": TARGET_SHARE if has_share else NOTHING,
            "baseline": baseline,
            "baseline_ms": round(plain * 1e3, 4),
            "ratio": round(ratio, 3),
            "required ratio": NOTHING if limit is None else round(limit, 3),
            "met": _met(share if has_share else None, ratio, limit),
            "measured": str(self.rates),
        }

    def _name(self) -> str:
        """Of the implementation that runs."""
        if self.implementation is not None:
            return self.implementation
        x = self.inputs.x
        request = api.request("linear_scan", x, x)
        return choose("linear_scan", IMPLEMENTATIONS, request, None, api.preference(request))[0]


def _timed(started: Mapping[str, Callable[[], Any]], bursts: int) -> dict[str, DeviceTiming]:
    """By trace on a GPU: calls take 50 us and more, and a host that others share is late more often."""
    if jax.default_backend() == "gpu":
        return time_kernels(started, traces=bursts)
    return time_bursts(started, bursts=bursts)


def _seconds(times: Mapping[str, DeviceTiming], direction: str) -> float:
    if direction != "bwd":
        return times[direction].median_s
    return times["fwd+bwd"].median_s - times["fwd"].median_s


def _met(share: float | None, ratio: float, limit: float | None) -> str:
    """Whether share and ratio are as required, or better."""
    if share is None and limit is None:
        return NOTHING
    if (share is not None and share < REQUIRED_SHARE) or (limit is not None and ratio > limit):
        return "no"
    return "target" if share is None or share >= TARGET_SHARE else "required"
