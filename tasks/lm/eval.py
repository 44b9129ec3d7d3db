"""Evaluate a language model by the paper's protocol: loss by position, perplexity by length, bits per byte,
pruning.

    python -m tasks.lm.eval --workdir=DIR
    python -m tasks.lm.eval --workdir=DIR --compare=DIR2,DIR3 --names=FoX,Transformer,Mamba
    python -m tasks.lm.eval --checkpoint=HF_FOLDER --tokenizer=FILE --data=FOLDER --length=65536

Options: `--help`, or README.md beside this file.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from kernels.forgetting_attention import TileConfig
from models import fox
from models.common.sharding import ShardingRules, param_shardings
from tasks.common.config import CommandLine, make_parser, parse_command_line
from tasks.common.errors import ConfigError, RunError, bad_input, run_main, writing
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.common.storage import atomic_write, write_json
from tasks.lm import perlength
from tasks.lm.config import SCHEMA
from tasks.lm.data import DataConfig, Documents, DocumentStarts, LMData, build
from tasks.lm.eval_report import Report, print_reports
from tasks.lm.evaluators import Scorer, score_positions
from tasks.lm.forgetting import Forgetting, measure_forgetting, write_forgetting
from tasks.lm.held_out import first_documents, ngram_nats_per_byte, score_documents
from tasks.lm.plots import plot_positions
from tasks.lm.subject import Subject, add_subject_options, read_subject

_NGRAM_BYTES = 64 * 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      RunError: any wrong option or unreadable file, in one line; or the evaluation was interrupted.
    """
    parser = make_parser(
        "Evaluate language models: loss by position, perplexity by length, bits per byte, pruning."
    )
    add_subject_options(parser)
    _add_options(parser)
    command = parse_command_line(parser, argv, schema=SCHEMA)
    try:
        Evaluation(command).run()
    except KeyboardInterrupt:
        raise RunError("interrupted; files that were already written are complete") from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--compare", default="", metavar="DIR,DIR", help="more workdirs, evaluated on the same documents")
    add(
        "--names",
        default="",
        metavar="NAME,NAME",
        help="for the legend: of this model, then of those compared",
    )
    add(
        "--data",
        default=None,
        metavar="stdlib|FOLDER",
        help="text to evaluate on (default: the run's held-out text)",
    )
    add("--split", choices=("held_out", "all"), default="held_out", help="which documents of it")
    add("--length", type=int, default=None, help="tokens of each document (default: 4 x the training length)")
    add("--min_tokens", type=int, default=None, help="admit shorter documents, of at least so many tokens")
    add(
        "--max_documents",
        type=int,
        default=None,
        help="most documents (default: the run's eval.documents, or 64)",
    )
    add("--max_tokens", type=int, default=2**18, help="held-out tokens scored for bits per byte; 0: none")
    add(
        "--batch",
        type=int,
        default=None,
        help="documents at a time (default: the run's eval.batch_size, or 1)",
    )
    add(
        "--window",
        type=int,
        default=perlength.SMOOTHING_WINDOW,
        help="positions the curve is smoothed over (odd)",
    )
    add("--log_x", action="store_true", help="logarithmic positions in the plot")
    add("--train_length", type=int, default=None, help="training length to mark, where it is not known")
    add("--log_pruning_tolerance", type=float, default=-10.0, help="log eps of the pruning statistics")
    add("--stats_documents", type=int, default=2, help="documents for gate and pruning statistics; 0: none")
    add("--no_ngrams", action="store_true", help="no byte n-gram models beside the embedded text's figures")
    add(
        "--output",
        default=None,
        metavar="DIR",
        help="(default: WORKDIR/evaluation, or ./evaluation for --checkpoint)",
    )


