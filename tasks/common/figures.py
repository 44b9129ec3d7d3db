"""What figures of all tasks share: PNG files written whole, axes, colours, and curves out of a run's log.

Headless, and without pyplot's global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.common.storage import replacing

COLOURS = ("#1f6fb4", "#d9622b", "#3a9a5b", "#8b5fb0", "#b59120", "#c44e7d", "#4a9fb5", "#666666")
_DPI = 130


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG so that a reader sees the old or the new one whole."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def axes_of(figure: Figure, rows: int = 1, columns: int = 1, **options: Any) -> np.ndarray:
    """Axes with a light grid, as an array of at least one dimension."""
    axes = np.atleast_1d(figure.subplots(rows, columns, **options))
    for ax in axes.flat:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def series(
    records: Sequence[Mapping[str, Any]], kind: str, name: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(steps, values) of a metric in the records of metrics.jsonl of one kind."""
    rows = [(r["step"], float(r[name])) for r in records if r.get("kind") == kind and name in r]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def smoothing_window(count: int) -> int:
    """Odd number of points over which so long a training curve is averaged."""
    return 2 * (max(1, count // 40) // 2) + 1


def smooth(values: Float[np.ndarray, " T"], window: int) -> Float[np.ndarray, " T"]:
    """Centred moving average over `window` positions, the window clipped at both ends; NaN values are left
    out.

    Raises:
      ValueError: an even or non-positive window, which has no centre.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"the smoothing window must be an odd number of positions, got {window}")
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    half = window // 2
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))

    def windowed(x: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)])
        return sums[high] - sums[low]

    totals, counts = windowed(np.where(known, values, 0.0)), windowed(known)
    return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw_training(
    ax: Axes, records: Sequence[Mapping[str, Any]], metric: str, colours: Sequence[str] = COLOURS
) -> bool:
    """A metric by step: of training, thin and smoothed, and of every evaluation that has it.

    Args:
      ax: where.
      records: of metrics.jsonl: kind "train" with `metric`, kind "eval" with "<name>/<metric>".
      metric: its name.
      colours: of training, then of the evaluations.

    Returns:
      False, and nothing is drawn, if training has no such metric.
    """
    steps, values = series(records, "train", metric)
    if not len(steps):
        return False
    ax.plot(steps, values, color=colours[0], alpha=0.28, linewidth=0.8)
    window = smoothing_window(len(values))
    label = "training" if window == 1 else f"training (mean over {window} steps)"
    ax.plot(steps, smooth(values, window), color=colours[0], linewidth=1.6, label=label)
    ending = f"/{metric}"
    names = sorted({k for r in records if r.get("kind") == "eval" for k in r if k.endswith(ending)})
    for colour, name in zip(tuple(colours[1:]) * len(names), names, strict=False):
        at, found = series(records, "eval", name)
        label = name.removesuffix(ending).replace("_", " ")
        ax.plot(at, found, color=colour, marker="o", markersize=3.5, linewidth=1.2, label=label)
    ax.set_xlabel("step")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.legend(frameon=False)
    return True


def frame_late(ax: Axes, values: Float[np.ndarray, " n"]) -> None:
    """Leaves the first steps of a loss, far above everything that follows, out of the frame, not out of the
    data.
    """
    finite = values[np.isfinite(values)]
    if len(finite):
        late = finite[len(finite) // 20 :]
        low, high = late.min(), max(late.max(), late.min() + 0.1)
        ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
