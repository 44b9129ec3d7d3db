"""Train a language model.

    python -m tasks.lm.train --config=configs/fox.py
    python -m tasks.lm.train --config=configs/fox.py:size=125m,path=data/longcrawl64 --workdir=DIR

The same command again resumes, or says that the run is finished.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models import fox
from models.common.sharding import ShardingRules
from tasks.common.config import to_json
from tasks.common.data import Batches, Order
from tasks.common.errors import ConfigError, bad_input, run_main
from tasks.common.job import Job, RunData
from tasks.common.mesh import make_mesh
from tasks.common.resolved import describe_differences
from tasks.common.train_command import TrainCommand
from tasks.lm.config import LM_FREE_KEYS, SCHEMA, LMConfig, freeze_all
from tasks.lm.data import LMData, build
from tasks.lm.losses import lm_loss_fn
from tasks.lm.reports import make_callbacks, make_evaluators, print_summary
from tasks.lm.trained import open_model

DEFAULT_CONFIG = "configs/fox.py"


def make_job(config: Any, workdir: Path) -> Job:
    """What the shared loop is told of a configuration; arguments and errors as those of `train`."""
    cfg = freeze_all(config)
    mesh = make_mesh(cfg.mesh)
    training = cfg.train.on_devices(mesh.size)
    shapes = jax.eval_shape(lambda key: fox.init_params(cfg.model, key), jax.random.key(0))
    return Job(
        workdir=workdir,
        seed=cfg.seed,
        mesh=mesh,
        rules=ShardingRules(),
        init_params=lambda key: fox.init_params(cfg.model, key),
        param_axes=fox.param_axes(cfg.model),
        loss_fn=lm_loss_fn(cfg.model, cfg.runtime, chunk_size=cfg.train.loss_chunk),
        open_data=lambda: open_run_data(cfg, mesh, workdir),
        optim=cfg.optim,
        train=training,
        checkpoint=cfg.checkpoint,
        log=cfg.log,
        units_per_step=training.batch_size * training.seq_len,
        unit_name="tokens",
        flops_per_unit=3 * fox.flops_per_token(cfg.model, training.seq_len),
        decay_mask=fox.decay_mask(shapes),
        trainable_mask=fox.trainable_mask(shapes),
        initial_params=(lambda: initial_params(cfg)) if cfg.train.init_from else None,
        config=to_json(config),
        free_keys=LM_FREE_KEYS,
        num_workers=training.num_workers,
        prefetch=training.prefetch,
        program=("lm", cfg.model, cfg.runtime, cfg.train.loss_chunk),
    )


def abstract_batch(cfg: LMConfig, rows: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of so many sequences, as the loss takes it."""
    dtypes = {"tokens": jnp.int32, "labels": jnp.int32, "reset": jnp.bool_, "loss_mask": jnp.bool_}
    return {name: jax.ShapeDtypeStruct((rows, cfg.train.seq_len), dtype) for name, dtype in dtypes.items()}


def open_run_data(cfg: LMConfig, mesh: Mesh, workdir: Path) -> RunData:
    """The text as batches, and what the run is judged on."""
    data = open_data(cfg)
    order: Order = "sequential" if data.train.ordered else "shuffled"
    return RunData(
        Batches(data.train, cfg.train.batch_size, cfg.seed, order),
        make_evaluators(cfg, data, mesh, workdir),
        make_callbacks(cfg, data, workdir),
    )


def open_data(cfg: LMConfig) -> LMData:
    """The run's text; every fault of it is a ConfigError, found before anything is trained."""
    print(f"text: {cfg.data.source}, tokenizer {cfg.data.tokenizer}", flush=True)
    with bad_input():
        data = build(
            cfg.data,
            cfg.train.seq_len,
            batch_size=cfg.train.batch_size,
            eval_length=cfg.eval.length or cfg.train.seq_len,
            vocab_size=cfg.model.vocab_size,
        )
    print(
        f"  {len(data.train_documents):,} training documents, {len(data.held_out_documents):,} held out; "
        f"{len(data.train):,} examples of {cfg.train.seq_len:,} tokens",
        flush=True,
    )
    return data


def initial_params(cfg: LMConfig) -> Any:
    """The parameters of `train.init_from`.

    Raises:
      ConfigError: they cannot be read, or are another model's (the differences are listed).
    """
    given = open_model(cfg.train.init_from)
    if lines := describe_differences(to_json(given.config), to_json(cfg.model), ("initializer_range",)):
        raise ConfigError(f"train.init_from: {given.source} holds another model than config.model:\n{lines}")
    return given.params


COMMAND = TrainCommand(
    task="lm",
    description="Train a language model",
    schema=SCHEMA,
    default_config=DEFAULT_CONFIG,
    make_job=make_job,
    print_summary=print_summary,
)
main, train = COMMAND.main, COMMAND.train

if __name__ == "__main__":
    run_main(main)
