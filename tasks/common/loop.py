"""The one training loop. It owns the order of things; what is trained it is told by functions.

At a step boundary n (n updates done) the order is: settle the metrics of step n - 1, save, evaluate, draw
batch n, dispatch step n. README.md says why each comes where it does.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tasks.common.checkpoint import Checkpointer
from tasks.common.data import Batch, BatchIterator
from tasks.common.errors import Stopped, writing
from tasks.common.flops import utilisation
from tasks.common.guard import DivergenceGuard, StopSignal
from tasks.common.job import Hook, Job, RunData, TrainConfig
from tasks.common.mesh import put_batch
from tasks.common.optim import learning_rate, make_optimizer
from tasks.common.progress import Progress, StopWatch
from tasks.common.resolved import require_same, save_resolved
from tasks.common.state import TrainState, split_trainable
from tasks.common.step import TrainStep, abstract_state, fresh_state, make_train_step, shared_step
from tasks.common.writer import Writer, read_records, truncate_records

__all__ = ["Hook", "Job", "RunData", "TrainConfig", "fit"]


def fit(job: Job) -> TrainState:
    """Trains to `train.steps`, going on from the newest good checkpoint of the workdir if there is one.

    Args:
      job: what is trained, on what, how and where.

    Returns:
      The final state.

    Raises:
      ConfigError: sizes that do not fit, or a checkpoint of another config (the difference is listed).
      CheckpointError: checkpoints exist but none is good, or the disk is full.
      Diverged: a non-finite or jumping step; its batch is saved, its state is not.
      Stopped: a signal came; the state is saved.
    """
    workdir = Path(job.workdir)
    with writing(workdir, "the workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
    decay = None if job.decay_mask is None else split_trainable(job.decay_mask, job.trainable_mask)[0]
    optimizer = make_optimizer(job.optim, decay)

    def check(extra: dict[str, Any]) -> None:
        require_same(extra["run"], job.facts(), workdir, free=())
        if job.config is not None:
            require_same(extra["config"], job.config, workdir, job.free_keys)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(job.mesh))
        checkpointer = stack.enter_context(Checkpointer(workdir, job.checkpoint))
        progress = Progress(job.train.steps, job.unit_name, enabled=job.log.progress)
        abstract = abstract_state(
            job.init_params,
            job.param_axes,
            job.mesh,
            job.rules,
            optimizer,
            job.trainable_mask,
            ema=job.train.ema > 0,
        )
        restored = checkpointer.restore(abstract, check)
        if restored is not None and _is_finished(workdir, restored.step, job.train.steps):
            progress.say(f"finished: {workdir} has all {restored.step} steps")
            return restored.state
        data = job.opened()  # may take its time, and be interrupted
        stop = stack.enter_context(StopSignal().listening())
        stack.enter_context(progress)
        if restored is not None:
            state, first = restored.state, restored.step
            progress.say(f"resuming at step {first} of {job.train.steps} in {workdir}")
        else:
            first = 0
            given = None if job.initial_params is None else job.initial_params()
            state = fresh_state(abstract, job.init_params, optimizer, job.seed, job.trainable_mask, given)
        if job.config is not None:
            save_resolved(workdir, job.config)
        writer, guard = _open_logs(stack, job, workdir, first)
        make_step = functools.partial(
            make_train_step,
            job.loss_fn,
            optimizer,
            seed=job.seed,
            accum=job.train.accum,
            ema=job.train.ema,
            trainable_mask=job.trainable_mask,
            teacher=job.teacher,
        )
        step_fn = shared_step(job.step_program(), make_step)
        batches = stack.enter_context(_read_batches(job, data, first))
        run = _Run(job, data, step_fn, checkpointer, writer, progress, guard, stop, batches)
        return run.to_the_end(state, first)


def _is_finished(workdir: Path, step: int, steps: int) -> bool:
    """Whether the run's last boundary, evaluations included, was completed."""
    return step >= steps and any(r["kind"] == "finished" and r["step"] == step for r in read_records(workdir))


def _open_logs(
    stack: contextlib.ExitStack, job: Job, workdir: Path, first: int
) -> tuple[Writer, DivergenceGuard]:
    """The log without what will be done again, and a guard that remembers what is kept."""
    guard = DivergenceGuard(workdir, job.train.spike_factor, job.train.spike_window)
    kept = truncate_records(workdir, first) if jax.process_index() == 0 else read_records(workdir)
    for record in kept:
        if record["kind"] == "train" and record["step"] < first:
            guard.remember(record["grad_norm"])
    writer = Writer(workdir, job.log, first_step=first, run_config=job.config)
    return stack.enter_context(writer), guard


