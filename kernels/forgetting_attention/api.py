"""Public functions of forgetting attention: argument checks and choice of implementation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.common.dispatch import check_sizes, choose, explain_choice, target
from kernels.forgetting_attention import arguments, pallas_mosaic_gpu, pruning, reference, xla_chunked
from kernels.forgetting_attention.config import Options, Request, TileConfig
from kernels.forgetting_attention.spans import KeySpans

Threshold = float | str | Array | None


class AttentionImplementation(NamedTuple):
    """An implementation: whether it can take a call, its tiles if none are given, and its two entry
    points.
    """

    supports: Callable[[Request], str | None]
    default_tiles: Callable[[Request], TileConfig]
    attention: Callable[..., tuple[Array, Array]]
    partial: Callable[..., tuple[Array, Array]]


IMPLEMENTATIONS: Mapping[str, AttentionImplementation] = {
    name: AttentionImplementation(module.supports, module.default_tiles, module.attention, module.partial)
    for name, module in (
        ("pallas_mosaic_gpu", pallas_mosaic_gpu),
        ("xla_chunked", xla_chunked),
        ("reference", reference),
    )
}
# Automatic choice, best first. `reference` holds T x S arrays, so it runs only when asked for by name.
PREFERENCE = ("pallas_mosaic_gpu", "xla_chunked")


def forgetting_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    sm_scale: float | None = None,
    adaptive_threshold: Threshold = None,
    log_pruning_tolerance: float = -10.0,
    seq_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    kv_length: Int[Array, " B"] | None = None,
    return_lse: bool = False,
    tiles: TileConfig | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Causal softmax attention whose scores decay with data-dependent forget gates.

    out_i = softmax_j(sm_scale q_i.k_j + D_ij) v_j over j <= i, with D_ij = sum of log f over (j, i]
    (Forgetting Transformer, arXiv 2503.02130, eq. 10). Sums of log gates, softmax statistics and
    accumulators are float32 (float64 for float64 inputs); the sums stay accurate at hundreds of thousands
    of tokens. Optional pruning skips tiles whose total weight is provably below exp(log_pruning_tolerance)
    per row (ACP, arXiv 2504.06949).

    Args:
      q: queries; they end at key kv_length[b], so row i has key position kv_length[b] - T + i.
      k, v: keys and values; T <= S. Query head n reads key/value head n // (N // K).
      log_fgate: log forget gates, <= 0, float32 or float64, per query head.
      sm_scale: scale of the scores; H ** -0.5 by default.
      adaptive_threshold: None (exact), "auto" (published threshold from the norms of q and k), "tight" (a
        provably safe bound per tile, prunes more), or values <= 0 broadcastable to [B, N]: tiles with every
        D below are pruned. Carries no gradient.
      log_pruning_tolerance: log eps for "auto" and "tight".
      seq_start: first real key of each row of the batch (left padding). Rows before it are dead.
      segment_ids: packed documents: adjacent equal ids form one segment, and attention stays inside it.
      kv_length: number of filled keys, for fixed-size buffers; default S. Later positions may hold
        anything, even NaN.
      return_lse: also return the natural-log normaliser, differentiable, -inf on dead rows.
      tiles: tile sizes; measured defaults if None.
      implementation: None (automatic), a name (that one or an error), or names tried in order.

    Returns:
      out in q's dtype, and lse if asked for. A dead row (no visible key) gives exactly 0 and zero gradients.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it. Values (positive
        gates or thresholds, positions out of range) are only checked outside of jit; see `check_values` for
        inside.
    """
    op = "forgetting_attention"
    arguments.check_shapes(q, k, v, op)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if queries > keys:
        raise ValueError(f"{op}: q has {queries} rows but k only {keys} keys; T <= S is needed.")
    arguments.check_array(op, "log_fgate", log_fgate, (batch, keys, heads), "wide float")
    arguments.check_array(op, "seq_start", seq_start, (batch,), "integer")
    arguments.check_array(op, "segment_ids", segment_ids, (batch, keys), "integer")
    arguments.check_array(op, "kv_length", kv_length, (batch,), "integer")
    arguments.check_range(op, "seq_start", seq_start, 0, keys)
    arguments.check_range(op, "kv_length", kv_length, 0, keys)
    arguments.check_threshold(op, adaptive_threshold, batch, heads)
    if kv_length is None and seq_start is None:
        arguments.check_gates(op, log_fgate)
    scale = arguments.check_scale(op, sm_scale, head_dim)

    request = _request(op, q, k, adaptive_threshold, tiles, segment_ids, seq_start, kv_length)
    _, chosen = choose(op, IMPLEMENTATIONS, request, implementation, PREFERENCE)
    threshold, tight_log_eps = _threshold(
        op, q, k, adaptive_threshold, scale, log_pruning_tolerance, seq_start, kv_length
    )
    numeric = adaptive_threshold is not None and not isinstance(adaptive_threshold, str)
    options = Options(
        scale, tight_log_eps, tiles or chosen.default_tiles(request), zero_first_gate=not numeric
    )
    out, lse = chosen.attention(
        q, k, v, log_fgate, seq_start=seq_start, segment_ids=segment_ids, kv_length=kv_length,
        threshold=threshold, options=options,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attend_partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    row_decay: Float[Array, "B T N"],
    col_decay: Float[Array, "B S N"],
    *,
    sm_scale: float | None = None,
    causal: bool = False,
    query_offset: int | Int[Array, " B"] | None = None,
    kv_length: Int[Array, " B"] | None = None,
    seq_start: Int[Array, " B"] | None = None,
    first_key: Int[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_segment_ids: Int[Array, "B T"] | None = None,
    adaptive_threshold: float | Array | None = None,
    tiles: TileConfig | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention to a part of the keys, for `merge_partials`; differentiable in all its arrays.

    The decay bias is D_ij = row_decay_i + col_decay_j, each relative to one reference point that the caller
    chooses near both, so that neither is large. For keys of the past and a present chunk, the boundary b
    between them gives row_decay_i = lambda_i - lambda_b, col_decay_j = lambda_b - lambda_j, where lambda is
    the inclusive sum of log gates (`gate_sums`).

    Args:
      q, k, v, sm_scale, tiles, implementation: as in `forgetting_attention`, except that T > S is allowed.
      row_decay, col_decay: the two parts of D, float32 or float64.
      causal: row i sees keys up to position query_offset + i; otherwise all keys.
      query_offset: position of row 0 among these keys, may be negative or beyond S; default kv_length - T.
      kv_length: number of filled keys per batch entry; later ones are never read.
      seq_start: first visible key per batch entry.
      first_key: first visible key per batch entry and head (evicted keys of a cache).
      segment_ids, query_segment_ids: a row sees keys of its own id only; both must be given, non-decreasing
        in time.
      adaptive_threshold: values <= 0 broadcastable to [B, N]; tiles with every D below are skipped. Needs
        row_decay non-increasing and col_decay non-decreasing in time.

    Returns:
      (out, lse): out normalised over these keys, in q's dtype; lse [B, T, N] float32, -inf where no key is
      visible.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
    """
    op = "attend_partial"
    arguments.check_shapes(q, k, v, op)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    arguments.check_array(op, "row_decay", row_decay, (batch, queries, heads), "wide float")
    arguments.check_array(op, "col_decay", col_decay, (batch, keys, heads), "wide float")
    arguments.check_array(op, "kv_length", kv_length, (batch,), "integer")
    arguments.check_array(op, "seq_start", seq_start, (batch,), "integer")
    arguments.check_array(op, "first_key", first_key, (batch, heads), "integer")
    arguments.check_array(op, "segment_ids", segment_ids, (batch, keys), "integer")
    arguments.check_array(op, "query_segment_ids", query_segment_ids, (batch, queries), "integer")
    if (segment_ids is None) != (query_segment_ids is None):
        raise ValueError(f"{op}: segment_ids and query_segment_ids must be given together.")
    if isinstance(adaptive_threshold, str):
        raise ValueError(
            f"{op}: adaptive_threshold must be None or values <= 0; {adaptive_threshold!r} needs the whole."
        )
    if query_offset is not None and not causal:
        raise ValueError(f"{op}: query_offset is only meaningful with causal=True.")
    arguments.check_threshold(op, adaptive_threshold, batch, heads)
    scale = arguments.check_scale(op, sm_scale, head_dim)

    request = _request(op, q, k, adaptive_threshold, tiles, segment_ids, seq_start, kv_length)
    _, chosen = choose(op, IMPLEMENTATIONS, request, implementation, PREFERENCE)
    threshold = None
    if adaptive_threshold is not None:
        limit = jnp.asarray(adaptive_threshold, row_decay.dtype)
        threshold = jax.lax.stop_gradient(jnp.broadcast_to(limit, (batch, heads)))
    spans = KeySpans.of(
        batch, queries, keys, causal=causal, query_offset=query_offset, kv_length=kv_length,
        seq_start=seq_start, first_key=first_key, segment_ids=segment_ids,
        query_segment_ids=query_segment_ids,
    )  # fmt: skip
    return chosen.partial(
        q, k, v, row_decay, col_decay, spans=spans, threshold=threshold,
        options=Options(scale, None, tiles or chosen.default_tiles(request)),
    )  # fmt: skip


def merge_partials(
    *partials: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Puts attention over disjoint sets of keys together: the result equals attention over their union.

    Args:
      partials: (out, lse) pairs as `attend_partial` returns them, all of one shape.

    Returns:
      (out, lse) over all keys; rows that see nothing anywhere give 0 and -inf, with zero gradients.

    Raises:
      ValueError: no partials, or their shapes differ.
    """
    if not partials:
        raise ValueError("merge_partials: at least one (out, lse) pair is needed.")
    shapes = {(out.shape, lse.shape) for out, lse in partials}
    if len(shapes) > 1:
        raise ValueError(f"merge_partials: all partials must have one shape; got {sorted(shapes)}.")
    outs, norms = zip(*partials, strict=True)
    norm = jnp.stack(norms)
    seen = norm > -jnp.inf
    top = jax.lax.stop_gradient(jnp.where(seen.any(axis=0), norm.max(axis=0), 0))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, norm - top, 0)), 0)
    total = weights.sum(axis=0)
    alive = total > 0
    safe_total = jnp.where(alive, total, 1)
    out = sum(w[..., None] * o.astype(norm.dtype) for w, o in zip(weights / safe_total, outs, strict=True))
    return jnp.asarray(out).astype(outs[0].dtype), jnp.where(alive, top + jnp.log(safe_total), -jnp.inf)


