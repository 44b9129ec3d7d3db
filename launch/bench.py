"""Run a kernel package's benchmark, print its table, and write it as a result file.

python -m launch.bench kernels.forgetting_attention --output=benchmarks/results/acp-cpu.json
"""

import datetime
import importlib
import importlib.util
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from tasks.common.config import make_parser
from tasks.common.errors import ConfigError, run_main, writing
from tasks.common.resolved import atomic_write


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Benchmark a kernel package.")
    parser.add_argument("package", help="for instance kernels.forgetting_attention")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--calls", type=int, default=3, help="timed calls of each function")
    options = parser.parse_args(argv)
    if options.calls < 1:
        raise ConfigError(f"--calls={options.calls}: must be at least 1")
    rows = [
        row | circumstances(options.package) for row in benchmark(options.package).rows(calls=options.calls)
    ]
    table = Table(title=f"{options.package} on {rows[0]['device']}, jax {jax.__version__}")
    shown = [key for key in rows[0] if key not in ("device", "jax", "commit", "date", "command", "seed")]
    for key in shown:
        table.add_column(key)
    for row in rows:
        table.add_row(*(str(row[key]) for key in shown))
    Console().print(table)
    if options.output is not None:
        with writing(options.output.parent, options.output.name):
            atomic_write(options.output, json.dumps(rows, indent=2) + "\n")


def benchmark(package: str) -> Any:
    """The module `<package>.benchmark`.

    Raises:
      ConfigError: there is no such module in `kernels`.
    """
    if not package.startswith("kernels.") or importlib.util.find_spec(package) is None:
        raise ConfigError(f"{package!r} is not a kernel package, such as kernels.forgetting_attention")
    if importlib.util.find_spec(f"{package}.benchmark") is None:
        raise ConfigError(f"{package} has no benchmark.py")
    return importlib.import_module(f"{package}.benchmark")


def circumstances(package: str) -> dict[str, Any]:
    """What a result row must say: command, device, jax, commit, date, seed."""
    device = jax.devices()[0]
    kind = f"{platform.processor() or platform.machine()} CPU, " if device.platform == "cpu" else ""
    return {
        "command": f"python -m launch.bench {package}",
        "device": f"{kind}{len(jax.devices())} x {device.device_kind}",
        "jax": jax.__version__,
        "commit": _commit(),
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
