"""Training throughput: the trainer's own step at long context, on random tokens, with gates that forget.

    python -m launch.bench tasks.lm --only="125M" --set=runtime.remat=attention --profile=DIR

An untrained FoX forgets everything within two tokens. So that pruning meets what it meets in training, the
kernels of the gate projections are scaled by 0.1 and their biases are those of decay times log-spaced from 1
to 512 tokens.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kernels.forgetting_attention.visits import own_tiles
from models import fox
from models.common.layers import embed, rms_norm
from models.fox.model import block
from models.fox.span import Span, make_span
from models.fox.statistics import layer_statistics
from tasks.common.bench import NOTHING, program_memory, start_training, trace_calls
from tasks.common.config import load_config, override_all, with_defaults
from tasks.common.errors import ConfigError
from tasks.common.flops import utilisation
from tasks.common.job import Job
from tasks.common.mesh import put_batch
from tasks.common.optim import learning_rate
from tasks.common.state import TrainState
from tasks.lm.config import SCHEMA, LMConfig, freeze_all
from tasks.lm.train import make_job

# The recipes' own settings save memory that a GPU of 80 GB need not save.
FASTEST = "runtime.remat=none,runtime.scan_layers=false"
LONGEST_DECAY = 512.0
GATE_SCALE = 0.1
LAPS, WARM_UP, TRACED = 3, 2, 3


class Goal(NamedTuple):
    """Tokens per second on one H200: the official code's, what is required, the target."""

    official: float
    required: float
    target: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
      name: such as "125M LLaMA".
      arch, size: see `configs/lm.py`.
      batch, length: B and T.
      vocab: V.
      goals: without and with pruning; None where nothing is required.
    """

    name: str
    arch: str
    size: str
    batch: int
    length: int = 16384
    vocab: int = 50304
    goals: tuple[Goal, Goal] | None = None

    def label(self, acp: bool) -> str:
        """What `only` is searched in and the row is called."""
        return f"{self.name}, {self.batch} x {self.length}, ACP {'on' if acp else 'off'}"


CASES = (
    Case("125M LLaMA", "fox_llama", "125m", 2, goals=(Goal(126e3, 180e3, 230e3), Goal(250e3, 330e3, 400e3))),
    Case("360M Pro", "fox_pro", "360m", 1, goals=(Goal(44e3, 65e3, 85e3), Goal(65e3, 100e3, 130e3))),
    Case("760M Pro", "fox_pro", "760m", 1, goals=(Goal(28e3, 40e3, 50e3), Goal(53e3, 68e3, 80e3))),
)


def rows(
    *,
    calls: int = 5,
    only: str = "",
    settings: str = FASTEST,
    profile: Path | None = None,
    cases: Sequence[Case] = CASES,
) -> list[dict[str, Any]]:
    """Times training steps of every case, without and with pruning.

    Args:
      calls: steps of a lap; three laps are timed, each with one wait at its end, after two steps.
      only: part of a case's label, such as "125M" or "360M Pro, 1 x 16384, ACP on"; "" is all.
      settings: config values for all cases; "" leaves those of the recipes.
      profile: folder for a trace of three steps of each case; where its time goes is printed.
      cases: what is timed.

    Returns:
      Rows {case, implementation, tokens/s, spread, ms a step, MFU, visited, memory GiB, compile s, loss,
      official, required, target, met}. MFU counts no savings by pruning; visited is the mean share of causal
      tiles over layers and heads before the first step; memory is what the compiled step needs.

    Raises:
      ConfigError: no case is called so, or a setting is wrong.
    """
    wanted = [(case, acp) for case in cases for acp in (False, True) if only in case.label(acp)]
    if not wanted:
        names = "; ".join(case.label(acp) for case in cases for acp in (False, True))
        raise ConfigError(f"--only={only}: part of no case; there are {names}")
    found = []
    for case, acp in wanted:
        cfg, job = _prepare(case, acp, settings)
        trace = None if profile is None else profile / case.label(acp).replace(", ", "-").replace(" ", "_")
        row = _measure(case, acp, cfg, job, calls, trace)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        found.append(row)
    return found


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which of the required and target rates hold."""
    judged = [row for row in rows if row["met"] != NOTHING]
    held, hit = (
        sum(row["met"] in wanted for row in judged) for wanted in (("target", "required"), ("target",))
    )
    return f"required: {held} of {len(judged)} hold; target: {hit} of {len(judged)}"


def _prepare(case: Case, acp: bool, settings: str) -> tuple[LMConfig, Job]:
    arguments = f"arch={case.arch},size={case.size},ctx={case.length},batch={case.batch},vocab={case.vocab}"
    # Any source whose files need not exist: the text is never opened.
    config = with_defaults(load_config(f"configs/fox.py:{arguments},acp={acp},data=stdlib"), SCHEMA)
    override_all(config, settings)
    job = make_job(config, Path())
    cfg = freeze_all(config)
    return cfg, dataclasses.replace(job, init_params=_slow_gates(cfg.model))


@functools.cache
def _slow_gates(model: fox.FoxConfig) -> Any:
    """Initial parameters whose heads forget within 1 to 512 tokens."""

    def init(key: Any) -> Any:
        params = fox.init_params(model, key)
        times = jnp.geomspace(1.0, LONGEST_DECAY, model.num_heads)
        for layer in params["layers"].values():
            gate = layer["attn"]["fgate_proj"]
            gate["kernel"] = gate["kernel"] * GATE_SCALE
            gate["bias"] = -jnp.log(jnp.expm1(1 / times)).astype(gate["bias"].dtype)
        return params

    return init


