"""Timing of compiled functions: compile, warm up, take the median, finish the device's work inside the
clock.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


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
