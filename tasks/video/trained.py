"""Weights and the models they belong to: a run's workdir, an official file, an image ViT to start from."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from models import trecvit
from models.common.official import read_leaves, read_npz
from models.common.params import check_params
from models.common.shapes import Params
from models.trecvit.parameters import param_specs
from tasks.common.checkpoint import load_params
from tasks.common.config import to_json
from tasks.common.errors import ConfigError, bad_input
from tasks.common.resolved import describe_differences
from tasks.common.trained import read_run_config
from tasks.video.config import SCHEMA, VideoConfig, freeze_all

CLASSES_FILE = "classes.txt"


class TrainedModel(NamedTuple):
    """A classifier with its parameters.

    Attributes:
      config: of the model.
      params: canonical tree.
      classes: names by label; None where they are not known.
      run: the whole configuration if it came from a run's workdir.
      source: the folder or file it was read from.
    """

    config: trecvit.TRecViTConfig
    params: Params
    classes: tuple[str, ...] | None
    run: VideoConfig | None
    source: Path


def run_config(workdir: Path | str) -> VideoConfig:
    """See `read_run_config`."""
    return read_run_config(workdir, SCHEMA, freeze_all)


def is_run(path: Path | str) -> bool:
    """Whether `path` is the workdir of a run."""
    return Path(path).is_dir()


def open_model(path: Path | str, step: int | None = None, **options: Any) -> TrainedModel:
    """A classifier, whoever trained it.

    Args:
      path: the workdir of a run, or an official .npz file.
      step: of a run's checkpoint; None = the newest good one.
      options: of an official file, what its shapes do not tell (`convert.config_from_official`).

    Raises:
      ConfigError: it cannot be read, and why; or it is an auto-encoder.
      CheckpointError: the run has no good checkpoint.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if is_run(path):
        run = run_config(path)
        if run.train.objective != "classes":
            raise ConfigError(
                f"{path} holds an auto-encoder, which has no classes: train a classifier on it with "
                f"--config.train.init_from={path}"
            )
        params = load_params(path, step)
        check(run.model, params, path)
        return TrainedModel(run.model, params, read_classes(path), run, path)
    with bad_input():
        config, params = trecvit.convert.load_official(path, **options)
    return TrainedModel(config, params, None, None, path)


def check(config: trecvit.TRecViTConfig, params: Params, source: Path) -> None:
    """Raises ConfigError where the arrays are not the model's."""
    with bad_input(str(source)):
        check_params(param_specs(config), params, config)


def write_classes(workdir: Path, classes: tuple[str, ...]) -> None:
    """Leaves the names of the classes beside the checkpoints, one a line."""
    (workdir / CLASSES_FILE).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def read_classes(workdir: Path) -> tuple[str, ...] | None:
    """What `write_classes` left; None if there is nothing."""
    path = workdir / CLASSES_FILE
    return tuple(path.read_text(encoding="utf-8").split("\n")[:-1]) if path.is_file() else None


def initial_params(cfg: VideoConfig) -> Params:
    """Parameters to start from, by `train.init_from`: what it holds, the rest freshly initialised.

    A run of the same model gives all of its parameters; one with another head, other classes or another
    resolution its encoder (positions are resized), as does an auto-encoder. Official files and image ViTs
    likewise.

    Raises:
      ConfigError: nothing readable there, or weights of a model of another size (the differences are listed).
      CheckpointError: the run has no good checkpoint.
    """
    path = Path(cfg.train.init_from).expanduser()
    if not path.exists():
        raise ConfigError(f"train.init_from: {path}: no such file or folder")
    mae = cfg.mae.model(cfg.model) if cfg.train.objective == "mae" else None
    encoder = cfg.model if mae is None else mae.encoder
    with bad_input(f"train.init_from: {path}"):
        # What can be wrong with the file comes first: initialising compiles for seconds.
        run = run_config(path) if is_run(path) else None
        found = _read_arrays(path) if run is None else load_params(path)
        fresh = _fresh(mae or encoder, cfg.seed)
        target = fresh if mae is None else fresh["encoder"]
        if run is None:
            given = _from_file(found, encoder, target, cfg.train.zero_centred)
        else:
            given = _from_run(run, found, encoder, target, path)
    return given if mae is None else fresh | {"encoder": given}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of an .npz or .safetensors file; nothing in it is executed."""
    if path.suffix != ".safetensors":
        return read_npz(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"not a readable .safetensors file: {error}") from error


def _fresh(model: trecvit.TRecViTConfig | trecvit.MAEConfig, seed: int) -> Params:
    """Initial parameters on the host, of a random stream of their own."""
    key = jax.random.fold_in(jax.random.key(seed), 0x6E6577)
    if isinstance(model, trecvit.MAEConfig):
        return jax.device_get(jax.jit(lambda k: trecvit.init_mae_params(model, k))(key))
    return jax.device_get(jax.jit(lambda k: trecvit.init_params(model, k))(key))


def _from_run(
    run: VideoConfig, params: Params, config: trecvit.TRecViTConfig, fresh: Params, path: Path
) -> Params:
    params, trained = jax.tree.map(jnp.asarray, params), run.model
    if run.train.objective == "mae":
        trained, params = run.mae.model(run.model).encoder, params["encoder"]
    check(trained, params, path)
    # What does not change the shapes of the encoder may differ: dropout, initialisation, the head.
    free = ("head", "num_classes", "rep_size", "dropout", "head_dropout", "min_rad", "frames_per_clip")
    if lines := describe_differences(to_json(trained), to_json(config), (*free, "image_size")):
        raise ValueError(f"it holds another model than config.model:\n{lines}")
    _, params = trecvit.resize_params(params, trained, config.image_size)
    shapes = jax.tree.map(np.shape, params.get("head"))
    same_head = config.head == trained.head and shapes == jax.tree.map(np.shape, fresh.get("head"))
    head = params.get("head") if same_head else fresh.get("head")
    body = {name: group for name, group in params.items() if name != "head"}
    return body if head is None else body | {"head": head}


def _from_file(
    flat: dict[str, np.ndarray], config: trecvit.TRecViTConfig, fresh: Params, zero_centred: bool
) -> Params:
    """An official classifier or auto-encoder's encoder, or an image ViT."""
    if "tokenizer/embedding/kernel" not in flat:
        return trecvit.from_imagenet(flat, config, fresh, zero_centred=zero_centred).params
    params, _ = trecvit.convert.encoder_from_official(flat, config, fresh)
    head = {n: s for n, s in param_specs(config).items() if n.startswith("head/") and s.official}
    shapes = {name: np.shape(array) for name, array in flat.items()}
    if head and all(shapes.get(spec.official) == spec.stored_shape for spec in head.values()):
        return params | read_leaves(head, flat)
    return params
