"""Train a video model: a classifier, or a masked auto-encoder.

    python -m tasks.video.train --config=configs/trecvit.py
    python -m tasks.video.train --config=configs/trecvit.py:data=ssv2,path=data/ssv2,init=ViT-B_16.npz
    python -m tasks.video.train --config=configs/trecvit.py --sheet=augmented.png      what the model sees

The same command again resumes, or says that the run is finished.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import trecvit
from models.common.sharding import ShardingRules
from tasks.common.config import to_json
from tasks.common.errors import bad_input, run_main
from tasks.common.job import Job, RunData
from tasks.common.mesh import make_mesh
from tasks.common.train_command import TrainCommand
from tasks.common.video.sheet import write_sheet
from tasks.video.augment import augment, augment_frames
from tasks.video.config import SCHEMA, VIDEO_FREE_KEYS, VideoConfig, freeze_all
from tasks.video.data import VideoData, open_video_data
from tasks.video.losses import LossFn, mae_loss_fn, video_loss_fn
from tasks.video.reports import make_callbacks, make_evaluators, print_summary
from tasks.video.trained import initial_params, write_classes

DEFAULT_CONFIG = "configs/trecvit.py"
UNREADABLE = "unreadable.jsonl"
_SHEET_ROWS = 16


def make_job(config: Any, workdir: Path) -> Job:
    """What the shared loop is told of a configuration; arguments and errors as those of `train`."""
    cfg = freeze_all(config)
    mesh = make_mesh(cfg.mesh)
    init, axes, masks = _model(cfg)
    classes = cfg.train.objective == "classes"
    flops = 3 * trecvit.flops_per_clip(cfg.model, cfg.data.frames) * cfg.augment.repeats
    return Job(
        workdir=workdir,
        seed=cfg.seed,
        mesh=mesh,
        rules=ShardingRules(),
        init_params=init,
        param_axes=axes,
        loss_fn=loss_fn(cfg),
        open_data=lambda: open_run_data(cfg, mesh, workdir),
        optim=cfg.optim,
        train=cfg.train,
        checkpoint=cfg.checkpoint,
        log=cfg.log,
        units_per_step=cfg.train.batch_size,
        unit_name="clips",
        # An auto-encoder's encoder sees a tenth of the tokens, a probe has hardly a backward pass.
        flops_per_unit=flops if classes and cfg.train.trained == "all" else None,
        decay_mask=masks[0],
        trainable_mask=masks[1],
        initial_params=(lambda: initial_params(cfg)) if cfg.train.init_from else None,
        config=to_json(config),
        free_keys=VIDEO_FREE_KEYS,
        num_workers=cfg.train.num_workers,
        prefetch=cfg.train.prefetch,
        # Not the data: runs on other videos share the compiled step.
        program=(
            "video",
            cfg.model,
            cfg.runtime,
            cfg.augment,
            cfg.mae,
            cfg.train.objective,
            cfg.train.trained,
        ),
    )


def _model(cfg: VideoConfig) -> tuple[Any, Any, tuple[Any, Any]]:
    """Initialiser, logical axes, and the masks (weight decay, what is trained) of what is trained."""
    if cfg.train.objective == "mae":
        mae = cfg.mae.model(cfg.model)

        def init_mae(key: Any) -> Any:
            return trecvit.init_mae_params(mae, key)

        shapes = jax.eval_shape(init_mae, jax.random.key(0))
        return init_mae, trecvit.mae_param_axes(mae), (trecvit.decay_mask(shapes), None)

    def init(key: Any) -> Any:
        return trecvit.init_params(cfg.model, key)

    shapes = jax.eval_shape(init, jax.random.key(0))
    trained = trecvit.head_mask(shapes) if cfg.train.trained == "head" else None
    return init, trecvit.param_axes(cfg.model), (trecvit.decay_mask(shapes), trained)


def loss_fn(cfg: VideoConfig) -> LossFn:
    """The loss of a configuration's objective."""
    runtime = cfg.runtime
    if cfg.train.objective == "mae":
        mae = cfg.mae.model(cfg.model)

        def reconstruct(params: Any, frames: Any, kept: Any, rng: Any, is_training: bool) -> Any:
            key = rng if is_training else None
            return trecvit.apply_mae(mae, runtime, params, frames, kept, rng=key)[0]

        return mae_loss_fn(
            reconstruct,
            cfg.augment,
            patch_size=cfg.model.patch_size,
            mask_ratio=cfg.mae.mask_ratio,
            normalize=cfg.mae.normalize,
            on=cfg.mae.painted,
            target=cfg.mae.target,
        )

    def classify(params: Any, frames: Any, rng: Any, is_training: bool) -> Any:
        key = rng if is_training else None
        return trecvit.apply(cfg.model, runtime, params, frames, output="clip", rng=key)[0].logits

    return video_loss_fn(classify, cfg.augment, cfg.model.num_classes)


