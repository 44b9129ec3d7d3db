"""Figures of language-model runs, as PNG files. Headless, and without pyplot's global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tasks.common.figures import (
    COLOURS,
    axes_of,
    draw_training,
    frame_late,
    save,
    series,
    smooth,
    smoothing_window,
)
from tasks.lm.perlength import SMOOTHING_WINDOW, perplexity_by_length, report_lengths

_MOST_COLUMNS = 1000
_MOST_IN_AXES = 3  # curves that a legend inside the axes names


class Curve(NamedTuple):
    """Per-position losses of one run.

    Attributes:
      name: for the legend.
      losses: L(i) in nats, float64; NaN where unknown.
      counts: documents behind each position.
      train_length: tokens it was trained on; None = not known.
    """

    name: str
    losses: Float[np.ndarray, " T"]
    counts: Int[np.ndarray, " T"]
    train_length: int | None


def _number(value: float, _: Any = None) -> str:
    """1536 -> "1.5k", with binary thousands where they come out even (65536 -> "64k"); 2e7 -> "20M"."""
    for scale, suffix in ((2**20, "M"), (2**10, "k")):
        if value >= scale and value % scale == 0:
            return f"{value / scale:g}{suffix}"
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def plot_training(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Training and held-out loss by step.

    Args:
      records: of metrics.jsonl: kind "train" with "loss", kind "eval" with "<name>/loss" in nats.
      path: PNG to write.
      title: of the figure.

    Returns:
      False, and nothing is written, if there is no loss to show yet.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    (ax,) = axes_of(figure)
    if not draw_training(ax, records, "loss"):
        return False
    frame_late(ax, series(records, "train", "loss")[1])
    ax.set(ylabel="loss (nats per token)", title=title)
    save(figure, path)
    return True


def plot_losses(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str = "") -> None:
    """Training and held-out loss of several runs by tokens trained on.

    Args:
      runs: name -> records of metrics.jsonl.
      path: PNG to write.
      title: of the figure.

    Raises:
      ValueError: no run has a training loss.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = axes_of(figure, 1, 2)
    lows, highs = [], []
    for colour, (name, records) in zip(COLOURS * len(runs), runs.items(), strict=False):
        steps, losses = series(records, "train", "loss")
        _, tokens = series(records, "train", "tokens")
        if not len(steps):
            continue
        smoothed = smooth(losses, smoothing_window(len(losses)))
        left.plot(tokens, smoothed, color=colour, linewidth=1.2, label=name)
        late = smoothed[len(smoothed) // 10 :]
        lows.append(np.nanmin(late))
        highs.append(np.nanmax(late))
        at, values = series(records, "eval", "validation/loss")
        right.plot(
            at * tokens[0], values, color=colour, marker="o", markersize=3.5, linewidth=1.2, label=name
        )
    if not lows:
        raise ValueError("there is no training loss to plot")
    margin = 0.05 * (max(highs) - min(lows)) + 0.01
    left.set_ylim(min(lows) - margin, max(highs) + margin)
    left.set(ylabel="loss (nats per token)", title="Training loss (smoothed)")
    right.set(ylabel="loss (nats per token)", title="Held-out loss")
    for ax in (left, right):
        ax.set_xlabel("tokens trained on")
        ax.xaxis.set_major_formatter(FuncFormatter(_number))
    _name_curves(figure, (left, right))
    figure.suptitle(title)
    save(figure, path)


def plot_pruning(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Share of attention tiles pruned by step: the mean of each layer, and every head.

    Args:
      records: of metrics.jsonl: kind "eval" with "pruning/pruned" and "pruning/layer_LL/head_HH".
      path: PNG to write.
      title: of the figure.

    Returns:
      False, and nothing is written, if pruning was not measured.
    """
    found = [r for r in records if r.get("kind") == "eval" and "pruning/pruned" in r]
    if not found:
        return False
    names = sorted(name for name in found[0] if name.startswith("pruning/layer_"))
    steps = np.array([r["step"] for r in found], np.float64)
    heads = np.array([[float(r[name]) for r in found] for name in names])
    layers = [name.split("/")[1] for name in names]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = axes_of(figure, 1, 2)
    unique = sorted(set(layers))
    for number, layer in enumerate(unique):
        mean = heads[[name == layer for name in layers]].mean(axis=0)
        shade = 0.15 + 0.75 * number / max(1, len(unique) - 1)
        left.plot(steps, mean, color=colormaps["viridis"](shade), linewidth=1, label=f"layer {number}")
    overall = [float(r["pruning/pruned"]) for r in found]
    left.plot(steps, overall, color="black", marker="o", markersize=3, linewidth=1.8, label="all")
    left.set(
        xlabel="step", ylabel="pruned fraction of attention tiles", ylim=(0, 1), title="Mean of each layer"
    )
    left.legend(frameon=False, fontsize=8, ncols=2)
    image = right.imshow(
        heads, aspect="auto", cmap="viridis", norm=Normalize(0, 1), interpolation="nearest",
        extent=(-0.5, len(steps) - 0.5, len(names) - 0.5, -0.5),
    )  # fmt: skip
    right.grid(False)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
    right.set_xticks(shown, [f"{steps[i]:g}" for i in shown])
    firsts = [layers.index(layer) for layer in unique]
    right.set_yticks(firsts, [str(number) for number in range(len(unique))])
    right.set(xlabel="step", ylabel="layer (a row for each head)", title="Every head")
    figure.colorbar(image, ax=right, label="pruned fraction")
    figure.suptitle(title)
    save(figure, path)
    return True


def plot_positions(
    curves: Sequence[Curve],
    path: Path,
    *,
    window: int = SMOOTHING_WINDOW,
    log_x: bool = False,
    title: str = "",
) -> None:
    """Smoothed loss by position and perplexity by length, one line per run; training lengths are marked.

    Positions before the first 128 (or the first eighth of a short document) are left out, as in the paper.

    Raises:
      ValueError: no curves, or none with a known position.
    """
    if not curves or not any(np.isfinite(c.losses).any() for c in curves):
        raise ValueError("there is no position with a loss to plot")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = axes_of(figure, 1, 2)
    longest = max(len(c.losses) for c in curves)
    begin = min(128, longest // 8)
    for colour, curve in zip(COLOURS * len(curves), curves, strict=False):
        positions = np.arange(len(curve.losses))
        smoothed = smooth(curve.losses, window)
        left.plot(positions[begin:], smoothed[begin:], color=colour, linewidth=1.4, label=curve.name)
        points = perplexity_by_length(curve.losses, report_lengths(len(curve.losses)))
        right.plot(
            *zip(*points.items(), strict=True), color=colour, marker="o", markersize=4, label=curve.name
        )
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in right.get_lines()])
    _mark_training_lengths((left, right), curves, longest)
    left.set(
        xlabel="position in the document (tokens)",
        ylabel="loss (nats per token)",
        title=f"Loss by position (mean over {window} positions)",
    )
    if log_x:
        left.set_xscale("log", base=2)
    left.set_xlim(max(begin, 1), longest)
    right.set_xscale("log", base=2)
    right.set(xlabel="length (tokens)", ylabel="perplexity", title="Perplexity by length")
    values = values[np.isfinite(values)]
    if (
        len(values) and values.max() > 8 * values.min()
    ):  # a model that falls apart must not flatten the others
        right.set_yscale("log")
    for ax in (left, right):
        ax.xaxis.set_major_formatter(FuncFormatter(_number))
    _name_curves(figure, (left, right))
    if not log_x:
        left.set_xticks(np.linspace(0, longest, 9)[1:] if longest % 8 == 0 else left.get_xticks()[1:-1])
    if title:
        figure.suptitle(title)
    save(figure, path)


def _name_curves(figure: Figure, axes: Sequence[Axes]) -> None:
    """A legend in each of the axes, or one below all of them where it would cover the curves."""
    handles, names = axes[0].get_legend_handles_labels()
    if len(names) > _MOST_IN_AXES:
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        return
    for ax in axes:
        ax.legend(frameon=False)


def _mark_training_lengths(axes: Sequence[Axes], curves: Sequence[Curve], longest: int) -> None:
    for length in sorted({c.train_length for c in curves if c.train_length}):
        for ax in axes:
            if length <= longest:
                ax.axvline(length, color="#444444", linestyle="--", linewidth=1)
                ax.annotate(
                    " training length",
                    (length, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(1, -2),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color="#444444",
                )


def plot_heat_map(
    values: Float[np.ndarray, "rows columns"],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    bar_label: str,
    limits: tuple[float, float] | None = None,
    log_scale: bool = False,
    x_extent: tuple[float, float] | None = None,
) -> None:
    """A matrix as an image; small ones (up to 32 x 32) carry their values in the cells.

    A matrix with more columns than the picture has pixels for is averaged over neighbouring columns.

    Args:
      values: what to show; NaN cells stay blank.
      path: PNG to write.
      limits: ends of the colour scale; None means those of the values.
      log_scale: logarithmic colours; values outside the limits take the colour of the nearest one.
      x_extent: coordinates of the first and after the last column; None means column numbers.
    """
    rows, columns = values.shape
    height = min(9.0, max(2.6, 1.6 + 0.34 * rows))
    figure = Figure(figsize=(max(5.5, min(11.0, 2.5 + 0.55 * columns)), height), layout="constrained")
    ax = figure.subplots()
    extent = (-0.5, columns - 0.5) if x_extent is None else x_extent
    scale = LogNorm if log_scale else Normalize
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    starts = np.unique(np.linspace(0, columns, _MOST_COLUMNS, endpoint=False).astype(int))
    drawn = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, columns])
    image = ax.imshow(
        np.clip(drawn, low, high),
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        norm=scale(low, high),
        extent=(*extent, rows - 0.5, -0.5),
    )
    figure.colorbar(image, ax=ax, label=bar_label)
    ax.set(title=title, xlabel=x_label, ylabel=y_label)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if x_extent is None and rows <= 32 and columns <= 32:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                bright = (value - low) / (high - low) > 0.55
                colour = "black" if bright else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    save(figure, path)


def plot_decay(
    log_fgate: Float[np.ndarray, "T N"], path: Path, *, heads: Sequence[int], title: str, floor: float = -10.0
) -> None:
    """The decay bias D_ij = sum of log f over (j, i] of some heads, queries down and keys across.

    Args:
      log_fgate: log forget gates of one sequence and layer.
      path: PNG to write.
      heads: which to show, side by side.
      floor: values below this (in nats) share the darkest colour: e^-10 is what pruning calls nothing.
    """
    # At most 256 rows and columns are drawn: more than the picture has pixels for.
    points = np.unique(np.linspace(0, len(log_fgate) - 1, min(256, len(log_fgate))).astype(int))
    sums = np.cumsum(log_fgate.astype(np.float64), axis=0)[points]
    figure = Figure(figsize=(1.4 + 3.1 * len(heads), 4.1), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(heads), sharey=True))
    image: Any = None
    for ax, head in zip(axes, heads, strict=True):
        bias = sums[:, None, head] - sums[None, :, head]
        bias = np.where(points[:, None] >= points[None, :], np.maximum(bias, floor), np.nan)
        end = len(log_fgate)
        image = ax.imshow(
            bias,
            cmap="magma",
            norm=Normalize(floor, 0),
            extent=(0, end, end, 0),
            interpolation="nearest",
        )
        ax.set(title=f"head {head}", xlabel="key position")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=list(axes), label="decay bias (nats)")
    figure.suptitle(title)
    save(figure, path)
