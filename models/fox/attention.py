"""Forgetting attention as a layer: the kernel between its projections, alone or continuing from a cache."""

from jaxtyping import Array, Float, Int

from kernels.forgetting_attention import forgetting_attention
from models.common.shapes import Activations, Params
from models.common.sharding import per_shard
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.projections import (
    AttentionInputs,
    attention_inputs,
    output_projection,
    pruning_threshold,
)
from models.fox.span import Span
from models.fox.state import Chunk, LayerCache, continue_pass


def _attend(
    inputs: AttentionInputs, span: Span, threshold: Array | str | None, runtime: FoxRuntime
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of this call's tokens to each other, on each device's part of the batch."""
    named = threshold if isinstance(threshold, str) else None
    tolerance = runtime.log_pruning_tolerance

    def local(
        q: Array, k: Array, v: Array, gates: Array, limit: Array | None, pads: Array | None, ids: Array | None
    ) -> tuple[Array, Array]:
        result = forgetting_attention(
            q,
            k,
            v,
            gates,
            adaptive_threshold=named if limit is None else limit,
            log_pruning_tolerance=-10.0 if tolerance is None else tolerance,
            seq_start=pads,
            segment_ids=ids,
            return_lse=True,
            tiles=runtime.tiles,
            implementation=runtime.attention_implementation,
        )
        assert isinstance(result, tuple)
        return result

    q, k, v, gates = inputs[:4]
    values = None if isinstance(threshold, str) else threshold
    return per_shard(local)(q, k, v, gates, values, span.pads, span.segment_ids)


def attention(
    config: FoxConfig,
    runtime: FoxRuntime,
    params: Params,
    x: Activations,
    span: Span,
    cache: LayerCache | None = None,
    length: Int[Array, " B"] | None = None,
) -> tuple[Activations, LayerCache | None]:
    """One forgetting attention layer, without residual or input norm.

    Args:
      params: the layer's "attn" group.
      x: [B, T, D] normalised input.
      span: what `make_span` says about the call.
      cache: the layer's memory of earlier calls; None = there were none and none will follow.
      length: tokens of the current document before this call; needed with a cache.

    Returns:
      ([B, T, D] in the compute dtype, the cache after this call).
    """
    dtype = runtime.compute_dtype
    if cache is None:
        inputs = attention_inputs(config, params, x, span, dtype)
        threshold = pruning_threshold(config, runtime, params, x.shape[0], x.shape[1])
        out, _ = _attend(inputs, span, threshold, runtime)
        return output_projection(config, params, x, out, dtype), None
    assert length is not None
    inputs = attention_inputs(config, params, x, span, dtype, cache.last_k, cache.last_v)
    threshold = pruning_threshold(config, runtime, params, x.shape[0], cache.k.shape[1])
    out, lse = _attend(inputs, span, threshold, runtime)
    # The kernel's own rules look at this call's norms: what they prune may matter later, so it stays.
    limit = None if isinstance(threshold, str) else threshold
    out, cache = continue_pass(cache, Chunk(inputs, out, lse, limit), span, length, runtime)
    return output_projection(config, params, x, out, dtype), cache
