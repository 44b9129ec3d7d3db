"""Speed of the released TRecViT-B on one GPU: whole clips, a stream frame by frame, training steps.

    python -m launch.bench tasks.video --only=forward --set=runtime.attention_implementation=xla --profile=DIR

Pixels and parameters are random: the time does not depend on them.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kernels.common.bench import DeviceTiming, Rates, measure_rates
from kernels.common.compiler import compiler_options
from models import trecvit
from models.common.recurrent_state import handed_over, taken_over
from models.common.sharding import ShardingRules
from models.trecvit import TRecViTConfig, TRecViTRuntime, TRecViTState
from tasks.common.bench import (
    NOTHING,
    Built,
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
    time_checked,
    tree_bytes,
    verdict,
)
from tasks.common.config import freeze, override_all, with_defaults
from tasks.common.errors import ConfigError
from tasks.common.mesh import MeshConfig, make_mesh, put_batch
from tasks.common.optim import OptimConfig, make_optimizer
from tasks.common.step import abstract_state, fresh_state, make_train_step
from tasks.video.augment import AugmentConfig
from tasks.video.losses import video_loss_fn

__all__ = ["GOALS", "RELEASED", "Goal", "Size", "rows", "verdict"]

# XLA's attention writes all scores; cuDNN's does not.
FASTEST = "runtime.attention_implementation=cudnn"
REMATS = ("none", "dots", "full")
LEARNING_RATE = 1e-4
FRAMES = 50


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the batch of whole clips: B, T. Streams are of one frame at a time, B = 1."""

    name: str
    model: TRecViTConfig
    batch: int
    frames: int

    @property
    def video(self) -> tuple[int, ...]:
        """Shape of a batch."""
        return self.batch, self.frames, *self.model.image_size, 3


RELEASED = Size("B", TRecViTConfig.preset("B", state_multiplier=2, min_rad=0.5), 8, 32)
GOALS = {
    "forward": Goal("frames/s", "2300 (official code, TF32)", 5000, 8000),
    "streaming": Goal("ms", NOTHING, 1.5, 0.8),
}


def rows(
    *,
    calls: int = 7,
    only: str = "",
    settings: str = FASTEST,
    profile: Path | None = None,
    size: Size = RELEASED,
) -> list[dict[str, Any]]:
    """Times the forward pass of whole clips, streaming, and training steps with each `remat` that fits.

    Args:
      calls: timed bursts of each, see `kernels.common.bench.time_bursts`.
      only: part of a case's name: "forward", "streaming", "training" or, for instance, "remat dots".
      settings: values for `TRecViTRuntime`, such as "runtime.attention_implementation=xla"; with a
        "runtime.remat" training is timed with that one alone. The compute dtype is bfloat16. Other options
        of the compiler for all but training: "compiler.xla_gpu_enable_triton_gemm=true".
      profile: folder for a trace of five calls of each case; where its time goes is printed.
      size: what is timed.

    Returns:
      Rows {case, implementation, parameters, ms, spread, wall ms, kernels ms, frames/s, clips/s, floor ms,
      floor frames/s, memory GiB, peak GiB, compile s, official, required, target, unit, met, measured}. ms is
      device time with calls queued back to back; wall ms that of a frame that is sent and whose logits are
      waited for, kernels ms what a trace finds of it on the device, without gaps. The floor is, in this run's
      rates, that of the FLOPs (training: three times the forward pass's), or in a stream that of reading
      parameters and state and writing the state. memory is what the compiled program needs, peak the most
      that the process has held so far. official is the official code's.

    Raises:
      ConfigError: no case is called so, a setting is wrong, or the released model is to be timed on a CPU.
    """
    if size is RELEASED and jax.default_backend() == "cpu":
        raise ConfigError("TRecViT-B is timed on a GPU: on this CPU it would take an hour")
    runtime, compiler = _settings(settings)
    remats = (runtime.remat,) if "runtime.remat=" in settings else REMATS
    names = ["forward", "streaming", *(f"training, remat {remat}" for remat in remats)]
    wanted = [name for name in names if only in name]
    if not wanted:
        raise ConfigError(f"--only={only}: part of no case; there are {'; '.join(names)}")
    rates = measure_rates() if jax.default_backend() != "cpu" else measure_rates(256, 2**16)
    found = []
    for name in wanted:
        bench = _Bench(name, size, runtime, compiler, calls, rates, profile)
        row = bench.training(name.split()[-1]) if name.startswith("training") else getattr(bench, name)()
        if row is not None:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    if not found:
        raise ConfigError(f"--only={only}: this device has not the memory for it")
    return found


