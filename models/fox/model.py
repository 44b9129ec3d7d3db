"""The Forgetting Transformer: pre-norm blocks of forgetting attention and a gated MLP.

`apply` is the model. `Fox` wraps it as an NNX module for those who want to hold parameters in an object.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.forgetting_attention import RESIDUAL_NAMES
from models.common.layers import embed, gated_mlp, linear, rms_norm
from models.common.module import ModelModule
from models.common.params import check_params, layer_keys
from models.common.shapes import Activations, Mask, Params, Tokens
from models.common.sharding import constrain
from models.common.stack import run_layers
from models.fox.attention import attention
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.parameters import init_params, param_specs
from models.fox.span import Span, make_span
from models.fox.state import FoxState, LayerCache
from models.fox.statistics import FoxStats, layer_statistics, stack_statistics

Output = Literal["logits", "hidden", "stats"]


def block(
    config: FoxConfig,
    runtime: FoxRuntime,
    params: Params,
    x: Activations,
    span: Span,
    cache: LayerCache | None = None,
    length: Array | None = None,
) -> tuple[Activations, LayerCache | None]:
    """h = x + attn(norm(x)); out = h + mlp(norm(h)). The residual stream x keeps its dtype (float32)."""
    normed = rms_norm(x, params["attn_norm"]["scale"], config.norm_eps)
    attended, cache = attention(config, runtime, params["attn"], normed, span, cache, length)
    x = x + attended.astype(x.dtype)
    normed = rms_norm(x, params["mlp_norm"]["scale"], config.norm_eps)
    update = gated_mlp(normed, params["mlp"], config.hidden_act, runtime.compute_dtype)
    return x + update.astype(x.dtype), cache


def apply(
    config: FoxConfig,
    runtime: FoxRuntime,
    params: Params,
    tokens: Tokens,
    state: FoxState | None = None,
    reset: Mask | None = None,
    mask: Mask | None = None,
    output: Output = "logits",
) -> tuple[Any, FoxState | None]:
    """Runs the model on a stretch of tokens.

    Without a state: one causal pass. With one: the tokens continue what earlier calls saw, in chunks of any
    length; any chunking gives the result of the whole pass. Under a mesh, everything is split over the batch.

    Args:
      params: canonical tree (`init_params`).
      tokens: [B, T] ids; an id outside the vocabulary gives NaN.
      state: memory of earlier calls (`init_state`), or None.
      reset: [B, T], True where a new document starts: nothing crosses that boundary (attention, shift,
        positions).
      mask: [B, T], False = left padding. Padding does not exist for the model: it changes no result and no
        state; outputs there mean nothing.
      output: "logits" [B, T, V] in the compute dtype; "hidden", the input of lm_head [B, T, D] in float32; or
        "stats", gates and pruning per layer and head (`FoxStats`; needs state = None).

    Returns:
      (output, state after the call; None if none was given).

    Raises:
      ValueError: parameters that are not this config's (differences listed), wrong shapes, a state of another
        batch size; and, where values are known outside of jit: padding after tokens, a document longer than
        the state's buffers. Inside jit the affected outputs are NaN instead.
    """
    if output not in get_args(Output):
        raise ValueError(f"output = {output!r}; it must be one of {list(get_args(Output))}")
    if output == "stats" and state is not None:
        raise ValueError('output="stats" describes a whole pass; state must be None')
    check_params(param_specs(config), params, config)
    tokens = constrain(tokens, ("batch", "length"))
    if state is not None and state.length.shape != tokens.shape[:1]:
        raise ValueError(f"state was made for {state.length.shape[0]} rows, tokens have {tokens.shape[0]}")
    span = make_span(tokens, None if state is None else state.length, reset, mask)
    invalid = _invalid(span, None if state is None else state.max_length)
    x = embed(tokens, params["embed"]["embedding"])
    if output == "stats":
        return _statistics(config, runtime, params["layers"], x, span), None
    if state is None:
        x = run_layers(
            lambda layer, h, span, _: block(config, runtime, layer, h, span)[0],
            params["layers"],
            x,
            span,
            remat=runtime.remat,
            scan=runtime.scan_layers,
            saved=RESIDUAL_NAMES,
        )
    else:
        x, state = _continue_layers(config, runtime, params["layers"], x, span, state)
    hidden = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    if invalid is not None:
        hidden = jnp.where(invalid[..., None], jnp.nan, hidden)
    if output == "hidden":
        return hidden, state
    return linear(hidden, params["lm_head"], runtime.compute_dtype), state


def _continue_layers(
    config: FoxConfig, runtime: FoxRuntime, layers: Params, x: Activations, span: Span, state: FoxState
) -> tuple[Activations, FoxState]:
    """One layer after the other whatever `scan_layers` says: a scan would copy every buffer at every step."""
    caches = {}
    for name in layer_keys(layers):
        x, cache = block(config, runtime, layers[name], x, span, state.layers[name], state.length)
        assert cache is not None
        caches[name] = cache
    return x, FoxState(length=span.positions[:, -1] + 1, layers=caches)


def _statistics(
    config: FoxConfig, runtime: FoxRuntime, layers: Params, x: Activations, span: Span
) -> FoxStats:
    stats = []
    for name in layer_keys(layers):
        normed = rms_norm(x, layers[name]["attn_norm"]["scale"], config.norm_eps)
        stats.append(layer_statistics(config, runtime, layers[name]["attn"], normed, span))
        x, _ = block(config, runtime, layers[name], x, span)
    return stack_statistics(stats)


def _invalid(span: Span, max_length: int | None) -> Bool[Array, "B T"] | None:
    """Tokens whose result cannot be right: beyond the buffer, or in a row whose mask is not left padding."""
    invalid = None
    if max_length is not None:
        invalid = span.positions >= max_length
        if not isinstance(invalid, jax.core.Tracer) and bool(invalid.any()):
            rows = [int(row) for row in jnp.flatnonzero(invalid.any(axis=1))]
            raise ValueError(
                f"the documents of rows {rows} are longer than the state's max_length = {max_length};"
                " make the state longer, or mark document starts with reset"
            )
    if span.malformed is not None:
        malformed = jnp.broadcast_to(span.malformed[:, None], span.positions.shape)
        invalid = malformed if invalid is None else invalid | malformed
    return invalid


class Fox(ModelModule[FoxConfig, FoxRuntime]):
    """The model as a module. `nnx.split`, `nnx.state` and `jax.jit` see one `nnx.Param` per canonical name.

    Made for NNX's tree mode: no shared references, no lifted transforms. Take `model.params()` to train.
    """

    _specs, _init, _runtime = staticmethod(param_specs), staticmethod(init_params), FoxRuntime

    def __call__(
        self,
        tokens: Tokens,
        state: FoxState | None = None,
        reset: Mask | None = None,
        *,
        mask: Mask | None = None,
    ) -> tuple[Float[Array, "B T V"], FoxState | None]:
        """Logits for the tokens and the state after them; see `apply`."""
        return apply(self.config, self.runtime, self.params(), tokens, state, reset, mask)
