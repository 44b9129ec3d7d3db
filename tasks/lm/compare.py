"""Finished runs side by side, from what they recorded as they trained: no weights are read.

    python -m tasks.lm.compare runs/a runs/b --output=DIR --results=benchmarks/results/what-device.json

Written to --output: `training.png` (loss by tokens trained on, held-out loss); of runs that were evaluated by
position at their end, `loss_by_position.png`; of FoX, `pruning_<workdir>.png`, and, where a run is there with
and without pruning, `acp_off.png`. --results writes a row for each run, for `launch.results`. To evaluate
weights anew, on other text or lengths: `tasks.lm.eval --compare`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table

from models import fox
from tasks.common.config import load_resolved, make_parser
from tasks.common.errors import ConfigError, run_main, writing
from tasks.common.resolved import FREE_KEYS, diff_configs, provenance
from tasks.common.storage import write_json
from tasks.common.writer import read_records
from tasks.lm.config import LMConfig
from tasks.lm.perlength import from_csv, perplexity_by_length, report_lengths
from tasks.lm.plots import Curve, plot_losses, plot_positions, plot_pruning
from tasks.lm.trained import run_config

_NOT_APPLICABLE = "-"


class Recorded(NamedTuple):
    """What a run left in its workdir.

    Attributes:
      workdir: where.
      run: its configuration.
      circumstances: the record it was saved with: command, device, versions, revision.
      metrics: records of metrics.jsonl.
      positions: loss by position and documents behind each; None = not evaluated so.
    """

    workdir: Path
    run: LMConfig
    circumstances: dict[str, Any]
    metrics: list[dict[str, Any]]
    positions: tuple[Float[np.ndarray, " T"], Int[np.ndarray, " T"]] | None

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if it was never logged."""
        values = [float(r[name]) for r in self.metrics if name in r]
        return values[-1] if values else None


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      ConfigError: a folder that is no run or has not finished, or wrong options.
    """
    parser = make_parser("Compare finished runs by what they recorded.")
    parser.add_argument("runs", nargs="+", metavar="DIR", help="workdirs of runs")
    parser.add_argument("--names", default="", metavar="NAME,NAME", help="for legends and tables")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a row for each run, as JSON")
    parser.add_argument("--command", default="", help="to state in the rows (default: as recorded)")
    parser.add_argument("--commit", default="", help="of the sources, where the run could not tell")
    options = parser.parse_args(argv)
    runs = [read_run(Path(folder)) for folder in options.runs]
    names = [name.strip() for name in options.names.split(",") if name.strip()] or default_names(runs)
    if len(names) != len(runs):
        raise ConfigError(f"--names gives {len(names)} names for {len(runs)} runs")
    models = names if options.names else [label(run.run) for run in runs]
    rows = result_rows(runs, models, options.command, options.commit)
    with writing(options.output, "the comparison"):
        options.output.mkdir(parents=True, exist_ok=True)
        draw(dict(zip(names, runs, strict=True)), options.output)
    if options.results is not None:
        with writing(options.results.parent, options.results.name):
            write_json(options.results, rows)
    _print(rows)
    for text in (describe_pruning_off(*pair) for pair in with_and_without_pruning(runs)):
        print(text)


def draw(runs: Mapping[str, Recorded], folder: Path) -> None:
    """The figures of the runs, by name, into `folder`."""
    plot_losses({name: run.metrics for name, run in runs.items()}, folder / "training.png")
    curves = [
        Curve(name, *run.positions, run.run.train.seq_len)
        for name, run in runs.items()
        if run.positions is not None
    ]
    if curves:
        plot_positions(curves, folder / "loss_by_position.png")
    for name, run in runs.items():
        plot_pruning(run.metrics, folder / f"pruning_{run.workdir.name}.png", title=name)
    for pruned, exact in with_and_without_pruning(list(runs.values()))[:1]:
        plot_losses(
            {"ACP on": pruned.metrics, "ACP off": exact.metrics},
            folder / "acp_off.png",
            title=describe_pruning_off(pruned, exact),
        )


def with_and_without_pruning(runs: Sequence[Recorded]) -> list[tuple[Recorded, Recorded]]:
    """(run, the same run without pruning), of all runs that differ in nothing else."""

    def rest(run: Recorded) -> dict[str, Any]:
        config = dict(run.circumstances["config"])
        return config | {"runtime": {**config["runtime"], "log_pruning_tolerance": None}}

    def is_exact(run: Recorded) -> bool:
        return run.run.runtime.log_pruning_tolerance is None

    return [
        (run, other)
        for run in runs
        for other in runs
        if is_exact(other) and not is_exact(run) and not diff_configs(rest(run), rest(other), FREE_KEYS)
    ]


def describe_pruning_off(pruned: Recorded, exact: Recorded) -> str:
    """One sentence: how far the losses of a run with and without pruning are apart."""
    first, second = (
        {r["step"]: float(r["loss"]) for r in run.metrics if r["kind"] == "train"} for run in (pruned, exact)
    )
    apart = np.abs([first[step] - second[step] for step in first.keys() & second.keys()])
    text = f"ACP on and off: training losses {apart.mean():.2g} apart in the mean, {apart.max():.2g} at most"
    held_out = [run.last("validation/loss") for run in (pruned, exact)]
    if None in held_out:
        return text
    return f"{text}; held-out losses {held_out[0]:.5g} and {held_out[1]:.5g}"


def read_run(workdir: Path) -> Recorded:
    """The records of a finished run.

    Raises:
      ConfigError: not the workdir of a run, or not finished.
    """
    run, records = run_config(workdir), read_records(workdir)
    if not any(r["kind"] == "finished" and r["step"] == run.train.steps for r in records):
        raise ConfigError(f"{workdir}: the run has not finished: its own command goes on")
    table = workdir / "evaluation" / "per_position.csv"
    positions = from_csv(table.read_text(encoding="utf-8")) if table.is_file() else None
    return Recorded(workdir, run, load_resolved(workdir), records, positions)


def label(run: LMConfig) -> str:
    """What the papers call the architecture, and whether a FoX ran without pruning: "FoX (Pro), exact"."""
    config = run.model
    options = (config.qk_norm, config.use_k_shift, config.use_v_shift, config.use_output_gate)
    flavour = "Pro" if all(options) else "LLaMA" if not any(options) else "other"
    exact = ", exact" if config.is_gated and run.runtime.log_pruning_tolerance is None else ""
    return f"{'FoX' if config.is_gated else 'Transformer'} ({flavour}){exact}"


def default_names(runs: Sequence[Recorded]) -> list[str]:
    """Labels, told apart by seed, or else by their folders."""
    labels = [label(run.run) for run in runs]
    seeded = [f"{name}, seed {run.run.seed}" for name, run in zip(labels, runs, strict=True)]
    names = [long if labels.count(name) > 1 else name for name, long in zip(labels, seeded, strict=True)]
    counts = Counter(names)
    return [run.workdir.name if counts[n] > 1 else n for n, run in zip(names, runs, strict=True)]


def result_rows(
    runs: Sequence[Recorded], names: Sequence[str], command: str = "", commit: str = ""
) -> list[dict[str, Any]]:
    """A row for each run, all with the same keys; what a run did not measure, but another did, is None.

    What a model does not have, such as pruning in a Transformer, is "-".

    Args:
      command: to state instead of each run's own.
      commit: of runs that did not record one.
    """
    lengths = sorted({length for run in runs if run.positions for length in _lengths(run)})
    rows = [_row(run, name, lengths, command, commit) for name, run in zip(names, runs, strict=True)]
    measured = [key for key in rows[0] if any(row[key] not in (None, _NOT_APPLICABLE) for row in rows)]
    return [{key: row[key] for key in measured} for row in rows]


def _lengths(run: Recorded) -> list[int]:
    """Lengths to report, from a sixteenth of the training length on."""
    assert run.positions is not None
    longest = len(run.positions[0])
    return report_lengths(longest, min(longest, max(1, run.run.train.seq_len // 16)))


def _row(run: Recorded, name: str, lengths: Sequence[int], command: str, commit: str) -> dict[str, Any]:
    perplexity: dict[int, float] = {}
    if run.positions is not None:
        perplexity = perplexity_by_length(run.positions[0], _lengths(run))
    speeds = [r["tokens_per_second"] for r in run.metrics if r["kind"] == "speed"]
    return {
        "model": name,
        "seed": run.run.seed,
        "peak lr": run.run.optim.peak_lr,
        "parameters": fox.count_params(run.run.model),
        "tokens": int(run.last("tokens") or 0),
        "training loss": _rounded(_last_losses(run)),
        "held-out loss": _rounded(run.last("validation/loss")),
        **{f"ppl at {length}": _rounded(perplexity.get(length)) for length in lengths},
        "pruned": _rounded(run.last("pruning/pruned")) if run.run.model.is_gated else _NOT_APPLICABLE,
        "tokens/s": round(statistics.median(speeds)) if speeds else None,
        **provenance(run.circumstances, command=command, commit=commit),
    }


def _last_losses(run: Recorded) -> float | None:
    """Mean training loss of the last twentieth of the steps."""
    losses = [float(r["loss"]) for r in run.metrics if r["kind"] == "train"]
    return statistics.fmean(losses[-max(1, len(losses) // 20) :]) if losses else None


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _print(rows: Sequence[dict[str, Any]]) -> None:
    shown = [k for k in rows[0] if k not in ("command", "device", "jax", "commit", "date")]
    table = Table()
    for key in shown:
        table.add_column(key, justify="left" if key == "model" else "right")
    for row in rows:
        table.add_row(*(_shown(row[key]) for key in shown))
    terminal = Console(highlight=False)
    # In a file or a pipe the table needs no folding.
    console = terminal if terminal.is_terminal else Console(highlight=False, width=240)
    console.print(table)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_main(main)
