"""What the eval command found about a model, and how it is shown."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tasks.lm import perlength
from tasks.lm.evaluators import Totals
from tasks.lm.plots import Curve


class Report(NamedTuple):
    """What was found about one model.

    Attributes:
      name: for legends and file names.
      source: where its weights came from.
      parameters: how many it has.
      train_length: tokens it was trained on; None = not known.
      compute_dtype: of its matmuls.
      positions: losses by position.
      totals: over the same documents.
      held_out: figures per byte, and those of n-gram models; None = not asked for.
      pruning: share of attention tiles pruned and how it was measured; None = no gates, or not asked for.
    """

    name: str
    source: str
    parameters: int
    train_length: int | None
    compute_dtype: str
    positions: perlength.PositionLosses
    totals: Totals
    held_out: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None

    def perplexities(self) -> dict[int, float]:
        """Perplexity by length."""
        mean = self.positions.mean()
        return perlength.perplexity_by_length(mean, perlength.report_lengths(len(mean)))

    def curve(self) -> Curve:
        """For the plot."""
        return Curve(self.name, self.positions.mean(), self.positions.counts, self.train_length)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source,
            "parameters": self.parameters,
            "train_length": self.train_length,
            "compute_dtype": self.compute_dtype,
            "by_position": {"tokens": self.totals.tokens, **self.totals.metrics()},
            "perplexity": {str(length): value for length, value in self.perplexities().items()},
            "held_out": self.held_out,
            "pruning": self.pruning,
        }


def print_reports(reports: Sequence[Report], console: Console) -> None:
    """Tables of perplexity by length, bits per byte and pruned tiles. The first report is the main one."""
    console.print(_perplexity_table(reports))
    held_out = reports[0].held_out
    if held_out is not None and "bits_per_byte" in held_out:
        console.print(_bytes_table(reports[0].name, held_out))
    for report in reports:
        pruning = report.pruning
        if pruning is not None:
            console.print(
                f"{report.name}: {pruning['pruned_fraction']:.1%} of attention tiles pruned at "
                f"{pruning['length']:,} tokens, eps = e^{pruning['log_pruning_tolerance']:g}"
            )


def _perplexity_table(reports: Sequence[Report]) -> Table:
    table = Table(title=f"perplexity by length, {reports[0].positions.documents} documents")
    table.add_column("tokens", justify="right")
    for report in reports:
        table.add_column(report.name, justify="right")
    marked = {report.train_length for report in reports}
    for length in reports[0].perplexities():
        mark = "trained on " if length in marked else ""
        table.add_row(f"{mark}{length:,}", *(f"{r.perplexities()[length]:.3f}" for r in reports))
    return table


def _bytes_table(name: str, held_out: dict[str, Any]) -> Table:
    table = Table(title=f"{held_out['documents']} held-out documents, {held_out['bytes']:,} bytes")
    for heading in ("model", "bits/byte", "nats/byte"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = {f"{order}, same training text": bits for order, bits in held_out["ngram_bits_per_byte"].items()}
    for label, bits in {**rows, name: held_out["bits_per_byte"]}.items():
        table.add_row(label, f"{bits:.3f}", f"{bits * math.log(2):.3f}")
    return table
