"""Train a point tracker, or fine-tune one.

    python -m tasks.points.train --config=configs/tapnext.py
    python -m tasks.points.train --config=configs/tapnext.py:init=FILE.npz,data=folder,path=DIR
    python -m tasks.points.train --config=configs/tapnext.py --sheet=clips.png         what it learns from

The same command again resumes, or says that the run is finished.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models import tapnext
from models.common.sharding import ShardingRules
from tasks.common.config import to_json
from tasks.common.data import Batches
from tasks.common.errors import bad_input, run_main
from tasks.common.job import Job, RunData
from tasks.common.mesh import make_mesh
from tasks.common.step import LossFn
from tasks.common.train_command import TrainCommand
from tasks.points.config import POINTS_FREE_KEYS, SCHEMA, PointsConfig, freeze_all
from tasks.points.data import PointsData, draw_sheet, open_points_data
from tasks.points.data.unlabelled import StudentView, UnlabelledClips, WithUnlabelled, find_videos
from tasks.points.losses import point_losses
from tasks.points.reports import make_callbacks, make_evaluators, print_summary
from tasks.points.selftraining import self_training_loss
from tasks.points.trained import initial_params

DEFAULT_CONFIG = "configs/tapnext.py"
UNREADABLE = "unreadable.jsonl"


def make_job(config: Any, workdir: Path) -> Job:
    """What the shared loop is told of a configuration; arguments and errors as those of `train`."""
    cfg = freeze_all(config)
    mesh = make_mesh(cfg.mesh)

    draw = tapnext.init_matching_params if cfg.train.initial == "matching" else tapnext.init_params
    init = functools.partial(draw, cfg.model)

    flops = 3 * tapnext.flops_per_clip(cfg.model, cfg.data.frames, cfg.data.tracks)
    return Job(
        workdir=workdir,
        seed=cfg.seed,
        mesh=mesh,
        rules=ShardingRules(),
        init_params=init,
        param_axes=tapnext.param_axes(cfg.model),
        loss_fn=loss_fn(cfg),
        open_data=lambda: open_run_data(cfg, mesh, workdir),
        optim=cfg.optim,
        train=cfg.train,
        checkpoint=cfg.checkpoint,
        log=cfg.log,
        units_per_step=cfg.train.batch_size,
        unit_name="clips",
        # Self-training runs teacher and student on clips of their own.
        flops_per_unit=None if cfg.selftraining.path else flops,
        decay_mask=tapnext.decay_mask(jax.eval_shape(init, jax.random.key(0))),
        initial_params=(lambda: initial_params(cfg)) if cfg.train.init_from else None,
        config=to_json(config),
        free_keys=POINTS_FREE_KEYS,
        num_workers=cfg.train.num_workers,
        prefetch=cfg.train.prefetch,
        # Not the data: runs on other clips share the compiled step.
        teacher=bool(cfg.selftraining.path),
        program=("points", cfg.model, cfg.runtime, cfg.loss, cfg.selftraining),
    )


class ClipOutput(NamedTuple):
    """The model's answer for whole clips; `layers` are the points' features after every block, or None: the
    logits of all blocks would fill the memory."""

    tracks_yx: jax.Array
    track_logits: jax.Array
    visible_logits: jax.Array
    layers: jax.Array | None


def loss_fn(cfg: PointsConfig) -> LossFn:
    """The loss of a configuration: supervised, and with `selftraining` that on unlabelled clips as well.

    Returns:
      loss_fn(params, batch, rng), or with self-training loss_fn(params, batch, rng, average): the teacher is
      the averaged model. See `point_losses` and `self_training_loss` for what a batch must hold.
    """
    model, runtime = cfg.model, cfg.runtime

    def track(params: Any, video: Any, query_tyx: Any, layers: bool = False, valid: Any = None) -> ClipOutput:
        queries = tapnext.make_queries(query_tyx)
        # Rows that only fill up a clip are seen by no point: a tracker at work has none.
        mask = None if valid is None else tapnext.key_mask(valid, model.num_patches, video.shape[1])
        features, _ = tapnext.point_features(model, runtime, params, video, queries, mask=mask, layers=layers)
        return ClipOutput(*tapnext.read_out(model, params, features.last), features.layers)

    def read_layer(params: Any, features: Any) -> tapnext.Readout:
        return tapnext.read_out(model, params, features, last=False)

    def supervised(params: Any, batch: dict[str, Any], rng: Any) -> tuple[Any, dict[str, Any]]:
        del rng  # all draws are made with the clips
        output = track(params, batch["video"], batch["query_tyx"], cfg.loss.deep, batch["valid"])
        read = functools.partial(read_layer, params)
        return point_losses(output, batch, cfg.loss, model.bins, read)

    if not cfg.selftraining.path:
        return supervised

    def with_teacher(
        params: Any, batch: dict[str, Any], rng: Any, average: Any
    ) -> tuple[Any, dict[str, Any]]:
        loss, aux = supervised(params, batch, rng)
        own, own_aux = self_training_loss(
            functools.partial(track, params),
            functools.partial(track, average),
            batch,
            rng,
            cfg.selftraining,
            cfg.loss,
            model.bins,
            functools.partial(read_layer, params),
        )
        return loss + cfg.selftraining.weight * own, aux | own_aux

    return with_teacher


def abstract_batch(cfg: PointsConfig, rows: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of so many clips, as `loss_fn` takes it."""
    data = cfg.data
    points = (rows, data.tracks)
    shapes = {
        "video": ((rows, data.frames, data.height, data.width, 3), jnp.uint8),
        "query_tyx": ((*points, 3), jnp.float32),
        "tracks_yx": ((*points, data.frames, 2), jnp.float32),
        "visible": ((*points, data.frames), jnp.bool_),
        "valid": (points, jnp.bool_),
    }
    if cfg.selftraining.path:
        shapes |= {
            "real_video": shapes["video"],
            "student_video": shapes["video"],
            "student_affine": ((rows, data.frames, 2, 3), jnp.float32),
            "real_query_tyx": ((rows, cfg.selftraining.tracks, 3), jnp.float32),
        }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def open_run_data(cfg: PointsConfig, mesh: Mesh, workdir: Path) -> RunData:
    """The clips as batches, and what the run is judged on."""
    data = open_data(cfg, workdir / UNREADABLE)
    return RunData(
        batches(cfg, data),
        make_evaluators(cfg, data, mesh, workdir),
        make_callbacks(cfg, data, mesh, workdir),
    )


