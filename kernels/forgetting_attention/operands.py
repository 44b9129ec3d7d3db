"""One call of forgetting attention with every option reduced to arrays: what every fast implementation
computes.

Gates become accurate sums, and causality, buffers, left padding and segments become one interval of keys per
row, so that implementations know nothing of the public arguments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.common.manual import aligned_varying
from kernels.forgetting_attention.config import Options
from kernels.forgetting_attention.gates import segment_gate_sums
from kernels.forgetting_attention.pruning import ScoreNorms, score_norms
from kernels.forgetting_attention.spans import KeySpans, live_keys, positions, run_starts
from kernels.forgetting_attention.tile_ranges import Decay


class Operands(NamedTuple):
    """One call with every option reduced to arrays; all have the batch axis first, so vmap can fold into
    it.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    row_hi: Float[Array, "B T N"]
    col_hi: Float[Array, "B S N"]
    row_lo: Float[Array, "B T N"] | None
    col_lo: Float[Array, "B S N"] | None
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    head_first: Int[Array, "B N"]
    threshold: Float[Array, "B N"] | None
    norms: ScoreNorms | None


class Static(NamedTuple):
    """What must be known when the call is traced.

    Attributes:
      options: scale, pruning rule and tiles.
      left_masks: whether keys may be invisible on the left of a visible one.
      plain_causal: whether row i sees exactly the keys up to i + S - T.
    """

    options: Options
    left_masks: bool
    plain_causal: bool


def attention_operands(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    seq_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B S"] | None,
    kv_length: Int[Array, " B"] | None,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Operands, Static]:
    """From the arguments of `forgetting_attention`, after its checks."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    q, k, v, log_fgate, seq_start, segment_ids, kv_length, threshold = aligned_varying(
        (q, k, v, log_fgate, seq_start, segment_ids, kv_length, threshold)
    )
    live = live_keys(batch, keys, seq_start, kv_length)
    starts = run_starts(batch, keys, seq_start, segment_ids)
    spans = KeySpans.of(batch, queries, keys, causal=True, kv_length=kv_length, seq_start=seq_start)
    row_at = positions(batch, queries, keys, kv_length)
    at = jnp.clip(row_at, 0, keys - 1)
    if segment_ids is not None:
        run_start = jax.lax.cummax(jnp.where(starts, jnp.arange(keys, dtype=jnp.int32), 0), axis=1)
        spans = spans.in_runs(run_start, at)

    # The first gate of a run decays no key of the run, and dead positions may hold anything: both count as
    # 0, with an exactly zero gradient.
    silent = starts if options.zero_first_gate else starts & (jnp.arange(keys) > 0)
    gates = jnp.where((live & ~silent)[:, :, None], log_fgate, 0)
    # Key 0 is always a start, so the last key is always an end.
    ends = None if segment_ids is None and seq_start is None else jnp.roll(starts, -1, axis=1)
    hi, lo = segment_gate_sums(gates.astype(accumulator(q)), ends)
    if kv_length is None:
        row_hi, row_lo = hi[:, keys - queries :], lo[:, keys - queries :]
    else:
        row_hi, row_lo = (jnp.take_along_axis(x, at[:, :, None], axis=1) for x in (hi, lo))

    if not spans.all_filled:
        q, k, v = _without_unused(q, k, v, spans)
    norms = None
    if options.tight_log_eps is not None:
        live_row = row_at >= (0 if seq_start is None else seq_start[:, None])
        norms = score_norms(q, k, row_at, live_row, options.sm_scale)
    return _assemble(q, k, v, Decay(row_hi, -hi, row_lo, -lo), spans, threshold, norms, options)


def partial_operands(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    row_decay: Float[Array, "B T N"],
    col_decay: Float[Array, "B S N"],
    *,
    spans: KeySpans,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Operands, Static]:
    """From the arguments of `attend_partial`, after its checks."""
    intervals = (spans.first, spans.last, spans.head_first)
    (q, k, v, row_decay, col_decay, threshold), (first, last, head_first) = aligned_varying(
        ((q, k, v, row_decay, col_decay, threshold), intervals)
    )
    spans = spans._replace(first=first, last=last, head_first=head_first)
    if not spans.all_filled:
        q, k, v = _without_unused(q, k, v, spans)
        used_row, used_key = _used(spans, k.shape[1])
        row_decay = jnp.where(used_row[:, :, None], row_decay, 0)
        col_decay = jnp.where(used_key[:, :, None], col_decay, 0)
    dtype = accumulator(q)
    decay = Decay(row_decay.astype(dtype), col_decay.astype(dtype), None, None)
    return _assemble(q, k, v, decay, spans, threshold, None, options)


def accumulator(q: Array) -> Any:
    """Dtype of sums and statistics: float32, or float64 if the inputs are."""
    return jnp.promote_types(q.dtype, jnp.float32)


def _used(spans: KeySpans, keys: int) -> tuple[Array, Array]:
    """Rows that see a key, and keys between the first and the last visible one of their batch entry."""
    start = spans.first
    if spans.head_first is not None:
        start = jnp.maximum(start, spans.head_first.min(axis=1)[:, None])
    at = jnp.arange(keys)
    used_key = (at >= start.min(axis=1)[:, None]) & (at <= spans.last.max(axis=1)[:, None])
    return start <= spans.last, used_key


def _without_unused(q: Array, k: Array, v: Array, spans: KeySpans) -> tuple[Array, Array, Array]:
    """Zeros where nothing is read: those places may hold NaN, and 0 * NaN would reach the result."""
    used_row, used_key = (used[:, :, None, None] for used in _used(spans, k.shape[1]))
    return jnp.where(used_row, q, 0), jnp.where(used_key, k, 0), jnp.where(used_key, v, 0)


def _assemble(
    q: Array, k: Array, v: Array, decay: Decay, spans: KeySpans,
    threshold: Array | None, norms: ScoreNorms | None, options: Options,
) -> tuple[Operands, Static]:  # fmt: skip
    head_first = spans.head_first
    if head_first is None:
        head_first = jnp.broadcast_to(spans.first[:, :1] * 0, (q.shape[0], q.shape[2]))
    operands = Operands(q, k, v, *decay, spans.first, spans.last, head_first, threshold, norms)
    return operands, Static(options, not spans.keeps_left, spans.plain_causal)
