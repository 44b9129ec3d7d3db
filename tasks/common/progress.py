"""The progress line: step, loss, speed, MFU, time left, memory. Plain lines where there is no terminal."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

# Wraps an iterable of known length to show progress; the identity shows none.
Progressing = Callable[[Iterable[Any], int, str], Iterable[Any]]


def no_progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """Shows nothing."""
    del total, what
    return items


def short(number: float) -> str:
    """1234567 -> "1.23M"."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def memory_in_use() -> int:
    """Peak bytes in use on the first local device, or of this process where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StopWatch:
    """Training time since the last lap, without what happens inside `paused` (evaluation, saving,
    compiling)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._excluded = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - begin

    def lap(self) -> float:
        """Seconds counted since the last lap; starts the next."""
        now = time.perf_counter()
        seconds = now - self._start - self._excluded
        self._start, self._excluded = now, 0.0
        return max(seconds, 1e-9)


class Progress:
    """Shows how a run is going: one live line on a terminal, a printed line per update elsewhere."""

    def __init__(
        self, total_steps: int, unit_name: str, *, enabled: bool = True, console: Console | None = None
    ):
        self._total = total_steps
        self._unit = unit_name
        self._enabled = enabled and jax.process_index() == 0
        self._console = console or Console(highlight=False)
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._enabled and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.__exit__(*error)

    def say(self, message: str) -> None:
        """A line that stays: resumed at, saved, evaluated."""
        if self._enabled:
            self._console.print(message, markup=False, soft_wrap=True)

    def update(
        self,
        step: int,
        loss: float,
        units_per_second: float,
        seconds_per_step: float,
        mfu: float | None,
    ) -> None:
        """Shows the state after `step` updates.

        Args:
          step: updates done.
          loss: of the last one.
          units_per_second: measured since the last update of the line.
          seconds_per_step: for the time left.
          mfu: model FLOPs utilisation in [0, 1]; None: not shown.
        """
        if not self._enabled:
            return
        left = clock(max(self._total - step, 0) * seconds_per_step)
        parts = [
            f"step {step}/{self._total}",
            f"loss {loss:.4f}",
            f"{short(units_per_second)} {self._unit}/s",
            *([f"MFU {mfu:.1%}"] if mfu is not None else []),
            f"left {left}",
            f"{memory_in_use() / 2**30:.2f} GiB",
        ]
        if self._live is None:
            self._console.print("  ".join(parts), markup=False, soft_wrap=True)
            return
        share = min(step / max(self._total, 1), 1.0)
        bar = "━" * round(24 * share)
        line = Text(f"{bar:<24} ", style="green") + Text("  ".join(parts), style="default")
        self._live.update(line)
