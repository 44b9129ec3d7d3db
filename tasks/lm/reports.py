"""What a training run shows as it goes and at its end: held-out figures, samples, plots.

Everything lands in the workdir: `loss.png`, `pruning.png`, `samples/step_*.txt`, `evaluation/` (loss by
position as CSV and PNG, and `held_out.json`, the model beside byte n-gram models fitted on the same training
split).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.storage import atomic_write, write_json
from tasks.common.writer import read_records
from tasks.lm.config import LMConfig
from tasks.lm.data import DocumentStarts, LMData
from tasks.lm.evaluators import (
    PositionReport,
    Scorer,
    Totals,
    positions_hook,
    validation_hook,
)
from tasks.lm.forgetting import pruning_hook
from tasks.lm.generate import generate
from tasks.lm.held_out import first_documents, ngram_nats_per_byte, score_documents
from tasks.lm.plots import plot_pruning, plot_training
from tasks.lm.sampling import Sampling

HELD_OUT_FILE = "held_out.json"


def make_evaluators(cfg: LMConfig, data: LMData, mesh: Mesh, workdir: Path) -> tuple[Hook, ...]:
    """Held-out loss as training goes; at the end loss by position and the comparison with n-gram models."""
    scorer = Scorer(cfg.model, cfg.runtime, mesh, cfg.eval.batch_size)
    token_bytes = data.tokenizer.token_bytes
    hooks = []
    if data.validation is not None and cfg.eval.validation_batches:
        limit = cfg.eval.validation_batches * scorer.batch_size
        hooks.append(validation_hook(scorer, data.validation, token_bytes, limit=limit))
    if cfg.eval.pruning_documents and cfg.model.is_gated:
        hooks += _pruning_hooks(cfg, data, scorer)
    documents = data.validation_documents
    if cfg.eval.documents and len(documents):
        report = PositionReport(workdir / "evaluation", workdir.name, cfg.train.seq_len)
        hooks.append(positions_hook(scorer, documents, report, limit=cfg.eval.documents, every=0))
    if len(data.held_out_documents) and token_bytes is not None and cfg.eval.final_tokens:
        hooks.append(_held_out_hook(cfg, data, scorer, workdir))
    return tuple(hooks)


def _pruning_hooks(cfg: LMConfig, data: LMData, scorer: Scorer) -> list[Hook]:
    """Pruning on held-out documents of the training length; none if there is no such document."""
    ids = {"bos_id": data.tokenizer.bos_id, "pad_id": data.tokenizer.pad_id}
    documents = DocumentStarts(data.held_out_documents, cfg.train.seq_len, **ids)
    limit, every = cfg.eval.pruning_documents, cfg.eval.pruning_every
    return [pruning_hook(scorer, documents, limit=limit, every=every)] if len(documents) else []


def make_callbacks(cfg: LMConfig, data: LMData, workdir: Path) -> tuple[Hook, ...]:
    """The loss curve, and text continued by the model."""

    def plot(params: Any, step: int) -> None:
        del params, step
        if jax.process_index() == 0:
            records = read_records(workdir)
            plot_training(records, workdir / "loss.png", title=workdir.name)
            plot_pruning(records, workdir / "pruning.png", title=workdir.name)

    def sample(params: Any, step: int) -> None:
        # One row per device, so that the batch splits over any mesh.
        prompts = [cfg.eval.sample_prompt] * jax.device_count()
        results, _ = generate(
            params,
            cfg.model,
            cfg.runtime,
            data.tokenizer,
            prompts,
            max_new_tokens=cfg.eval.sample_tokens,
            sampling=Sampling(temperature=cfg.eval.sample_temperature, top_p=0.95),
            seed=cfg.seed,
        )
        if jax.process_index() == 0:
            text = "\n\n".join(f"{r.prompt}{r.text}" for r in results)
            with writing(workdir, "a sample"):
                atomic_write(workdir / "samples" / f"step_{step:08d}.txt", text + "\n")
            print(f"--- sample at step {step} ---\n{results[0].prompt}{results[0].text}\n---", flush=True)

    hooks = [Hook("loss curve", plot)]
    if cfg.eval.sample_tokens and data.tokenizer.can_decode:
        hooks.append(Hook("samples", sample, cfg.eval.sample_every))
    return tuple(hooks)


def _held_out_hook(cfg: LMConfig, data: LMData, scorer: Scorer, workdir: Path) -> Hook:
    """At the end: the model and n-gram models on the same held-out documents, per byte of their text."""
    documents = first_documents(data.held_out_documents, cfg.eval.final_tokens)

    def run(params: Any, step: int) -> dict[str, float]:
        totals = score_documents(scorer, params, documents, cfg.train.seq_len, data.tokenizer)
        baselines = {}
        if cfg.eval.ngram_bytes and data.tokenizer.can_decode:
            baselines = ngram_nats_per_byte(
                data.train_documents, documents, data.tokenizer, cfg.eval.ngram_bytes
            )
        if jax.process_index() == 0:
            _write_held_out(workdir, step, totals, baselines, len(documents))
        return totals.metrics() | {f"{name}_nats_per_byte": value for name, value in baselines.items()}

    return Hook("held_out", run, 0)


def _write_held_out(
    workdir: Path, step: int, totals: Totals, baselines: dict[str, float], documents: int
) -> None:
    record = {
        "step": step,
        "documents": documents,
        "tokens": totals.tokens,
        "bytes": totals.bytes,
        "nats_per_token": totals.loss,
        "nats_per_byte": {"model": totals.nats_per_byte, **baselines},
    }
    with writing(workdir, "the evaluation"):
        write_json(workdir / "evaluation" / HELD_OUT_FILE, record)


def print_summary(workdir: Path, console: Console | None = None) -> None:
    """The run's last figures and where its pictures are."""
    console = console or Console(highlight=False)
    path = workdir / "evaluation" / HELD_OUT_FILE
    if path.is_file():
        console.print(_held_out_table(json.loads(path.read_text(encoding="utf-8"))))
    for name in ("loss.png", "pruning.png", "evaluation/loss_by_position.png", "samples", "metrics.jsonl"):
        if (workdir / name).exists():
            console.print(f"  {workdir / name}", soft_wrap=True)


def _held_out_table(record: dict[str, Any]) -> Table:
    table = Table(
        title=f"{record['documents']} held-out documents, {record['bytes']:,} bytes, step {record['step']}"
    )
    for heading in ("model", "nats/byte", "bits/byte"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows: Sequence[tuple[str, float]] = sorted(record["nats_per_byte"].items(), key=lambda item: -item[1])
    for name, nats in rows:
        label = "this model" if name == "model" else f"{name}, same training text"
        table.add_row(label, f"{nats:.3f}", f"{nats / np.log(2):.3f}")
    return table