def abstract_batch(cfg: VideoConfig, rows: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of so many clips, as `loss_fn` takes it."""
    data = cfg.data
    frames = jax.ShapeDtypeStruct((rows, data.frames, data.height, data.width, 3), jnp.uint8)
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return {"frames": frames, "label": number, "clip": number}


def open_run_data(cfg: VideoConfig, mesh: Mesh, workdir: Path) -> RunData:
    """The videos as batches, and what the run is judged on."""
    data = open_data(cfg, workdir / UNREADABLE)
    if jax.process_index() == 0 and data.classes:
        write_classes(workdir, data.classes)
    return RunData(
        data.batches(cfg.train.batch_size),
        make_evaluators(cfg, data, mesh, workdir),
        make_callbacks(cfg, data, mesh, workdir),
    )


def open_data(cfg: VideoConfig, report: Path | None = None) -> VideoData:
    """The run's videos; every fault of lists and folders is a ConfigError, found before anything is trained.

    Args:
      report: JSON lines that name the videos which cannot be read.
    """
    classes = cfg.model.num_classes if cfg.train.objective == "classes" else None
    with bad_input():
        data = open_video_data(cfg.data, seed=cfg.seed, num_classes=classes, report=report)
    held_out = 0 if data.eval_videos is None else len(data.eval_videos)
    missing = len(data.train_videos.missing)
    print(
        f"videos: {cfg.data.source}, {len(data.train_videos):,} for training, {held_out:,} held out, "
        f"{len(data.classes)} classes" + (f"; {missing:,} listed files are missing" if missing else ""),
        flush=True,
    )
    return data


def draw_sheet(config: Any, path: Path) -> None:
    """A contact sheet of the first clips of the first batch after augmentation, each under its targets."""
    cfg = freeze_all(config)
    data = open_data(cfg)
    batch = data.batches(cfg.train.batch_size)[0]
    key = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 0))[0]
    if cfg.train.objective == "mae":
        frames = augment_frames(cfg.augment, jnp.asarray(batch["frames"]), key)
        names = [data.train_videos.name(int(index)) for index in batch["clip"]]
        titles = [name for name in names for _ in range(cfg.augment.repeats)]
    else:
        clips, labels = (jnp.asarray(batch[name]) for name in ("frames", "label"))
        frames, targets = augment(cfg.augment, clips, labels, key, num_classes=cfg.model.num_classes)
        titles = [_title(row, data.classes) for row in np.asarray(targets)]
    pictures = np.asarray(jnp.round(frames * 255)).astype(np.uint8)[:_SHEET_ROWS]
    write_sheet(path, list(zip(titles[:_SHEET_ROWS], pictures, strict=True)))


def _title(targets: np.ndarray, classes: tuple[str, ...]) -> str:
    """The largest targets of a row, by name."""
    order = [int(c) for c in np.argsort(-targets, kind="stable")[:2] if targets[c] > 0.05]
    return ", ".join(f"{100 * targets[c]:.0f} % {classes[c] if c < len(classes) else c}" for c in order)


COMMAND = TrainCommand(
    task="video",
    description="Train a video model",
    schema=SCHEMA,
    default_config=DEFAULT_CONFIG,
    make_job=make_job,
    print_summary=print_summary,
    draw_sheet=draw_sheet,
    sheet_help="the first batch as the model sees it",
)
main, train = COMMAND.main, COMMAND.train

if __name__ == "__main__":
    run_main(main)
