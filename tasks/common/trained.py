"""What opening the runs of all tasks has in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tasks.common.config import Schema, load_resolved, with_defaults


def read_run_config[C](workdir: Path | str, schema: Schema, freeze_all: Callable[[Any], C]) -> C:
    """The configuration a run was made with, completed by the defaults of what is newer than the run.

    Raises:
      ConfigError: not the workdir of a run, or of a run of another task.
    """
    return freeze_all(with_defaults(ConfigDict(load_resolved(workdir)["config"]), schema))