def _measure(
    case: Case, acp: bool, cfg: LMConfig, job: Job, calls: int, trace: Path | None
) -> dict[str, Any]:
    with jax.set_mesh(job.mesh):
        state, step = start_training(job)
        batch = _random_batch(cfg, job)
        rates = _learning_rates(job)
        visited = _visited(cfg, state.params, batch["tokens"][0]) if acp else 1.0
        begin = time.perf_counter()
        compiled = step.lower(state, batch, next(rates)).compile()
        compile_s = time.perf_counter() - begin
        for _ in range(WARM_UP):
            state, metrics = compiled(state, batch, next(rates))
        first = float(metrics["loss"])
        laps = []
        for _ in range(LAPS):
            state, metrics, seconds = _lap(compiled, state, batch, rates, calls)
            laps.append(seconds)
        if not np.isfinite([first, float(metrics["loss"]), float(metrics["grad_norm"])]).all():
            raise FloatingPointError(f"{case.label(acp)}: loss or gradient is not finite")
        if trace is not None:
            trace_calls(trace, case.label(acp), lambda: _lap(compiled, state, batch, rates, TRACED), TRACED)
    seconds = statistics.median(laps)
    rate = job.units_per_step / seconds
    mfu = utilisation(rate, job.flops_per_unit, job.mesh.size)
    goal = None if case.goals is None else case.goals[acp]
    runtime = cfg.runtime
    return {
        "case": case.label(acp),
        "implementation": f"{_implementation(cfg)[0]}, remat {runtime.remat}"
        f"{', scanned layers' if runtime.scan_layers else ''}, {runtime.compute_dtype}",
        "tokens/s": round(rate),
        "spread": f"{100 * (max(laps) - min(laps)) / seconds:.1f} %",
        "ms a step": round(seconds * 1e3, 1),
        "MFU": NOTHING if mfu is None else round(mfu, 3),
        "visited": round(visited, 3),
        "memory GiB": round(program_memory(compiled) / 2**30, 1),
        "compile s": round(compile_s, 1),
        "loss": round(first, 3),
        "official": NOTHING if goal is None else goal.official,
        "required": NOTHING if goal is None else goal.required,
        "target": NOTHING if goal is None else goal.target,
        "met": _met(rate, goal),
    }


def _random_batch(cfg: LMConfig, job: Job) -> dict[str, Any]:
    rng = np.random.default_rng(job.seed)
    shape = (cfg.train.batch_size, cfg.train.seq_len + 1)
    ids = rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32)
    host = {"tokens": ids[:, :-1], "labels": ids[:, 1:]}
    return put_batch(host, job.mesh, micro_batches=job.train.accum)


def _learning_rates(job: Job) -> Iterator[Any]:
    """The schedule's rates on the device, from the first step on."""
    replicated = NamedSharding(job.mesh, PartitionSpec())
    step = 0
    while True:
        yield jax.device_put(np.float32(learning_rate(job.optim, job.units_seen(step))), replicated)
        step += 1


def _lap(
    step: Any, state: TrainState, batch: Any, rates: Iterator[Any], count: int
) -> tuple[TrainState, Any, float]:
    """State, metrics and seconds a step of `count` steps with one wait at their end."""
    lr = [next(rates) for _ in range(count)]
    jax.block_until_ready((state, lr))
    begin = time.perf_counter()
    for rate in lr:
        state, metrics = step(state, batch, rate)
    jax.block_until_ready((state, metrics))
    return state, metrics, (time.perf_counter() - begin) / count


def _implementation(cfg: LMConfig) -> tuple[str, Any]:
    """Name and tiles of the attention that runs."""
    model = cfg.model
    size = (cfg.train.batch_size, cfg.train.seq_len)
    q = jax.ShapeDtypeStruct((*size, model.num_heads, model.head_dim), cfg.runtime.compute_dtype)
    k = jax.ShapeDtypeStruct((*size, model.kv_heads, model.head_dim), cfg.runtime.compute_dtype)
    name, tiles = own_tiles(q, k, cfg.runtime.attention_implementation)
    return name, cfg.runtime.tiles or tiles


def _visited(cfg: LMConfig, params: Any, tokens: Any) -> float:
    """Mean share of the causal tiles that the forward pass visits, over rows, layers and heads.

    One layer is compiled and run for all of them: unrolled, as `fox.apply` does it, takes minutes to compile.
    """
    runtime = dataclasses.replace(cfg.runtime, tiles=_implementation(cfg)[1])

    @jax.jit
    def one_layer(layer: Any, x: Any, span: Span) -> tuple[Any, Any]:
        normed = rms_norm(x, layer["attn_norm"]["scale"], cfg.model.norm_eps)
        stats = layer_statistics(cfg.model, runtime, layer["attn"], normed, span)
        return block(cfg.model, runtime, layer, x, span)[0], stats.visited_fraction

    span = jax.jit(lambda tokens: make_span(tokens, None, None, None))(tokens)
    x = jax.jit(embed)(tokens, params["embed"]["embedding"])
    shares = []
    for layer in params["layers"].values():
        x, share = one_layer(layer, x, span)
        shares.append(share)
    return float(np.mean([np.asarray(share).mean() for share in shares]))


def _met(rate: float, goal: Goal | None) -> str:
    if goal is None:
        return NOTHING
    return "target" if rate >= goal.target else "required" if rate >= goal.required else "no"
