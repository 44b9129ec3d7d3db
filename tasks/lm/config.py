"""The sections of a language-model configuration and the dataclass each becomes."""

import dataclasses
from typing import Any, NamedTuple

from models.fox import FoxConfig, FoxRuntime
from tasks.common.checkpoint import CheckpointConfig
from tasks.common.config import Schema, freeze_sections
from tasks.common.errors import ConfigError
from tasks.common.job import TrainConfig
from tasks.common.mesh import MeshConfig
from tasks.common.optim import OptimConfig
from tasks.common.resolved import FREE_KEYS
from tasks.common.writer import LogConfig
from tasks.lm.data import DataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMTrainConfig(TrainConfig):
    """The loop's settings and what is particular to text.

    seq_len: training length T in tokens.
    micro_batch: sequences per device and micro-step; the number of micro-steps then follows from batch_size
      and the number of devices, so that a run goes on with the same batches on other hardware. None:
      `accum` says.
    loss_chunk: positions whose logits exist at one time; None: chosen from the shapes.
    init_from: start from these parameters (fine-tuning): a folder or file with an official checkpoint, or
      the workdir of another run. "": random.
    num_workers, prefetch: processes that read ahead (0: threads), and how many batches.
    """

    seq_len: int
    micro_batch: int | None = None
    loss_chunk: int | None = None
    init_from: str = ""
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seq_len", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} = {getattr(self, name)}: must be at least 1")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.accum != 1):
            raise ConfigError(
                f"train.micro_batch = {self.micro_batch}, train.accum = {self.accum}: give a positive "
                "micro_batch, or accum, not both"
            )

    def on_devices(self, count: int) -> "LMTrainConfig":
        """With `accum` worked out for this many devices.

        Raises:
          ConfigError: batch_size is not a whole number of micro-batches on every device.
        """
        if self.micro_batch is None:
            return self
        rows = self.micro_batch * count
        if self.batch_size % rows:
            raise ConfigError(
                f"train.batch_size = {self.batch_size} is not divisible by "
                f"train.micro_batch = {self.micro_batch} x {count} devices = {rows} sequences a micro-step"
            )
        return dataclasses.replace(self, accum=self.batch_size // rows, micro_batch=None)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation and samples while training, and the evaluation at its end.

    documents: held-out documents evaluated whole, at most. length: how much of each, in tokens (0: the
      training length); the paper's protocol is four times the training length. batch_size: documents at a
      time.
    validation_batches: held-out batches of the training kind, at every evaluation.
    final_tokens: held-out tokens scored at the end, per byte of text (0: none); ngram_bytes: beside byte
      n-gram models fitted on at most so many bytes of the same training split (0: without them).
    pruning_documents: held-out documents of the training length on which pruning is measured as training
      goes (FoX only; 0: not); pruning_every: steps between (0: at the end only).
    sample_every: steps between samples (0: at the end only); sample_prompt, sample_tokens,
      sample_temperature: what is continued, by how much, and how. sample_tokens = 0: no samples.
    """

    documents: int = 64
    length: int = 0
    batch_size: int = 8
    validation_batches: int = 16
    final_tokens: int = 2**20
    ngram_bytes: int = 64 * 2**20
    pruning_documents: int = 0
    pruning_every: int = 0
    sample_every: int = 0
    sample_prompt: str = ""
    sample_tokens: int = 128
    sample_temperature: float = 0.8

    def __post_init__(self) -> None:
        for name in (
            "documents",
            "length",
            "validation_batches",
            "final_tokens",
            "ngram_bytes",
            "pruning_documents",
            "pruning_every",
            "sample_every",
            "sample_tokens",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"eval.{name} = {getattr(self, name)}: must be 0 or more")
        if self.batch_size < 1:
            raise ConfigError(f"eval.batch_size = {self.batch_size}: must be at least 1")
        if self.sample_temperature < 0:
            raise ConfigError(
                f"eval.sample_temperature = {self.sample_temperature}: must be 0 (greedy) or more"
            )


SCHEMA: Schema = {
    "seed": int,
    "model": FoxConfig,
    "runtime": FoxRuntime,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": LMTrainConfig,
    "eval": EvalConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
# What a resumed run may change, beyond what every task's may.
LM_FREE_KEYS = (
    *FREE_KEYS,
    "train.num_workers",
    "train.prefetch",
    "data.cache_dir",
    "runtime.log_pruning_tolerance",
)


class LMConfig(NamedTuple):
    """A whole configuration, frozen."""

    seed: int
    model: FoxConfig
    runtime: FoxRuntime
    data: DataConfig
    optim: OptimConfig
    train: LMTrainConfig
    eval: EvalConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def freeze_all(config: Any) -> LMConfig:
    """Every section as its dataclass.

    Raises:
      ConfigError: unknown or missing keys, wrong types, values out of range, or sections that do not fit
        together.
    """
    return freeze_sections(config, SCHEMA, LMConfig)
