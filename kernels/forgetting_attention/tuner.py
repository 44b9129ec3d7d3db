"""Measures which tile and schedule each Hopper kernel runs fastest with, per head dim, and writes `tuned/`.

    python -m launch.bench kernels.forgetting_attention --tune --only=forward:64

Each kernel is timed by itself, on gates that prune nothing ("global", no threshold) and on gates that prune
half ("mix", published threshold); the product of the two times decides. What does not compile, or gives
another result than the schedule in use, is refused.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.common.bench import time_bursts
from kernels.common.hopper import SHARED_BYTES
from kernels.forgetting_attention import pallas_mosaic_gpu, schedules
from kernels.forgetting_attention.config import Options
from kernels.forgetting_attention.device_table import Inputs, Shape
from kernels.forgetting_attention.differentiable import Saved
from kernels.forgetting_attention.operands import Operands, Static, attention_operands
from kernels.forgetting_attention.schedules import Schedule
from kernels.forgetting_attention.workloads import gates

KERNELS = ("forward", "backward_kv", "backward_q")
KINDS = ("global", "mix")
# Registers of a consumer thread by consumer warpgroups, less some for the compiler.
REGISTERS = {2: 224, 3: 144}
SHOWN, COMPILERS, TOLERANCE = 5, 12, 2e-2
_OUTPUTS = {"backward_kv": ("k", "v", "col_hi"), "backward_q": ("q", "row_hi")}


class Found(NamedTuple):
    """What became of a candidate: milliseconds by kind of gates, or why it was refused."""

    ms: Mapping[str, float]
    refused: str = ""

    @property
    def score(self) -> float:
        """Product of the times."""
        return float(np.prod(list(self.ms.values())))


Measure = Callable[[str, int, Sequence[Schedule], int], Mapping[Schedule, Found]]


def rows(*, calls: int = 5, only: str = "", measure: Measure | None = None) -> list[dict[str, Any]]:
    """Times all candidates of the kernels asked for.

    Args:
      calls: timed bursts of each candidate.
      only: "forward:64", "backward_q", ":128", several with a comma; "" is every kernel at every head dim.
      measure: (kernel, head dim, candidates, bursts) -> what became of each; None asks the device.

    Returns:
      Rows {kernel, head dim, rank, schedule, global ms, mix ms, timed, refused, why}: the best five of each.

    Raises:
      ValueError: `only` names no kernel or head dim, or no candidate of a kernel runs.
    """
    wanted = list(_wanted(only))
    found = []
    for kernel, head_dim in wanted:
        tried = (measure or measure_on_device)(kernel, head_dim, candidates(kernel, head_dim), calls)
        timed = sorted((s for s in tried if not tried[s].refused), key=lambda s: tried[s].score)
        refused = [result.refused for result in tried.values() if result.refused]
        if not timed:
            raise ValueError(
                f"{kernel} at head dim {head_dim}: no candidate runs: {'; '.join(sorted(set(refused)))}"
            )
        for rank, schedule in enumerate(timed[:SHOWN], 1):
            found.append({
                "kernel": kernel,
                "head dim": head_dim,
                "rank": rank,
                "schedule": dataclasses.asdict(schedule),
                **{f"{kind} ms": round(tried[schedule].ms[kind], 4) for kind in KINDS},
                "timed": len(timed),
                "refused": len(refused),
                "why": "; ".join(sorted(set(refused)))[:200],
            })  # fmt: skip
            print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found


def save(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path | None = None) -> Path:
    """Writes the best schedules, beside what the file already holds of other kernels.

    Args:
      rows: of `rows`.
      facts: jax, commit, date, command.
      path: None is the device's file in `tuned/`.

    Returns:
      The path.

    Raises:
      TunedFileError: the file that is there cannot be read.
    """
    device = jax.devices()[0].device_kind
    own = schedules.tuned_file(device)
    path = path or own
    before = next((p for p in (path, own) if p.is_file()), None)
    entries: dict[str, dict[str, Any]] = {} if before is None else schedules.read_tuned(before)["entries"]
    for row in rows:
        ms = {kind: row[f"{kind} ms"] for kind in KINDS}
        of_dim = entries.setdefault(str(row["head dim"]), {})
        if row["rank"] == 1:
            measured = {key: facts[key] for key in ("commit", "date")}
            of_dim[row["kernel"]] = {"schedule": row["schedule"], "ms": ms, **measured, "runners_up": []}
        else:
            of_dim[row["kernel"]]["runners_up"].append({"schedule": row["schedule"], "ms": ms})
    document = {
        "device": device,
        **{k: facts[k] for k in ("jax", "commit", "date", "command")},
        "entries": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    schedules.tuned.cache_clear()
    return path


def _wanted(only: str) -> Iterator[tuple[str, int]]:
    parts = [part.partition(":")[::2] for part in only.split(",")]
    for kernel, dim in parts:
        if kernel not in ("", *KERNELS) or dim not in ("", *map(str, schedules.DEFAULTS)):
            dims = ", ".join(map(str, schedules.DEFAULTS))
            raise ValueError(f"only={only!r}: expected KERNEL:HEAD_DIM of {', '.join(KERNELS)} and {dims}")
    for kernel, head_dim in itertools.product(KERNELS, schedules.DEFAULTS):
        if any(k in ("", kernel) and d in ("", str(head_dim)) for k, d in parts):
            yield kernel, head_dim


def candidates(kernel: str, head_dim: int) -> list[Schedule]:
    """Every schedule of a kernel that fits shared memory and registers, the one in use among them."""
    blocks, steps = (128, 192), (64, 128, 192, 256)
    found = {schedules.DEFAULTS[head_dim][kernel]: None}
    # (turns, overlap): wide weights beside wide scores are too much for larger steps.
    modes = ((False, False), (True, False), (True, True)) if kernel == "forward" else ((False, False),)
    choices = itertools.product(blocks, steps, (1, 2, 3, 4), (1, 2), modes)
    for block, step, stages, buffers, (turns, overlap) in choices:
        if overlap and step > 128:
            continue
        tile = (step, block) if kernel == "backward_kv" else (block, step)
        schedule = Schedule(tile, stages, buffers, turns, overlap)
        # One stage leaves nothing to overlap, nor does one buffer: only where two do not fit.
        more: list[dict[str, Any]] = [{x: 2} for x in ("stages", "buffers") if getattr(schedule, x) == 1]
        fitting = [budget(kernel, head_dim, dataclasses.replace(schedule, **two)) is None for two in more]
        if budget(kernel, head_dim, schedule) is None and not any(fitting):
            found[schedule] = None
    return list(found)


def budget(kernel: str, head_dim: int, schedule: Schedule) -> str | None:
    """Why a schedule cannot fit an SM, or None: an estimate from what the kernel must hold.

    Args:
      kernel, head_dim, schedule: as in `candidates`.
    """
    rows, columns = schedule.tile
    block, step = (columns, rows) if kernel == "backward_kv" else (rows, columns)
    # The forward kernel owns q; the backward kernels own two operands of a block, and stream two of a step.
    owned = 1 if kernel == "forward" else 2
    shared = 2 * head_dim * (owned * schedule.buffers * block + 2 * schedule.stages * step)
    shared += 4 * (2 * schedule.stages * step + schedule.buffers * block)
    if shared > SHARED_BYTES:
        return f"{shared} bytes of shared memory; there are {SHARED_BYTES}"
    # Per thread: accumulators of the results, then scores and their 16-bit copies.
    results = {"forward": 1, "backward_q": 1, "backward_kv": 2 if head_dim <= 128 else 1}[kernel]
    scores = 0.75 if kernel == "forward" else 1.25
    registers = results * head_dim / 2 + scores * step
    limit = REGISTERS[block // 64]
    return None if registers <= limit else f"about {registers:.0f} registers a thread; there are {limit}"


def measure_on_device(
    kernel: str, head_dim: int, tried: Sequence[Schedule], bursts: int, shape: Shape | None = None
) -> dict[Schedule, Found]:
    """Builds, checks and times candidates, see `Measure`; at B2 T16384, N H = 1024 if no shape is given."""
    shape = shape or Shape(2, 16384, 1024 // head_dim, head_dim)
    inputs = Inputs.draw(shape, 0)
    in_use = schedules.chosen(jax.devices()[0].device_kind, head_dim)
    found = {schedule: Found({}) for schedule in tried}
    for kind in KINDS:
        limit = shape.threshold if kind == "mix" else None
        call = _Call.of(inputs, kind, limit, in_use)
        alive = [schedule for schedule in tried if not found[schedule].refused]
        programs = _build(call, kernel, [in_use[kernel], *alive], in_use)
        right = programs.pop(0)
        if isinstance(right, str):
            raise ValueError(f"{kernel} at head dim {head_dim}: the schedule in use does not run: {right}")
        expected = right(*call)
        runs: dict[Schedule, Callable[..., Any]] = {}
        for schedule, program in zip(alive, programs, strict=True):
            if isinstance(program, str):
                found[schedule] = Found({}, program)
            elif why := _difference(program, call, expected):
                found[schedule] = Found({}, why)
            else:
                runs[schedule] = program
        named = {str(schedule): functools.partial(run, *call) for schedule, run in runs.items()}
        timed = time_bursts(named, bursts=bursts, seconds=0.02) if named else {}
        for schedule in runs:
            ms = timed[str(schedule)].median_s * 1e3
            found[schedule] = Found({**found[schedule].ms, kind: ms})
    return found


class _Call(NamedTuple):
    """What the passes are called with."""

    operands: Operands
    out: Array
    lse: Array
    d_out: Array
    d_lse: Array

    @classmethod
    def of(cls, inputs: Inputs, kind: str, limit: float | None, in_use: schedules.Schedules) -> "_Call":
        batch, length, heads, _ = inputs.q.shape
        log_fgate = jnp.asarray(gates(kind, np.random.default_rng(0), (batch, length, heads)), jnp.float32)

        @jax.jit
        def make(inputs: Inputs, log_fgate: Array) -> _Call:
            threshold = None if limit is None else jnp.full((batch, heads), limit, jnp.float32)
            operands, static = attention_operands(
                *inputs[:3], log_fgate, seq_start=None, segment_ids=None, kv_length=None, threshold=threshold,
                options=_static(inputs.q, in_use).options,
            )  # fmt: skip
            out, lse = pallas_mosaic_gpu.forward(operands, static)
            return cls(operands, out, lse, inputs.cotangent, jnp.zeros_like(lse))

        return make(inputs, log_fgate)


def _static(q: Array, used: schedules.Schedules) -> Static:
    options = Options(q.shape[3] ** -0.5, None, schedules.tiles_of(used), zero_first_gate=False)
    return Static(options, left_masks=False, plain_causal=True)


def _build(
    call: _Call, kernel: str, tried: Sequence[Schedule], in_use: schedules.Schedules
) -> list[Callable[..., Any] | str]:
    """A compiled program per candidate, or why there is none; traced here, compiled several at a time."""

    def lower(schedule: Schedule) -> Any:
        used = {**in_use, kernel: schedule}
        static = _static(call.operands.q, used)

        def run(operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array) -> Any:
            if kernel == "forward":
                return pallas_mosaic_gpu.forward(operands, static)
            grads = pallas_mosaic_gpu.backward((Saved(operands, out, lse), d_out, d_lse), static)
            return [grads[name] for name in _OUTPUTS[kernel]]

        with schedules.forced(used):
            return jax.jit(run).lower(*call)

    def attempt(step: Callable[[Any], Any], given: Any) -> Any:
        try:
            return given if isinstance(given, str) else step(given)
        except Exception as error:  # whatever the compiler says of a candidate, the others go on
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"

    lowered = [attempt(lower, schedule) for schedule in tried]
    with ThreadPoolExecutor(COMPILERS) as pool:
        return list(pool.map(lambda one: attempt(lambda program: program.compile(), one), lowered))


def _difference(program: Callable[..., Any], call: _Call, expected: Any) -> str:
    """Why a program is wrong, or ""."""
    with contextlib.suppress(RuntimeError):
        for ours, theirs in zip(jax.tree.leaves(program(*call)), jax.tree.leaves(expected), strict=True):
            error = float(_relative(ours, theirs))
            if not error <= TOLERANCE:
                return "wrong result"
        return ""
    return "does not run"


@jax.jit
def _relative(ours: Array, theirs: Array) -> Array:
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return jnp.linalg.norm(ours - theirs) / jnp.maximum(jnp.linalg.norm(theirs), 1e-30)
