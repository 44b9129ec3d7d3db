"""The sections of a point-tracking configuration and the dataclass each becomes."""

import dataclasses
from typing import Any, Literal, NamedTuple

from models.tapnext import TAPNextConfig, TAPNextRuntime
from tasks.common.checkpoint import CheckpointConfig
from tasks.common.config import Schema, freeze_sections
from tasks.common.errors import ConfigError
from tasks.common.job import TrainConfig
from tasks.common.mesh import LongVideoMeshConfig
from tasks.common.optim import OptimConfig
from tasks.common.resolved import FREE_KEYS
from tasks.common.writer import LogConfig
from tasks.points.data import PointsDataConfig
from tasks.points.losses import PointLossConfig
from tasks.points.selftraining import SelfTrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointsTrainConfig(TrainConfig):
    """The loop's settings and what is particular to points.

    init_from: start from these weights: the workdir of another run, a .safetensors of `export`, or an
      official .npz, .pt or .ckpt. "": see `initial`.
    initial: how parameters are drawn: "official", or "matching", with which small models learn sooner (see
      `models/tapnext/matching_init.py`).
    num_workers, prefetch: processes that read or draw ahead (0: threads), and how many batches.
    """

    init_from: str = ""
    initial: Literal["official", "matching"] = "official"
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefetch < 1 or self.num_workers < 0:
            raise ConfigError(
                f"train.prefetch = {self.prefetch}, train.num_workers = {self.num_workers}: must be at least "
                "1, and at least 0"
            )


@dataclasses.dataclass(frozen=True)
class PointsEvalConfig:
    """Evaluation while training, and at its end.

    batch_size: clips at a time.
    clips: held-out clips at evaluations under way; the last is over all of them. 0: all, always.
    lucas_kanade: at the end, the same clips tracked by Lucas-Kanade beside the model.
    pictures: clips drawn at the end, truth above prediction; 0: none.
    """

    batch_size: int = 8
    clips: int = 0
    lucas_kanade: bool = True
    pictures: int = 4

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("clips", 0), ("pictures", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name} = {getattr(self, name)}: must be at least {least}")


SCHEMA: Schema = {
    "seed": int,
    "model": TAPNextConfig,
    "runtime": TAPNextRuntime,
    "data": PointsDataConfig,
    "loss": PointLossConfig,
    "selftraining": SelfTrainingConfig,
    "optim": OptimConfig,
    "train": PointsTrainConfig,
    "eval": PointsEvalConfig,
    "mesh": LongVideoMeshConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
# What a resumed run may change, beyond what every task's may.
POINTS_FREE_KEYS = (
    *FREE_KEYS,
    "train.num_workers",
    "train.prefetch",
    "data.cache_dir",
    "runtime.scan_implementation",
)


class PointsConfig(NamedTuple):
    """A whole configuration, frozen."""

    seed: int
    model: TAPNextConfig
    runtime: TAPNextRuntime
    data: PointsDataConfig
    loss: PointLossConfig
    selftraining: SelfTrainingConfig
    optim: OptimConfig
    train: PointsTrainConfig
    eval: PointsEvalConfig
    mesh: LongVideoMeshConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def freeze_all(config: Any) -> PointsConfig:
    """Every section as its dataclass.

    Raises:
      ConfigError: unknown or missing keys, wrong types, values out of range, or sections that do not fit
        together.
    """
    cfg = freeze_sections(config, SCHEMA, PointsConfig)
    size = (cfg.data.height, cfg.data.width)
    if size != cfg.model.image_size:
        raise ConfigError(
            f"data.height, data.width = {size}, model.image_size = {cfg.model.image_size}: clips are trained "
            "on at the model's native size"
        )
    try:
        cfg.loss.weights_of_layers(cfg.model.depth)
    except ValueError as error:
        raise ConfigError(f"config section 'loss': {error}") from error
    if cfg.data.frames % cfg.mesh.time:
        raise ConfigError(
            f"data.frames = {cfg.data.frames}, mesh.time = {cfg.mesh.time}: the frames of a clip must divide"
        )
    if cfg.selftraining.path and not cfg.train.ema:
        raise ConfigError("selftraining.path is set, train.ema = 0: the teacher is the averaged model")
    return cfg
