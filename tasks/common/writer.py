"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases on request.

metrics.jsonl holds one JSON object per line: {"kind": "train", "step": 7, "loss": ...}. Floats are written
so that reading them back gives the same float32 (non-finite ones as the strings "nan", "inf", "-inf").
Records of kind "train" hold no clock time, so those of an interrupted and of an undisturbed run are the
same bytes.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tasks.common.board import Board
from tasks.common.errors import CheckpointError, ConfigError, writing
from tasks.common.storage import atomic_write

FILE_NAME = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """every: steps between progress lines, speed records and TensorBoard points (metrics.jsonl has every
    step).
    progress: show progress at all. wandb, wandb_project, wandb_name: also send to Weights & Biases."""

    every: int = 10
    progress: bool = True
    wandb: bool = False
    wandb_project: str = "foxtrot"
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every = {self.every}: must be at least 1 step")


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def read_records(workdir: Path | str) -> list[dict[str, Any]]:
    """Every whole record of a run's metrics.jsonl, in order; empty if there is none.

    A last line that a kill cut short is left out.
    """
    path = Path(workdir) / FILE_NAME
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was never finished
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def truncate_records(workdir: Path | str, step: int) -> list[dict[str, Any]]:
    """Keeps the records of steps before `step` in metrics.jsonl, atomically, and returns them.

    A run resumed at `step` does that step again, so a finished log holds each step once.
    """
    path = Path(workdir) / FILE_NAME
    kept = [record for record in read_records(workdir) if record.get("step", -1) < step]
    if path.exists():
        with writing(path.parent, FILE_NAME):
            atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class Writer:
    """Writes metrics of a run; silent on processes other than 0. Use as a context manager."""

    def __init__(
        self, workdir: Path | str, config: LogConfig, *, first_step: int = 0, run_config: Any = None
    ):
        self.workdir = Path(workdir)
        self._active = jax.process_index() == 0
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None
        if not self._active:
            return
        with writing(self.workdir, FILE_NAME):
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = (self.workdir / FILE_NAME).open("a", encoding="utf-8")
            self._board = Board(self.workdir / "tensorboard", first_step)
        if config.wandb:
            self._wandb = _start_wandb(config, self.workdir, run_config)

    def write(self, kind: str, step: int, values: Mapping[str, Any], *, boards: bool = True) -> None:
        """Writes one record.

        Args:
          kind: "train", "speed", "eval", ...: also the prefix of the names in TensorBoard.
          step: updates done before it.
          values: scalars.
          boards: also to TensorBoard and Weights & Biases, not to metrics.jsonl alone.

        Raises:
          CheckpointError: the disk is full, or gone.
        """
        if not self._active:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        with writing(self.workdir, FILE_NAME):
            self._file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
            self._file.flush()
            if not boards:
                return
            numbers = {
                n: v for n, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)
            }
            self._board.scalars(step, {f"{kind}/{name}": value for name, value in numbers.items()})
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{n}": v for n, v in numbers.items()}, step=step)

    def sync(self) -> None:
        """Makes what was written survive a crash of the machine: called before a checkpoint counts on it."""
        if self._active:
            with writing(self.workdir, FILE_NAME):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes everything."""
        if not self._active:
            return
        with contextlib.ExitStack() as stack:  # each is closed even if another cannot be
            stack.enter_context(writing(self.workdir, FILE_NAME))
            stack.callback(self._file.close)
            stack.callback(self._board.close)
            if self._wandb is not None:
                stack.callback(self._wandb.finish)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # an error already on its way is the one to show
                raise


def _start_wandb(config: LogConfig, workdir: Path, run_config: Any) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb=true needs the wandb package: pip install wandb") from None
    name = config.wandb_name or workdir.name
    return wandb.init(
        project=config.wandb_project, name=name, id=name, dir=str(workdir), config=run_config, resume="allow"
    )
