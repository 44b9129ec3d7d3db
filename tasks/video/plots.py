"""Figures of video runs, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tasks.common import figures
from tasks.common.figures import COLOURS


def plot_training(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Loss by step, and top-1 beside it where there are classes.

    Args:
      records: of metrics.jsonl: kind "train" with "loss" and "top1", kind "eval" with "<name>/top1".
      path: PNG to write.
      title: of the figure.

    Returns:
      False, and nothing is written, if there is no loss to show yet.
    """
    _, losses = figures.series(records, "train", "loss")
    if not len(losses):
        return False
    classes = len(figures.series(records, "train", "top1")[0]) > 0
    figure = Figure(figsize=(11 if classes else 7, 4.2), layout="constrained")
    axes = figures.axes_of(figure, 1, 2 if classes else 1)
    figures.draw_training(axes[0], records, "loss")
    figures.frame_late(axes[0], losses)
    axes[0].set_ylabel("loss (nats)" if classes else "loss (per pixel value)")
    if classes:
        figures.draw_training(axes[1], records, "top1")
        axes[1].set(ylabel="top-1", ylim=(0, 1))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title)
    figures.save(figure, path)
    return True


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str = "") -> None:
    """Held-out top-1 of several runs by step; the last evaluation, by all views, as a square.

    Args:
      runs: name -> records of metrics.jsonl.

    Raises:
      ValueError: no run was evaluated.
    """
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    (ax,) = figures.axes_of(figure)
    drawn = 0
    for colour, (name, records) in zip(COLOURS * len(runs), runs.items(), strict=False):
        at, values = figures.series(records, "eval", "validation/top1")
        last, final = figures.series(records, "eval", "held_out/top1")
        label = f"{name} ({100 * final[-1]:.1f} %)" if len(final) else name
        ax.plot([*at, *last[-1:]], [*values, *final[-1:]], color=colour, linewidth=1.4, label=label)
        ax.plot(last[-1:], final[-1:], color=colour, marker="s", markersize=5)
        drawn += len(at) + len(last)
    if not drawn:
        raise ValueError("no run has a held-out top-1 to plot")
    ax.set(xlabel="step", ylabel="held-out top-1", ylim=(0, 1), title=title)
    ax.set_xlim(left=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(frameon=False)
    figures.save(figure, path)
