"""The table of an accelerator: forgetting attention beside cuDNN's attention without gates, in one process.

What is required, and the target, stand in `GOALS` as multiples of the baseline's time; "official" are the
times of the papers' Triton kernels on one H200, in the same multiples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.common.bench import DeviceTiming, Rates, compile_all, measure_rates, time_bursts
from kernels.forgetting_attention.api import forgetting_attention
from kernels.forgetting_attention.visits import Visits, measure_visits, own_tiles
from kernels.forgetting_attention.workloads import gates

LOG_EPS = -10.0
RULES = ("exact", "threshold", "tight")
NOTHING = "-"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes B, T = S, N = K, H; bfloat16."""

    batch: int
    length: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} N{self.heads} H{self.head_dim}"

    @property
    def flops(self) -> dict[str, float]:
        """Of the causal half: two products forward, five backward (recomputation is not counted)."""
        product = 2.0 * self.batch * self.heads * self.length * (self.length + 1) / 2 * self.head_dim
        return {"fwd": 2 * product, "bwd": 5 * product, "fwd+bwd": 7 * product}

    @property
    def bytes(self) -> dict[str, float]:
        """Each input read once and each output written once: 16-bit arrays, float32 gates and normalisers."""
        array = 2.0 * self.batch * self.length * self.heads * self.head_dim
        vector = 4.0 * self.batch * self.length * self.heads
        forward, backward = 4 * array + 2 * vector, 8 * array + 3 * vector
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}

    @property
    def threshold(self) -> float:
        """The published one, -(2 U + ln T) + log eps, for RMS-normalised q and k: U = sqrt(H)."""
        return float(-(2 * self.head_dim**0.5 + np.log(self.length)) + LOG_EPS)


class Goal(NamedTuple):
    """Multiples of the baseline's time."""

    official: float
    required: float
    target: float


SHAPES = (Shape(2, 16384, 16, 64), Shape(2, 16384, 8, 128), Shape(8, 4096, 16, 64))
# (shape, gates, rule, pass)
GOALS: Mapping[tuple[Shape, str, str, str], Goal] = {
    (SHAPES[0], "global", "exact", "fwd"): Goal(1.87, 1.15, 1.0),
    (SHAPES[0], "global", "exact", "bwd"): Goal(2.64, 1.35, 1.15),
    (SHAPES[0], "global", "threshold", "fwd"): Goal(1.19, 1.03, 1.01),
    (SHAPES[0], "mix", "threshold", "fwd+bwd"): Goal(1.40, 0.75, 0.63),
    (SHAPES[0], "mix", "tight", "fwd+bwd"): Goal(1.40, 0.75, 0.60),
    (SHAPES[0], "fast", "threshold", "fwd+bwd"): Goal(0.30, 0.15, 0.12),
    (SHAPES[0], "fast", "tight", "fwd+bwd"): Goal(0.30, 0.15, 0.10),
    (SHAPES[1], "global", "exact", "fwd"): Goal(1.56, 1.1, 0.95),
    (SHAPES[1], "global", "exact", "bwd"): Goal(1.69, 1.3, 1.1),
}
# What is timed at every shape: (gates, rule, passes); the pass "bwd" is (fwd+bwd) - fwd.
CASES = (
    ("global", "exact", ("fwd", "bwd", "fwd+bwd")),
    ("global", "threshold", ("fwd", "fwd+bwd")),
    ("mix", "threshold", ("fwd", "bwd", "fwd+bwd")),
    ("mix", "tight", ("fwd+bwd",)),
    ("fast", "threshold", ("fwd", "bwd", "fwd+bwd")),
    ("fast", "tight", ("fwd+bwd",)),
)
Attend = Callable[[Array, Array, Array, Array], Array]


