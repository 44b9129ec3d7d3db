"""Many runs, one after the other, in one process; the same command goes on where it was.

    python -m launch.sweep configs/fox_comparison.py --runs=DIR --minutes=9
    python -m launch.sweep configs/fox_comparison.py --runs=DIR --list

A sweep file defines `get_sweep(arg)`, which returns a list of runs, each a dict of

    name     its workdir below --runs
    task     trained by `tasks.<task>.train`
    config   config file and arguments
    set      {config key: value}
    choose   {config key: names of earlier runs}: the value of the one among them that did best
    by       the metric, lowest is best, that `choose` goes by: its last value in metrics.jsonl
    shows    the metric in the table's column "held out"; by default validation/loss

A run is finished when its metrics.jsonl says so; its checkpoints are not needed for that. One that diverged
is not tried again, and is never best. After --minutes, on SIGTERM or on SIGINT, the run under way saves its
state and stops (exit code 75); what it has begun to compile or to evaluate it ends first. A run that was
killed goes on from its last checkpoint.
"""

import contextlib
import fnmatch
import importlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from tasks.common.config import make_parser, parse_command_line, run_config_file, to_json
from tasks.common.errors import ConfigError, Diverged, RunError, Stopped, run_main
from tasks.common.resolved import flatten, load_resolved, require_same
from tasks.common.writer import read_records

_KEYS = {"name", "task", "config", "set", "choose", "by", "shows"}

Run = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Run a sweep; the same command goes on.")
    parser.add_argument("sweep", metavar="FILE[:args]", help="a file that defines get_sweep(arg)")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of the workdirs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, state saved")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of runs, such as 'trial-*'")
    parser.add_argument("--list", action="store_true", help="say how far every run is, and train nothing")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        raise ConfigError(f"--minutes={options.minutes:g}: must be positive")
    sweep = Sweep(read_sweep(options.sweep), options.runs)
    if options.list:
        sweep.show()
        return
    try:
        with deadline(60 * options.minutes) as clock:
            sweep.run(options.only, clock)
    finally:
        sweep.show()


def read_sweep(file_and_args: str) -> list[Run]:
    """The runs a sweep file defines.

    Raises:
      ConfigError: no such file or function, or runs that are not made as they must be.
    """
    runs = run_config_file(file_and_args, "get_sweep")
    names: list[str] = []
    for run in runs:
        if not isinstance(run, Mapping) or not {"name", "task", "config"} <= run.keys() <= _KEYS:
            raise ConfigError(
                f"{file_and_args}: {run!r}: a run has name, task, config; set, choose, by, shows"
            )
        missing = [n for given in run.get("choose", {}).values() for n in given if n not in names]
        if missing or run["name"] in names:
            raise ConfigError(
                f"{file_and_args}: run {run['name']!r} is there twice, or chooses from runs that do not come "
                f"before it: {', '.join(missing)}"
            )
        names.append(run["name"])
    return list(runs)


class Clock:
    """Whether it is time to stop, and why."""

    def __init__(self) -> None:
        self.reason = ""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[Clock]:
    """Sends this process SIGTERM when the time is up, and on every second after.

    A training run notes the first that it hears, saves its state and stops; between runs the signal is noted
    here. So are SIGTERM and SIGINT from elsewhere; another SIGINT interrupts at once.
    """
    clock, over = Clock(), threading.Event()

    def note(number: int, _: FrameType | None) -> None:
        if clock.reason and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked again: now
        clock.reason = clock.reason or signal.Signals(number).name

    def watch() -> None:
        if over.wait(min(seconds, threading.TIMEOUT_MAX)):
            return
        clock.reason = "the time limit"
        while not over.wait(1.0):
            os.kill(os.getpid(), signal.SIGTERM)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield clock
    finally:
        over.set()
        thread.join()
        for number, handler in previous.items():
            signal.signal(number, handler)


