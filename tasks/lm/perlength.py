"""Loss by position and perplexity by length: the arithmetic of the paper's long-context evaluation.

L(i) is the mean over documents of the loss of token i, given i tokens before it (FoX section 4.2).
Perplexity over length l is P(l) = exp(mean of L(i) for i < l). Pure NumPy, float64.
"""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.common.figures import smooth

SMOOTHING_WINDOW = 101


class PositionLosses:
    """Sums of losses by position, in float64, over any number of batches.

    Documents may be shorter than `length`: a position counts the documents that reach it.
    """

    def __init__(self, length: int):
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self._sums = np.zeros(length, np.float64)
        self._counts = np.zeros(length, np.int64)

    def add(self, losses: Float[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"] | None = None) -> None:
        """Adds documents, one per row: losses in nats; only positions where `mask` is True count.

        Raises:
          ValueError: rows of another length.
        """
        if losses.shape[1] != len(self._sums):
            raise ValueError(f"losses have {losses.shape[1]} positions, expected {len(self._sums)}")
        mask = np.ones(losses.shape, bool) if mask is None else mask
        self._sums += np.sum(losses, axis=0, dtype=np.float64, where=mask)
        self._counts += np.sum(mask, axis=0)

    @property
    def counts(self) -> Int[np.ndarray, " T"]:
        """Documents that reach each position."""
        return self._counts.copy()

    @property
    def documents(self) -> int:
        """Documents seen (those with at least one token)."""
        return int(self._counts[0])

    def mean(self) -> Float[np.ndarray, " T"]:
        """L(i) in nats; NaN at positions no document reaches."""
        return np.divide(
            self._sums, self._counts, out=np.full(len(self._sums), np.nan), where=self._counts > 0
        )


def report_lengths(length: int, shortest: int | None = None) -> list[int]:
    """Lengths at which perplexity is reported: `length`, halved again and again; 65536 gives 65536 ... 512.

    Args:
      length: longest.
      shortest: where to stop; None means length / 128, but at least 16 (and `length` itself in any case).
    """
    shortest = max(16, length // 128) if shortest is None else shortest
    lengths = [length]
    while lengths[-1] // 2 >= max(1, shortest):
        lengths.append(lengths[-1] // 2)
    return lengths


def perplexity_by_length(mean_losses: Float[np.ndarray, " T"], lengths: Sequence[int]) -> dict[int, float]:
    """P(l) = exp(mean of L(i) for i < l), unsmoothed; NaN where some position before l has no document.

    Raises:
      ValueError: a length outside 1..T.
    """
    for length in lengths:
        if not 1 <= length <= len(mean_losses):
            raise ValueError(f"length {length} is outside the {len(mean_losses)} positions evaluated")
    return {length: float(np.exp(np.mean(mean_losses[:length], dtype=np.float64))) for length in lengths}


def to_csv(losses: PositionLosses, window: int = SMOOTHING_WINDOW) -> str:
    """Table with one line per position: position, documents, loss, smoothed_loss (nats; empty = no
    document).
    """
    mean, counts = losses.mean(), losses.counts
    smoothed = smooth(mean, window)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("position", "documents", "loss", "smoothed_loss"))
    for i, (count, loss, average) in enumerate(zip(counts, mean, smoothed, strict=True)):
        table.writerow((i, count, *("" if np.isnan(x) else repr(float(x)) for x in (loss, average))))
    return out.getvalue()


def from_csv(text: str) -> tuple[Float[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """(L(i), documents) of a table that `to_csv` made; NaN where it has no loss.

    Raises:
      ValueError: not such a table.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or not {"documents", "loss"} <= rows[0].keys():
        raise ValueError("not a table of losses by position")
    losses = np.array([float(row["loss"] or "nan") for row in rows], np.float64)
    return losses, np.array([int(row["documents"]) for row in rows], np.int64)


def perplexity_csv(perplexities: Mapping[int, float]) -> str:
    """Table with one line per length: length, perplexity, mean loss in nats."""
    lines = [f"{length},{value!r},{float(np.log(value))!r}" for length, value in perplexities.items()]
    return "\n".join(["length,perplexity,loss", *lines, ""])
