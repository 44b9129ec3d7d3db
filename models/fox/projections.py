"""What surrounds the attention kernel: projections, KV-shift, QK-norm, positions, gates, thresholds, output.

The order of operations is that of the official code (FoX section 3 and appendix; room README).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.forgetting_attention import threshold_from_bound
from models.common.layers import activation, at_least_float32, linear, recomputed, rms_norm, rotate
from models.common.shapes import Activations, Params
from models.common.sharding import constrain, gathered
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.parameters import FIXED_GATE
from models.fox.span import Span

# The official q_norm and k_norm ignore norm_eps.
QK_NORM_EPS = 1e-5


class AttentionInputs(NamedTuple):
    """What the kernel sees, and what the next call's shift needs.

    Attributes:
      q: [B, T, N, H]; k, v: [B, T, K, H], shifted, normalised and rotated, in the compute dtype.
      log_fgate: [B, T, N] float32, <= 0; 0 on padding.
      unshifted_k, unshifted_v: [B, T, K, H] projections before the shift.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    log_fgate: Float[Array, "B T N"]
    unshifted_k: Float[Array, "B T K H"]
    unshifted_v: Float[Array, "B T K H"]


def shift(
    logits: Float[Array, "B T K"],
    projected: Float[Array, "B T K H"],
    span: Span,
    previous: Float[Array, "B K H"] | None,
) -> Float[Array, "B T K H"]:
    """KV-shift: a_t * y_{t-1} + (1 - a_t) * y_t with a_t = sigmoid(W x_t), one scalar per head.

    The predecessor of a document's first token is zero; that of a call's first token is `previous`, if the
    document began in an earlier call. The mix is computed in float32 and cast back.

    Args:
      logits: W x.
      projected: y = W_k x (or W_v x).
      previous: last projection of the previous call; None = zero.
    """

    continues = None
    if previous is not None:
        previous = previous.astype(projected.dtype)
        # The first real token of a call that continues an earlier call's document.
        continues = span.has_past & ~span.predecessor
    return _shifted(logits, projected, previous, span.predecessor, continues)


@jax.custom_vjp
def _shifted(
    logits: Array, projected: Array, previous: Array | None, predecessor: Array, continues: Array | None
) -> Array:
    mix = jax.nn.sigmoid(at_least_float32(logits))[..., None]
    earlier = _earlier(projected, previous, predecessor, continues)
    mixture = mix * at_least_float32(earlier) + (1 - mix) * at_least_float32(projected)
    return mixture.astype(projected.dtype)


