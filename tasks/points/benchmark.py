"""Speed of TAPNext on one device: a stream frame by frame, recorded clips, training steps.

    python -m launch.bench tasks.points --only=streaming --set=runtime.residual_dtype=bfloat16 --profile=DIR
    python -m launch.bench tasks.points --accuracy FILM.mp4 ... --checkpoint=RUN    bfloat16 against float32

Pixels, points and parameters are random: the time does not depend on them. On a CPU a small model stands in,
and nothing is judged.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.common.bench import DeviceTiming, Rates, measure_rates
from kernels.common.compiler import compiler_options
from models import tapnext
from models.common.recurrent_state import handed_over, taken_over
from models.tapnext import TAPNextConfig, TAPNextOutput, TAPNextRuntime, TAPNextState
from tasks.common.bench import (
    NOTHING,
    Carried,
    Goal,
    build,
    burst_seconds,
    device_stat,
    goal_columns,
    kernel_seconds,
    memory_limit,
    program_memory,
    rounded,
    start_training,
    time_checked,
    tree_bytes,
    verdict,
)
from tasks.common.errors import ConfigError
from tasks.common.flops import utilisation
from tasks.common.mesh import put_batch
from tasks.points.benchmark_cases import CASES, STAND_INS, STREAMS, Case, Setup, prepare
from tasks.points.train import abstract_batch, make_job

__all__ = ["CASES", "STAND_INS", "Case", "rows", "verdict"]

# On a GPU. XLA's attention writes all scores; cuDNN's does not.
FASTEST = "runtime.attention_implementation=cudnn"
LEARNING_RATE = 1e-4
FRAMES = 50  # of a stream, of which each is sent and its tracks waited for


def rows(
    *,
    calls: int = 7,
    only: str = "",
    settings: str | None = None,
    profile: Path | None = None,
    cases: Sequence[Case] | None = None,
) -> list[dict[str, Any]]:
    """Times each case.

    Args:
      calls: timed bursts of each, see `kernels.common.bench.time_bursts`.
      only: part of a case's label: "streaming", "1024 points", "training, B".
      settings: config values, such as "runtime.residual_dtype=bfloat16,loss.layers=0" or
        "train.batch_size=2", or options of the compiler for "streaming" and "offline":
        "compiler.xla_gpu_enable_triton_gemm=true" (the other cases are compiled as their users get them).
        None: cuDNN's attention on a GPU.
      profile: folder for a trace of five calls of each case; where its time goes is printed.
      cases: what is timed; None: TAPNext-B and the training of S and B, on a CPU small stand-ins.

    Returns:
      Rows {case, implementation, parameters M, ms, spread, wall ms, kernels ms, frames/s, clips/s, MFU, floor
      ms, floor frames/s, memory GiB, peak GiB, compile s, official, required, target, unit, met, measured}.
      ms is device time with calls queued back to back, except of "tracker" and "recorded", which wait for
      each result. wall ms is that of a frame that is sent and whose tracks are waited for, kernels ms what a
      trace finds of a streamed frame on the device, without gaps. The floor is, in this run's rates, the
      longer of the FLOPs (training: three times the forward pass's) and, in a stream, of reading parameters
      and state and writing the state. MFU counts no recomputation. memory is what the compiled program needs,
      peak the most that the process has held so far.

    Raises:
      ConfigError: no case is called so, a setting is wrong, or the device has not the memory for any.
    """
    on_cpu = jax.default_backend() == "cpu"
    cases = (STAND_INS if on_cpu else CASES) if cases is None else cases
    settings = (FASTEST if jax.default_backend() == "gpu" else "") if settings is None else settings
    wanted = [case for case in cases if only in case.label()]
    if not wanted:
        names = "; ".join(case.label() for case in cases)
        raise ConfigError(f"--only={only}: part of no case; there are {names}")
    prepared = [prepare(case, settings) for case in wanted]
    rates = measure_rates(256, 2**16) if on_cpu else measure_rates()
    found = []
    for case, setup in zip(wanted, prepared, strict=True):
        bench = _Bench(case, setup, calls, rates, profile)
        measured: _Measured | None = getattr(bench, case.kind)()
        if measured is not None:
            row = bench.row(measured)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    if not found:
        raise ConfigError(f"--only={only}: this device has not the memory for it")
    return found


def stream_step(model: TAPNextConfig, runtime: TAPNextRuntime, compiler: dict[str, Any]) -> Any:
    """Jitted (state, params, frame) -> (state after the frame, tracks). The state is handed over."""

    def step(state: TAPNextState, params: Any, frame: Any) -> tuple[TAPNextState, TAPNextOutput]:
        output, after = tapnext.apply(model, runtime, params, frame, state=taken_over(state))
        assert after is not None
        return after, output

    return jax.jit(step, donate_argnums=0, compiler_options=compiler)


class _Measured(NamedTuple):
    """Of one case. Seconds and bytes; None where there is none.

    clips: in a call; 0 of a stream, whose calls are of one frame.
    flops: of a call, backward pass included.
    moved: bytes that a call cannot but read or write.
    """

    timing: DeviceTiming
    clips: int
    flops: float
    compile_s: float
    moved: int = 0
    memory: float | None = None
    wall: float | None = None
    kernels: float | None = None


@dataclasses.dataclass(frozen=True)
class _Bench:
    """One case: a method for each kind."""

    case: Case
    setup: Setup
    calls: int
    rates: Rates
    profile: Path | None

    @property
    def model(self) -> TAPNextConfig:
        return self.setup.cfg.model

    @property
    def runtime(self) -> TAPNextRuntime:
        return self.setup.cfg.runtime

    def streaming(self) -> _Measured:
        """One stream, one frame a call; the state stays on the device."""
        params, state = self._params(), self._state()
        frame = jnp.asarray(self._video(1))[None]
        step = stream_step(self.model, self.runtime, self.setup.compiler)
        built = build(step.lower(handed_over(state), params, frame))
        moved = tree_bytes(params) + 2 * tree_bytes(state)
        call = Carried(built.compiled, state, params, frame, hand_over=handed_over)
        timing = self._time(call)
        camera, wall = np.asarray(frame), []
        for _ in range(FRAMES):
            begin = time.perf_counter()
            output = call(params, jax.device_put(camera))
            jax.device_get((output.tracks_yx, output.visible_logits))
            wall.append(time.perf_counter() - begin)
        return _Measured(
            timing,
            clips=0,
            flops=self._flops(1),
            compile_s=built.seconds,
            moved=moved,
            memory=program_memory(built.compiled),
            wall=statistics.median(wall),
            kernels=kernel_seconds(call),
        )

    def tracker(self) -> _Measured:
        """The tracker for users, all slots in use."""
        params = self._params()
        tracker = tapnext.SlotTracker(self.model, params, self.case.points, runtime=self.runtime)
        tracker.add(self._queries())
        moved = tree_bytes(params) + 2 * tree_bytes(tracker.state)
        call = functools.partial(tracker.step, self._video(1))
        begin = time.perf_counter()
        call()
        compile_s = time.perf_counter() - begin
        timing = self._time(call)
        return _Measured(timing, 0, self._flops(1), compile_s, moved, wall=timing.median_s)

    def offline(self) -> _Measured:
        """A whole clip in one call, without a state."""
        model, runtime = self.model, self.runtime

        def run(params: Any, video: Any, query_tyx: Any) -> TAPNextOutput:
            return tapnext.apply(model, runtime, params, video, query_tyx)[0]

        video, query_tyx = jnp.asarray(self._video(self.case.frames)), jnp.asarray(self._queries())
        arguments = (self._params(), video[None], query_tyx[None])
        built = build(jax.jit(run, compiler_options=self.setup.compiler).lower(*arguments))
        timing = self._time(functools.partial(built.compiled, *arguments))
        flops, memory = self._flops(self.case.frames), program_memory(built.compiled)
        return _Measured(timing, 1, flops, built.seconds, memory=memory)

    def recorded(self) -> _Measured:
        """The function for users, forwards, with its own chunks."""
        call = functools.partial(
            tapnext.track_clip,
            self.model,
            self._params(),
            self._video(self.case.frames),
            self._queries(),
            runtime=self.runtime,
            both_ways=False,
        )
        begin = time.perf_counter()
        call()
        compile_s = time.perf_counter() - begin
        timing = self._time(call)
        return _Measured(timing, 1, self._flops(self.case.frames), compile_s, wall=timing.median_s)

    def training(self) -> _Measured | None:
        """The trainer's step: forward and backward pass with its losses, AdamW. None: no memory."""
        job = make_job(self.setup.config, Path())
        clips = self.setup.cfg.train.batch_size
        with jax.set_mesh(job.mesh):
            state, step = start_training(job)
            batch = put_batch(self._batch(clips), job.mesh, micro_batches=1)
            arguments = (state, batch, jnp.float32(LEARNING_RATE))
            built = build(step.lower(*arguments))
            if (needed := program_memory(built.compiled)) > memory_limit():
                label = self.case.label(clips)
                print(f"{label}: needs {needed / 2**30:.1f} GiB, skipped", flush=True)
                return None
            timing = self._time(Carried(built.compiled, *arguments))
        assert job.flops_per_unit is not None
        return _Measured(timing, clips, clips * job.flops_per_unit, built.seconds, memory=needed)

    def row(self, measured: _Measured) -> dict[str, Any]:
        """See `rows`."""
        case, timing, cfg = self.case, measured.timing, self.setup.cfg
        clips = measured.clips
        seconds, frames = timing.median_s, case.frames * max(clips, 1)
        floor = max(measured.flops / self.rates.matmul, measured.moved / self.rates.copy)
        mfu = utilisation(1 / seconds, measured.flops, len(jax.devices()) if case.kind == "training" else 1)
        peak, goal = device_stat("peak_bytes_in_use"), self._goal()
        value = seconds * 1e3 if goal and goal.unit == "ms" else frames / seconds
        return {
            "case": case.label(cfg.train.batch_size if case.kind == "training" else None),
            "implementation": self._implementation(),
            "parameters M": round(tapnext.count_params(self.model) / 1e6, 1),
            "ms": rounded(seconds * 1e3),
            "spread": f"{100 * timing.spread:.1f} %",
            "wall ms": NOTHING if measured.wall is None else rounded(measured.wall * 1e3),
            "kernels ms": NOTHING if measured.kernels is None else rounded(measured.kernels * 1e3),
            "frames/s": rounded(frames / seconds),
            "clips/s": rounded(clips / seconds) if clips else NOTHING,
            "MFU": NOTHING if mfu is None else round(mfu, 3),
            "floor ms": rounded(floor * 1e3),
            "floor frames/s": rounded(frames / floor),
            "memory GiB": NOTHING if measured.memory is None else round(measured.memory / 2**30, 2),
            "peak GiB": NOTHING if peak is None else round(peak / 2**30, 2),
            "compile s": round(measured.compile_s, 1),
            **goal_columns(goal, value),
            "measured": str(self.rates),
        }

    def _goal(self) -> Goal | None:
        """What the row is judged by: the released model in bfloat16, on a GPU."""
        judged = self.model == TAPNextConfig() and self.runtime.compute_dtype == "bfloat16"
        return self.case.goal if judged and jax.default_backend() == "gpu" else None

    def _implementation(self) -> str:
        runtime, kind = self.runtime, self.case.kind
        parts = [f"attention {runtime.attention_implementation or 'xla'}", runtime.compute_dtype]
        parts += [f"residual {runtime.residual_dtype}"] * (runtime.residual_dtype != "float32")
        parts += [f"scan {runtime.scan_implementation}"] * (runtime.scan_implementation is not None)
        parts += [f"gated MLP {runtime.gated_mlp}"] * (runtime.gated_mlp is not None)
        if kind == "training":
            parts += [f"remat {runtime.remat}"]
            parts += ["scanned layers"] * runtime.scan_layers
        if kind in ("streaming", "offline"):
            usual = compiler_options()
            parts += [f"{k}={v}" for k, v in self.setup.compiler.items() if v != usual.get(k)]
        return ", ".join(parts)

    def _time(self, call: Callable[[], Any]) -> DeviceTiming:
        seconds = burst_seconds(self.case.kind in STREAMS)
        return time_checked(self.case.label(), call, bursts=self.calls, seconds=seconds, profile=self.profile)

    def _params(self) -> Any:
        """Random, prepared as the trackers do it."""

        def draw(key: Any) -> Any:
            return tapnext.prepare_params(tapnext.init_params(self.model, key), self.runtime.compute_dtype)

        return jax.jit(draw)(jax.random.key(0))

    def _state(self) -> TAPNextState:
        query_tyx = jnp.asarray(self._queries())[None]
        return tapnext.init_state(self.model, query_tyx, dtype=jnp.dtype(self.runtime.compute_dtype))

    def _queries(self) -> np.ndarray:
        """[Q, 3] (t, y, x), anywhere in the first frame."""
        places = np.random.default_rng(1).uniform(0, self.case.image, (self.case.points, 2))
        return np.concatenate([np.zeros((len(places), 1)), places], axis=1).astype(np.float32)

    def _video(self, frames: int) -> np.ndarray:
        shape = (frames, *self.model.image_size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def _batch(self, clips: int) -> dict[str, np.ndarray]:
        """What the trainer's loss takes, on the host: points that are all seen and move at random."""
        shapes = abstract_batch(self.setup.cfg, clips)
        draw = np.random.default_rng(0)
        moving = draw.uniform(0, self.case.image, shapes["tracks_yx"].shape).astype(np.float32)
        pixels = draw.integers(0, 256, shapes["video"].shape, np.uint8)
        queries = np.broadcast_to(self._queries(), shapes["query_tyx"].shape)
        seen = {name: np.ones(shapes[name].shape, bool) for name in ("visible", "valid")}
        return {"video": pixels, "query_tyx": queries, "tracks_yx": moving} | seen

    def _flops(self, frames: int) -> float:
        """Of a forward pass of so many frames of one clip."""
        return tapnext.flops_per_clip(self.model, frames, self.case.points)
