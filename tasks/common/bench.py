"""What the benchmarks of tasks share: goals, programs that hand a state on, checked timings, the trainer's
step, memory, traces of a few calls.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.common.bench import DeviceTiming, time_bursts, time_kernels
from kernels.common.trace import describe, trace
from tasks.common.job import Job
from tasks.common.optim import make_optimizer
from tasks.common.state import TrainState, split_trainable
from tasks.common.step import abstract_state, fresh_state, make_train_step

NOTHING = "-"  # in a row: not measured, or not asked for
# What of a GPU of 80 GB can be had.
LARGEST = 75 * 2**30
TRACED = 5


class Goal(NamedTuple):
    """In `unit`s, on one H200: the official code's figure, what is required, the target."""

    unit: str
    official: str
    required: float
    target: float

    def met(self, found: float) -> str:
        """ "target", "required" or "no". Of milliseconds less is better, of frames per second more."""
        sign = -1 if self.unit.startswith("ms") else 1
        reached = [name for name in ("target", "required") if sign * found >= sign * getattr(self, name)]
        return reached[0] if reached else "no"


def goal_columns(goal: Goal | None, found: float) -> dict[str, Any]:
    """The columns official, required, target, unit and met of a row: empty without a goal."""
    if goal is None:
        return dict.fromkeys(("official", "required", "target", "unit", "met"), NOTHING)
    return {
        "official": goal.official,
        "required": goal.required,
        "target": goal.target,
        "unit": goal.unit,
        "met": goal.met(found),
    }


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which of the required and target figures hold."""
    judged = [row for row in rows if row["met"] != NOTHING]
    failed = [row["case"] for row in judged if row["met"] == "no"]
    hit = sum(row["met"] == "target" for row in judged)
    summary = f"required: {len(judged) - len(failed)} of {len(judged)} hold; target: {hit} of {len(judged)}"
    return "\n  ".join([summary, *(f"not met: {name}" for name in failed)])


class Carried:
    """Calls of a program that hands its first argument on, donated: a stream's state, a training state."""

    def __init__(
        self,
        program: Callable[..., tuple[Any, Any]],
        carried: Any,
        *arguments: Any,
        hand_over: Callable[[Any], Any] | None = None,
    ):
        """Makes what `program` is called with: what is carried, after `hand_over` if given, and arguments."""
        self._program, self._carried, self._arguments = program, carried, arguments
        self._hand_over = hand_over or (lambda carried: carried)

    def __call__(self, *arguments: Any) -> Any:
        """What one call returns beside what is carried; `arguments` replace those given at first."""
        self._carried, result = self._program(self._hand_over(self._carried), *(arguments or self._arguments))
        return result


class Built(NamedTuple):
    """A compiled program, and the seconds that compiling took."""

    compiled: Any
    seconds: float


def build(lowered: Any) -> Built:
    """Compiles what `jax.jit(...).lower(...)` gave."""
    begin = time.perf_counter()
    compiled = lowered.compile()
    return Built(compiled, time.perf_counter() - begin)


def start_training(job: Job) -> tuple[TrainState, Any]:
    """State and jitted step, as `tasks.common.loop.fit` makes them. Call it under the job's mesh."""
    decay = None if job.decay_mask is None else split_trainable(job.decay_mask, job.trainable_mask)[0]
    optimizer = make_optimizer(job.optim, decay)
    abstract = abstract_state(
        job.init_params, job.param_axes, job.mesh, job.rules, optimizer, job.trainable_mask
    )
    state = fresh_state(abstract, job.init_params, optimizer, job.seed, job.trainable_mask)
    step = make_train_step(
        job.loss_fn, optimizer, seed=job.seed, accum=job.train.accum, trainable_mask=job.trainable_mask
    )
    return state, step


def time_checked(
    name: str, call: Callable[[], Any], *, bursts: int, seconds: float, profile: Path | None = None
) -> DeviceTiming:
    """Times a call by `kernels.common.bench.time_bursts`.

    Args:
      name: for messages, and for the trace's folder.
      call: starts one compiled program and returns its results.
      bursts, seconds: how many, and how long each.
      profile: folder for a trace of five more calls; where their time goes is printed.

    Raises:
      FloatingPointError: a result is not finite.
    """
    timing = time_bursts({"": call}, bursts=bursts, seconds=seconds)[""]
    result = jax.tree.leaves(call())
    if not all(bool(jnp.isfinite(x).all()) for x in result):
        raise FloatingPointError(f"{name}: the result holds NaN or infinity")
    if profile is not None:
        folder = profile / name.replace(", ", "-").replace(" ", "_")
        trace_calls(folder, name, lambda: _repeat(call, TRACED), TRACED)
    return timing


def burst_seconds(is_stream: bool) -> float:
    """Length of a burst: several clips or training steps, or hundreds of a stream's frames. A wait takes as
    long as a frame, and a host that others share is late at times. Short on a CPU.
    """
    if jax.default_backend() == "cpu":
        return 0.05
    return 0.5 if is_stream else 1.5


def kernel_seconds(call: Callable[[], Any]) -> float | None:
    """Of a call's kernels, by a trace of some calls, without the gaps between them: what the host does not
    show in. None on a CPU, which is host and device.
    """
    if jax.default_backend() == "cpu":
        return None
    return time_kernels({"": call}, traces=1, repeats=TRACED)[""].median_s


def _repeat(call: Callable[[], Any], times: int) -> None:
    jax.block_until_ready([call() for _ in range(times)])


def program_memory(compiled: Any) -> float:
    """Bytes that a compiled program needs at a time; donated buffers count once."""
    sizes = compiled.memory_analysis()
    return float(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def memory_limit() -> float:
    """Bytes that a program may need."""
    limit = device_stat("bytes_limit")
    return LARGEST if limit is None else min(LARGEST, limit)


def device_stat(name: str) -> int | None:
    """What the first device's allocator says; None where it says nothing."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get(name)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def rounded(x: float) -> float:
    """Four digits."""
    return round(x, max(3 - math.floor(math.log10(x)), 0)) if x > 0 else x


def trace_calls(folder: Path, name: str, run: Callable[[], Any], calls: int) -> None:
    """Traces `run`, which makes `calls` calls and waits for them; prints where time goes."""
    print(f"{name}: {calls} calls in {folder}\n{describe(trace(run, folder), calls)}", flush=True)