class Inputs(NamedTuple):
    """RMS-normalised q and k, normal v and cotangent."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T N H"]
    v: Float[Array, "B T N H"]
    cotangent: Float[Array, "B T N H"]

    @classmethod
    def draw(cls, shape: Shape, seed: int) -> "Inputs":
        """Random inputs in bfloat16, made on the device."""

        @jax.jit
        def draw(key: Array) -> Inputs:
            sizes = (4, shape.batch, shape.length, shape.heads, shape.head_dim)
            x = jax.random.normal(key, sizes, jnp.float32)
            q, k = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True)) for y in x[:2])
            return Inputs(*(y.astype(jnp.bfloat16) for y in (q, k, x[2], x[3])))

        return draw(jax.random.key(seed))


def rows(
    *,
    bursts: int = 7,
    only: str = "",
    shapes: Sequence[Shape] = SHAPES,
    implementation: str | None = None,
    baseline: str = "cudnn",
    slow: str | None = "xla_chunked",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Times every case of `CASES` at every shape, and the baseline in turns with them.

    Args:
      bursts: timed bursts of each, see `kernels.common.bench.time_bursts`.
      only: part of a shape's name, such as "H128"; "" is all of them.
      shapes: what is timed.
      implementation: of forgetting attention; None is the automatic choice.
      baseline: `implementation` of `jax.nn.dot_product_attention`, causal, without gates.
      slow: another implementation, timed once on the first shape; None: none.
      seed: of the inputs.

    Returns:
      Rows {case, pass, implementation, visited, ms, spread, TFLOP/s, FLOP floor ms, byte floor ms, baseline,
      baseline_ms, ratio, official, required, target, met, measured}. visited is the share of the kernels' own
      tiles, those of forward and backward weighed by their products; TFLOP/s counts the visited share of two
      products forward and five backward.

    Raises:
      ValueError: `only` names no shape.
    """
    chosen = [shape for shape in shapes if only in str(shape)]
    if not chosen:
        raise ValueError(f"only={only!r} is part of no shape: {', '.join(map(str, shapes))}")
    inputs = {shape: Inputs.draw(shape, seed) for shape in chosen}
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for shape in chosen:
        with_slow = slow if shape == shapes[0] else None
        attends = _attends(shape, implementation, baseline, with_slow)
        log_fgate = jnp.zeros((shape.batch, shape.length, shape.heads), jnp.float32)
        for name, attend in attends.items():
            for direction, function in (("fwd", _forward), ("fwd+bwd", _both)):
                run = functools.partial(function, attend)
                programs[f"{shape} {name} {direction}"] = (run, (*inputs[shape], log_fgate))
    compiled = compile_all(programs)
    rates = measure_rates() if jax.default_backend() != "cpu" else measure_rates(256, 2**16)
    found = []
    for shape in chosen:
        with_slow = slow if shape == shapes[0] else None
        table = _Table(shape, inputs[shape], compiled, rates, seed, implementation, baseline, with_slow)
        for row in table.rows(bursts):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    return found


def _forward(attend: Attend, q: Array, k: Array, v: Array, cotangent: Array, log_fgate: Array) -> Array:
    del cotangent
    return attend(q, k, v, log_fgate)


def _both(attend: Attend, q: Array, k: Array, v: Array, cotangent: Array, log_fgate: Array) -> Any:
    out, pullback = jax.vjp(attend, q, k, v, log_fgate)
    return out, pullback(cotangent)


def _attends(shape: Shape, implementation: str | None, baseline: str, slow: str | None) -> dict[str, Attend]:
    """What is timed at a shape, as functions of q, k, v and log gates."""
    theirs: Any = baseline  # a Literal

    def plain(q: Array, k: Array, v: Array, log_fgate: Array) -> Array:
        del log_fgate
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=theirs)

    def ours(rule: str, name: str | None) -> Attend:
        limit = {"exact": None, "threshold": shape.threshold, "tight": "tight"}[rule]

        def attend(q: Array, k: Array, v: Array, log_fgate: Array) -> Array:
            out = forgetting_attention(
                q,
                k,
                v,
                log_fgate,
                adaptive_threshold=limit,
                log_pruning_tolerance=LOG_EPS,
                implementation=name,
            )
            assert not isinstance(out, tuple)
            return out

        return attend

    found = {"baseline": plain} | {rule: ours(rule, implementation) for rule in RULES}
    return found if slow is None else found | {"slow": ours("exact", slow)}


