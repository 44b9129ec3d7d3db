"""Evaluation on the host: scores of views added up per clip, top-1/5, per-class table, confusion matrix.

A clip is judged once, on the mean over its views (4 x 3 in the paper), however these are spread over batches.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tasks.common.figures import save
from tasks.common.storage import replacing

Average = Literal["probabilities", "logits"]

_MOST_NUMBERS = 20  # classes up to which cells carry their counts
_MOST_NAMES = 60  # classes up to which every row and column is named
_NAME_LENGTH = 28
_LISTED_LENGTH = 50
_PAIRS = 12


class Judged(NamedTuple):
    """Every clip once, in the order of its id.

    Attributes:
      clips: ids.
      labels: true classes.
      scores: means over the views, of probabilities or logits, float64; NaN where a view was not finite.
      views: how many there were.
    """

    clips: Int[np.ndarray, " N"]
    labels: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, "N C"]
    views: Int[np.ndarray, " N"]


class ViewScores:
    """Adds up the logits of views by the clip they show."""

    def __init__(self, num_classes: int, average: Average = "probabilities"):
        """Starts empty.

        Args:
          num_classes: C.
          average: what is averaged over the views of a clip: softmax "probabilities", or "logits".

        Raises:
          ValueError: num_classes below 1, or another average.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes = {num_classes}: must be at least 1")
        if average not in ("probabilities", "logits"):
            raise ValueError(f"average = {average!r}: must be 'probabilities' or 'logits'")
        self.num_classes, self.average = num_classes, average
        self._sums: dict[int, np.ndarray] = {}
        self._labels: dict[int, int] = {}
        self._views: dict[int, int] = {}

    def add(self, logits: Any, labels: Any, clips: Any, valid: Any = None) -> None:
        """Adds the views of one batch.

        Args:
          logits: [N, C], of any float dtype; of views of any clips, in any order.
          labels: [N], true class of each view's clip.
          clips: [N], ids of the clips.
          valid: [N] bool, views that count; None: all. The others may hold anything.

        Raises:
          ValueError: arrays that do not fit together, a label outside [0, C), or another label than that of
            an earlier view of the same clip.
        """
        logits = np.asarray(logits).astype(np.float64)
        labels, clips = np.asarray(labels), np.asarray(clips)
        valid = np.ones(labels.shape, bool) if valid is None else np.asarray(valid, bool)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must have shape [N, {self.num_classes}]; got {logits.shape}")
        for name, array in (("labels", labels), ("clips", clips), ("valid", valid)):
            if array.shape != logits.shape[:1]:
                raise ValueError(
                    f"{name} must have shape {logits.shape[:1]}, one per view; got {array.shape}"
                )
        scores = _softmax(logits) if self.average == "probabilities" else logits
        for row in np.flatnonzero(valid):
            clip, label = int(clips[row]), int(labels[row])
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {label} of clip {clip} is not one of {self.num_classes} classes")
            if self._labels.setdefault(clip, label) != label:
                raise ValueError(
                    f"clip {clip} has label {label} in one view and {self._labels[clip]} in another"
                )
            self._sums[clip] = self._sums.get(clip, 0.0) + scores[row]
            self._views[clip] = self._views.get(clip, 0) + 1

    def judged(self) -> Judged:
        """All clips so far."""
        clips = sorted(self._sums)
        views = np.array([self._views[c] for c in clips], np.int64)
        sums = np.array([self._sums[c] for c in clips], np.float64).reshape(len(clips), self.num_classes)
        labels = np.array([self._labels[c] for c in clips], np.int64)
        return Judged(np.array(clips, np.int64), labels, sums / np.maximum(views, 1)[:, None], views)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Rows with a NaN or no largest number become NaN."""
    with np.errstate(invalid="ignore"):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)


def ranks(scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Place of the true class among the scores, 0 for the first; equal scores rank by class index.

    C where a score is NaN: such a clip is never right.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    tied = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    rank = ((scores > own) | tied).sum(axis=1)
    return np.where(np.isnan(scores).any(axis=1), scores.shape[1], rank)


def summarize(judged: Judged) -> dict[str, float]:
    """Shares in [0, 1]: "top1", "top5", and "mean_class" (top-1 averaged over the classes that occur).

    Also counts: "clips", "views" (the fewest of a clip) and, if there are any, clips that are "not_finite":
    they count as wrong. Shares of no clips are NaN.
    """
    count = len(judged.labels)
    if count == 0:
        return {"top1": math.nan, "top5": math.nan, "mean_class": math.nan, "clips": 0, "views": 0}
    rank = ranks(judged.scores, judged.labels)
    per_class = per_class_table(judged)
    broken = int(np.isnan(judged.scores).any(axis=1).sum())
    return {
        "top1": float((rank < 1).mean()),
        "top5": float((rank < min(5, judged.scores.shape[1])).mean()),
        "mean_class": float(np.mean([row.top1 for row in per_class if row.clips])),
        "clips": count,
        "views": int(judged.views.min()),
        **({"not_finite": broken} if broken else {}),
    }


def confusion_matrix(judged: Judged) -> Int[np.ndarray, "C C"]:
    """Clips of true class (row) that were taken for a class (column). Clips with NaN scores are left out."""
    classes = judged.scores.shape[1]
    usable = ~np.isnan(judged.scores).any(axis=1)
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (judged.labels[usable], judged.scores[usable].argmax(axis=1)), 1)
    return matrix


class ClassRow(NamedTuple):
    """How one class fared.

    Attributes:
      label: the class.
      clips: of this class.
      top1, top5: share of them that are right; NaN without clips.
      confused_with: the wrong class they are most often taken for; -1 if none.
      confused: how often.
    """

    label: int
    clips: int
    top1: float
    top5: float
    confused_with: int
    confused: int


def per_class_table(judged: Judged) -> list[ClassRow]:
    """One row per class, in the order of the classes, those without clips included."""
    classes = judged.scores.shape[1]
    rank, matrix = ranks(judged.scores, judged.labels), confusion_matrix(judged)
    rows = []
    for index in range(classes):
        own = rank[judged.labels == index]
        top1, top5 = (float((own < min(k, classes)).mean()) if len(own) else math.nan for k in (1, 5))
        wrong = matrix[index].copy()
        wrong[index] = 0
        other = int(wrong.argmax()) if wrong.any() else -1
        rows.append(ClassRow(index, len(own), top1, top5, other, int(wrong.max())))
    return rows


def write_per_class(path: Path, rows: Sequence[ClassRow], names: Sequence[str]) -> None:
    """Writes the table as CSV: class, name, clips, top1, top5, confused_with (a name), confused.

    Shares have four decimals; cells of what there is not are empty.

    Raises:
      ValueError: not one name per row.
    """
    _check_names(names, len(rows))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", "clips", "top1", "top5", "confused_with", "confused"])
        for row in rows:
            shares = [f"{s:.4f}" if row.clips else "" for s in (row.top1, row.top5)]
            other = [names[row.confused_with], row.confused] if row.confused_with >= 0 else ["", ""]
            table.writerow([row.label, names[row.label], row.clips, *shares, *other])


def plot_confusion(path: Path, matrix: Int[np.ndarray, "C C"], names: Sequence[str], title: str = "") -> None:
    """Draws a confusion matrix as PNG: shares of each true class, rare mistakes made visible.

    Up to 20 classes the cells carry counts, up to 60 rows and columns carry names; beyond, class indices, and
    the most frequent mistakes are listed by name beside the matrix.

    Raises:
      ValueError: not one name per class.
    """
    classes = len(matrix)
    _check_names(names, classes)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    side = min(max(4.5, 0.42 * classes + 2.5), 11.0)
    figure = Figure(
        figsize=(side + (4.5 if classes > 2 else 1.0), side),
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15),
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(side, 4.0 if classes > 2 else 0.5))
    axes = figure.add_subplot(grid[0])
    image = axes.imshow(
        shares, cmap=colormaps["Blues"], norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="equal"
    )
    figure.colorbar(
        image, ax=axes, label="share of the true class", fraction=0.04, ticks=(0, 0.05, 0.25, 0.5, 1)
    )
    _label_classes(axes, names)
    if classes <= _MOST_NUMBERS:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.35 else "black"
            axes.text(
                column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8
            )
    correct = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set_title(title or f"top-1 {100 * correct:.1f} % of {matrix.sum()} clips, {classes} classes")
    side_axes = figure.add_subplot(grid[1])
    side_axes.axis("off")
    if classes > 2:
        side_axes.text(0, 1, _worst_pairs(matrix, names), va="top", fontsize=7, transform=side_axes.transAxes)
    save(figure, path)


def _label_classes(axes: Axes, names: Sequence[str]) -> None:
    classes = len(names)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    if classes > _MOST_NAMES:
        return  # matplotlib's own ticks: class indices
    size = 9 if classes <= _MOST_NUMBERS else 6
    short = [_shorten(name) for name in names]
    axes.set_xticks(range(classes), short, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), short, fontsize=size)


def _shorten(name: str, length: int = _NAME_LENGTH) -> str:
    if len(name) > length:  # both ends: names of SSv2 begin alike
        name = name[: (length - 1) // 2] + "…" + name[-(length // 2) :]
    return name.replace("$", r"\$")  # a dollar sign would start a formula


def _worst_pairs(matrix: np.ndarray, names: Sequence[str]) -> str:
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    lines = ["most frequent mistakes:"]
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, column]:
            true, taken = (_shorten(names[i], _LISTED_LENGTH) for i in (row, column))
            lines.append(
                f"{wrong[row, column]} of {matrix[row].sum()}: {true} ({row})\n    as {taken} ({column})"
            )
    return "\n".join(lines if len(lines) > 1 else ["no mistakes"])


def _check_names(names: Sequence[str], classes: int) -> None:
    if len(names) != classes:
        raise ValueError(f"{len(names)} names for {classes} classes: give one per class")