def _read_batches(job: Job, data: RunData, first: int) -> BatchIterator:
    return data.batches.iterate(
        first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=job.num_workers,
        prefetch=job.prefetch,
    )


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that was dispatched and whose metrics were not looked at yet."""

    step: int
    lr: float
    metrics: dict[str, Any]
    batch: Batch


class _Run:
    """A run under way: the loop itself."""

    def __init__(
        self,
        job: Job,
        data: RunData,
        step_fn: TrainStep,
        checkpointer: Checkpointer,
        writer: Writer,
        progress: Progress,
        guard: DivergenceGuard,
        stop: StopSignal,
        batches: BatchIterator,
    ) -> None:
        self.job = job
        self.data = data
        self.step_fn = step_fn
        self.checkpointer = checkpointer
        self.writer = writer
        self.progress = progress
        self.guard = guard
        self.stop = stop
        self.batches = batches
        self.watch = StopWatch()
        self.pending: _Pending | None = None
        self.steps_in_lap = 0
        self.replicated = NamedSharding(job.mesh, PartitionSpec())

    def to_the_end(self, state: TrainState, first: int) -> TrainState:
        """Trains from step `first` to the last; the state's buffers are taken."""
        steps = self.job.train.steps
        with self._profiler() as profile:
            for step in range(first, steps):
                self._boundary(state, step, is_first=step == first)
                profile(step)
                state = self._advance(state, step, is_first=step == first)
                if self.stop.requested(step):
                    self._save(state, step + 1)
                    self.checkpointer.wait()
                    raise Stopped(
                        f"stopped by {self.stop.name or 'a signal'} after step {step}: saved in "
                        f"{self.job.workdir}; run the same command to go on"
                    )
        self._boundary(state, max(steps, first), is_first=False)
        self.checkpointer.wait()
        self.writer.write("finished", max(steps, first), {}, boards=False)
        self.writer.sync()
        return state

    def _advance(self, state: TrainState, step: int, *, is_first: bool) -> TrainState:
        """Draws a batch and dispatches its step; then looks at the metrics of the step before."""
        batch = next(self.batches)
        lr = learning_rate(self.job.optim, self.job.units_seen(step))
        on_device = put_batch(batch, self.job.mesh, micro_batches=self.job.train.accum)
        rate = jax.device_put(np.float32(lr), self.replicated)
        # The first call compiles, which is no training time.
        clock = self.watch.paused() if is_first else contextlib.nullcontext()
        traced = jax.profiler.StepTraceAnnotation("train", step_num=step)
        with clock, traced, jax.transfer_guard_host_to_device("disallow"):
            state, metrics = self.step_fn(state, on_device, rate)
        self._settle()
        self.pending = _Pending(step, lr, metrics, batch)
        return state

    def _settle(self) -> None:
        """Waits for the pending step's metrics, checks and logs them."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self.guard.check(pending.step, metrics, pending.batch)
        done = pending.step + 1
        units = {self.job.unit_name: done * self.job.units_per_step}
        is_shown = done % self.job.log.every == 0 or done == self.job.train.steps
        self.writer.write("train", pending.step, {**metrics, "lr": pending.lr, **units}, boards=is_shown)
        self.steps_in_lap += 1
        if is_shown:
            self._report_speed(done, metrics["loss"])

    def _report_speed(self, done: int, loss: float) -> None:
        seconds, steps = self.watch.lap(), self.steps_in_lap
        self.steps_in_lap = 0
        rate = steps * self.job.units_per_step / seconds
        mfu = utilisation(rate, self.job.flops_per_unit, self.job.mesh.size)
        speed = {f"{self.job.unit_name}_per_second": rate, "seconds_per_step": seconds / steps}
        self.writer.write("speed", done - 1, speed if mfu is None else {**speed, "mfu": mfu})
        self.progress.update(done, loss, rate, seconds / steps, mfu)

    def _boundary(self, state: TrainState, step: int, *, is_first: bool) -> None:
        """Saves and evaluates what is due with `step` updates done."""
        job, data, is_last = self.job, self.data, step >= self.job.train.steps
        hooks = [h for h in (*data.evaluators, *data.callbacks) if h.due(step, job.train)]
        save = is_last or (step % job.checkpoint.every == 0 and not is_first)
        if not save and not hooks:
            return
        with self.watch.paused():
            if save:
                self._save(state, step)
            else:
                self._settle()
            for hook in hooks:
                values = hook.run(state.evaluated, step)
                if values and hook in data.evaluators:
                    named = {f"{hook.name}/{name}": value for name, value in values.items()}
                    self.writer.write("eval", step, named)
                    shown = "  ".join(f"{n} {v:.4f}" for n, v in named.items() if n.count("/") == 1)
                    self.progress.say(f"step {step}  {shown}")

    def _save(self, state: TrainState, step: int) -> None:
        # First the metrics: a bad state must not be saved, and the log must reach up to the checkpoint.
        self._settle()
        self.writer.sync()
        extra = {"run": self.job.facts(), "config": dict(self.job.config or {}), "position": step}
        self.checkpointer.save(state, step, extra)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        """Yields a function to call before each step, which traces the steps asked for to
        <workdir>/profile."""
        start, count = self.job.train.profile_start, self.job.train.profile_steps
        tracing = False

        def before(step: int) -> None:
            nonlocal tracing
            if step == start:
                jax.profiler.start_trace(str(Path(self.job.workdir) / "profile"))
                tracing = True
            elif tracing and start is not None and step == start + count:
                self._settle()  # the last traced step must have run
                jax.profiler.stop_trace()
                tracing = False

        try:
            yield before
        finally:
            if tracing:
                jax.profiler.stop_trace()
