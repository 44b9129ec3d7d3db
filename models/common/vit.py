"""Vision Transformer pieces: patches, positions, pre-norm blocks, and the table their parameters come from.

Plain functions of arrays. Parameters stay in float32, `dtype` is what matmuls run in; the statistics of norms
and of the softmax are float32 (float64 for float64).
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from kernels.common.dispatch import target
from models.common.attention import AttentionImplementation, attend
from models.common.layers import at_least_float32, linear, recomputed
from models.common.params import unflatten_names
from models.common.shapes import Params
from models.common.sharding import AxisNames, constrain, gathered, per_shard

Key = PRNGKeyArray | UInt32[Array, "2"]
Grid = tuple[int, int]

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Init:
    """How a parameter starts.

    Attributes:
      kind: "zeros"; "ones"; "normal" N(0, high^2); "truncated" the same cut at two standard deviations and
        rescaled to standard deviation `high`; "uniform" in [low, high); "custom", `draw(key, shape)`.
      low, high: see kind.
      draw: only for "custom".
    """

    kind: Literal["zeros", "ones", "normal", "truncated", "uniform", "custom"]
    high: float = 0.0
    low: float = 0.0
    draw: Callable[[Key, tuple[int, ...]], Array] | None = None

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Array:
        """Initial value, float32."""
        match self.kind:
            case "zeros":
                return jnp.zeros(shape, jnp.float32)
            case "ones":
                return jnp.ones(shape, jnp.float32)
            case "normal":
                return self.high * jax.random.normal(key, shape, jnp.float32)
            case "truncated":
                # A unit normal cut at +-2 has this standard deviation.
                unit = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) / 0.87962566103423978
                return self.high * unit
            case "uniform":
                return jax.random.uniform(key, shape, jnp.float32, self.low, self.high)
            case "custom":
                assert self.draw is not None
                return self.draw(key, shape)


ZEROS, ONES = Init("zeros"), Init("ones")


def lecun_normal(fan_in: int) -> Init:
    """Truncated normal of variance 1 / fan_in: the default of Flax's Dense and Conv."""
    return Init("truncated", fan_in**-0.5)


def xavier_uniform(fan_in: int, fan_out: int) -> Init:
    """Uniform of variance 2 / (fan_in + fan_out)."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return Init("uniform", limit, -limit)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: everything that initialisation, sharding and conversion need to know.

    Attributes:
      shape: our layout; kernels are [in, out].
      axes: logical axis names, one per dimension.
      init: initial value.
      official: name in the official checkpoint.
      official_shape: shape there, a reshape of ours; None = the same.
    """

    shape: tuple[int, ...]
    axes: AxisNames
    init: Init
    official: str
    official_shape: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the official checkpoint."""
        return self.shape if self.official_shape is None else self.official_shape


def initialize(specs: Mapping[str, ParamSpec], key: Key) -> Params:
    """Initial values (float32) for a table of parameters, as a tree.

    Every parameter draws from its own key, derived from its name alone: adding an option, or changing the
    number of layers, leaves the others as they were. Those of one shape and kind are drawn together: compile
    time grows with the number of kinds, not of parameters.
    """
    groups: dict[tuple[tuple[int, ...], Init], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault((spec.shape, spec.init), []).append(name)
    values: dict[str, Array] = {}
    for (shape, init), names in groups.items():
        if init.kind in ("zeros", "ones"):
            # Each is an array of its own: donated buffers may not be shared.
            values |= {name: init(key, shape) for name in names}
            continue
        checksums = jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, checksums)
        drawn = jax.vmap(lambda key, init=init, shape=shape: init(key, shape))(keys)
        # The barrier keeps the compiler from drawing them one by one after all, once per slice.
        values |= dict(zip(names, jax.lax.optimization_barrier(drawn), strict=True))
    return unflatten_names({name: values[name] for name in specs})


def linear_specs(
    size_in: int,
    size_out: int,
    axes: AxisNames,
    kernel: Init,
    official: str,
    bias: Init = ZEROS,
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
) -> dict[str, ParamSpec]:
    """Kernel [in, out] and bias [out]; `shapes` are their official shapes where those differ."""
    return {
        "kernel": ParamSpec((size_in, size_out), axes, kernel, f"{official}/kernel", shapes[0]),
        "bias": ParamSpec((size_out,), (axes[-1],), bias, f"{official}/bias", shapes[1]),
    }


def norm_specs(width: int, official: str) -> dict[str, ParamSpec]:
    """Scale and bias of a LayerNorm."""
    return {
        "scale": ParamSpec((width,), ("norm",), ONES, f"{official}/scale"),
        "bias": ParamSpec((width,), ("norm",), ZEROS, f"{official}/bias"),
    }


def grouped(groups: Mapping[str, Mapping[str, ParamSpec]]) -> dict[str, ParamSpec]:
    """{"a": {"b": spec}} -> {"a/b": spec}."""
    return {f"{group}/{name}": spec for group, specs in groups.items() for name, spec in specs.items()}


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
) -> Float[Array, "*B P D"]:
    """Multi-head self-attention over the tokens of each frame, scale 1 / sqrt(D / heads).

    Args:
      params: "q_proj", "k_proj", "v_proj", "out_proj".
      implementation: of `jax.nn.dot_product_attention`; "cudnn" needs a GPU and a 16-bit dtype, and writes no
        scores.
      mask: which keys (last axis) each token sees, see `attend`; None: all.
    """

    def heads(name: str) -> Array:
        return linear(x, params[name], dtype).reshape(*x.shape[:-1], num_heads, -1)

    def local(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        flat = (y.reshape(-1, *y.shape[-3:]) for y in (q, k, v))
        seen = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
        return attend(*flat, implementation, seen).reshape(q.shape)

    attended = per_shard(local)(heads("q_proj"), heads("k_proj"), heads("v_proj"), mask)
    return linear(attended.reshape(x.shape), params["out_proj"], dtype)


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
) -> Float[Array, "*B P D"]:
    """h = x + attention(LN(x)); out = h + mlp(LN(h)). The residual stream keeps x's dtype.

    Args:
      rate: dropout after the attention, after the GELU and after the MLP.
      key: for dropout; None = none.
      mask: which keys each token sees; None: all.
      approximate: GELU by tanh, or exact.
    """
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    normed = layer_norm(x, params["attn_norm"])
    attended = attention(normed, params["attn"], num_heads, dtype, implementation, mask)
    x = x + dropout(attended, rate, keys[0]).astype(x.dtype)
    update = mlp(layer_norm(x, params["mlp_norm"]), params["mlp"], dtype, rate, keys[1], approximate)
    return x + dropout(update, rate, keys[2]).astype(x.dtype)


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
