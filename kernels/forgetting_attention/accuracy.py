"""Precision at long context: output and gradients against float64, at 4k, 128k and 256k tokens.

The reference is computed here in blocks of rows, every row of every compared head, on the same rounded
inputs. An error that grows with the context would show as a multiple of the error at 4k tokens.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kernels.forgetting_attention.api import forgetting_attention
from kernels.forgetting_attention.device_table import NOTHING, Inputs, Shape
from kernels.forgetting_attention.visits import own_tiles
from kernels.forgetting_attention.workloads import gates

LENGTHS, HEADS, HEAD_DIM = (4096, 131072, 262144), 4, 64
KINDS = ("global", "mix", "fast", "uniformly fast")
TENSORS = ("out", "dq", "dk", "dv", "d log f")
# Kinds whose heads differ: all of them are compared, else two beyond the first length.
VARYING = ("global", "mix")
# Draws of the inputs, so that what is compared is no accident: of all kinds at the first length, which the
# others are divided by, and beyond it of those whose d log f is a random walk: between single draws its
# relative error varies by a factor of four.
DRAWS, WALKING = 4, ("global",)
# Largest error allowed at long context, in multiples of that at the base length.
ALLOWED = 1.5
# Rows shorter than this share of the root mean square length count as that long: a score gradient passes
# through 0, and quotients by what is nearly 0 have no mean square to converge to.
SHORTEST = 0.01
# Float64 scores held at a time, and stretches of rows that look only at the keys up to their own end.
_SCORES, _STRETCHES = 2**27, 4


class Results(NamedTuple):
    """Output and gradients of one head or of many: [T, ..., H] and, of the log gates, [T, ...]."""

    out: Any
    dq: Any
    dk: Any
    dv: Any
    dgate: Any


def rows(
    *,
    only: str = "",
    lengths: Sequence[int] = LENGTHS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    implementation: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures relative errors of every kind of gates at every length, without and with pruning.

    Gates: those of `workloads.gates`, and "uniformly fast", log sigmoid of N(-5, 1).

    Args:
      only: part of a case's name, such as "mix" or "T131072"; the first length is always measured.
      lengths: T = S; the first is what the others are compared with.
      heads, head_dim: N = K and H; one batch entry, bfloat16.
      implementation: None is the automatic choice.
      seed: of the inputs.

    Returns:
      Rows {case, implementation, out, dq, dk, dv, d log f, times, allowed, met, s}. The error of a row is
      |error| / |exact| (see `SHORTEST`), of d log f the root mean square error over that of the exact values;
      each in root mean square over rows and heads. times is the largest multiple of the error at the first
      length.

    Raises:
      ValueError: `only` is part of no case.
    """
    found, base = [], {}
    for length, kind in [(length, kind) for length in lengths for kind in KINDS]:
        is_base, shape = length == lengths[0], Shape(1, length, heads, head_dim)
        names = {
            acp: f"T{length} N{heads} H{head_dim} {kind}{', ACP' if acp else ''}" for acp in (False, True)
        }
        chosen = {acp: name for acp, name in names.items() if only in name or is_base}
        if not chosen:
            continue
        begin = time.perf_counter()
        seeds = range(seed, seed + (DRAWS if is_base or kind in WALKING else 1))
        compared = heads if is_base or kind in VARYING else min(heads, 2)
        errors = _errors(shape, kind, tuple(chosen), implementation, seeds, compared)
        seconds = time.perf_counter() - begin
        for acp, error in errors.items():
            if is_base:
                base[kind, acp] = error
            row = _row(chosen[acp], shape, implementation, error, base[kind, acp], is_base, seconds)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            found.append(row)
    if only and not any(only in row["case"] for row in found):
        raise ValueError(
            f"only={only!r} is part of no case; T{lengths[-1]} N{heads} H{head_dim} mix, ACP is one"
        )
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether no error grows with the context by more than is allowed."""
    judged = [row for row in rows if row["met"] != NOTHING]
    failed = [f"  {row['case']}: {row['times']} times" for row in judged if row["met"] == "no"]
    held = f"{len(judged) - len(failed)} of {len(judged)}"
    summary = f"at most {ALLOWED} times the error at the shortest length: {held}"
    return "\n".join([summary, *failed])


def draw_gates(kind: str, length: int, heads: int, seed: int) -> Float[Array, "1 T N"]:
    """Float32 log gates of a kind of `KINDS`."""
    rng = np.random.default_rng(seed)
    if kind == "uniformly fast":
        return jnp.asarray(-np.logaddexp(0, -rng.normal(-5, 1, (1, length, heads))), jnp.float32)
    return jnp.asarray(gates(kind, rng, (1, length, heads)), jnp.float32)


def exact_results(
    q: Float[Array, "T H"],
    k: Float[Array, "T H"],
    v: Float[Array, "T H"],
    log_fgate: Float[Array, " T"],
    cotangent: Float[Array, "T H"],
) -> Results:
    """One head of causal forgetting attention and its gradients in float64, linear in memory.

    Equations as in README.md; the scale is H ** -0.5 and the first gate counts as 0.

    Returns:
      float64 arrays; out, dq, dk, dv [T, H], dgate [T].
    """
    with jax.enable_x64(True):
        inputs = [
            jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64)
            for x in (q, k, v, log_fgate, cotangent)
        ]
        return jax.block_until_ready(_exact(*inputs))


@jax.jit
def _exact(q: Array, k: Array, v: Array, log_fgate: Array, cotangent: Array) -> Results:
    length, scale = q.shape[0], q.shape[1] ** -0.5
    lambdas = jnp.cumsum(log_fgate.at[0].set(0))
    parts = _STRETCHES if length % _STRETCHES == 0 else 1
    size = max(d for d in range(1, length // parts + 1) if length // parts % d == 0 and d * length <= _SCORES)

    def block(carry: tuple[Array, Array, Array], start: Array, end: int) -> tuple[Any, tuple[Array, ...]]:
        dk, dv, by_column = carry
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        q_rows, d_out, at = take(q), take(cotangent), start + jnp.arange(size)
        scores = scale * q_rows @ k[:end].T + take(lambdas)[:, None] - lambdas[:end]
        scores = jnp.where(jnp.arange(end) <= at[:, None], scores, -jnp.inf)
        p = jax.nn.softmax(scores, axis=1)
        out = p @ v[:end]
        delta = jnp.sum(d_out * out, axis=1, keepdims=True)
        ds = p * (d_out @ v[:end].T - delta)
        dk = dk.at[:end].add(scale * ds.T @ q_rows)
        dv = dv.at[:end].add(p.T @ d_out)
        by_column = by_column.at[:end].add(ds.sum(axis=0))
        return (dk, dv, by_column), (out, scale * ds @ k[:end], ds.sum(axis=1))

    carry = jnp.zeros_like(k), jnp.zeros_like(v), jnp.zeros_like(lambdas)
    found = []
    for part in range(parts):
        end = (part + 1) * (length // parts)
        starts = jnp.arange(part * (length // parts), end, size)
        carry, ys = lax.scan(functools.partial(block, end=end), carry, starts)
        found.append([y.reshape(-1, *y.shape[2:]) for y in ys])
    out, dq, by_row = (jnp.concatenate(ys) for ys in zip(*found, strict=True))
    dk, dv, by_column = carry
    dgate = jnp.cumsum((by_row - by_column)[::-1])[::-1].at[0].set(0)
    return Results(out, dq, dk, dv, dgate)


def _errors(
    shape: Shape,
    kind: str,
    rules: Sequence[bool],
    implementation: str | None,
    seeds: Sequence[int],
    heads: int,
) -> dict[bool, list[float]]:
    """Relative errors of `TENSORS` without (False) and with (True) pruning; `heads` heads of every seed."""
    squares: dict[bool, list[list[float]]] = {acp: [] for acp in rules}
    for seed in seeds:
        inputs, log_fgate = Inputs.draw(shape, seed), draw_gates(kind, shape.length, shape.heads, seed)
        found = {acp: _run(shape, acp, implementation)(*inputs, log_fgate) for acp in rules}
        for head in range(heads):
            q, k, v, cotangent = (x[0, :, head] for x in inputs)
            exact = exact_results(q, k, v, log_fgate[0, :, head], cotangent)
            for acp in rules:
                ours = Results(*(x[0, :, head] for x in found[acp]))
                squares[acp].append(relative_squares(ours, exact))
    return {acp: [float(error) for error in np.sqrt(np.mean(squares[acp], axis=0))] for acp in rules}


def relative_squares(ours: Results, exact: Results) -> list[float]:
    """Mean square relative errors of one head, in the order of `TENSORS`."""
    with jax.enable_x64(True):
        found = []
        for x, y in zip(ours, exact, strict=True):
            error = jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) - y
            if y.ndim == 1:
                found.append(float(jnp.mean(error**2) / jnp.mean(y**2)))
                continue
            squared = jnp.sum(y**2, axis=1)
            least = SHORTEST**2 * jnp.mean(squared)
            found.append(float(jnp.mean(jnp.sum(error**2, axis=1) / jnp.maximum(squared, least))))
        return found


@functools.cache
def _run(shape: Shape, acp: bool, implementation: str | None) -> Callable[..., Results]:
    """Forward and backward, compiled once per shape and rule, whatever the gates."""

    def attend(*args: Array) -> Array:
        limit = shape.threshold if acp else None
        out = forgetting_attention(*args, adaptive_threshold=limit, implementation=implementation)
        assert not isinstance(out, tuple)
        return out

    @jax.jit
    def both(q: Array, k: Array, v: Array, cotangent: Array, log_fgate: Array) -> Results:
        out, pullback = jax.vjp(attend, q, k, v, log_fgate)
        return Results(out, *pullback(cotangent))

    return both


def _row(
    name: str, shape: Shape, implementation: str | None, error: Sequence[float], base: Sequence[float],
    is_base: bool, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    q = jax.ShapeDtypeStruct((1, shape.length, shape.heads, shape.head_dim), jnp.bfloat16)
    times = float(np.max(np.divide(error, base)))
    return {
        "case": name,
        "implementation": own_tiles(q, q, implementation)[0],
        **{tensor: float(f"{value:.3g}") for tensor, value in zip(TENSORS, error, strict=True)},
        "times": NOTHING if is_base else round(times, 3),
        "allowed": NOTHING if is_base else ALLOWED,
        "met": NOTHING if is_base else ("yes" if times <= ALLOWED else "no"),
        "s": round(seconds, 1),
    }
