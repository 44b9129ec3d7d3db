"""Run a package's benchmark, print its table, and write it as a result file.

    python -m launch.bench kernels.forgetting_attention --output=benchmarks/results/attention-h200.json
    python -m launch.bench kernels.forgetting_attention --accuracy      long context against float64
    python -m launch.bench kernels.forgetting_attention --tune          writes tuned/<device>.json
    python -m launch.bench tasks.lm --only=125m                         training steps
    python -m launch.bench tasks.lm --agreement                         loss curves of two implementations
    python -m launch.bench tasks.points --accuracy FILM.mp4 ... --checkpoint=RUN    bfloat16 in pixels

A benchmark is a module of the package with `rows(...) -> list of dicts of one set of keys`, whose keyword
arguments are the options it takes; `figure` is the output's name as a PNG. If it has `verdict(rows) -> str`,
that is printed last; if it has `save(rows, facts, path)`, that writes the result instead.
"""

import datetime
import importlib
import importlib.util
import inspect
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from configs.common import nearest
from launch.results import CAPTION
from tasks.common.config import make_parser
from tasks.common.errors import ConfigError, run_main, writing
from tasks.common.storage import write_json

# Flag -> module of the package; without one it is `benchmark`.
MODES = {"accuracy": "accuracy", "tune": "tuner", "agreement": "agreement"}
# Keyword of `rows` -> option.
OPTIONS = {
    "calls": "--calls",
    "only": "--only",
    "settings": "--set",
    "profile": "--profile",
    "videos": "--accuracy FILE",
    "checkpoint": "--checkpoint",
}
# Columns at most as wide as this where the output is no terminal.
_WIDTH = 220


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser("Benchmark a package.")
    parser.add_argument("package", help="for instance kernels.forgetting_attention")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--calls", type=int, help="timed calls, bursts or steps of each function")
    parser.add_argument("--only", help="part of the cases; the benchmark says which there are")
    parser.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE,...", help="config values of a training benchmark"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="folder for a profiler trace of each case"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="RUN|FILE", help="trained weights, where needed")
    parser.add_argument("--commit", help="of the measured code, where it lies outside of a git checkout")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--accuracy", action="extend", nargs="*", metavar="FILE", help="of tasks.points: on these films"
    )
    for name in list(MODES)[1:]:
        modes.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(words)
    if options.calls is not None and options.calls < 1:
        raise ConfigError(f"--calls={options.calls}: must be at least 1")
    chosen = [name for name in MODES if getattr(options, name) not in (None, False)]
    module = benchmark(options.package, MODES[chosen[0]] if chosen else "benchmark")
    options.videos = options.accuracy or None
    given = {name: getattr(options, name) for name in OPTIONS}
    arguments = _accepted(module, {name: value for name, value in given.items() if value is not None})
    if options.output is not None and "figure" in inspect.signature(module.rows).parameters:
        arguments["figure"] = options.output.with_suffix(".png")
    facts = circumstances(words, options.commit)
    try:
        rows = module.rows(**arguments)
    except ValueError as error:
        raise ConfigError(f"{options.package}: {error}") from error
    _print(rows, f"{options.package} on {facts['device']}, jax {jax.__version__}")
    if hasattr(module, "verdict"):
        print(module.verdict(rows), flush=True)
    if hasattr(module, "save"):
        print(f"written: {module.save(rows, facts, options.output)}", flush=True)
    elif options.output is not None:
        with writing(options.output.parent, options.output.name):
            write_json(options.output, [row | facts for row in rows])


def benchmark(package: str, mode: str = "benchmark") -> Any:
    """The module `<package>.<mode>`.

    Raises:
      ConfigError: there is no such module in `kernels` or `tasks`.
    """
    if not package.startswith(("kernels.", "tasks.")) or importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{package!r} is not a kernel package, such as kernels.forgetting_attention, or a task's"
        )
    if importlib.util.find_spec(f"{package}.{mode}") is None:
        raise ConfigError(f"{package} has no {mode}.py")
    return importlib.import_module(f"{package}.{mode}")


def _accepted(module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, if the module's `rows` takes them all."""
    taken = inspect.signature(module.rows).parameters
    for name in arguments:
        if name not in taken:
            valid = [option for keyword, option in OPTIONS.items() if keyword in taken]
            raise ConfigError(
                f"{OPTIONS[name]} is no option of {module.__name__}: {nearest(OPTIONS[name], valid)}"
            )
    return arguments


def _print(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    shown = [key for key in rows[0] if key not in CAPTION]
    for key in shown:
        table.add_column(key)
    for row in rows:
        table.add_row(*(str(row[key]) for key in shown))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    print("; ".join(f"{key}: {rows[0][key]}" for key in rows[0] if key in CAPTION), flush=True)


def circumstances(arguments: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """What a result row must say: command, device, jax, commit, date, seed.

    Args:
      arguments: of the command, of which those that change no number are left out.
      commit: None asks git.
    """
    device = jax.devices()[0]
    kind = f"{platform.processor() or platform.machine()} CPU, " if device.platform == "cpu" else ""
    words = [word for word in arguments if not word.startswith(("--output", "--commit", "--profile"))]
    return {
        "command": f"python -m launch.bench {shlex.join(words)}",
        "device": f"{kind}{len(jax.devices())} x {device.device_kind}",
        "jax": jax.__version__,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": 0,
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    run_main(main)
