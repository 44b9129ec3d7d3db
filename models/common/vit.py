"""Vision Transformer pieces: patches, positions, pre-norm blocks, and the tables of their parameters.

Plain functions of arrays. Parameters stay in float32, `dtype` is what matmuls run in; the statistics of norms
and of the softmax are float32 (float64 for float64).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from kernels.common.dispatch import target
from models.common.attention import AttentionImplementation, attend
from models.common.joined import JOINT, PROJECTIONS, linear_apart, taken_apart
from models.common.layers import at_least_float32, linear, recomputed
from models.common.params import (
    Init,
    ParamSpec,
    grouped,
    lecun_normal,
    linear_specs,
    norm_specs,
    xavier_uniform,
)
from models.common.shapes import Key, Params
from models.common.sharding import constrain, gathered, per_shard

Grid = tuple[int, int]

NORM_EPS = 1e-6
# Tokens up to which queries, keys and values are one product, where their maps are joined.
FEW_ROWS = 8192


def vit_block_specs(width: int, mlp_size: int, num_heads: int, official: str = "") -> dict[str, ParamSpec]:
    """Parameters of `vit_block` by flat name.

    Args:
      width, mlp_size, num_heads: D, F, N.
      official: prefix of the official names, with its "/".
    """
    head_dim = width // num_heads
    attn, mlp = f"{official}MultiHeadDotProductAttention_0", f"{official}MlpBlock_0"
    square = xavier_uniform(width, width)

    def projection(name: str) -> dict[str, ParamSpec]:
        shapes = ((width, num_heads, head_dim), (num_heads, head_dim))
        return linear_specs(width, width, ("embed", "heads"), square, f"{attn}/{name}", shapes=shapes)

    out_shapes = ((num_heads, head_dim, width), None)
    tiny = Init("normal", 1e-6)
    xavier = xavier_uniform(width, mlp_size)
    return grouped(
        {
            "attn_norm": norm_specs(width, f"{official}LayerNorm_0"),
            "attn/q_proj": projection("query"),
            "attn/k_proj": projection("key"),
            "attn/v_proj": projection("value"),
            "attn/out_proj": linear_specs(
                width, width, ("heads", "embed"), square, f"{attn}/out", shapes=out_shapes
            ),
            "mlp_norm": norm_specs(width, f"{official}LayerNorm_1"),
            "mlp/up": linear_specs(width, mlp_size, ("embed", "mlp"), xavier, f"{mlp}/Dense_0", tiny),
            "mlp/down": linear_specs(mlp_size, width, ("mlp", "embed"), xavier, f"{mlp}/Dense_1", tiny),
        }
    )


def layer_norm(x: Float[Array, "*B D"], params: Params, eps: float = NORM_EPS) -> Float[Array, "*B D"]:
    """(x - mean) * rsqrt(var + eps) * scale + bias over the last axis; in float32, result in x's dtype."""

    @recomputed
    def normalised(x: Array, scale: Array, bias: Array) -> Array:
        wide = at_least_float32(x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)

    return normalised(x, gathered(params["scale"]), gathered(params["bias"]))


def gelu(x: Float[Array, "*B"], approximate: bool = True) -> Float[Array, "*B"]:
    """By tanh, as everywhere in the official JAX code, or exact; computed in float32, result in x's dtype."""
    return jax.nn.gelu(at_least_float32(x), approximate=approximate).astype(x.dtype)


@jax.custom_vjp
def _narrow_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _narrow_gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    return jax.vjp(gelu, x)[1](cotangent)


_narrow_gelu.defvjp(lambda x: (_narrow_gelu(x), x), _narrow_gelu_backward)


def linear_gelu(
    x: Float[Array, "*B D"], params: Params, dtype: DTypeLike, approximate: bool = True
) -> Float[Array, "*B F"]:
    """gelu(x @ kernel + bias) in `dtype`; the backward pass starts from what enters the GELU."""
    hidden = linear(x, params, dtype)
    if approximate and target().platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16:
        # Written in the product's dtype, XLA hands it to cuBLAS, which computes it in float32 from the
        # accumulators: nothing is rounded in between, and nothing but the result is written.
        return _narrow_gelu(hidden)
    return recomputed(functools.partial(gelu, approximate=approximate))(hidden)


