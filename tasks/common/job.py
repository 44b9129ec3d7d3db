"""What the loop has to be told: the functions and settings of one training run."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from models.common.sharding import ShardingRules
from tasks.common.checkpoint import CheckpointConfig
from tasks.common.data import Batches
from tasks.common.errors import ConfigError
from tasks.common.mesh import batch_ways
from tasks.common.optim import OptimConfig
from tasks.common.resolved import FREE_KEYS
from tasks.common.step import LossFn
from tasks.common.writer import LogConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train.

    steps: updates in all.
    batch_size: rows of a global batch.
    accum: micro-batches a batch is computed in.
    eval_every: steps between evaluations, for hooks that do not say; 0: at the end only.
    eval_at_start: also evaluate before step 0.
    ema: decay of an exponential moving average of the trained parameters, which is then what is evaluated
      and loaded; 0: off. After n updates it is at most (1 + n) / (10 + n).
    spike_factor: stop when the gradient norm exceeds this many times its running median over `spike_window`
      steps; None: off. Non-finite values always stop.
    profile_start: first step of a profiler trace of `profile_steps` steps; None: no trace.
    """

    steps: int
    batch_size: int
    accum: int = 1
    eval_every: int = 0
    eval_at_start: bool = False
    ema: float = 0.0
    spike_factor: float | None = None
    spike_window: int = 100
    profile_start: int | None = None
    profile_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accum", "spike_window", "profile_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train.ema = {self.ema}: must be 0 (off), or a decay below 1, such as 0.9999")
        if self.eval_every < 0:
            raise ConfigError(f"train.eval_every = {self.eval_every}: must be 0 (at the end only) or more")
        if self.batch_size % self.accum:
            raise ConfigError(
                f"train.batch_size = {self.batch_size} is not divisible by train.accum = {self.accum}"
            )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ConfigError(f"train.spike_factor = {self.spike_factor}: must be above 1, or none")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to do with the parameters now and then, and always at the end of the run.

    name: prefix of its metrics.
    run: (params, step) -> {metric: value}, or None. It must not keep the params: the next step takes their
      buffers. A metric with a slash in its name is a detail: logged, but not shown.
    every: steps between calls; 0: at the end only; None: train.eval_every.
    """

    name: str
    run: Callable[[Any, int], Mapping[str, float] | None]
    every: int | None = None

    def due(self, step: int, config: TrainConfig) -> bool:
        """Whether it runs at the boundary before `step`."""
        every = config.eval_every if self.every is None else self.every
        if step >= config.steps:
            return True
        return config.eval_at_start if step == 0 else every > 0 and step % every == 0


class RunData(NamedTuple):
    """What a run reads and is judged on.

    batches: global batches of `train.batch_size` rows, dicts of arrays.
    evaluators: hooks whose metrics are logged.
    callbacks: hooks whose results are not.
    """

    batches: Batches
    evaluators: Sequence[Hook] = ()
    callbacks: Sequence[Hook] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What `loop.fit` runs.

    workdir: folder of the run; the only place written to.
    seed: of initialisation and of the steps' rng, fold_in(key(seed), step).
    mesh, rules: the devices, and where named dimensions lie on them.
    init_params: key -> pure dict of parameters.
    param_axes: tree of logical axis names, one tuple per parameter.
    loss_fn: (params, batch, rng) -> (scalar loss, aux). aux holds (sum, weight) pairs and, if batches can
      have unequal ones, "weight": the denominator of the loss.
    teacher: loss_fn takes the averaged parameters (train.ema) as a fourth argument, to learn from.
    open_data: opens the data; not called for a finished run.
    optim, train, checkpoint, log: sections of the config.
    units_per_step: units (tokens, clips, ...) in a global batch. The schedule counts units, or updates if
      optim.unit is "steps".
    unit_name: what to call a unit.
    flops_per_unit: model FLOPs of forward AND backward per unit, for MFU; None: not shown.
    decay_mask, trainable_mask: trees of bool over the parameters; None: all True.
    initial_params: gives parameters to start from a copy of (fine-tuning); not called on resume.
    config: the resolved config as plain JSON values: saved in the workdir before step 0 and in every
      checkpoint, and compared on resume; None: neither.
    free_keys: dotted keys of it that may change on resume.
    num_workers, prefetch: of `Batches.iterate`.
    program: names what `loss_fn` and the masks compute. Runs of one process for which it is equal share
      their compiled step if nothing else of it differs. None: they do not.
    """

    workdir: Path | str
    seed: int
    mesh: Mesh
    rules: ShardingRules
    init_params: Callable[[Any], Any]
    param_axes: Any
    loss_fn: LossFn
    open_data: Callable[[], RunData]
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    units_per_step: int
    unit_name: str = "tokens"
    flops_per_unit: float | None = None
    decay_mask: Any = None
    trainable_mask: Any = None
    initial_params: Callable[[], Any] | None = None
    config: Mapping[str, Any] | None = None
    free_keys: Sequence[str] = FREE_KEYS
    num_workers: int = 0
    prefetch: int = 2
    program: Hashable = None
    teacher: bool = False

    def __post_init__(self) -> None:
        rows = self.train.batch_size
        ways = batch_ways(self.mesh)
        if rows // self.train.accum % ways:
            raise ConfigError(
                f"train.batch_size = {rows} in train.accum = {self.train.accum} micro-batches leaves "
                f"{rows // self.train.accum} rows, not divisible by the {ways} devices of the mesh"
            )
        if self.units_per_step < 1:
            raise ConfigError(f"units_per_step = {self.units_per_step}: must be at least 1")
        if self.teacher and not self.train.ema:
            raise ConfigError("train.ema = 0: the averaged model is the teacher; use a decay such as 0.999")

    def opened(self) -> RunData:
        """The data.

        Raises:
          ConfigError: its batches are not of the size that is to be trained on.
        """
        data, rows = self.open_data(), self.train.batch_size
        if data.batches.batch_size != rows:
            raise ConfigError(
                f"train.batch_size = {rows}, but the data has {data.batches.batch_size} rows a batch"
            )
        return data

    def units_seen(self, step: int) -> int:
        """Position on the learning-rate schedule before `step`."""
        return step * (self.units_per_step if self.optim.unit == "tokens" else 1)

    def step_program(self) -> Hashable:
        """All that the jitted step depends on; None if it is not to be shared."""
        if self.program is None:
            return None
        optim = self.optim
        settings = (optim.b1, optim.b2, optim.eps, optim.weight_decay, optim.clip_norm)
        averaging = (self.train.ema, self.teacher)
        return self.program, self.seed, self.train.accum, averaging, settings, self.mesh

    def facts(self) -> dict[str, int]:
        """What must stay the same on resume for the data order and losses to go on."""
        return {"seed": self.seed, "batch_size": self.train.batch_size, "units_per_step": self.units_per_step}
