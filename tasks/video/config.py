"""The sections of a video configuration and the dataclass each becomes."""

import dataclasses
from typing import Any, Literal, NamedTuple

from models.trecvit import MAEConfig, TRecViTConfig, TRecViTRuntime
from tasks.common.checkpoint import CheckpointConfig
from tasks.common.config import Schema, freeze_sections
from tasks.common.errors import ConfigError
from tasks.common.job import TrainConfig
from tasks.common.mesh import MeshConfig
from tasks.common.optim import OptimConfig
from tasks.common.resolved import FREE_KEYS
from tasks.common.writer import LogConfig
from tasks.video.augment import AugmentConfig
from tasks.video.data import VideoDataConfig
from tasks.video.losses import Painted, Target
from tasks.video.metrics import Average

Objective = Literal["classes", "mae"]
Trained = Literal["all", "head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoTrainConfig(TrainConfig):
    """The loop's settings and what is particular to video.

    objective: "classes", or "mae": masked auto-encoding, without labels (`MAETrainConfig`).
    trained: "all" parameters, or the "head" alone: a probe of frozen features.
    init_from: start from these weights: the workdir of another run (a classifier or an auto-encoder), an
      official .npz, or an image ViT (big_vision .npz, timm .safetensors). "": random.
    zero_centred: an image ViT given as init_from was trained on pixels in [-1, 1].
    num_workers, prefetch: processes that read ahead (0: threads), and how many batches.
    """

    objective: Objective = "classes"
    trained: Trained = "all"
    init_from: str = ""
    zero_centred: bool = True
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefetch < 1 or self.num_workers < 0:
            raise ConfigError(
                f"train.prefetch = {self.prefetch}, train.num_workers = {self.num_workers}: must be at least "
                "1, and at least 0"
            )
        if self.objective == "mae" and self.trained != "all":
            raise ConfigError("train.trained = 'head': an auto-encoder (train.objective = 'mae') has no head")


@dataclasses.dataclass(frozen=True)
class MAETrainConfig:
    """Masked auto-encoding; used with train.objective = "mae". See `MAEConfig` and `losses.mae_loss`.

    mask_ratio: share of the tubes that are hidden.
    decoder_width, decoder_depth, decoder_heads: of the decoder; None: half the encoder's width and heads.
    target: the decoder paints the "pixels" of a frame (VideoMAE, TRecViT), or its "change" from the last one.
    normalize: pixels standardised per patch; a change is not.
    painted: the loss is over the "masked" patches or "all".
    """

    mask_ratio: float = 0.9
    decoder_width: int | None = None
    decoder_depth: int = 4
    decoder_heads: int | None = None
    target: Target = "pixels"
    normalize: bool = True
    painted: Painted = "masked"

    def model(self, encoder: TRecViTConfig) -> MAEConfig:
        """The auto-encoder around an encoder, whose head is left out."""
        return MAEConfig(
            dataclasses.replace(encoder, head="none"),
            self.mask_ratio,
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads,
        )


@dataclasses.dataclass(frozen=True)
class VideoEvalConfig:
    """Evaluation while training, and at its end.

    batch_size: views at a time.
    videos: held-out videos at most, drawn once, at evaluations under way; 0: all. The last
      evaluation is always over all of them, with data.eval_clips x data.eval_crops views each.
    clips, crops: views of a video at evaluations under way.
    average: what is averaged over the views of a video.
    """

    batch_size: int = 32
    videos: int = 0
    clips: int = 1
    crops: int = 1
    average: Average = "probabilities"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("videos", 0), ("clips", 1), ("crops", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"eval.{name} = {getattr(self, name)}: must be at least {least}")


SCHEMA: Schema = {
    "seed": int,
    "model": TRecViTConfig,
    "runtime": TRecViTRuntime,
    "data": VideoDataConfig,
    "augment": AugmentConfig,
    "mae": MAETrainConfig,
    "optim": OptimConfig,
    "train": VideoTrainConfig,
    "eval": VideoEvalConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
# What a resumed run may change, beyond what every task's may.
VIDEO_FREE_KEYS = (
    *FREE_KEYS,
    "train.num_workers",
    "train.prefetch",
    "data.cache_dir",
    "data.eval_clips",
    "data.eval_crops",
    "data.eval_split",
    "runtime.scan_implementation",
)


class VideoConfig(NamedTuple):
    """A whole configuration, frozen."""

    seed: int
    model: TRecViTConfig
    runtime: TRecViTRuntime
    data: VideoDataConfig
    augment: AugmentConfig
    mae: MAETrainConfig
    optim: OptimConfig
    train: VideoTrainConfig
    eval: VideoEvalConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def freeze_all(config: Any) -> VideoConfig:
    """Every section as its dataclass.

    Raises:
      ConfigError: unknown or missing keys, wrong types, values out of range, or sections that do not fit
        together.
    """
    cfg = freeze_sections(config, SCHEMA, VideoConfig)
    if cfg.augment.size != cfg.model.image_size:
        raise ConfigError(
            f"augment.size = {cfg.augment.size}, model.image_size = {cfg.model.image_size}: the model must "
            "see frames of the size they are cut to"
        )
    if cfg.train.objective == "mae":
        _check_mae(cfg)
    elif cfg.model.head not in ("classes", "readout"):
        raise ConfigError(
            f"model.head = {cfg.model.head!r}: clips are classified by 'classes' or 'readout' "
            "(train.objective = 'classes')"
        )
    clips = max(cfg.data.frames // cfg.model.frames_per_clip, 1)
    if cfg.data.frames % clips:
        raise ConfigError(
            f"data.frames = {cfg.data.frames} make {clips} clips of model.frames_per_clip = "
            f"{cfg.model.frames_per_clip}, and do not divide into them: make one a multiple of the other"
        )
    return cfg


def _check_mae(cfg: VideoConfig) -> None:
    try:
        cfg.mae.model(cfg.model)
    except ValueError as error:
        raise ConfigError(f"config section 'mae': {error}") from error
    if cfg.mae.target == "change" and cfg.mae.normalize:
        raise ConfigError(
            "mae.normalize = true, mae.target = 'change': a change is not standardised (where nothing moves "
            "it is noise): set mae.normalize=false"
        )
    if cfg.mae.target == "change" and cfg.data.frames < 2:
        raise ConfigError(f"data.frames = {cfg.data.frames}: mae.target = 'change' needs at least 2")
    for name in ("mixup_alpha", "cutmix_alpha", "label_smoothing"):
        if getattr(cfg.augment, name):
            raise ConfigError(
                f"augment.{name} = {getattr(cfg.augment, name)}: must be 0 for train.objective = 'mae'"
            )
