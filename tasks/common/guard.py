"""Stopping a run that went wrong, and stopping one that was asked to stop."""

import contextlib
import json
import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tasks.common.errors import Diverged, writing

# Over several processes, agreeing on a stop is a collective: not at every step.
_AGREE_EVERY = 16


class DivergenceGuard:
    """Looks at every step's metrics; raises on the first bad one.

    Non-finite loss, gradient, update or parameter norms always stop the run. With a `spike_factor`, so does a
    gradient norm above that many times the median of the last `window` ones (once half a window is known).
    """

    def __init__(self, workdir: Path, spike_factor: float | None = None, window: int = 100) -> None:
        self._workdir = workdir
        self._factor = spike_factor
        self._recent: deque[float] = deque(maxlen=window)

    def remember(self, grad_norm: Any) -> None:
        """Adds a gradient norm of the past: on resume, from the log."""
        if isinstance(grad_norm, int | float) and math.isfinite(grad_norm):
            self._recent.append(float(grad_norm))

    def check(self, step: int, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
        """Accepts the metrics of `step`, or saves its batch and raises.

        Raises:
          Diverged: names the step, what is wrong, and where the batch is.
        """
        watched = ("loss", "grad_norm", "update_norm", "param_norm")
        bad = [name for name in watched if not math.isfinite(float(metrics[name]))]
        reason = f"{', '.join(bad)} not finite" if bad else self._spike(float(metrics["grad_norm"]))
        if reason is None:
            self.remember(float(metrics["grad_norm"]))
            return
        path = self._save(step, reason, metrics, batch)
        raise Diverged(
            f"step {step}: {reason}; its batch is in {path}. No checkpoint of this state was written"
        )

    def _spike(self, grad_norm: float) -> str | None:
        if self._factor is None or len(self._recent) < max((self._recent.maxlen or 2) // 2, 1):
            return None
        median = statistics.median(self._recent)
        if grad_norm <= self._factor * median:
            return None
        return f"grad_norm {grad_norm:.4g} is over {self._factor:g} x its running median {median:.4g}"

    def _save(
        self, step: int, reason: str, metrics: Mapping[str, Any], batch: Mapping[str, np.ndarray]
    ) -> Path:
        process = f"_process{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._workdir / f"diverged_step{step}{process}.npz"
        message = json.dumps({"step": step, "reason": reason, **{n: str(v) for n, v in metrics.items()}})
        with writing(self._workdir, path.name):
            self._workdir.mkdir(parents=True, exist_ok=True)
            np.savez(path, _step=np.int64(step), _message=np.array(message), **batch)  # type: ignore[arg-type]
        return path


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying; a second one of either kills as usual."""

    def __init__(self) -> None:
        self.name: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handles the signals inside; elsewhere than in the main thread it leaves them alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, _: FrameType | None) -> None:
            self.name = signal.Signals(number).name
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether any process was asked to stop; every process gets the same answer at the same step."""
        if jax.process_count() == 1:
            return self.name is not None
        if step % _AGREE_EVERY:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.array(self.name is not None))))