def explain(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    *,
    adaptive_threshold: Threshold = None,
    segment_ids: Array | None = None,
    seq_start: Array | None = None,
    kv_length: Array | None = None,
    tiles: TileConfig | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """Says which implementation `forgetting_attention` would run for such arguments, and why not the others.

    Arrays may be `jax.ShapeDtypeStruct`s: only shapes and dtypes are read.
    """
    op = "forgetting_attention"
    request = _request(op, q, k, adaptive_threshold, tiles, segment_ids, seq_start, kv_length)
    return explain_choice(op, IMPLEMENTATIONS, request, implementation, PREFERENCE)


def explain_shape(
    sizes: Mapping[str, int],
    dtype: str,
    *,
    pruning: str | None = None,
    implementation: str | Sequence[str] | None = None,
) -> str:
    """`explain` from sizes by letter (B, T, S, N, K, H; the rest is default), for the command line.

    Raises:
      ValueError: a letter is not a size of this op.
    """
    check_sizes("forgetting_attention", sizes, "BTSNKH")
    queries, heads = sizes.get("T", 4096), sizes.get("N", 16)
    batch, head_dim = sizes.get("B", 1), sizes.get("H", 64)
    q = jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, sizes.get("S", queries), sizes.get("K", heads), head_dim), dtype)
    arguments.check_shapes(q, k, k, "forgetting_attention")
    return explain(q, k, adaptive_threshold=pruning, implementation=implementation)