@dataclasses.dataclass(frozen=True)
class _Table:
    """The rows of one shape."""

    shape: Shape
    inputs: Inputs
    programs: Mapping[str, Any]
    rates: Rates
    seed: int
    implementation: str | None
    baseline: str
    slow: str | None

    def rows(self, bursts: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        size = (self.shape.batch, self.shape.length, self.shape.heads)
        log_fgate = {
            kind: jnp.asarray(gates(kind, rng, size), jnp.float32) for kind in ("global", "mix", "fast")
        }
        name, tiles = own_tiles(self.inputs.q, self.inputs.k, self.implementation)
        calls = {"baseline": ("baseline", "global")} | {
            f"{kind} {rule}": (rule, kind) for kind, rule, _ in CASES
        }
        times = self._times(calls, log_fgate, bursts)
        limits = {"exact": None, "threshold": self.shape.threshold, "tight": "tight"}
        for kind, rule, passes in CASES:
            visits = measure_visits(
                self.inputs.q,
                self.inputs.k,
                log_fgate[kind],
                tiles=tiles,
                adaptive_threshold=limits[rule],
                implementation=self.implementation,
            )
            ours = times[f"{kind} {rule}"]
            for direction in passes:
                yield self._row(kind, rule, direction, name, ours, times["baseline"], visits)
                if (kind, rule, direction) == ("global", "threshold", "fwd"):
                    # Nothing can be pruned here: all that is added is finding that out.
                    yield self._row(
                        kind, rule, direction, name, ours, times["global exact"], visits, f"{name}, exact"
                    )
        if self.slow is not None:
            slow = self._times({"slow": ("slow", "global")}, log_fgate, 2)["slow"]
            for direction in ("fwd", "fwd+bwd"):
                whole = Visits(1.0, 1.0, 1.0)
                yield self._row("global", "exact", direction, self.slow, slow, times["baseline"], whole)

    def _times(
        self, calls: Mapping[str, tuple[str, str]], log_fgate: Mapping[str, Array], bursts: int
    ) -> dict[str, dict[str, DeviceTiming]]:
        """Of every call, by pass."""
        started = {}
        for label, (program, kind) in calls.items():
            for direction in ("fwd", "fwd+bwd"):
                run = self.programs[f"{self.shape} {program} {direction}"]
                started[label, direction] = functools.partial(run, *self.inputs, log_fgate[kind])
                _require_finite(started[label, direction](), f"{self.shape} {label} {direction}")
        timed = time_bursts({"|".join(key): call for key, call in started.items()}, bursts=bursts)
        return {label: {d: timed[f"{label}|{d}"] for d in ("fwd", "fwd+bwd")} for label in calls}

    def _row(
        self, kind: str, rule: str, direction: str, implementation: str, ours: Mapping[str, DeviceTiming],
        theirs: Mapping[str, DeviceTiming], visits: Visits, baseline: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        (ms, spread), (baseline_ms, _) = _milliseconds(ours, direction), _milliseconds(theirs, direction)
        visited = visits.forward if direction == "fwd" else visits.both
        flops = self.shape.flops[direction] * visited
        shown = {"exact": "exact", "threshold": "ACP, published threshold", "tight": "ACP, tight"}[rule]
        overhead = (rule, direction) == ("threshold", "fwd") and kind == "global"
        goal = GOALS.get((self.shape, kind, rule, direction))
        if (overhead and not baseline) or implementation == self.slow:
            goal = None
        ratio = ms / baseline_ms
        return {
            "case": f"{self.shape} {kind}, {shown}",
            "pass": direction,
            "implementation": implementation,
            "visited": round(visited, 3),
            "ms": round(ms, 3),
            "spread": f"{100 * spread:.1f} %",
            "TFLOP/s": round(flops / ms / 1e9),
            "FLOP floor ms": round(flops / self.rates.matmul * 1e3, 3),
            "byte floor ms": round(self.shape.bytes[direction] / self.rates.copy * 1e3, 3),
            "baseline": baseline or f"{self.baseline}, causal, no gates",
            "baseline_ms": round(baseline_ms, 3),
            "ratio": round(ratio, 3),
            "official": goal.official if goal else NOTHING,
            "required": goal.required if goal else NOTHING,
            "target": goal.target if goal else NOTHING,
            "met": _met(ratio, goal),
            "measured": str(self.rates),
        }


def _milliseconds(times: Mapping[str, DeviceTiming], direction: str) -> tuple[float, float]:
    """Time and relative spread of a pass."""
    both, forward = times["fwd+bwd"], times["fwd"]
    if direction != "bwd":
        return times[direction].median_s * 1e3, times[direction].spread
    seconds = both.median_s - forward.median_s
    spread = (both.spread * both.median_s + forward.spread * forward.median_s) / seconds
    return seconds * 1e3, spread


def _met(ratio: float, goal: Goal | None) -> str:
    if goal is None:
        return NOTHING
    return "target" if ratio <= goal.target else "required" if ratio <= goal.required else "no"


def _require_finite(results: Any, name: str) -> None:
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(results)):
        raise FloatingPointError(f"{name}: the result holds NaN or infinity; there is nothing to time")
