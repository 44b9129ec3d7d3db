"""What a model forgets and what pruning saves, per layer and head: for evaluation, not for training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.forgetting_attention import TileConfig, acp_threshold
from kernels.forgetting_attention.visits import forward_visits
from models.common.shapes import Activations, Params
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.projections import attention_inputs, pruning_threshold
from models.fox.span import Span


class FoxStats(NamedTuple):
    """Statistics of one pass; the leading axis counts layers.

    Attributes:
      log_fgate: [L, B, T, N] float32, log of the forget gates (0 without gates, and on padding).
      threshold: [L, B, N] ACP threshold on the decay bias; None with pruning off or without gates.
      visited_fraction: [L, B, N] share of the causal tiles that attention computes; None idem.
    """

    log_fgate: Float[Array, "L B T N"]
    threshold: Float[Array, "L B N"] | None
    visited_fraction: Float[Array, "L B N"] | None


def layer_statistics(
    config: FoxConfig, runtime: FoxRuntime, params: Params, x: Activations, span: Span
) -> FoxStats:
    """Statistics of one layer, without the layer axis.

    Tiles are the runtime's, or 128 x 128. The threshold of the "tight" rule, which has none, is the published
    one. Document starts are not counted as savings, neither is padding.

    Args:
      params: the layer's "attn" group.
      x: normalised input of the attention layer.
    """
    inputs = attention_inputs(config, params, x, span, runtime.compute_dtype)
    rule = pruning_threshold(config, runtime, params, x.shape[0], x.shape[1])
    if rule is None:
        return FoxStats(inputs.log_fgate, None, None)
    assert runtime.log_pruning_tolerance is not None
    visited = forward_visits(
        inputs.q,
        inputs.k,
        inputs.log_fgate,
        tile=(runtime.tiles or TileConfig()).forward,
        adaptive_threshold=rule,
        log_pruning_tolerance=runtime.log_pruning_tolerance,
        seq_start=span.pads,
    )
    if not isinstance(rule, str):
        return FoxStats(inputs.log_fgate, rule, visited)
    live = None if span.mask is None else span.mask[..., None, None]
    limit = acp_threshold(
        inputs.q if live is None else jnp.where(live, inputs.q, 0),
        inputs.k if live is None else jnp.where(live, inputs.k, 0),
        sm_scale=config.head_dim**-0.5,
        num_keys=x.shape[1],
        log_pruning_tolerance=runtime.log_pruning_tolerance,
    )
    return FoxStats(inputs.log_fgate, limit, visited)


def stack_statistics(layers: list[FoxStats]) -> FoxStats:
    """One `FoxStats` with a leading layer axis from those of single layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
