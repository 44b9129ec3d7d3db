"""Opening a trained model, whoever trained it: the workdir of a run, or an official checkpoint."""

from pathlib import Path
from typing import NamedTuple

from models import fox
from models.common.shapes import Params
from tasks.common.checkpoint import load_params
from tasks.common.config import load_resolved
from tasks.common.errors import ConfigError, bad_input
from tasks.common.trained import read_run_config
from tasks.lm.config import SCHEMA, LMConfig, freeze_all


class TrainedModel(NamedTuple):
    """A model with its parameters.

    config: of the model. params: canonical tree. run: the whole configuration if it came from a run's
    workdir, else None. source: the folder or file it was read from.
    """

    config: fox.FoxConfig
    params: Params
    run: LMConfig | None
    source: Path


def run_config(workdir: Path | str) -> LMConfig:
    """See `read_run_config`."""
    return read_run_config(workdir, SCHEMA, freeze_all)


def open_run(workdir: Path | str, step: int | None = None) -> TrainedModel:
    """The newest good checkpoint of a run, or that of `step`.

    Raises:
      ConfigError: not the workdir of a run.
      CheckpointError: it holds no good checkpoint.
    """
    run = run_config(workdir)
    return TrainedModel(run.model, load_params(workdir, step), run, Path(workdir))


def open_official(path: Path | str) -> TrainedModel:
    """A checkpoint in the official format (folder, .safetensors or .bin).

    Raises:
      ConfigError: it cannot be read, and why.
    """
    with bad_input():
        config, params = fox.convert.load_official(path)
    return TrainedModel(config, params, None, Path(path))


def is_run(path: Path | str) -> bool:
    """Whether `path` is the workdir of a run (folders of official checkpoints have a config.json as well)."""
    try:
        load_resolved(path)
    except ConfigError:
        return False
    return True


def open_model(path: Path | str, step: int | None = None) -> TrainedModel:
    """Whichever of the two `path` is.

    Args:
      step: of a run's checkpoint; None = the newest good one.

    Raises:
      ConfigError, CheckpointError: see `open_run` and `open_official`.
    """
    path = Path(path).expanduser()
    return open_run(path, step) if is_run(path) else open_official(path)