class Sweep:
    """Runs and their workdirs."""

    def __init__(self, runs: Sequence[Run], folder: Path):
        self.runs, self.folder = {run["name"]: run for run in runs}, folder
        self.console = Console(highlight=False)

    def run(self, only: str, clock: Clock) -> None:
        """Trains what is not finished, in order.

        Raises:
          Stopped: the time is up, or a signal came; everything is saved.
          RunError: a run failed, or chooses from runs that have not ended.
        """
        self._cache_programs()
        todo = [name for name in self.runs if fnmatch.fnmatch(name, only)]
        if not todo:
            raise ConfigError(f"--only={only}: there is no such run; there are {', '.join(self.runs)}")
        for number, name in enumerate(todo, 1):
            if clock.reason:
                raise Stopped(f"stopped by {clock.reason}; run the same command to go on")
            run = self.runs[name]
            argv = self.arguments(run)
            if self.state(run, argv) in ("finished", "diverged"):
                continue
            self.console.rule(f"{name} ({number} of {len(todo)})")
            try:
                importlib.import_module(f"tasks.{run['task']}.train").main(argv)
            except Stopped as stopped:
                raise Stopped(": ".join(filter(None, (name, clock.reason, str(stopped))))) from None
            except Diverged as error:
                self.console.print(f"{name}: {error}", markup=False, soft_wrap=True)
            except RunError as error:
                error.args = (f"{name}: {error}",)
                raise

    def _cache_programs(self) -> None:
        """Compiled programs on disk, for the next process; in this one runs share them (`Job.program`)."""
        if not jax.config.jax_compilation_cache_dir:
            compilation_cache.set_cache_dir(str(self.folder.resolve() / ".programs"))
            compilation_cache.reset_cache()  # JAX asks whether there is one at its first program only

    def workdir(self, name: str) -> Path:
        """Where a run is."""
        return self.folder / name

    def arguments(self, run: Run) -> list[str]:
        """The command line of a run.

        Raises:
          RunError: runs it chooses from have not ended, or none of them has a result.
        """
        values = dict(run.get("set", {}))
        for key, names in run.get("choose", {}).items():
            values[key] = self.best(run, key, names)
        settings = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={run['config']}", f"--workdir={self.workdir(run['name'])}", *settings]

    def best(self, run: Run, key: str, names: Sequence[str]) -> Any:
        """The value of config key `key` in the run among `names` that did best."""
        open_ones = [n for n in names if self.state(self.runs[n]) not in ("finished", "diverged")]
        if open_ones:
            raise ConfigError(
                f"run {run['name']!r} chooses {key} from runs that have not ended: {', '.join(open_ones)}"
            )
        results = {n: self.result(n, run["by"]) for n in names if self.state(self.runs[n]) == "finished"}
        good = {n: value for n, value in results.items() if value is not None and math.isfinite(value)}
        if not good:
            raise ConfigError(f"run {run['name']!r}: none of {', '.join(names)} has a {run['by']}")
        best = min(good, key=lambda n: good[n])
        return flatten(load_resolved(self.workdir(best))["config"])[key]

    def result(self, name: str, metric: str) -> float | None:
        """The last value of a metric in a run's log."""
        values = [r[metric] for r in read_records(self.workdir(name)) if metric in r]
        return float(values[-1]) if values else None

    def state(self, run: Run, argv: Sequence[str] | None = None) -> str:
        """ "finished", "diverged", "step N", or "" for a run that has not begun.

        Args:
          argv: its command line, to see that what is finished is what is asked for.

        Raises:
          ConfigError: a finished run has another config.
        """
        workdir = self.workdir(run["name"])
        records = read_records(workdir)
        done = [r["step"] for r in records if r["kind"] == "finished"]
        steps = sum(r["kind"] == "train" for r in records)
        if done:
            config = load_resolved(workdir)["config"]
            if argv is not None:
                asked = self._resolved(run, argv)
                require_same(config, asked, workdir)
                config = asked
            return "finished" if config["train"]["steps"] == done[-1] else f"step {steps}"
        if any(workdir.glob("diverged_step*.npz")):
            return "diverged"
        return f"step {steps}" if steps else ""

    def _resolved(self, run: Run, argv: Sequence[str]) -> dict[str, Any]:
        schema = importlib.import_module(f"tasks.{run['task']}.config").SCHEMA
        config: ConfigDict | None = parse_command_line(make_parser(""), argv, schema=schema).config
        return dict(to_json(config))

    def show(self) -> None:
        """A table of all runs: how far, last losses, and what was chosen."""
        table = Table(title=str(self.folder))
        for heading in ("run", "state", "loss", "held out", "chosen"):
            is_text = heading in ("run", "state", "chosen")
            table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
        for name, run in self.runs.items():
            metrics = ("loss", run.get("shows", "validation/loss"))
            losses = [self.result(name, metric) for metric in metrics]
            chosen = ""
            if run.get("choose") and read_records(self.workdir(name)):
                config = flatten(load_resolved(self.workdir(name))["config"])
                chosen = ", ".join(f"{key.rpartition('.')[2]} {config[key]:g}" for key in run["choose"])
            shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
            table.add_row(name, self.state(run), *shown, chosen)
        self.console.print(table)


if __name__ == "__main__":
    run_main(main)
