"""The memory of a decoding pass: fixed shapes, one buffer per layer, for chunks of any length.

A buffer holds the current document only, without gaps: padding is never stored, and a document start rewinds
it, so position in the document = slot in the buffer. Gate sums are kept cumulative, as hi/lo pairs: a step
adds one gate and sums nothing again (the official cache keeps raw gates and sums all of them at every step).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.common.numerics import add_pairs
from kernels.forgetting_attention import attend_partial, gate_sums, merge_partials
from models.common.sharding import per_shard
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.projections import AttentionInputs
from models.fox.span import Span


class GateSums(NamedTuple):
    """lambda_t = sum of log f from the document's first token to t, as an unevaluated sum hi + lo.

    Attributes:
      hi, lo: [B, S, N] float32, per stored token.
      total_hi, total_lo: [B, N], of the newest token.
      first_kept: [B, N] int32, slots before it are pruned for every later token (ACP): free to be evicted.
    """

    hi: Float[Array, "B S N"]
    lo: Float[Array, "B S N"]
    total_hi: Float[Array, "B N"]
    total_lo: Float[Array, "B N"]
    first_kept: Int[Array, "B N"]


class LayerCache(NamedTuple):
    """What one layer remembers of the current document.

    Attributes:
      k, v: [B, S, K, H], after shift, QK-norm and rotation; later slots hold anything.
      gates: None without forget gates.
      last_k, last_v: [B, K, H], newest projection before the shift; None without that shift.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    gates: GateSums | None
    last_k: Float[Array, "B K H"] | None
    last_v: Float[Array, "B K H"] | None


class FoxState(NamedTuple):
    """Memory of a whole model. Every leaf has the batch first: select or reorder rows by tree.map.

    Attributes:
      length: [B] int32, tokens of the current document seen so far. It keeps counting beyond the buffer.
      layers: "0", "1", ... -> the layer's cache.
    """

    length: Int[Array, " B"]
    layers: dict[str, LayerCache]

    @property
    def max_length(self) -> int:
        """S: the longest document the buffers hold."""
        return self.layers["0"].k.shape[1]


def init_state(config: FoxConfig, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> FoxState:
    """Empty memory of fixed shapes.

    Args:
      batch: B.
      max_length: S, longest document (prompt and continuation, without padding) a row can hold. A longer one
        gives NaN for its tokens from S on, and ValueError where positions are known outside of jit.
      dtype: of keys, values and shift states; gate sums are float32 (float64 with float64).

    Raises:
      ValueError: batch or max_length below 1.
    """
    for name, size in (("batch", batch), ("max_length", max_length)):
        if size < 1:
            raise ValueError(f"{name} = {size}; it must be at least 1")
    dtype = jnp.dtype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_dim

    def layer() -> LayerCache:
        # Each leaf is an array of its own: donated buffers may not be shared.
        gates = None
        if config.is_gated:
            gates = GateSums(
                hi=jnp.zeros((batch, max_length, heads), wide),
                lo=jnp.zeros((batch, max_length, heads), wide),
                total_hi=jnp.zeros((batch, heads), wide),
                total_lo=jnp.zeros((batch, heads), wide),
                first_kept=jnp.zeros((batch, heads), jnp.int32),
            )
        return LayerCache(
            k=jnp.zeros((batch, max_length, kv_heads, head_dim), dtype),
            v=jnp.zeros((batch, max_length, kv_heads, head_dim), dtype),
            gates=gates,
            last_k=jnp.zeros((batch, kv_heads, head_dim), dtype) if config.use_k_shift else None,
            last_v=jnp.zeros((batch, kv_heads, head_dim), dtype) if config.use_v_shift else None,
        )

    layers = {str(i): layer() for i in range(config.num_layers)}
    return FoxState(length=jnp.zeros((batch,), jnp.int32), layers=layers)


class Chunk(NamedTuple):
    """What a layer hands to its cache: the call's own keys and gates, and its attention to itself.

    Attributes:
      inputs: the kernel's inputs for the call's tokens.
      out, lse: [B, T, N, H] and [B, T, N], attention of the call's tokens to the call's keys.
      threshold: [B, N] ACP threshold that holds for every later token too; None = nothing is pruned.
    """

    inputs: AttentionInputs
    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]
    threshold: Float[Array, "B N"] | None


