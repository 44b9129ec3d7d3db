"""Weights and the trackers they belong to: those of a run, of a file that `export` wrote, or of an official
one."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from models import tapnext
from models.common.params import check_params
from models.common.shapes import Params
from tasks.common.checkpoint import load_params
from tasks.common.config import to_json
from tasks.common.errors import ConfigError, bad_input
from tasks.common.resolved import describe_differences
from tasks.common.trained import read_run_config
from tasks.points.config import SCHEMA, PointsConfig, freeze_all
from tasks.points.weight_files import WEIGHTS_ENDING, load_weights


class TrainedModel(NamedTuple):
    """A tracker with its parameters.

    Attributes:
      config: of the model.
      params: canonical tree.
      run: the whole configuration if it came from a run's workdir.
      source: the folder or file it was read from.
    """

    config: tapnext.TAPNextConfig
    params: Params
    run: PointsConfig | None
    source: Path


def run_config(workdir: Path | str) -> PointsConfig:
    """See `read_run_config`."""
    return read_run_config(workdir, SCHEMA, freeze_all)


def open_model(path: Path | str, step: int | None = None) -> TrainedModel:
    """A tracker, whoever trained it.

    Args:
      path: the workdir of a run, a .safetensors file of `tasks.points.export`, or an official .npz, .pt or
        .ckpt file.
      step: of a run's checkpoint; None = the newest good one.

    Raises:
      ConfigError: it cannot be read, and why.
      CheckpointError: the run has no good checkpoint.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.is_dir():
        run = run_config(path)
        config, params = run.model, load_params(path, step)
    else:
        run = None
        with bad_input():
            if path.suffix == WEIGHTS_ENDING:
                config, params, _ = load_weights(path)
            else:
                config, params = tapnext.load_official(path)
    with bad_input(str(path)):
        check_params(tapnext.param_specs(config), params, config)
    return TrainedModel(config, params, run, path)


def initial_params(cfg: PointsConfig) -> Params:
    """The parameters of `train.init_from`.

    Raises:
      ConfigError: they cannot be read, or are another model's (the differences are listed).
      CheckpointError: the run has no good checkpoint.
    """
    with bad_input("train.init_from"):
        given = open_model(cfg.train.init_from)
    # What changes neither shapes nor the meaning of the weights.
    free = ("min_rad", "decode_radius", "decode_temperature")
    if lines := describe_differences(_sizes(given.config), _sizes(cfg.model), free):
        raise ConfigError(f"train.init_from: {given.source} holds another model than config.model:\n{lines}")
    return given.params


def _sizes(config: tapnext.TAPNextConfig) -> dict[str, Any]:
    """A model's fields as JSON values, with the sizes that None stands for: files say them."""
    stated: dict[str, Any] = {"lru_width": config.recurrent_width, "coordinate_bins": config.bins}
    return to_json(dataclasses.replace(config, **stated))
