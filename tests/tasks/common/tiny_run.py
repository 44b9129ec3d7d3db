"""A tiny regression trained by the shared loop: what the loop's tests run, in process or as a child process.

As a program: python tests/tasks/common/tiny_run.py --workdir=DIR [--config.KEY=VALUE] [--pause=SECONDS]
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from models.common.sharding import ShardingRules, gathered
from tasks.common import config as config_lib
from tasks.common.checkpoint import CheckpointConfig
from tasks.common.data import Batches
from tasks.common.errors import run_main
from tasks.common.job import Job, RunData, TrainConfig
from tasks.common.loop import fit
from tasks.common.mesh import MeshConfig, make_mesh
from tasks.common.optim import OptimConfig
from tasks.common.writer import LogConfig

WIDTH = 8
SCHEMA = {
    "seed": int,
    "num_workers": int,
    "mesh": MeshConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}


class Points:
    """37 rows of a noisy regression, fixed by their index."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(index)
        x = rng.normal(size=WIDTH).astype(np.float32)
        return {
            "x": x,
            "y": np.float32(np.sin(x.sum()) + 0.1 * rng.normal()),
            "mask": np.bool_(index % 5 > 0),
        }


def init_params(key: Any) -> dict[str, Any]:
    keys = jax.random.split(key)
    return {
        "layers": {"0": {"kernel": jax.random.normal(keys[0], (WIDTH, 16)) / 3, "bias": jnp.zeros((16,))}},
        "head": {"kernel": jax.random.normal(keys[1], (16,)) / 4},
    }


PARAM_AXES = {"layers": {"0": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}, "head": {"kernel": ("mlp",)}}


def loss_fn(params: Any, batch: Any, rng: Any) -> tuple[Any, dict[str, Any]]:
    """Mean squared error over the rows that count, with a little noise from the step's rng on the targets."""
    layer = params["layers"]["0"]
    hidden = jnp.tanh(batch["x"] @ gathered(layer["kernel"]) + gathered(layer["bias"]))
    error = hidden @ gathered(params["head"]["kernel"]) - batch["y"]
    noise = 0.01 * jax.random.normal(rng)
    total = jnp.sum(jnp.where(batch["mask"], (error + noise) ** 2, 0.0))
    weight = jnp.sum(batch["mask"].astype(jnp.float32))
    aux = {"weight": weight, "abs_error": (jnp.sum(jnp.where(batch["mask"], jnp.abs(error), 0.0)), weight)}
    return total / jnp.maximum(weight, 1.0), aux


def get_config(arg: str | None = None) -> ConfigDict:
    assert arg is None
    return ConfigDict(
        {
            "seed": 3,
            "num_workers": 0,
            "optim": {"peak_lr": 0.05, "total": 12 * 8, "warmup": 16},
            "train": {"steps": 12, "batch_size": 8},
            "checkpoint": {"every": 4, "keep": 3},
            "log": {"every": 5},
        }
    )


def arguments(workdir: Path | str, config: ConfigDict, **changes: Any) -> dict[str, Any]:
    """Arguments of `Job` for a config; `changes` replace some, and parts of its data."""
    sections = {
        name: config_lib.freeze(config[name], cls, name)
        for name, cls in SCHEMA.items()
        if name not in ("seed", "num_workers")
    }
    mesh = make_mesh(sections.pop("mesh"))
    data = {"batches": Batches(Points(), sections["train"].batch_size, seed=config.seed)}
    data |= {name: changes.pop(name) for name in RunData._fields if name in changes}
    return {
        "workdir": workdir,
        "seed": config.seed,
        "mesh": mesh,
        "rules": ShardingRules(),
        "init_params": init_params,
        "param_axes": PARAM_AXES,
        "loss_fn": loss_fn,
        "open_data": lambda: RunData(**data),
        "units_per_step": sections["train"].batch_size,
        "unit_name": "rows",
        "num_workers": config.num_workers,
        "config": config_lib.to_json(config),
        "free_keys": (*config_lib.FREE_KEYS, "num_workers"),
        **sections,
        **changes,
    }


def tiny_config(**overrides: Any) -> ConfigDict:
    """The config with dotted keys replaced: tiny_config(**{"train.steps": 3})."""
    config = config_lib.with_defaults(get_config(), SCHEMA)
    for key, value in overrides.items():
        config_lib.override(config, key, str(value))
    return config


def main() -> None:
    parser = config_lib.make_parser("a tiny run")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep after every batch drawn")
    given = config_lib.parse_command_line(parser, ["--config", f"{__file__}", *sys.argv[1:]], schema=SCHEMA)
    assert given.config is not None
    job = arguments(given.workdir or Path(), given.config)
    if given.options.pause:
        source = job["open_data"]().batches

        class Slow(Batches):
            def rows(self, k: int, start: int, stop: int) -> dict[str, np.ndarray]:
                time.sleep(given.options.pause)
                return super().rows(k, start, stop)

        job["open_data"] = lambda: RunData(Slow(source.source, source.batch_size, source.seed))
    fit(Job(**job))


if __name__ == "__main__":
    run_main(main)
