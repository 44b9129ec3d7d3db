"""What a training run shows as it goes and at its end: held-out figures, tables, pictures.

Everything lands in the workdir: `training.png`, `evaluation/` (per_class.csv, confusion.png), and of an
auto-encoder `reconstructions/step_*.png`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from tasks.common.job import Hook
from tasks.common.writer import read_records
from tasks.video.config import VideoConfig
from tasks.video.data import VideoData
from tasks.video.evaluators import Classifier, final_hook, validation_hook
from tasks.video.plots import plot_training
from tasks.video.reconstruction import Painter, picture_hook, reconstruction_hook

EVALUATION = "evaluation"
RECONSTRUCTIONS = "reconstructions"


def make_evaluators(cfg: VideoConfig, data: VideoData, mesh: Mesh, workdir: Path) -> tuple[Hook, ...]:
    """Held-out accuracy as training goes and by all views at the end; an auto-encoder's held-out loss."""
    if data.eval_videos is None:
        return ()
    if cfg.train.objective == "mae":
        return (reconstruction_hook(_painter(cfg, mesh), data, cfg.eval.videos),)
    classifier = Classifier(cfg.model, cfg.runtime, cfg.augment, mesh, cfg.eval.batch_size, cfg.eval.average)
    views = {"videos": cfg.eval.videos, "clips": cfg.eval.clips, "crops": cfg.eval.crops}
    return (
        validation_hook(classifier, data, **views, last=cfg.train.steps),
        final_hook(classifier, data, workdir / EVALUATION),
    )


def make_callbacks(cfg: VideoConfig, data: VideoData, mesh: Mesh, workdir: Path) -> tuple[Hook, ...]:
    """The curves, and what an auto-encoder paints."""

    def plot(params: Any, step: int) -> None:
        del params, step
        if jax.process_index() == 0:
            plot_training(read_records(workdir), workdir / "training.png", title=workdir.name)

    hooks = [Hook("curves", plot)]
    if cfg.train.objective == "mae" and data.eval_videos is not None:
        hooks.append(picture_hook(_painter(cfg, mesh), data, workdir / RECONSTRUCTIONS))
    return tuple(hooks)


def _painter(cfg: VideoConfig, mesh: Mesh) -> Painter:
    return Painter(cfg.mae.model(cfg.model), cfg.runtime, cfg.augment, cfg.mae, mesh, cfg.eval.batch_size)


def final_figures(workdir: Path) -> dict[str, float]:
    """The last evaluation of a finished run: metric -> value, without prefixes; empty if there is none."""
    found: dict[str, float] = {}
    for record in read_records(workdir):
        if record["kind"] == "eval":
            values = {k: v for k, v in record.items() if "/" in k}
            found |= {k.split("/", 1)[1]: v for k, v in values.items() if not k.startswith("validation/")}
    return found


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """The run's last figures and where its pictures are."""
    console = console or Console(highlight=False)
    figures = final_figures(workdir)
    if figures:
        print_figures({workdir.name: figures}, console)
    names = ("training.png", f"{EVALUATION}/per_class.csv", f"{EVALUATION}/confusion.png", RECONSTRUCTIONS)
    for name in (*names, "unreadable.jsonl", "metrics.jsonl"):
        if (workdir / name).exists():
            console.print(f"  {workdir / name}", soft_wrap=True)


def print_figures(runs: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """A table of runs side by side; shares as percentages."""
    columns: Sequence[str] = [
        name
        for name in ("top1", "top5", "mean_class", "loss")
        if any(name in figures for figures in runs.values())
    ]
    table = Table(title="held-out videos")
    table.add_column("run")
    for name in (*columns, "clips", "views"):
        table.add_column({"top1": "top-1 %", "top5": "top-5 %", "mean_class": "mean class %"}.get(name, name))
    for run, figures in runs.items():
        counts = [figures.get(name, figures.get(f"count/{name}")) for name in ("clips", "views")]
        table.add_row(
            run,
            *(_shown(name, figures.get(name)) for name in columns),
            *("" if count is None else f"{count:,.0f}" for count in counts),
        )
    console.print(table)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.1f}"
