"""Norm, linear map, gated MLP, embedding, rotary positions: plain functions of arrays.

Mixed precision is by argument: parameters stay in their own dtype (float32), `dtype` is what matmuls run in.
Statistics and angles are float32, or float64 when the input is.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.common.shapes import Activations, Params, Tokens
from models.common.sharding import ShardingRules, active_mesh, fit_spec, gathered

Activation = Literal["silu", "sigmoid"]

_STATISTIC = "row_statistic"

# For element-wise work on arrays that are large: its backward pass starts from its arguments and the
# statistics of their rows. Writing the float32 values in between for it, and reading them, takes longer than
# computing them again. Nothing has to keep the compiler from merging the two (`prevent_cse`): where it sees
# both, it may.
recomputed = functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(_STATISTIC),
    prevent_cse=False,
)


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or untouched if it is float64: the dtype of statistics and gates."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "*S D"], eps: float) -> Float[Array, "*B D"]:
    """x * rsqrt(mean(x^2) + eps) * scale over the last axis; statistics in float32, result in x's dtype.

    Args:
      scale: [D], or [N, D] for one weight per head of x [..., N, D].
    """

    @recomputed
    def normalised(x: Array, scale: Array) -> Array:
        wide = at_least_float32(x)
        mean_square = checkpoint_name(jnp.mean(wide * wide, axis=-1, keepdims=True), _STATISTIC)
        return (wide * jax.lax.rsqrt(mean_square + eps) * scale).astype(x.dtype)

    return normalised(x, gathered(scale))


def linear(x: Float[Array, "*B D"], params: Params, dtype: DTypeLike) -> Float[Array, "*B F"]:
    """x @ kernel [D, F] (+ bias [F]), computed and returned in `dtype`.

    The kernel is cast before it is gathered, so that a sharded weight travels in the compute dtype.
    """
    y = x.astype(dtype) @ gathered(params["kernel"].astype(dtype))
    if "bias" in params:
        y = y + gathered(params["bias"].astype(dtype))
    return y


def activation(name: Activation, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """silu(x) = x sigmoid(x), or sigmoid(x)."""
    return jax.nn.silu(x) if name == "silu" else jax.nn.sigmoid(x)


def gated_mlp(x: Activations, params: Params, act: Activation, dtype: DTypeLike) -> Activations:
    """down(act(gate) * value) with one fused projection D -> 2F whose FIRST half is the gate.

    The product is formed in float32 and rounded once, as the fused kernels of the official code do.

    Args:
      params: {"gate_proj": {"kernel": [D, 2F]}, "down_proj": {"kernel": [F, D]}}.
    """

    @recomputed
    def gated(both: Array) -> Array:
        gate, value = jnp.split(at_least_float32(both), 2, axis=-1)
        return (activation(act, gate) * value).astype(dtype)

    return linear(gated(linear(x, params["gate_proj"], dtype)), params["down_proj"], dtype)


def embed(
    tokens: Tokens, table: Float[Array, "V D"], rules: ShardingRules | None = None
) -> Float[Array, "B T D"]:
    """Rows of the embedding table, in the table's dtype, split over the mesh as the tokens are.

    An explicit mesh needs to be told how the result of a gather is laid out; without a mesh it is a plain
    lookup. Ids outside [0, V) give NaN rows rather than a neighbour's embedding.
    """
    mesh = active_mesh()
    spec = None
    if mesh is not None:
        spec = fit_spec((rules or ShardingRules()).spec(("batch", "length", None)), (*tokens.shape, 1), mesh)
    rows = gathered(table).at[tokens]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=spec)


def rotate(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], base: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split ("NeoX") pairs (c, c + H/2), over the whole head dim.

    Angle = position * base^(-2c/H) in float32; cos and sin are cast to x's dtype before the rotation.

    Raises:
      ValueError: the head dim is odd.
    """
    head_dim = x.shape[-1]
    if head_dim % 2:
        raise ValueError(f"rotary positions need an even head dim, got {head_dim}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angles = (positions[..., None].astype(wide) * frequencies)[:, :, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
