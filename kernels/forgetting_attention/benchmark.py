"""Forgetting attention, timed: on an accelerator the table of `device_table`, on a CPU what pruning saves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.common.bench import time_together
from kernels.forgetting_attention import device_table
from kernels.forgetting_attention.api import forgetting_attention
from kernels.forgetting_attention.config import TileConfig
from kernels.forgetting_attention.pruning import visited_fraction
from kernels.forgetting_attention.workloads import gates

LOG_EPS = -10.0


def rows(*, calls: int | None = None, only: str = "") -> list[dict[str, Any]]:
    """The rows for the device that is there; see `device_table.rows` and `cpu_rows`.

    Args:
      calls: timed bursts (7 if None) on an accelerator, timed calls (3 if None) on a CPU.
      only: on an accelerator, part of a shape's name, such as "H128".

    Raises:
      ValueError: `only` names no shape, or is given on a CPU.
    """
    if jax.default_backend() == "cpu":
        if only:
            raise ValueError(f"only={only!r}: there is one shape on a CPU")
        return cpu_rows(calls=3 if calls is None else calls)
    return device_table.rows(bursts=7 if calls is None else calls, only=only)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which of the required and target times hold."""
    judged = [row for row in rows if row.get("met", device_table.NOTHING) != device_table.NOTHING]
    if not judged:
        return ""
    failed = [
        f"{row['case']} {row['pass']} ({row['ratio']} > {row['required']})"
        for row in judged
        if row["met"] == "no"
    ]
    hit = sum(row["met"] == "target" for row in judged)
    summary = f"required: {len(judged) - len(failed)} of {len(judged)} hold; target: {hit} of {len(judged)}"
    return "\n  ".join([summary, *(f"not met: {name}" for name in failed)])


def cpu_rows(
    *, batch: int = 1, length: int = 8192, heads: int = 8, head_dim: int = 64, calls: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """One row per kind of gate ("fast", "mix"): milliseconds of forward and backward, pruned and exact.

    q and k are RMS-normalised, so that U = sqrt(H) bounds the scores and the published threshold is
    -(2 sqrt(H) + ln T) + log eps (arXiv 2504.06949). Times are the best of `calls`; "cpu ratio" compares
    processor time, which a busy machine disturbs less.

    Args:
      batch, length, heads, head_dim: B, T = S, N = K, H; float32.
      calls: timed calls of each.
      seed: of the inputs.

    Returns:
      Rows {case, pass, implementation, visited, ms, baseline, baseline_ms, ratio, cpu ratio}.
    """
    rng = np.random.default_rng(seed)
    q, k, v, cotangent = (_normalised(rng, (batch, length, heads, head_dim)) for _ in range(4))
    limit = -(2 * head_dim**0.5 + np.log(length)) + LOG_EPS

    def both(threshold: float | None) -> Callable[[Array], Any]:
        def run(log_fgate: Array) -> Any:
            def call(*args: Array) -> Any:
                return forgetting_attention(*args, adaptive_threshold=threshold)

            out, pullback = jax.vjp(call, q, k, v, log_fgate)
            return out, pullback(cotangent)

        return run

    found = []
    for kind in ("fast", "mix"):
        log_fgate = jnp.asarray(gates(kind, rng, (batch, length, heads)), jnp.float32)
        timed = time_together({"exact": both(None), "pruned": both(limit)}, log_fgate, calls=calls)
        exact, pruned = timed["exact"], timed["pruned"]
        visited = visited_fraction(log_fgate, jnp.full((batch, heads), limit), tile=TileConfig().forward)
        found.append(
            {
                "case": f"{kind} gates, B{batch} T{length} N{heads} H{head_dim}",
                "pass": "fwd+bwd",
                "implementation": "xla_chunked, ACP",
                "visited": round(float(visited.mean()), 3),
                "ms": round(pruned.best_s * 1e3, 1),
                "baseline": "xla_chunked, exact",
                "baseline_ms": round(exact.best_s * 1e3, 1),
                "ratio": round(pruned.best_s / exact.best_s, 3),
                "cpu ratio": round(pruned.cpu_s / exact.cpu_s, 3),
            }
        )
    return found


def _normalised(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    x = rng.standard_normal(shape)
    return jnp.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True)), jnp.float32)
