"""What the benchmarks of tasks share: memory of a compiled program, traces of a few calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tasks.common.trace import describe, read_trace


def program_memory(compiled: Any) -> float:
    """Bytes that a compiled program needs at a time; donated buffers count once."""
    sizes = compiled.memory_analysis()
    return float(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def trace_calls(folder: Path, name: str, run: Callable[[], Any], calls: int) -> None:
    """Traces `run`, which makes `calls` calls and waits for them; prints where time goes."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        run()
    print(f"{name}: {calls} calls in {folder}\n{describe(read_trace(folder), calls)}", flush=True)