def _earlier(
    projected: Array, previous: Array | None, predecessor: Array, continues: Array | None
) -> Float[Array, "B T K H"]:
    """What lies before every token: 0 where nothing does."""
    shifted = jnp.pad(projected[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    earlier = jnp.where(predecessor[..., None, None], shifted, 0)
    if continues is None:
        return earlier
    assert previous is not None
    return jnp.where(continues[..., None, None], previous[:, None], earlier)


def _shifted_forward(*inputs: Any) -> tuple[Array, Any]:
    return _shifted(*inputs), inputs


def _shifted_backward(inputs: Any, cotangent: Array) -> tuple[Array | None, ...]:
    logits, projected, previous, predecessor, continues = inputs
    mix = jax.nn.sigmoid(at_least_float32(logits))
    apart = at_least_float32(_earlier(projected, previous, predecessor, continues))
    apart = apart - at_least_float32(projected)
    cotangent = jax.lax.optimization_barrier(cotangent)
    sums = jnp.sum(apart * at_least_float32(cotangent), axis=-1)
    # What follows waits for the sums: XLA for GPU would make one kernel of both, which takes four times as
    # long.
    cotangent, sums, mix, predecessor = jax.lax.optimization_barrier((cotangent, sums, mix, predecessor))
    d_logits = mix * (1 - mix) * sums
    wide = at_least_float32(cotangent)
    to_earlier = mix[..., None] * wide
    to_shifted = jnp.where(predecessor[..., None, None], to_earlier, 0)
    d_projected = (1 - mix[..., None]) * wide + jnp.pad(to_shifted[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    d_previous = None
    if continues is not None:
        d_previous = jnp.sum(jnp.where(continues[..., None, None], to_earlier, 0), axis=1)
        d_previous = d_previous.astype(previous.dtype)
    return d_logits.astype(logits.dtype), d_projected.astype(projected.dtype), d_previous, None, None


_shifted.defvjp(_shifted_forward, _shifted_backward)


def log_forget_gates(
    config: FoxConfig, params: Params, x: Activations, logits: Float[Array, "B T N"] | None
) -> Float[Array, "B T N"]:
    """log f_t = log sigmoid(w x_t + b) per query head, in float32 from the logits on.

    Args:
      params: the layer's "attn" group.
      x: attention input.
      logits: w x; None unless `fgate_type` is "full".
    """
    if logits is not None:
        return jax.nn.log_sigmoid(at_least_float32(logits) + gathered(params["fgate_proj"]["bias"]))
    shape = (*x.shape[:2], config.num_heads)
    if config.fgate_type == "none":
        return constrain(jnp.zeros(shape, at_least_float32(x).dtype), ("batch", "length", None))
    if config.fgate_type == "fixed":
        bias = jax.lax.stop_gradient(params[FIXED_GATE]["bias"])
    else:
        bias = params["fgate"]["bias"]
    gates = jnp.broadcast_to(jax.nn.log_sigmoid(at_least_float32(gathered(bias))), shape)
    return constrain(gates, ("batch", "length", None))


def gate_logits(config: FoxConfig, params: Params, x: Activations, dtype: str) -> dict[str, Array]:
    """What decides one number per head and token, by parameter group: [B, T, heads] in the compute dtype.

    One product for all of them: each alone would read x, and write a gradient as large, for a few columns.
    """
    wanted = {
        "fgate_proj": config.fgate_type == "full",
        "k_shift": config.use_k_shift,
        "v_shift": config.use_v_shift,
    }
    kernels = {name: gathered(params[name]["kernel"].astype(dtype)) for name in wanted if wanted[name]}
    if not kernels:
        return {}
    joint = linear(x, {"kernel": jnp.concatenate(list(kernels.values()), axis=1)}, dtype)
    ends = np.cumsum([kernel.shape[1] for kernel in kernels.values()])
    return dict(zip(kernels, jnp.split(joint, ends[:-1].tolist(), axis=-1), strict=True))


def attention_inputs(
    config: FoxConfig,
    params: Params,
    x: Activations,
    span: Span,
    dtype: str,
    last_k: Float[Array, "B K H"] | None = None,
    last_v: Float[Array, "B K H"] | None = None,
) -> AttentionInputs:
    """Projections, then shift, then QK-norm, then rotary positions; and the gates.

    Args:
      params: the layer's "attn" group.
      x: normalised input.
      span: what `make_span` says about the call.
      dtype: compute dtype.
      last_k, last_v: newest unshifted projections of the previous call; None = there was none.
    """

    def heads(name: str, count: int) -> Array:
        return linear(x, params[name], dtype).reshape(*x.shape[:2], count, config.head_dim)

    q = heads("q_proj", config.num_heads)
    unshifted_k, unshifted_v = heads("k_proj", config.kv_heads), heads("v_proj", config.kv_heads)
    k, v, logits = unshifted_k, unshifted_v, gate_logits(config, params, x, dtype)
    if config.use_k_shift:
        k = shift(logits["k_shift"], k, span, last_k)
    if config.use_v_shift:
        v = shift(logits["v_shift"], v, span, last_v)
    if config.qk_norm:
        q = rms_norm(q, _per_head(params["q_norm"]["scale"], config.head_dim), QK_NORM_EPS)
        k = rms_norm(k, _per_head(params["k_norm"]["scale"], config.head_dim), QK_NORM_EPS)
    if config.use_rope:
        q, k = (rotate(y, span.positions, config.rope_base) for y in (q, k))
    log_fgate = log_forget_gates(config, params, x, logits.get("fgate_proj"))
    if span.mask is not None:
        log_fgate = jnp.where(span.mask[..., None], log_fgate, 0)
    return AttentionInputs(q, k, v, log_fgate, unshifted_k, unshifted_v)


def _per_head(scale: Float[Array, " C"], head_dim: int) -> Float[Array, "*N H"]:
    """[H] shared by all heads stays as it is; [N * H] becomes [N, H]."""
    return scale if scale.shape[0] == head_dim else gathered(scale).reshape(-1, head_dim)


def score_bound(config: FoxConfig, params: Params) -> Float[Array, " N"]:
    """U_h = sqrt(H) max|w_q,h| max|w_k,h| >= |q k| / sqrt(H), from the QK-norm weights.

    A normalised and scaled vector is at most sqrt(H) max|w| long, and rotations keep its length. With shared
    weights every head gets the same bound; a key head serves N / K query heads.
    """
    q_scale, k_scale = (
        jnp.max(
            jnp.abs(at_least_float32(_per_head(gathered(params[name]["scale"]), config.head_dim))), axis=-1
        )
        for name in ("q_norm", "k_norm")
    )
    group = config.num_heads // config.kv_heads
    bound = jnp.broadcast_to(q_scale, (config.num_heads,)) * jnp.repeat(
        jnp.broadcast_to(k_scale, (config.kv_heads,)), group
    )
    return jax.lax.stop_gradient(config.head_dim**0.5 * bound)


def pruning_threshold(
    config: FoxConfig, runtime: FoxRuntime, params: Params, batch: int, num_keys: int
) -> Float[Array, "B N"] | str | None:
    """ACP's threshold for one layer, in the form the kernel takes.

    Args:
      params: the layer's attention parameters.
      num_keys: L of the threshold's ln L: the most keys a row can see, padding included.

    Returns:
      None without pruning (ACP off, or no gates); -(2 U + ln L) + log eps per head from the QK-norm weights;
      or the name of the kernel's own rule, "auto" or "tight", which look at q and k.
    """
    tolerance = runtime.log_pruning_tolerance
    if tolerance is None or not config.is_gated:
        return None
    if runtime.adaptive_threshold != "weights":
        return runtime.adaptive_threshold
    if not config.qk_norm:
        return "auto"
    limit = threshold_from_bound(
        score_bound(config, params), num_keys=num_keys, log_pruning_tolerance=tolerance
    )
    return constrain(jnp.broadcast_to(limit, (batch, config.num_heads)), ("batch", None))


def output_projection(
    config: FoxConfig, params: Params, x: Activations, attended: Float[Array, "B T N H"], dtype: str
) -> Activations:
    """What follows the kernel: RMSNorm per head, then the output gate, then o_proj.

    Norm and gate are computed in float32 and rounded once.
    """
    scale = _per_head_scale(params["output_norm"]["scale"], config) if config.use_output_norm else None
    logits = linear(x, params["ogate_proj"], dtype) if config.use_output_gate else None

    @recomputed
    def gated(attended: Array, scale: Array | None, logits: Array | None) -> Array:
        y = at_least_float32(attended)
        if scale is not None:
            y = rms_norm(y, scale, config.norm_eps)
        y = y.reshape(x.shape)
        if logits is not None:
            y = y * activation(config.ogate_act, at_least_float32(logits))
        return y.astype(dtype)

    return linear(gated(attended, scale, logits), params["o_proj"], dtype)


def _per_head_scale(scale: Float[Array, " D"], config: FoxConfig) -> Float[Array, "N H"]:
    return gathered(scale).reshape(config.num_heads, config.head_dim)