def _request(
    op: str, q: Any, k: Any, adaptive_threshold: Threshold, tiles: TileConfig | None,
    segment_ids: Array | None, seq_start: Array | None, kv_length: Array | None,
) -> Request:  # fmt: skip
    if adaptive_threshold is None:
        mode = "none"
    else:
        mode = adaptive_threshold if isinstance(adaptive_threshold, str) else "threshold"
    batch, queries, heads, head_dim = q.shape
    device = target()
    return Request(
        op=op, platform=device.platform, capability=device.capability, device=device.kind, dtype=str(q.dtype),
        batch=batch, queries=queries,
        keys=k.shape[1], heads=heads, kv_heads=k.shape[2], head_dim=head_dim,
        pruning=mode, packed=segment_ids is not None,
        left_padded=seq_start is not None, buffered=kv_length is not None, tiles=tiles,
    )  # fmt: skip


def _threshold(
    op: str, q: Array, k: Array, mode: Threshold, scale: float, log_eps: float,
    seq_start: Array | None, kv_length: Array | None,
) -> tuple[Array | None, float | None]:  # fmt: skip
    """The threshold per batch entry and head, or log(eps / keys) of the "tight" rule; at most one of them."""
    if mode is None:
        return None, None
    if log_eps > 0:
        raise ValueError(f"{op}: log_pruning_tolerance is log eps and must be <= 0; got {log_eps}.")
    if isinstance(mode, str):
        if mode == "tight":
            return None, log_eps - math.log(k.shape[1])
        q, k = pruning.without_dead(q, k, seq_start, kv_length)
        return pruning.acp_threshold(
            q, k, sm_scale=scale, num_keys=k.shape[1], log_pruning_tolerance=log_eps
        ), None  # fmt: skip
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    limit = jnp.broadcast_to(jnp.asarray(mode, dtype), (q.shape[0], q.shape[2]))
    return jax.lax.stop_gradient(limit), None
