"""What a training run shows as it goes and at its end: held-out figures beside trackers that learn nothing.

Everything lands in the workdir: `training.png`, and in `evaluation/` per_clip.csv and clips.png, predictions
drawn over the frames.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from tasks.common import figures
from tasks.common.data import Source
from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.storage import atomic_write
from tasks.common.writer import read_records
from tasks.points.config import PointsConfig
from tasks.points.controls import LucasKanade, static
from tasks.points.data import PointsData
from tasks.points.data.sheet import write_track_sheet
from tasks.points.held_out import (
    SHOWN,
    ClipTracker,
    batches_of,
    judge_model,
    judge_predictor,
    shown_means,
)
from tasks.points.predictors import Predictor

EVALUATION = "evaluation"
NAMES = {"held_out": "model", "static": "points do not move", "lucas_kanade": "Lucas-Kanade"}


def make_evaluators(cfg: PointsConfig, data: PointsData, mesh: Mesh, workdir: Path) -> tuple[Hook, ...]:
    """The held-out clips as training goes, all of them at the end, and the controls on the same clips."""
    if data.held_out is None:
        return ()
    clips, tracker = data.held_out, ClipTracker(cfg.model, cfg.runtime, mesh, cfg.eval.batch_size)
    hooks = [
        _validation_hook(tracker, clips, cfg.eval.clips, cfg.train.steps),
        _final_hook(tracker, clips, workdir / EVALUATION),
        _control_hook("static", static, clips),
    ]
    if cfg.eval.lucas_kanade:
        hooks.append(_control_hook("lucas_kanade", lucas_kanade_for(cfg.model.image_size), clips))
    return tuple(hooks)


def lucas_kanade_for(image_size: tuple[int, int]) -> Predictor:
    """Lucas-Kanade forward in time, its window an eighth of the frame, where small windows do better."""
    return LucasKanade(radius=min(max(min(image_size) // 16, 3), LucasKanade().radius), backward=False)


def make_callbacks(cfg: PointsConfig, data: PointsData, mesh: Mesh, workdir: Path) -> tuple[Hook, ...]:
    """The curves, and clips with the tracks that the model sees in them."""

    def plot(params: Any, step: int) -> None:
        del params, step
        if jax.process_index() == 0:
            plot_training(read_records(workdir), workdir / "training.png", workdir.name)

    hooks = [Hook("curves", plot)]
    if data.held_out is not None and cfg.eval.pictures:
        tracker = ClipTracker(cfg.model, cfg.runtime, mesh, cfg.eval.batch_size)
        hooks.append(_picture_hook(tracker, data.held_out, cfg.eval.pictures, workdir / EVALUATION))
    return tuple(hooks)


def _validation_hook(tracker: ClipTracker, clips: Source, most: int, last: int) -> Hook:
    def run(params: Any, step: int) -> dict[str, float] | None:
        return None if step >= last else shown_means(judge_model(tracker, params, clips, most))

    return Hook("validation", run)


def _final_hook(tracker: ClipTracker, clips: Source, folder: Path) -> Hook:
    def run(params: Any, step: int) -> dict[str, float]:
        del step
        rows = judge_model(tracker, params, clips)
        if jax.process_index() == 0:
            with writing(folder, "the evaluation"):
                atomic_write(folder / "per_clip.csv", _csv(rows))
        return shown_means(rows)

    return Hook("held_out", run, 0)


def _control_hook(name: str, predict: Predictor, clips: Source) -> Hook:
    """A tracker that learns nothing, once, at the end."""

    def run(params: Any, step: int) -> dict[str, float]:
        del params, step
        return shown_means(judge_predictor(predict, clips))

    return Hook(name, run, 0)


def _picture_hook(tracker: ClipTracker, clips: Source, count: int, folder: Path) -> Hook:
    def run(params: Any, step: int) -> None:
        del step
        rows = []
        for batch, size in batches_of(clips, tracker.batch_size, count):
            tracks, visible = tracker.tracks(params, batch)
            for row in range(size):
                used = batch["valid"][row]
                given = [batch[name][row][used] for name in ("tracks_yx", "visible")]
                rows += [
                    ("truth", batch["video"][row], *given),
                    ("model", batch["video"][row], tracks[row][used], visible[row][used]),
                ]
        if jax.process_index() == 0:
            with writing(folder, "a picture"):
                folder.mkdir(parents=True, exist_ok=True)
                write_track_sheet(folder / "clips.png", rows)

    return Hook("pictures", run, 0)


def _csv(rows: Sequence[Mapping[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["clip", *rows[0]])
    writer.writerows([index, *(f"{value:.6g}" for value in row.values())] for index, row in enumerate(rows))
    return text.getvalue()


def final_figures(workdir: Path) -> dict[str, dict[str, float]]:
    """The last evaluation of a finished run: "held_out", "static", ... -> metric -> value."""
    found: dict[str, dict[str, float]] = {}
    for record in read_records(workdir):
        if record["kind"] == "eval":
            for key, value in record.items():
                name, slash, metric = key.partition("/")
                if slash and name in NAMES:
                    found.setdefault(name, {})[metric] = float(value)  # what is undefined is logged as "nan"
    return found


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """The run's last figures beside those of the controls, and where its pictures are."""
    console = console or Console(highlight=False)
    found = final_figures(workdir)
    if found:
        print_figures({NAMES[name]: found[name] for name in NAMES if name in found}, console)
    names = ("training.png", f"{EVALUATION}/per_clip.csv", f"{EVALUATION}/clips.png")
    for name in (*names, "unreadable.jsonl", "metrics.jsonl"):
        if (workdir / name).exists():
            console.print(f"  {workdir / name}", soft_wrap=True)


def print_figures(rows: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """A table of trackers side by side, in per cent; a dash where there was nothing to count."""
    table = Table(title="held-out clips, per cent")
    table.add_column("tracker", no_wrap=True)
    titles = {
        "average_jaccard": "AJ",
        "occlusion_accuracy": "OA",
        "delta_avg_of_occluded": "of occluded",
        "delta_avg_after_occlusion": "after occlusion",
    }
    for metric in SHOWN.values():
        table.add_column(titles.get(metric, metric), justify="right")
    for name, values in rows.items():
        cells = [values[metric] for metric in SHOWN.values()]
        table.add_row(name, *("-" if math.isnan(value) else f"{100 * value:.1f}" for value in cells))
    console.print(table)


def plot_training(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Loss by step, and delta_avg beside it, held out and of the controls.

    Returns:
      False, and nothing is written, if there is no loss to show yet.
    """
    _, losses = figures.series(records, "train", "loss")
    if not len(losses):
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figures.axes_of(figure, 1, 2)
    figures.draw_training(left, records, "loss")
    figures.frame_late(left, losses)
    left.set_ylabel("loss (all read-outs)")
    figures.draw_training(right, records, "delta_avg")
    right.set(ylabel="delta_avg", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title)
    figures.save(figure, path)
    return True