def batches(cfg: PointsConfig, data: PointsData) -> Batches:
    """Global batches of labelled clips, each row with an unlabelled clip if there are any.

    Raises:
      ConfigError: the folder of unlabelled videos does not exist or holds none.
    """
    labelled, unlabelled = data.batches(cfg.train.batch_size), cfg.selftraining
    if not unlabelled.path:
        return labelled
    with bad_input("selftraining.path"):
        videos = find_videos(Path(unlabelled.path).expanduser())
    clips = UnlabelledClips(
        videos,
        cfg.data.frames,
        cfg.data.height,
        cfg.data.width,
        unlabelled.tracks,
        cfg.seed,
        StudentView(unlabelled.zoom, unlabelled.drift, unlabelled.quality),
        cfg.data.limits(),
        data.report,
    )
    return dataclasses.replace(labelled, source=WithUnlabelled(labelled.source, clips))


def open_data(cfg: PointsConfig, report: Path | None = None) -> PointsData:
    """The run's clips; every fault of lists and folders is a ConfigError, found before anything is trained.

    Args:
      report: JSON lines that name what cannot be read.
    """
    with bad_input():
        data = open_points_data(cfg.data, seed=cfg.seed, report=report)
    held_out = 0 if data.held_out is None else len(data.held_out)
    print(f"clips: {cfg.data.source}, {len(data.train):,} for training, {held_out:,} held out", flush=True)
    return data


def draw_first_batch(config: Any, path: Path) -> None:
    """The clips of the first batch with their tracks."""
    cfg = freeze_all(config)
    draw_sheet(open_data(cfg).batches(cfg.train.batch_size)[0], path)


COMMAND = TrainCommand(
    task="points",
    description="Train a point tracker",
    schema=SCHEMA,
    default_config=DEFAULT_CONFIG,
    make_job=make_job,
    print_summary=print_summary,
    draw_sheet=draw_first_batch,
    sheet_help="the first batch and its tracks",
)
main, train = COMMAND.main, COMMAND.train

if __name__ == "__main__":
    run_main(main)