def dropout(x: Float[Array, "*B"], rate: float, key: Key | None) -> Float[Array, "*B"]:
    """Zeroes entries with probability `rate`, scales the others by 1 / (1 - rate); identity without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(constrain(kept, ("batch", *[None] * (x.ndim - 1))), x / (1 - rate), 0).astype(x.dtype)


def attention(
    x: Float[Array, "*B P D"],
    params: Params,
    num_heads: int,
    dtype: DTypeLike,
    implementation: AttentionImplementation | None = None,
    mask: Bool[Array, "*B #P P"] | None = None,
    asked: int | None = None,
    keys: int | None = None,
) -> Float[Array, "*B asked D"]:
    """Multi-head self-attention over the tokens of each frame, scale 1 / sqrt(D / heads).

    Args:
      params: "q_proj", "k_proj", "v_proj" (or joined, see `models.common.joined`), "out_proj".
      implementation: of `jax.nn.dot_product_attention`; "cudnn" needs a GPU and a 16-bit dtype, and writes no
        scores.
      mask: which keys (last axis) each token sees, see `attend`; None: all.
      asked: how many of the tokens, the last ones, an answer is wanted for; None: all.
      keys: how many of the tokens, the first ones, are seen; None: all.
    """
    if mask is not None and mask.shape[-2] > 1:
        mask = _last_tokens(mask, asked)

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], num_heads, -1)

    def local(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        flat = (y.reshape(-1, *y.shape[-3:]) for y in (q, k, v))
        seen = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
        return attend(*flat, implementation, seen, keys).reshape(q.shape)

    q, k, v = _projections(x, params, dtype, asked)
    attended = per_shard(local)(heads(q), heads(k), heads(v), mask)
    return linear(attended.reshape(q.shape), params["out_proj"], dtype)


def _projections(x: Array, params: Params, dtype: DTypeLike, asked: int | None) -> list[Array]:
    """Queries of the tokens that are asked for, keys and values of all.

    Attention kernels read arrays that lie by themselves: where `split_matmul` has no kernel, each part of a
    joint product is copied. Of many rows that takes longer than two more launches, so the matrix is taken
    apart.
    """
    if JOINT.join(PROJECTIONS) in params and math.prod(x.shape[:-1]) <= FEW_ROWS:
        q, k, v = linear_apart(x, params, PROJECTIONS, dtype)
        return [_last_tokens(q, asked), k, v]
    maps = taken_apart(params, PROJECTIONS)
    asking = _last_tokens(x, asked)
    return [linear(y, maps[name], dtype) for y, name in zip((asking, x, x), PROJECTIONS, strict=True)]


def _last_tokens(x: Array, count: int | None) -> Array:
    return x if count is None else x[..., x.shape[-2] - count :, :]


def mlp(
    x: Float[Array, "*B D"],
    params: Params,
    dtype: DTypeLike,
    rate: float = 0.0,
    key: Key | None = None,
    approximate: bool = True,
) -> Float[Array, "*B D"]:
    """down(dropout(gelu(up(x))))."""
    hidden = linear_gelu(x, params["up"], dtype, approximate)
    return linear(dropout(hidden, rate, key), params["down"], dtype)


def vit_block(
    x: Float[Array, "*B P D"],
    params: Params,
    num_heads: int,
    dtype: DTypeLike,
    implementation: AttentionImplementation | None = None,
    rate: float = 0.0,
    key: Key | None = None,
    mask: Bool[Array, "*B #P P"] | None = None,
    approximate: bool = True,
    asked: int | None = None,
    keys: int | None = None,
) -> Float[Array, "*B asked D"]:
    """h = x + attention(LN(x)); out = h + mlp(LN(h)). The residual stream keeps x's dtype.

    Args:
      rate: dropout after the attention, after the GELU and after the MLP.
      key: for dropout; None = none.
      mask: which keys each token sees; None: all.
      approximate: GELU by tanh, or exact.
      asked: how many of the tokens, the last ones, are computed and returned; None: all.
      keys: how many of the tokens, the first ones, others attend to; None: all.
    """
    rngs = [None] * 3 if key is None else list(jax.random.split(key, 3))
    normed = layer_norm(x, params["attn_norm"])
    attended = attention(normed, params["attn"], num_heads, dtype, implementation, mask, asked, keys)
    x = _last_tokens(x, asked) + dropout(attended, rate, rngs[0]).astype(x.dtype)
    update = mlp(layer_norm(x, params["mlp_norm"]), params["mlp"], dtype, rate, rngs[1], approximate)
    return x + dropout(update, rate, rngs[2]).astype(x.dtype)


def patchify(video: Float[Array, "*B height width colours"], patch: Grid) -> Float[Array, "*B P pixels"]:
    """Frames to rows of pixels, patch by patch in row-major order; inside a patch row, column, colour.

    Raises:
      ValueError: frames that the patch size does not divide.
    """
    rows, columns = grid_of((video.shape[-3], video.shape[-2]), patch)

    def local(video: Array) -> Array:
        batch, colours = video.shape[:-3], video.shape[-1]
        split = video.reshape(*batch, rows, patch[0], columns, patch[1], colours)
        return jnp.swapaxes(split, -4, -3).reshape(*batch, rows * columns, patch[0] * patch[1] * colours)

    return per_shard(local)(video)  # an explicit mesh takes no reshape of several axes


def patch_specs(patch: Grid, width: int, official: str) -> dict[str, ParamSpec]:
    """Kernel and bias of the map of patches to tokens; officially a convolution over one frame."""
    pixels = math.prod(patch) * 3
    shapes = ((1, *patch, 3, width), None)
    return linear_specs(pixels, width, (None, "embed"), lecun_normal(pixels), official, shapes=shapes)


def unpatchify(
    patches: Float[Array, "*B P pixels"], grid: Grid, patch: Grid
) -> Float[Array, "*B height width colours"]:
    """Inverse of `patchify`."""

    def local(patches: Array) -> Array:
        batch, colours = patches.shape[:-2], patches.shape[-1] // (patch[0] * patch[1])
        split = patches.reshape(*batch, grid[0], grid[1], patch[0], patch[1], colours)
        return jnp.swapaxes(split, -4, -3).reshape(*batch, grid[0] * patch[0], grid[1] * patch[1], colours)

    return per_shard(local)(patches)


def grid_of(image_size: Grid, patch: Grid) -> Grid:
    """Patches along height and width.

    Raises:
      ValueError: the patch size does not divide the frame.
    """
    for name, size, step in zip(("height", "width"), image_size, patch, strict=True):
        if size < step or size % step:
            raise ValueError(f"frame {name} = {size}; it must be a multiple of the patch size, {step}")
    return image_size[0] // patch[0], image_size[1] // patch[1]


def sincos_positions(grid: Grid, width: int) -> Float[Array, "P D"]:
    """Fixed positions [sin x w, cos x w, sin y w, cos y w], w_k = 10000^(-k / (D/4 - 1)), row-major grid.

    Raises:
      ValueError: a width that is not a multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"width = {width}; sincos2d positions need a multiple of 4 from 8 on")
    count = width // 4
    frequencies = 10000.0 ** (-jnp.arange(count, dtype=jnp.float32) / (count - 1))
    rows, columns = (index.reshape(-1, 1).astype(jnp.float32) for index in jnp.mgrid[: grid[0], : grid[1]])
    return jnp.concatenate(
        [f(at * frequencies) for at in (columns, rows) for f in (jnp.sin, jnp.cos)], axis=1
    )


def position_spec(grid: Grid, width: int, official: str) -> ParamSpec:
    """Learnt positions [P, D], N(0, 1/D)."""
    shape = (grid[0] * grid[1], width)
    return ParamSpec(shape, (None, "embed"), Init("normal", width**-0.5), official, (1, *shape))


def resize_positions(table: Float[Array, "P D"], old: Grid, new: Grid) -> Float[Array, "Q D"]:
    """Learnt positions for another grid of patches: bicubic, antialiased when it shrinks.

    Args:
      table: row-major over the grid `old`.

    Raises:
      ValueError: a table that is not of that grid.
    """
    if table.shape[0] != old[0] * old[1]:
        raise ValueError(f"the table has {table.shape[0]} positions; grid {old} needs {old[0] * old[1]}")
    if old == new:
        return table
    image = table.reshape(*old, -1)
    resized = jax.image.resize(image, (*new, image.shape[-1]), method="bicubic", antialias=True)
    return resized.reshape(new[0] * new[1], -1)


def as_float(video: Any) -> Array:
    """uint8 pixels to [0, 1]; anything else unchanged."""
    video = jnp.asarray(video)
    return video.astype(jnp.float32) / 255 if video.dtype == jnp.uint8 else video
