"""Timing of compiled functions: compile, warm up, take the median, finish the device's work inside the
clock.
"""

import concurrent.futures
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.common.trace import trace

_COMPILERS = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds.

    Attributes:
      compile_s: lowering and compiling, once.
      median_s, best_s: wall clock of a call, over `calls` calls.
      cpu_s: least processor time of a call, all threads: on a busy machine a steadier figure than wall clock.
      calls: how many calls were timed.
    """

    compile_s: float
    median_s: float
    best_s: float
    cpu_s: float
    calls: int


def time_compiled(function: Callable[..., Any], *args: Any, warmup: int = 1, calls: int = 5) -> Timing:
    """Times jax.jit(function)(*args); see `time_together` for functions to be compared."""
    return time_together({"": function}, *args, warmup=warmup, calls=calls)[""]


def time_together(
    functions: dict[str, Callable[..., Any]], *args: Any, warmup: int = 1, calls: int = 5
) -> dict[str, Timing]:
    """Times several functions of the same arguments in turns, so that a slow minute of the machine hits all
    of them.

    Args:
      functions: by name; each is jitted.
      *args: arguments of every function.
      warmup: untimed calls of each.
      calls: timed calls of each.

    Raises:
      ValueError: calls is not positive.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1; got {calls}.")
    compiled, compile_s = {}, {}
    for name, function in functions.items():
        begin = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*args).compile()
        compile_s[name] = time.perf_counter() - begin
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + calls):
        for name, run in compiled.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*args))
            if turn >= warmup:
                wall[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - begin_cpu)
    return {
        name: Timing(compile_s[name], statistics.median(wall[name]), min(wall[name]), min(cpu[name]), calls)
        for name in functions
    }


@dataclasses.dataclass(frozen=True)
class DeviceTiming:
    """Seconds of device work per call, from bursts of calls sent to the device without waiting in between, or
    from traces of such calls.

    Attributes:
      median_s, best_s: over the bursts (traces).
      spread: interquartile range of the bursts over their median: differences below it are noise.
      calls: calls in a burst.
      bursts: how many bursts were timed.
    """

    median_s: float
    best_s: float
    spread: float
    calls: int
    bursts: int


def compile_all(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Any]:
    """Compiled programs by name: traced here one after the other, compiled several at a time.

    Args:
      functions: (function, arguments) by name; arguments may be `jax.ShapeDtypeStruct`s.

    Returns:
      What `jax.jit(function).lower(*arguments).compile()` gives, by name.
    """
    lowered = {name: jax.jit(function).lower(*args) for name, (function, args) in functions.items()}
    with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
        return dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))


def time_bursts(
    calls: Mapping[str, Callable[[], Any]],
    *,
    bursts: int = 7,
    seconds: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, DeviceTiming]:
    """Times device work without the host's part in it.

    A burst is as many calls as fill `seconds`, dispatched back to back with one wait at its end: the host
    runs ahead of the device, so that its own time is paid once per burst. Bursts of all the calls go in
    turns, so that a change of the device's clocks meets all of them; every turn in another order, and every
    burst after an untimed one of the same calls: what ran before leaves its heat and clocks.

    Args:
      calls: by name; each starts one compiled program and returns its results, the same work every time.
      bursts: timed bursts of each.
      seconds: length of a burst; one call at least, 500 at most.
      clock: seconds, monotonic.

    Raises:
      ValueError: bursts is not positive.
    """
    if bursts < 1:
        raise ValueError(f"bursts must be at least 1; got {bursts}.")

    def burst(run: Callable[[], Any], count: int) -> float:
        _in_a_row(run, count)
        begin = clock()
        _in_a_row(run, count)
        return (clock() - begin) / count

    counts = {}
    for name, run in calls.items():
        burst(run, 1)  # loads the program
        counts[name] = min(max(round(seconds / max(burst(run, 2), 1e-9)), 1), 500)
    found: dict[str, list[float]] = {name: [] for name in calls}
    shuffler, names = random.Random(0), list(calls)
    for _ in range(bursts):
        shuffler.shuffle(names)
        for name in names:
            found[name].append(burst(calls[name], counts[name]))
    return {name: _summary(found[name], counts[name]) for name in calls}


def time_kernels(
    calls: Mapping[str, Callable[[], Any]], *, traces: int = 5, repeats: int = 10
) -> dict[str, DeviceTiming]:
    """Times the kernels of calls by a profiler's traces, without the gaps between them and without the host:
    for calls that take less than a host needs to start them.

    Args:
      calls: by name; each starts one compiled program and returns its results, the same work every time.
      traces: of each, in turns.
      repeats: calls in a trace, and before it.

    Raises:
      ValueError: traces or repeats is not positive.
    """
    if min(traces, repeats) < 1:
        raise ValueError(f"traces and repeats must be at least 1; got {traces} and {repeats}.")

    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(traces):
        for name, run in calls.items():
            _in_a_row(run, repeats)
            found[name].append(trace(functools.partial(_in_a_row, run, repeats)).busy_s / repeats)
    return {name: _summary(found[name], repeats) for name in calls}


def _in_a_row(run: Callable[[], Any], count: int) -> None:
    """Calls without waiting in between, then waits."""
    for _ in range(count):
        result = run()
    jax.block_until_ready(result)


def _summary(seconds: list[float], calls: int) -> DeviceTiming:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return DeviceTiming(median, min(seconds), (high - low) / median, calls, len(seconds))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device was measured to do: the floor of any kernel is what these leave no way around.

    Attributes:
      matmul: FLOP/s of a large bfloat16 matrix product on random data.
      copy: bytes per second, read plus written.
    """

    matmul: float
    copy: float

    def __str__(self) -> str:
        return (
            f"matmul {self.matmul / 1e12:.0f} TFLOP/s, copy {self.copy / 1e12:.2f} TB/s, measured in this run"
        )


def measure_rates(size: int = 8192, elements: int = 2**29) -> Rates:
    """Measures the two ceilings of the default device.

    Args:
      size: side of the square matrices.
      elements: float32 numbers that are read and written.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    source = jax.random.normal(keys[0], (elements,), jnp.float32)
    product, negated = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    timed = time_bursts({"matmul": lambda: product(a, b), "copy": lambda: negated(source)}, bursts=5)
    return Rates(2 * size**3 / timed["matmul"].median_s, 8 * elements / timed["copy"].median_s)
