"""Finished video runs side by side, from their logs: no weights are read, nothing is evaluated anew.

    python -m tasks.video.compare runs/trecvit_controls/* --output=DIR --results=FILE.json

Prints the held-out figures each run ended with and draws `comparison.png`. --results writes a row for each
run, for `launch.results`. To evaluate with other views: `python -m tasks.video.eval`.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models import trecvit
from tasks.common.config import make_parser
from tasks.common.errors import ConfigError, run_main, writing
from tasks.common.resolved import load_resolved, provenance
from tasks.common.storage import write_json
from tasks.common.writer import read_records
from tasks.video.plots import plot_runs
from tasks.video.reports import final_figures, print_figures
from tasks.video.trained import run_config


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      ConfigError: a folder that is no run or has not finished, or wrong options.
    """
    parser = make_parser("Compare finished runs by what they recorded.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="workdirs of runs")
    parser.add_argument("--names", default="", metavar="NAME,NAME", help="for legend and table")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a row for each run, as JSON")
    parser.add_argument("--commit", default="", help="of the sources, where the run could not tell")
    options = parser.parse_args(argv)
    names = [name.strip() for name in options.names.split(",") if name.strip()]
    names = names or [folder.resolve().name for folder in options.runs]
    if len(names) != len(options.runs) or len(set(names)) != len(names):
        raise ConfigError(f"--names={options.names}: {len(options.runs)} different names are needed")
    runs = dict(zip(names, options.runs, strict=True))
    figures = {name: _finished(folder) for name, folder in runs.items()}
    console = Console(highlight=False)
    print_figures(figures, console)
    with writing(options.output, "the comparison"):
        if any("top1" in found for found in figures.values()):
            plot_runs(
                {n: read_records(folder) for n, folder in runs.items()}, options.output / "comparison.png"
            )
            console.print(f"  {options.output / 'comparison.png'}", soft_wrap=True)
    if options.results is not None:
        rows = [row(name, folder, figures[name], options.commit) for name, folder in runs.items()]
        with writing(options.results.parent, options.results.name):
            write_json(options.results, rows)


def _finished(workdir: Path) -> dict[str, float]:
    if not any(record["kind"] == "finished" for record in read_records(workdir)):
        raise ConfigError(f"{workdir} is not the workdir of a finished run: train it to its end first")
    return final_figures(workdir)


def row(name: str, workdir: Path, figures: dict[str, float], commit: str = "") -> dict[str, Any]:
    """What a result file says of a finished run.

    Args:
      figures: its last evaluation, see `final_figures`.
      commit: instead of the recorded one.
    """
    cfg, log = run_config(workdir), read_records(workdir)
    speeds = [r["clips_per_second"] for r in log if r["kind"] == "speed"]
    rate = statistics.median(speeds) if speeds else None
    clips = cfg.train.steps * cfg.train.batch_size
    views = figures.get("count/views")
    return {
        "run": name,
        "seed": cfg.seed,
        "parameters": trecvit.count_params(cfg.model),
        "steps": cfg.train.steps,
        "batch": cfg.train.batch_size,
        "clips/s": None if rate is None else round(rate),
        "minutes of steps": None if rate is None else round(clips / rate / 60, 1),
        "held out": int(figures["count/clips"]) if "count/clips" in figures else "-",
        "views": "-" if views is None else int(views),
        **{
            heading: round(100 * figures[key], 2) if key in figures else "-"
            for heading, key in (("top-1 %", "top1"), ("top-5 %", "top5"))
        },
        **({"loss": round(figures["loss"], 4)} if "loss" in figures else {}),
        **provenance(load_resolved(workdir), commit=commit),
    }


if __name__ == "__main__":
    run_main(main)