def _settings(text: str) -> tuple[TRecViTRuntime, dict[str, Any]]:
    """How the model is run, and the compiler's options."""
    given = ConfigDict({"runtime": {"compute_dtype": "bfloat16"}, "compiler": compiler_options()})
    config = with_defaults(given, {"runtime": TRecViTRuntime, "compiler": dict})
    override_all(config, text)
    return freeze(config.runtime, TRecViTRuntime, "runtime"), dict(config.compiler)


@dataclasses.dataclass(frozen=True)
class _Bench:
    """One case."""

    name: str
    size: Size
    runtime: TRecViTRuntime
    compiler: dict[str, Any]
    calls: int
    rates: Rates
    profile: Path | None

    def forward(self) -> dict[str, Any]:
        """Logits and probabilities of whole clips."""
        size, runtime = self.size, self.runtime

        def run(params: Any, video: Any) -> Any:
            return trecvit.apply(size.model, runtime, params, video, output="clip")[0]

        arguments = (self._params(), _pixels(size.video))
        built = build(jax.jit(run, compiler_options=self.compiler).lower(*arguments))
        call = functools.partial(built.compiled, *arguments)
        timing = self._time(call)
        flops = size.batch * trecvit.flops_per_clip(size.model, size.frames)
        return self._row(built, timing, size.batch, flops / self.rates.matmul)

    def streaming(self) -> dict[str, Any]:
        """One stream, one frame a call; the state stays on the device."""
        size, runtime = self.size, self.runtime
        params, state = self._params(), trecvit.init_state(size.model, 1, runtime.compute_dtype)

        def step(state: TRecViTState, params: Any, frame: Any) -> tuple[TRecViTState, Any]:
            logits, after = trecvit.apply(size.model, runtime, params, frame, taken_over(state))
            assert after is not None
            return after, logits

        frame = _pixels((1, 1, *size.video[2:]))
        jitted = jax.jit(step, donate_argnums=0, compiler_options=self.compiler)
        built = build(jitted.lower(handed_over(state), params, frame))
        moved = tree_bytes(params) + 2 * tree_bytes(state)
        call = Carried(built.compiled, state, params, frame, hand_over=handed_over)
        timing = self._time(call)
        camera, wall = np.asarray(frame), []
        for _ in range(FRAMES):
            begin = time.perf_counter()
            np.asarray(call(params, jax.device_put(camera)))
            wall.append(time.perf_counter() - begin)
        row = self._row(built, timing, None, moved / self.rates.copy, statistics.median(wall))
        kernels = kernel_seconds(call)
        return row | {"kernels ms": NOTHING if kernels is None else rounded(kernels * 1e3)}

    def training(self, remat: Any) -> dict[str, Any] | None:
        """The trainer's step: plain cutting, forward and backward pass, clipping, AdamW. None: no memory."""
        size, runtime = self.size, dataclasses.replace(self.runtime, remat=remat)
        mesh, model = make_mesh(MeshConfig(), jax.devices()[:1]), size.model
        init = functools.partial(trecvit.init_params, model)

        def classify(params: Any, frames: Any, rng: Any, is_training: bool) -> Any:
            key = rng if is_training else None
            return trecvit.apply(model, runtime, params, frames, output="clip", rng=key)[0].logits

        loss_fn = video_loss_fn(classify, AugmentConfig(size=model.image_size), model.num_classes)
        masks = trecvit.decay_mask(jax.eval_shape(init, jax.random.key(0)))
        optimizer = make_optimizer(OptimConfig(peak_lr=LEARNING_RATE, total=1, unit="steps"), masks)
        host = {"frames": np.asarray(_pixels(size.video)), "label": np.arange(size.batch) % model.num_classes}
        with jax.set_mesh(mesh):
            axes = trecvit.param_axes(model)
            abstract = abstract_state(init, axes, mesh, ShardingRules(), optimizer)
            batch, lr = put_batch(host, mesh, micro_batches=1), jnp.float32(LEARNING_RATE)
            step: Any = make_train_step(loss_fn, optimizer, seed=0)
            built = build(step.lower(abstract, batch, lr))
            if (needed := program_memory(built.compiled)) > memory_limit():
                print(f"{self.name}: needs {needed / 2**30:.1f} GiB, skipped", flush=True)
                return None
            call = Carried(built.compiled, fresh_state(abstract, init, optimizer, 0), batch, lr)
            timing = self._time(call)
        flops = 3 * size.batch * trecvit.flops_per_clip(model, size.frames)
        return self._row(built, timing, size.batch, flops / self.rates.matmul)

    def _params(self) -> Any:
        """Random, as a server of the model would have them."""

        def draw(key: Any) -> Any:
            drawn = trecvit.init_params(self.size.model, key)
            return trecvit.prepare_params(drawn, self.runtime.compute_dtype)

        return jax.jit(draw)(jax.random.key(0))

    def _time(self, call: Callable[[], Any]) -> DeviceTiming:
        seconds = burst_seconds(self.name == "streaming")
        return time_checked(self.name, call, bursts=self.calls, seconds=seconds, profile=self.profile)

    def _row(
        self, built: Built, timing: DeviceTiming, clips: int | None, floor: float, wall: float | None = None
    ) -> dict[str, Any]:
        training, size = self.name.startswith("training"), self.size
        frames = 1 if clips is None else clips * size.frames
        seconds, peak = timing.median_s, device_stat("peak_bytes_in_use")
        goal = GOALS.get(self.name) if jax.default_backend() == "gpu" and size is RELEASED else None
        shape = " x ".join(map(str, size.video[:-1] if clips else (1, 1, *size.model.image_size)))
        value = seconds * 1e3 if goal and goal.unit == "ms" else frames / seconds
        return {
            "case": f"{self.name}, {size.name}, {shape}",
            "implementation": self._implementation(),
            "parameters": "float32" if training else f"{self.runtime.compute_dtype}, prepared",
            "ms": rounded(seconds * 1e3),
            "spread": f"{100 * timing.spread:.1f} %",
            "wall ms": NOTHING if wall is None else rounded(wall * 1e3),
            "kernels ms": NOTHING,
            "frames/s": rounded(frames / seconds),
            "clips/s": NOTHING if clips is None else rounded(clips / seconds),
            "floor ms": rounded(floor * 1e3),
            "floor frames/s": rounded(frames / floor),
            "memory GiB": round(program_memory(built.compiled) / 2**30, 2),
            "peak GiB": NOTHING if peak is None else round(peak / 2**30, 2),
            "compile s": round(built.seconds, 1),
            **goal_columns(goal, value),
            "measured": str(self.rates),
        }

    def _implementation(self) -> str:
        runtime = self.runtime
        parts = [f"attention {runtime.attention_implementation or 'xla'}", runtime.compute_dtype]
        parts += [f"residual {runtime.residual_dtype}"] * (runtime.residual_dtype != "float32")
        parts += [f"scan {runtime.scan_implementation}"] * (runtime.scan_implementation is not None)
        parts += ["scanned layers"] * (runtime.scan_layers and self.name != "streaming")
        if not self.name.startswith("training"):
            usual = compiler_options()
            parts += [f"{key}={value}" for key, value in self.compiler.items() if value != usual.get(key)]
        return ", ".join(parts)


def _pixels(shape: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, shape, np.uint8))
