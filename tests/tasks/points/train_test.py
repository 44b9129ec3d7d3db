"""What the loop is told of a configuration, and what is refused before anything is trained."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from models import tapnext
from tasks.common.config import make_parser, parse_command_line
from tasks.common.errors import ConfigError
from tasks.common.job import Job
from tasks.points import train
from tasks.points.config import SCHEMA, PointsConfig
from tests.integration.points_runs import BATCH, MODEL, SMALL, config, film, frozen, write_films
from tests.models.tapnext.small_tapnext import random_params
from tests.tasks.common.video.video_files import write_video

TEACHING = ("--config.selftraining.tracks=5", "--config.train.ema=0.9")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Arguments of labelled films; beside them lie films without labels."""
    write_video(tmp_path / "unlabelled" / "a.mp4", film(0).video)
    return write_films(tmp_path / "clips")


def job(args: str = "", *options: str) -> Job:
    words = [f"--config={config(args)}", *SMALL, *options]
    return train.make_job(parse_command_line(make_parser(""), words, schema=SCHEMA).config, Path("run"))


def test_what_the_loop_is_told() -> None:
    plain = job()
    assert (plain.units_per_step, plain.unit_name, plain.teacher) == (BATCH, "clips", False)
    assert plain.flops_per_unit == 3 * tapnext.flops_per_clip(MODEL, 6, 8)
    assert plain.initial_params is None
    # A compiled step is shared by runs that differ in clips, and in nothing that it computes.
    same = job("data=npz,path=x", "--config.data.augment_roll=0.5", "--config.train.init_from=y")
    assert same.step_program() == plain.step_program()
    assert same.initial_params is not None
    for option in ("loss.occluded=0.2", "model.depth=1", "runtime.remat=full", "train.ema=0.9"):
        assert job("", f"--config.{option}").step_program() != plain.step_program(), option
    taught = job("unlabelled=films")
    assert taught.teacher
    assert taught.flops_per_unit is None
    assert taught.step_program() != plain.step_program()


def test_batches_are_as_the_loss_takes_them(folder: str, tmp_path: Path) -> None:
    """Labelled clips, and with self-training one without labels beside each."""
    for options in ((), (f"--config.selftraining.path={tmp_path / 'unlabelled'}", *TEACHING)):
        cfg = frozen(folder, *options)
        batch = train.batches(cfg, train.open_data(cfg))[3]
        found = {name: (x.shape, x.dtype) for name, x in batch.items()}
        assert found == {n: (x.shape, x.dtype) for n, x in train.abstract_batch(cfg, BATCH).items()}
        again = train.batches(cfg, train.open_data(cfg))[3]
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_folders_that_cannot_be_trained_on_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder of clips"):
        train.open_data(frozen(f"data=npz,path={tmp_path / 'nowhere'}"))
    (tmp_path / "empty").mkdir()
    for name, message in {"nowhere": "no such folder of videos", "empty": "no video files in it"}.items():
        cfg = frozen(folder, f"--config.selftraining.path={tmp_path / name}", *TEACHING)
        with pytest.raises(ConfigError, match=rf"^selftraining\.path: .*{name}: {message}"):
            train.batches(cfg, train.open_data(cfg))


def test_faults_are_found_before_the_workdir_is_made(folder: str, tmp_path: Path) -> None:
    for args, options, message in (
        (folder, ("--config.mesh.time=4",), r"mesh\.time = 4"),
        (folder, ("--config.selftraining.path=x",), r"train\.ema = 0"),
        (folder, ("--config.mesh.data=3",), r"mesh\.data=3, .* does not fit"),
        (folder, ("--sheets=x.png",), r"unknown option '--sheets': did you mean '--sheet'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.main([f"--config={config(args)}", f"--workdir={tmp_path / 'run'}", *SMALL, *options])
    assert not (tmp_path / "run").exists()


def traced(cfg: PointsConfig, mesh: AbstractMesh | None = None) -> Any:
    """Loss and aux as shapes, with all gradients traced, on the mesh if there is one."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(tapnext.init_params, cfg.model), key)

    def placed(tree: Any, *spec: Any) -> Any:
        where = {} if mesh is None else {"sharding": NamedSharding(mesh, PartitionSpec(*spec))}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, **where), tree)

    params, batch = placed(shapes), placed(train.abstract_batch(cfg, BATCH), ("data", "fsdp"))
    teacher = (params,) if cfg.selftraining.path else ()
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        found = jax.value_and_grad(train.loss_fn(cfg), has_aux=True)
        return jax.eval_shape(found, params, batch, key, *teacher)[0]


def test_losses_are_traceable_where_devices_share_frames() -> None:
    """Self-training, which turns clips round in time, too; with the same metrics as on one device."""
    options = ("--config.selftraining.path=x", *TEACHING, "--config.model.depth=1")
    cfg = frozen("", "--config.mesh.time=2", *options)
    mesh = AbstractMesh((1, 1, 2), ("data", "fsdp", "time"), axis_types=(AxisType.Explicit,) * 3)
    split, alone = traced(cfg, mesh), traced(cfg)
    assert jax.tree.structure(split) == jax.tree.structure(alone)
    metrics = {"huber", "coordinate", "visibility", "layers", "delta_avg", "occlusion_accuracy", "weight"}
    assert split[1].keys() == metrics | {"own_coordinate", "consistent"}


def test_rows_that_fill_up_a_clip_change_nothing() -> None:
    """Neither the loss nor what a tracker under training says of the other points."""
    cfg = frozen("", "--config.model.depth=1", "--config.loss.layers=0")
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {
        name: np.zeros(x.shape, x.dtype) for name, x in train.abstract_batch(cfg, 1).items()
    }
    batch["video"] = rng.integers(0, 256, batch["video"].shape, np.uint8)
    batch["query_tyx"][..., 1:] = rng.uniform(0, 32, batch["query_tyx"][..., 1:].shape)
    batch["visible"][:] = True
    batch["valid"][:, :5] = True
    params = random_params(cfg.model)
    loss = jax.jit(train.loss_fn(cfg))
    value, aux = loss(params, batch, jax.random.key(0))
    batch["query_tyx"][:, 5:] = [2.0, 9.0, 9.0]
    batch["tracks_yx"][:, 5:] = 30.0
    np.testing.assert_array_equal(loss(params, batch, jax.random.key(0))[0], value)
    batch["valid"][:, 5] = True
    assert abs(float(loss(params, batch, jax.random.key(0))[0] - value)) > 1e-3
    assert aux.keys() >= {"huber", "coordinate", "visibility"}