def continue_pass(
    cache: LayerCache, chunk: Chunk, span: Span, length: Int[Array, " B"], runtime: FoxRuntime
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Adds the attention to the cached keys, and stores the chunk.

    Args:
      length: tokens of the current document before this call.

    Returns:
      (attention over cached and own keys, the cache after the call).
    """

    def local(cache: LayerCache, chunk: Chunk, span: Span, length: Array) -> tuple[Array, LayerCache]:
        past = _attend_to_past(cache, chunk, span, length, runtime)
        out, _ = merge_partials((chunk.out, chunk.lse), past)
        return out, _store(cache, chunk, span)

    return per_shard(local)(cache, chunk, span, length)


def _attend_to_past(
    cache: LayerCache, chunk: Chunk, span: Span, length: Int[Array, " B"], runtime: FoxRuntime
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of the chunk to the cached keys alone.

    Decay is measured from the boundary between the two, so neither part of D is ever a large sum of far away
    gates: D_ij = (lambda_i - lambda_b) + (lambda_b - lambda_j).
    """
    if cache.gates is None:
        row_decay = jnp.zeros_like(chunk.inputs.log_fgate)
        col_decay = jnp.zeros(
            (*cache.k.shape[:2], chunk.inputs.log_fgate.shape[2]), chunk.inputs.log_fgate.dtype
        )
        first_kept = None
    else:
        gates = cache.gates
        own_hi, own_lo = gate_sums(chunk.inputs.log_fgate)
        row_decay = own_hi + own_lo
        col_decay = (gates.total_hi[:, None] - gates.hi) + (gates.total_lo[:, None] - gates.lo)
        # Unfilled slots hold anything, but the kernel prunes by a tile's last column: keep them on top.
        filled = jnp.arange(cache.k.shape[1]) < length[:, None]
        col_decay = jnp.where(filled[..., None], col_decay, 0)
        first_kept = gates.first_kept
    # Id 0 = sees the past. Tokens after a document start count on from 1; padding gets -1 and sees nothing.
    ids = jnp.where(span.has_past, 0, 1) if span.segment_ids is None else span.segment_ids
    if span.mask is not None:
        ids = jnp.where(span.mask, ids, -1)
    return attend_partial(
        chunk.inputs.q,
        cache.k.astype(chunk.inputs.q.dtype),
        cache.v.astype(chunk.inputs.q.dtype),
        row_decay,
        col_decay,
        kv_length=jnp.minimum(length, cache.k.shape[1]),
        first_key=first_kept,
        segment_ids=jnp.zeros(cache.k.shape[:2], jnp.int32),
        query_segment_ids=ids,
        adaptive_threshold=chunk.threshold,
        tiles=runtime.tiles,
        implementation=runtime.attention_implementation,
    )


def _store(cache: LayerCache, chunk: Chunk, span: Span) -> LayerCache:
    """Writes the tokens of the chunk's last document to their slots; the others, and padding, go nowhere."""
    kept = jnp.ones_like(span.positions, bool) if span.mask is None else span.mask
    if span.segment_ids is not None:
        kept &= span.segment_ids == span.segment_ids[:, -1:]
    max_length = cache.k.shape[1]
    # A slot beyond the buffer is dropped by the scatter: overflow never lands on another token.
    slots = jnp.where(kept, span.positions, max_length)
    row = jnp.arange(slots.shape[0])[:, None]

    def put(buffer: Array, values: Array) -> Array:
        return buffer.at[row, slots].set(values.astype(buffer.dtype), mode="drop", unique_indices=False)

    gates = None
    if cache.gates is not None:
        gates = _store_gates(cache.gates, chunk, span, kept, put)
    return LayerCache(
        k=put(cache.k, chunk.inputs.k),
        v=put(cache.v, chunk.inputs.v),
        gates=gates,
        last_k=_newest(cache.last_k, chunk.inputs.unshifted_k, span),
        last_v=_newest(cache.last_v, chunk.inputs.unshifted_v, span),
    )


def _newest(
    last: Float[Array, "B K H"] | None, projected: Float[Array, "B T K H"], span: Span
) -> Float[Array, "B K H"] | None:
    """The last token's projection; a row of nothing but padding keeps what it had."""
    if last is None:
        return None
    newest = projected[:, -1].astype(last.dtype)
    return newest if span.mask is None else jnp.where(span.mask[:, -1, None, None], newest, last)


def _store_gates(
    gates: GateSums, chunk: Chunk, span: Span, kept: Array, put: Callable[[Array, Array], Array]
) -> GateSums:
    """Continues the running sums, or restarts them at a document start; moves first kept slots on."""
    continues = True if span.segment_ids is None else (span.segment_ids[:, -1] == 0)[:, None]
    total_hi, total_lo, first_kept = (
        jnp.where(continues, x, 0) for x in (gates.total_hi, gates.total_lo, gates.first_kept)
    )
    own = gate_sums(jnp.where(kept[..., None], chunk.inputs.log_fgate, 0))
    hi, lo = add_pairs((total_hi[:, None], total_lo[:, None]), own)
    stored_hi, stored_lo = put(gates.hi, hi), put(gates.lo, lo)
    total_hi, total_lo = hi[:, -1], lo[:, -1]
    if chunk.threshold is not None:
        # D falls from token to token and rises from slot to slot: the slots below the threshold are a prefix,
        # and stay below it. Slots of older documents or of none are not counted.
        decay = (total_hi[:, None] - stored_hi) + (total_lo[:, None] - stored_lo)
        filled = jnp.arange(decay.shape[1]) <= span.positions[:, -1:]
        pruned = (decay < chunk.threshold[:, None]) & filled[..., None]
        first_kept = jnp.maximum(first_kept, jnp.sum(pruned, axis=1, dtype=jnp.int32))
    return GateSums(stored_hi, stored_lo, total_hi, total_lo, first_kept)