class Evaluation:
    """One call of the command. Data are opened and checked before any weights are read."""

    def __init__(self, command: CommandLine):
        self.options, self.console = command.options, Console(highlight=False)
        self.subject = read_subject(command)
        self._check_options()
        self.subjects = [self.subject, *self._compared()]
        self.names = self._names()
        run = self.subject.run
        self.mesh = make_mesh(MeshConfig() if run is None else run.mesh)
        self.batch = self.options.batch or (1 if run is None else run.eval.batch_size)
        self.train_length = self.options.train_length or self.subject.train_length
        self.length = self.options.length or (4 * self.train_length if self.train_length else 2048)
        base = self.subject.workdir or Path()
        self.output = Path(self.options.output) if self.options.output else base / "evaluation"
        self.data = self._open_data()
        every = self.data.train_documents if self.options.split == "all" else self.data.held_out_documents
        self.documents: Documents = every
        self.starts = self._starts(self.length, self.options.min_tokens)
        most = self.options.max_documents or (64 if run is None else run.eval.documents)
        self.count = min(most, len(self.starts))

    def run(self) -> None:
        """Evaluates every model and writes tables, plots and summary.json."""
        reports = []
        for name, subject in zip(self.names, self.subjects, strict=True):
            self.console.print(f"[bold]{name}[/bold]: {subject.source}", soft_wrap=True)
            config, params = self._load(subject)
            scorer = Scorer(config, subject.runtime, self.mesh, self.batch)
            positions, totals = score_positions(
                scorer,
                params,
                self.starts,
                self.data.tokenizer.token_bytes,
                limit=self.count,
                progress=self._track,
            )
            report = Report(
                name=name,
                source=str(subject.source),
                parameters=fox.count_params(config),
                train_length=subject.train_length or self.options.train_length,
                compute_dtype=subject.runtime.compute_dtype,
                positions=positions,
                totals=totals,
            )
            self._write_tables(report)
            held_out = self._held_out(scorer, params) if subject is self.subject else None
            pruning = self._forgetting(name, scorer, params)
            reports.append(report._replace(held_out=held_out, pruning=pruning))
        self._write_report(reports)
        print_reports(reports, self.console)
        self.console.print(f"tables and plots: {self.output}", soft_wrap=True)

    def _check_options(self) -> None:
        for name in ("length", "max_documents", "batch", "train_length", "min_tokens"):
            value = getattr(self.options, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        for name in ("max_tokens", "stats_documents"):
            if getattr(self.options, name) < 0:
                raise ConfigError(f"--{name} must be 0 or more, got {getattr(self.options, name)}")
        if self.options.window < 1 or self.options.window % 2 == 0:
            raise ConfigError(f"--window must be an odd number of positions, got {self.options.window}")
        if self.options.log_pruning_tolerance >= 0:
            raise ConfigError("--log_pruning_tolerance is a log probability: negative, -10 is recommended")

    def _compared(self) -> list[Subject]:
        folders = [part for part in self.options.compare.split(",") if part]
        subjects = []
        for folder in folders:
            parser = make_parser("")
            add_subject_options(parser)
            subject = read_subject(parse_command_line(parser, [f"--workdir={folder}"], schema=SCHEMA))
            if subject.tokenizer().fingerprint != self.subject.tokenizer().fingerprint:
                raise ConfigError(
                    f"--compare={folder}: it was trained with another tokenizer ({subject.data.tokenizer}) "
                    f"than "
                    f"{self.subject.name} ({self.subject.data.tokenizer}): losses per token cannot be "
                    f"compared"
                )
            subjects.append(subject._replace(dtype=self.options.dtype))
        return subjects

    def _names(self) -> list[str]:
        given = [part.strip() for part in self.options.names.split(",") if part.strip()]
        if given and len(given) != len(self.subjects):
            raise ConfigError(f"--names gives {len(given)} names for {len(self.subjects)} models")
        names = given or [subject.name for subject in self.subjects]
        if len(set(names)) < len(names):
            names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
        return names

    def _open_data(self) -> LMData:
        settings, run = self.subject.data, self.subject.run
        if self.options.data is not None:
            settings = _text_of(settings, self.options.data)
        if self.options.split == "all" and settings.source != "longcrawl64":
            settings = dataclasses.replace(settings, validation_fraction=0.0)
        own = run is not None and self.options.data is None
        with bad_input():
            return build(
                settings,
                self.train_length or self.length,
                batch_size=run.train.batch_size if own and run is not None else 1,
            )

    def _starts(self, length: int, least: int | None = None) -> DocumentStarts:
        ids = {"bos_id": self.data.tokenizer.bos_id, "pad_id": self.data.tokenizer.pad_id}
        with bad_input():
            starts = DocumentStarts(self.documents, length, min_tokens=least, **ids)
        if not len(starts):
            longest = int(self.documents.lengths.max()) if len(self.documents) else 0
            raise ConfigError(
                f"none of the {len(self.documents)} held-out documents has {least or length} tokens "
                f"(the longest has {longest}): evaluate a shorter length, or admit shorter documents "
                "with min_tokens"
            )
        return starts

    def _load(self, subject: Subject) -> tuple[fox.FoxConfig, Any]:
        config, params = subject.load()
        if config.vocab_size < self.data.tokenizer.vocab_size:
            raise ConfigError(
                f"the model knows {config.vocab_size} ids, the tokenizer {self.data.tokenizer.name!r} has "
                f"{self.data.tokenizer.vocab_size}: it is not the one the model was trained with"
            )
        shardings = param_shardings(params, fox.param_axes(config), self.mesh, ShardingRules())
        return config, jax.device_put(params, shardings)

    def _held_out(self, scorer: Scorer, params: Any) -> dict[str, Any] | None:
        """Loss per byte of the first held-out documents, each from its beginning, packed into training
        rows.
        """
        tokenizer = self.data.tokenizer
        if not self.options.max_tokens:
            return None
        documents = first_documents(self.documents, self.options.max_tokens)
        seq_len = self.train_length or self.length
        totals = score_documents(scorer, params, documents, seq_len, tokenizer, self._track)
        found: dict[str, Any] = {
            "documents": len(documents),
            "tokens": totals.tokens,
            "bytes": totals.bytes,
            **totals.metrics(),
            "ngram_bits_per_byte": {},
        }
        embedded = self.options.data in (None, "stdlib") and self.subject.data.source == "stdlib"
        if embedded and self.options.split == "held_out" and not self.options.no_ngrams:
            nats = ngram_nats_per_byte(self.data.train_documents, documents, tokenizer, _NGRAM_BYTES)
            found["ngram_bits_per_byte"] = {order: value / math.log(2) for order, value in nats.items()}
        return found

    def _forgetting(self, name: str, scorer: Scorer, params: Any) -> dict[str, Any] | None:
        """Gate maps and pruned tiles, at the evaluated length or that of the longest document."""
        if not scorer.config.is_gated or not self.options.stats_documents:
            return None
        whole = np.any(self.documents.lengths >= self.length)
        length = self.length if whole else int(self.documents.lengths.max())
        tolerance = self.options.log_pruning_tolerance
        runtime = dataclasses.replace(scorer.runtime, log_pruning_tolerance=tolerance)
        pruning = Scorer(scorer.config, runtime, self.mesh, 1)
        found: Forgetting = measure_forgetting(
            pruning, params, self._starts(length), limit=self.options.stats_documents, progress=self._track
        )
        write_forgetting(found, self._folder(name), tolerance)
        return {
            "length": length,
            "documents": found.documents,
            "log_pruning_tolerance": tolerance,
            "tile": list((runtime.tiles or TileConfig()).forward),
            "pruned_fraction": found.pruned,
        }

    def _folder(self, name: str) -> Path:
        if len(self.subjects) == 1:
            return self.output
        return self.output / re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")

    def _write_tables(self, report: Report) -> None:
        folder = self._folder(report.name)
        with writing(self.output, "the evaluation"):
            atomic_write(folder / "per_position.csv", perlength.to_csv(report.positions, self.options.window))
            atomic_write(folder / "perplexity.csv", perlength.perplexity_csv(report.perplexities()))

    def _write_report(self, reports: Sequence[Report]) -> None:
        title = f"{self.count} documents" + ("" if self.options.min_tokens is None else " or fewer")
        summary = {
            "data": dataclasses.asdict(self.subject.data),
            "text": self.options.data,
            "split": self.options.split,
            "length": self.length,
            "documents": self.count,
            "documents_at_last_position": int(reports[0].positions.counts[-1]),
            "smoothing_window": self.options.window,
            "models": {report.name: report.summary() for report in reports},
        }
        with writing(self.output, "the evaluation"):
            plot_positions(
                [report.curve() for report in reports],
                self.output / "loss_by_position.png",
                window=self.options.window,
                log_x=self.options.log_x,
                title=title,
            )
            write_json(self.output / "summary.json", summary)

    def _track(self, items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        return track(items, description=f"  {what}", total=total, console=self.console, transient=True)


def _text_of(settings: DataConfig, given: str) -> DataConfig:
    """`settings` with the text of --data: the embedded one, LongCrawl64 arrays, or a folder of text or
    shards.
    """
    if given == "stdlib":
        return dataclasses.replace(settings, source="stdlib", path="")
    path = Path(given).expanduser()
    if not path.exists():
        raise ConfigError(f"--data={given}: no such folder, and not 'stdlib'")
    zarr = path.suffix == ".zarr" or any(path.glob("*.zarr"))
    return dataclasses.replace(
        settings,
        source="longcrawl64" if zarr else "text",
        path=str(path),
        validation_path="",
        json_escape=settings.json_escape or settings.source == "longcrawl64",
    )


if __name__ == "__main__":
    run_main(main)
