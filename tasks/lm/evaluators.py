"""Held-out figures of a language model: loss, bits per byte, loss by position.

The functions serve the eval command and, as hooks, the training loop. They run under a mesh, the batch split
over all devices, and add up on the host in float64.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from models import fox
from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.mesh import put_whole_batch
from tasks.common.progress import Progressing, no_progress
from tasks.common.storage import atomic_write
from tasks.lm import losses, perlength
from tasks.lm.data import Examples
from tasks.lm.plots import Curve, plot_positions


class Scorer:
    """Losses of every token of host batches, computed on a mesh.

    Args:
      config, runtime: the model and how it is run.
      mesh: devices the batch is split over.
      batch_size: rows at a time; rounded up to a multiple of the mesh's devices, short batches are filled
        with rows that do not count.
    """

    def __init__(self, config: fox.FoxConfig, runtime: fox.FoxRuntime, mesh: Mesh, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.config, self.runtime, self.mesh = config, runtime, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def losses(self, params: Any, batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, "B T"]:
        """Loss of every label in nats, float32; 0 where `loss_mask` is False.

        Args:
          params: canonical tree, of host or device arrays.
          batch: tokens, labels, reset, loss_mask [B, T], B <= batch_size.
        """
        rows = len(batch["tokens"])
        with jax.set_mesh(self.mesh):
            placed = put_whole_batch(self._filled(batch), self.mesh)
            scored = _token_losses(self.config, self.runtime, params, placed)
            return np.asarray(scored)[:rows]

    def statistics(self, params: Any, tokens: np.ndarray, reset: np.ndarray) -> Any:
        """`FoxStats` of a batch, as host arrays; see `models.fox.statistics`."""
        rows = len(tokens)
        with jax.set_mesh(self.mesh):
            placed = put_whole_batch(self._filled({"tokens": tokens, "reset": reset}), self.mesh)
            stats = _statistics(self.config, self.runtime, params, placed["tokens"], placed["reset"])
            return jax.tree.map(lambda x: np.asarray(x)[:, :rows], stats)

    def _filled(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With rows that do not count, up to the batch size."""
        missing = self.batch_size - len(batch["tokens"])
        return {k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_losses(config: fox.FoxConfig, runtime: fox.FoxRuntime, params: Any, batch: Any) -> jax.Array:
    hidden, _ = fox.apply(config, runtime, params, batch["tokens"], reset=batch["reset"], output="hidden")
    scored = losses.token_losses(
        hidden,
        params["lm_head"]["kernel"],
        batch["labels"],
        batch["loss_mask"],
        compute_dtype=runtime.compute_dtype,
    )
    # Whole on every device, so that every process can read all of it.
    return jax.sharding.reshard(scored, PartitionSpec())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(
    config: fox.FoxConfig, runtime: fox.FoxRuntime, params: Any, tokens: jax.Array, reset: jax.Array
) -> Any:
    stats, _ = fox.apply(config, runtime, params, tokens, reset=reset, output="stats")
    return jax.tree.map(lambda x: jax.sharding.reshard(x, PartitionSpec()), stats)


class Totals(NamedTuple):
    """Sums over what was scored.

    Attributes:
      nats: loss of all labels.
      tokens: how many labels.
      bytes: of UTF-8 text they stand for; None where the tokenizer does not know.
    """

    nats: float
    tokens: int
    bytes: int | None

    @property
    def loss(self) -> float:
        """Mean loss in nats per token; NaN if nothing was scored."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def nats_per_byte(self) -> float | None:
        """Loss in nats spread over the bytes; ends of documents add loss but no bytes."""
        return self.nats / self.bytes if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """`nats_per_byte` in bits."""
        nats = self.nats_per_byte
        return None if nats is None else nats / math.log(2)

    def metrics(self) -> dict[str, float]:
        """loss, perplexity and, where bytes are known, bits_per_byte."""
        values = {"loss": self.loss, "perplexity": math.exp(self.loss) if self.loss < 700 else math.inf}
        if self.bits_per_byte is not None:
            values["bits_per_byte"] = self.bits_per_byte
        return values


class _Adder:
    """Adds batches up into `Totals`."""

    def __init__(self, token_bytes: np.ndarray | None):
        self._token_bytes = token_bytes
        self._nats, self._tokens, self._bytes = 0.0, 0, 0

    def add(self, scored: np.ndarray, batch: Mapping[str, np.ndarray]) -> None:
        mask = batch["loss_mask"]
        self._nats += float(np.sum(scored, dtype=np.float64, where=mask))
        self._tokens += int(mask.sum())
        if self._token_bytes is not None:
            self._bytes += int(self._token_bytes[batch["labels"][mask]].sum(dtype=np.int64))

    def totals(self) -> Totals:
        return Totals(self._nats, self._tokens, None if self._token_bytes is None else self._bytes)


def batches_of(
    examples: Examples, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Examples 0, 1, ... stacked `batch_size` at a time; the last batch may be smaller.

    Args:
      limit: most examples; None means all.
    """
    count = len(examples) if limit is None else min(limit, len(examples))
    for start in range(0, count, batch_size):
        rows = [examples[i] for i in range(start, min(start + batch_size, count))]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def score_examples(
    scorer: Scorer,
    params: Any,
    examples: Examples,
    token_bytes: np.ndarray | None,
    *,
    limit: int | None = None,
    progress: Progressing = no_progress,
) -> Totals:
    """Loss of held-out examples of the training kind (packed rows or windows).

    Args:
      token_bytes: bytes of each token id, of the tokenizer; None = not known.
      limit: most examples; None means all.
    """
    adder = _Adder(token_bytes)
    count = len(examples) if limit is None else min(limit, len(examples))
    batches = batches_of(examples, scorer.batch_size, limit)
    for batch in progress(batches, -(-count // scorer.batch_size), "validation"):
        adder.add(scorer.losses(params, batch), batch)
    return adder.totals()


def score_positions(
    scorer: Scorer,
    params: Any,
    documents: Examples,
    token_bytes: np.ndarray | None = None,
    *,
    limit: int | None = None,
    progress: Progressing = no_progress,
) -> tuple[perlength.PositionLosses, Totals]:
    """Loss by position over the beginnings of documents (`DocumentStarts`): the paper's protocol."""
    adder, positions = _Adder(token_bytes), perlength.PositionLosses(documents.seq_len)
    count = len(documents) if limit is None else min(limit, len(documents))
    batches = batches_of(documents, scorer.batch_size, limit)
    for batch in progress(batches, -(-count // scorer.batch_size), "loss by position"):
        scored = scorer.losses(params, batch)
        adder.add(scored, batch)
        positions.add(scored, batch["loss_mask"])
    return positions, adder.totals()


def validation_hook(
    scorer: Scorer,
    examples: Examples,
    token_bytes: np.ndarray | None,
    *,
    limit: int | None = None,
    name: str = "validation",
    every: int | None = None,
) -> Hook:
    """A training-loop hook: loss, perplexity and bits per byte of the first `limit` held-out examples."""

    def run(params: Any, step: int) -> dict[str, float]:
        del step
        return score_examples(scorer, params, examples, token_bytes, limit=limit).metrics()

    return Hook(name, run, every)


@dataclasses.dataclass(frozen=True)
class PositionReport:
    """Where the figures by position of a run in training go.

    Attributes:
      folder: receives per_position.csv, perplexity.csv and loss_by_position.png, replaced at every call.
      name: of the run, for the legend.
      train_length: marked in the plot.
      window: of the smoothing.
    """

    folder: Path
    name: str
    train_length: int
    window: int = perlength.SMOOTHING_WINDOW


def positions_hook(
    scorer: Scorer,
    documents: Examples,
    report: PositionReport,
    *,
    limit: int | None = None,
    name: str = "by_length",
    every: int | None = None,
) -> Hook:
    """A training-loop hook: perplexity by length, with the per-position table and plot written beside it.

    The metrics are "ppl_<length>" for the full length, its halves down to the training length, and below.
    """

    def run(params: Any, step: int) -> dict[str, float]:
        positions, _ = score_positions(scorer, params, documents, limit=limit)
        perplexities = write_positions(positions, report, title=f"step {step}")
        return {f"ppl_{length}": value for length, value in perplexities.items()}

    return Hook(name, run, every)


def write_positions(
    positions: perlength.PositionLosses, report: PositionReport, *, title: str = "", log_x: bool = False
) -> dict[int, float]:
    """Writes per_position.csv, perplexity.csv and loss_by_position.png; returns perplexity by length.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    mean = positions.mean()
    perplexities = perlength.perplexity_by_length(mean, perlength.report_lengths(len(mean)))
    if jax.process_index() == 0:
        with writing(report.folder, "the evaluation"):
            atomic_write(report.folder / "per_position.csv", perlength.to_csv(positions, report.window))
            atomic_write(report.folder / "perplexity.csv", perlength.perplexity_csv(perplexities))
            curve = Curve(report.name, mean, positions.counts, report.train_length)
            path = report.folder / "loss_by_position.png"
            plot_positions([curve], path, window=report.window, title=title, log_x=log_x)
    return perplexities
