"""What a model forgets: pruned attention tiles per layer and head, and maps of its forget gates (ACP section
4).
"""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.progress import Progressing, no_progress
from tasks.common.storage import atomic_write
from tasks.lm.data import Examples
from tasks.lm.evaluators import Scorer, batches_of
from tasks.lm.plots import plot_decay, plot_heat_map

# Colours of the gate maps run over these forgetting rates, in nats per token: decay times of 10^4 and 1
# tokens.
_RATES = (1e-4, 10.0)
_MOST_DECAY_HEADS = 4
# log eps of the published pruning, for runs that do not prune: what it would have skipped.
_TOLERANCE = -10.0
PRUNING = "pruning"


class Forgetting(NamedTuple):
    """Statistics over some documents, by layer (first axis) and head (last axis).

    Attributes:
      length: tokens of each document.
      documents: how many.
      visited: share of the causal attention tiles computed; None with pruning off.
      rate: mean of -log f in nats per token; its inverse is a decay time in tokens.
      log_fgate: [L, T, N], log f of the first document.
    """

    length: int
    documents: int
    visited: Float[np.ndarray, "L N"] | None
    rate: Float[np.ndarray, "L N"]
    log_fgate: Float[np.ndarray, "L T N"]

    @property
    def pruned(self) -> float | None:
        """Share of all attention tiles that pruning skips: layers and heads count alike."""
        return None if self.visited is None else float(1 - self.visited.mean())


def measure_forgetting(
    scorer: Scorer,
    params: Any,
    documents: Examples,
    *,
    limit: int,
    progress: Progressing = no_progress,
) -> Forgetting:
    """Runs documents (`DocumentStarts`, unpadded) and collects gates and visited tiles.

    Args:
      scorer: its runtime's `log_pruning_tolerance` decides what is pruned.
      documents: whole documents of one length.
      limit: most documents.

    Raises:
      ValueError: a model without forget gates, or padded documents.
    """
    if not scorer.config.is_gated:
        raise ValueError("this model has no forget gates (fgate_type 'none')")
    visited: list[np.ndarray] = []
    rates: list[np.ndarray] = []
    first: np.ndarray | None = None
    count = min(limit, len(documents))
    batches = batches_of(documents, scorer.batch_size, limit)
    for batch in progress(batches, -(-count // scorer.batch_size), "forget gates"):
        if not batch["loss_mask"].all():
            raise ValueError("forget gates are measured on whole documents: give a length they all reach")
        stats = scorer.statistics(params, batch["tokens"], batch["reset"])
        rates.append(-stats.log_fgate.mean(axis=2, dtype=np.float64))
        if stats.visited_fraction is not None:
            visited.append(stats.visited_fraction)
        first = stats.log_fgate[:, 0] if first is None else first
    assert first is not None
    return Forgetting(
        length=documents.seq_len,
        documents=count,
        visited=np.concatenate(visited, axis=1).mean(axis=1, dtype=np.float64) if visited else None,
        rate=np.concatenate(rates, axis=1).mean(axis=1),
        log_fgate=first,
    )


def pruning_hook(scorer: Scorer, documents: Examples, *, limit: int, every: int | None = None) -> Hook:
    """A training-loop hook: the share of attention tiles that pruning skips.

    The metrics are "pruned", over all layers and heads, and "layer_LL/head_HH" for each. For a run without
    pruning they are what the published threshold would have skipped.
    """
    pruning = scorer
    if scorer.runtime.log_pruning_tolerance is None:
        runtime = dataclasses.replace(scorer.runtime, log_pruning_tolerance=_TOLERANCE)
        pruning = Scorer(scorer.config, runtime, scorer.mesh, scorer.batch_size)

    def run(params: Any, step: int) -> dict[str, float]:
        del step
        found = measure_forgetting(pruning, params, documents, limit=limit)
        assert found.visited is not None
        heads = {
            f"layer_{layer:02d}/head_{head:02d}": float(1 - share)
            for (layer, head), share in np.ndenumerate(found.visited)
        }
        return {"pruned": float(1 - found.visited.mean())} | heads

    return Hook(PRUNING, run, every)


def forgetting_csv(found: Forgetting) -> str:
    """One line per layer and head: visited and pruned fraction of tiles, mean -log f, decay time in
    tokens.
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(("layer", "head", "visited_fraction", "pruned_fraction", "forgetting_rate", "decay_time"))
    for (layer, head), rate in np.ndenumerate(found.rate):
        visited = None if found.visited is None else float(found.visited[layer, head])
        shares = ("", "") if visited is None else (repr(visited), repr(1 - visited))
        decay = repr(1 / float(rate)) if rate > 0 else "inf"
        table.writerow((layer, head, *shares, repr(float(rate)), decay))
    return out.getvalue()


def write_forgetting(found: Forgetting, folder: Path, tolerance: float | None) -> list[Path]:
    """Writes acp.csv, acp.png (with pruning on), and per layer gates_*.png and decay_*.png; returns their
    paths.

    Args:
      tolerance: log eps the pruning was measured with, for the title.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    paths = [folder / "acp.csv"]
    with writing(folder, "the evaluation"):
        atomic_write(paths[0], forgetting_csv(found))
        if found.visited is not None:
            paths.append(folder / "acp.png")
            plot_heat_map(
                1 - found.visited,
                paths[-1],
                title=f"Attention tiles pruned, {found.length} tokens, eps = e^{tolerance:g}",
                x_label="head",
                y_label="layer",
                bar_label="pruned fraction",
                limits=(0.0, 1.0),
            )
        for layer, log_fgate in enumerate(found.log_fgate):
            paths += [folder / f"gates_{layer:02d}.png", folder / f"decay_{layer:02d}.png"]
            plot_heat_map(
                -log_fgate.T,
                paths[-2],
                title=f"Forgetting per token, layer {layer}, first document",
                x_label="position",
                y_label="head",
                bar_label="-log f (nats)",
                limits=_RATES,
                log_scale=True,
                x_extent=(0, found.length),
            )
            plot_decay(
                log_fgate,
                paths[-1],
                heads=spread_heads(found.rate[layer]),
                title=f"Decay bias, layer {layer}, first document (heads from fast to slow)",
            )
    return paths


def spread_heads(rates: Float[np.ndarray, " N"], most: int = _MOST_DECAY_HEADS) -> list[int]:
    """Up to `most` heads from the one that forgets fastest to the slowest, evenly spaced in rank."""
    order = np.argsort(-rates, kind="stable")
    picks = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [int(order[i]) for i in picks]
