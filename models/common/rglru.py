"""The recurrent block of Griffin and TRecViT: gates, RG-LRU, causal convolution, residuals, their memory.

Time is axis 1. Axes between time and channels ("*P": the tokens of a frame) are tubes that never mix; they
are not moved: the scan sees them as further channels. So [B, T, E] and [B, T, P, E] both work, and memory has
the batch first.

Every call takes `positions` [B, T]: how many frames lie between a frame and the start of its segment. 0 is a
start: nothing crosses it, neither the recurrence nor the convolution, in one call or in several.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.linear_scan import (
    input_scale,
    linear_scan,
    log_decay,
    rglru_scan,
    rglru_step,
    sharded_rglru_scan,
)
from models.common.block_diagonal import pre_activations
from models.common.fused_block import fused_block
from models.common.gated_gelu import GatedMLPImplementation, gated_gelu_mlp
from models.common.joined import BRANCHES, RATE, linear_each
from models.common.layers import at_least_float32, linear, rms_norm
from models.common.params import ZEROS, Init, ParamSpec, grouped, linear_specs
from models.common.recurrent_state import RecurrentState
from models.common.shapes import Key, Params
from models.common.sharding import active_mesh, gathered, per_shard, time_axis
from models.common.temporal_conv import temporal_conv
from models.common.vit import gelu

NORM_EPS = 1e-6
MAX_RADIUS = 0.999

Implementation = str | tuple[str, ...] | None


def frame_positions(like: Array, length: Int[Array, " B"] | None, reset: Array | None) -> Int[Array, "B T"]:
    """Frames since the start of the segment, for a stretch of frames.

    Args:
      like: [B, T, ...]; its layout under a mesh is kept.
      length: frames of the current segment that earlier calls saw; None = 0.
      reset: [B, T] bool, True where a segment starts.
    """
    zeros = jnp.zeros_like(like[(slice(None), slice(None), *[0] * (like.ndim - 2))], dtype=jnp.int32)
    index = zeros + jnp.arange(like.shape[1], dtype=jnp.int32)
    past = 0 if length is None else length[:, None]
    if reset is None:
        return past + index
    layout = None if active_mesh() is None else jax.typeof(index).sharding.spec
    if layout is not None:  # where the latest start lies needs all frames of a row
        reset = jax.sharding.reshard(reset, PartitionSpec(layout[0]))
    latest = jax.lax.cummax(jnp.where(reset, jnp.arange(like.shape[1], dtype=jnp.int32), -1), axis=1)
    if layout is not None:
        latest = jax.sharding.reshard(latest, layout)
    return jnp.where(latest < 0, past + index, index - latest)


def rg_lru(
    x: Float[Array, "B T *P E"],
    params: Params,
    positions: Int[Array, "B T"],
    state: Float[Array, "B *P E"] | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T *P E"], Float[Array, "B *P E"]]:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), log a_t = -8 r_t softplus(Lambda) (Griffin, 2.4).

    i and r are sigmoids of block-diagonal maps of x. At a start (position 0) h_{t-1} counts as 0 and the
    input enters with factor 1. Without a state h_{-1} = 0. Gates and recurrence are float32.

    Args:
      params: "input_gate", "a_gate" (see `block_diagonal`), "a_param" = Lambda (and what `join_params` makes
        of it); with "a_imag_param" = theta too, a_t turns by r_t theta and channels are E/2 complex numbers,
        [real half | imaginary half].
      state: h of the last frame before the call.
      dtype: of the gates' matmuls.
      implementation: of the scan (`kernels.linear_scan`).

    Returns:
      (h in x's dtype, h of the last frame in float32).
    """
    gate_x, gate_a = pre_activations(x, params, dtype)
    if (axis := time_axis(x)) is not None:
        return _split_scan(x, gate_x, gate_a, params, positions == 0, state, axis, implementation)
    # Axis 0 must be the batch for `per_shard`, so the channels' parameters get one copy per row.
    if "a_imag_param" in params:
        scan, names = _complex_scan, ["a_param", "a_imag_param"]
    elif x.shape[1] > 1:
        scan, names = _real_scan, ["a_param"]
    else:
        scan, names = _one_frame, ["a_param"] + [RATE] * (RATE in params)
    rows = [jnp.broadcast_to(gathered(params[name]), (x.shape[0], *params[name].shape)) for name in names]

    def local(
        x: Array, gate_x: Array, gate_a: Array, rows: list[Array], starts: Array, h: Array | None
    ) -> tuple[Array, Array]:
        return scan(x, gate_x, gate_a, [row[0] for row in rows], starts, h, implementation)

    return per_shard(local)(x, gate_x, gate_a, rows, positions == 0, state)


def _flat(x: Array) -> Array:
    """[B, T, *P, E] -> [B, T, P * E]: tubes as channels, without moving anything."""
    return x.reshape(*x.shape[:2], -1)


def _real_scan(
    x: Array,
    gate_x: Array,
    gate_a: Array,
    rows: list[Array],
    starts: Array,
    h: Array | None,
    implementation: Implementation,
) -> tuple[Array, Array]:
    tubes = math.prod(x.shape[2:-1])
    out, last = rglru_scan(
        _flat(x),
        _flat(gate_x),
        _flat(gate_a),
        jnp.tile(rows[0], tubes),
        None if h is None else h.reshape(h.shape[0], -1),
        starts,
        implementation=implementation,
    )[:2]
    return out.reshape(x.shape).astype(x.dtype), last.reshape(x.shape[0], *x.shape[2:])


def _one_frame(
    x: Array,
    gate_x: Array,
    gate_a: Array,
    rows: list[Array],
    starts: Array,
    h: Array | None,
    implementation: Implementation,
) -> tuple[Array, Array]:
    """`_real_scan` of T = 1, the same whatever the implementation. Nothing is reshaped, or XLA for GPUs would
    make several kernels of it.
    """
    start = starts.reshape(*starts.shape, *[1] * (x.ndim - 2))
    out = rglru_step(x, gate_x, gate_a, rows[0], None if h is None else h[:, None], start, *rows[1:])
    return out.astype(x.dtype), out[:, 0]


def _split_scan(
    x: Array,
    gate_x: Array,
    gate_a: Array,
    params: Params,
    starts: Array,
    h: Array | None,
    axis: str,
    implementation: Implementation,
) -> tuple[Array, Array]:
    """Of frames that are split over a mesh axis: devices exchange their last states (TAPNext++)."""
    if "a_imag_param" in params:
        raise ValueError(
            "frames are split over the mesh: the complex recurrence needs them whole (mesh.time = 1)"
        )
    out, last = sharded_rglru_scan(
        _flat(x),
        _flat(gate_x),
        _flat(gate_a),
        jnp.tile(gathered(params["a_param"]), math.prod(x.shape[2:-1])),
        None if h is None else h.reshape(h.shape[0], -1),
        starts,
        axis=axis,
        implementation=implementation,
    )
    return out.reshape(x.shape).astype(x.dtype), last.reshape(x.shape[0], *x.shape[2:])


def _complex_scan(
    x: Array,
    gate_x: Array,
    gate_a: Array,
    rows: list[Array],
    starts: Array,
    h: Array | None,
    implementation: Implementation,
) -> tuple[Array, Array]:
    start = starts.reshape(*starts.shape, *[1] * (x.ndim - 2))
    log_radius = log_decay(gate_a, rows[0])
    angle = jax.nn.sigmoid(gate_a) * rows[1]
    a = jnp.where(start, 0, jnp.exp(jax.lax.complex(log_radius, angle)))
    scale = jnp.where(start, 1, input_scale(log_radius))
    u = scale * jax.nn.sigmoid(gate_x) * _as_complex(x)
    first = None if h is None else _as_complex(h).reshape(h.shape[0], -1)
    out, last = linear_scan(_flat(u), _flat(a), first, implementation=implementation)[:2]
    out, last = out.reshape(u.shape), last.reshape(u.shape[0], *u.shape[2:])
    return _as_halves(out).astype(x.dtype), _as_halves(last)


def _as_complex(x: Array) -> Array:
    real, imaginary = jnp.split(at_least_float32(x), 2, axis=-1)
    return jax.lax.complex(real, imaginary)


def _as_halves(z: Array) -> Array:
    return jnp.concatenate([z.real, z.imag], axis=-1)


def recurrent_block(
    x: Float[Array, "B T *P D"],
    params: Params,
    positions: Int[Array, "B T"],
    state: RecurrentState | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T *P D"], RecurrentState]:
    """(RG-LRU(conv(x W_x + b_x)) * gelu(x W_y + b_y)) W_o + b_o (Griffin, section 2.3).

    Args:
      params: "linear_x", "linear_y", "conv", "rglru", "linear_out"; or joined (`models.common.joined`).
      state: memory of earlier calls; None = there were none.
      implementation: of the scan; None chooses, and where there is a kernel for all of the block, takes that.

    Returns:
      (output in `dtype`, the memory after the call: it continues exactly, whatever the chunk length).
    """
    if implementation is None:
        fused = fused_block(x, params, positions, state, dtype)
        if fused is not None:
            return fused
    branch, gate = linear_each(x, params, BRANCHES, dtype)
    branch, conv = temporal_conv(branch, params["conv"], positions, None if state is None else state.conv)
    h, last = rg_lru(
        branch, params["rglru"], positions, None if state is None else state.lru, dtype, implementation
    )
    # Without its barrier XLA keeps the GELU's tanh for the backward pass, in float32.
    gated = jax.checkpoint(lambda h, gate: h * gelu(gate))(h, gate)
    return linear(gated, params["linear_out"], dtype), RecurrentState(last, conv)


def residual_block(
    x: Float[Array, "B T *P D"],
    params: Params,
    positions: Int[Array, "B T"],
    state: RecurrentState | None = None,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation = None,
    gated_mlp: GatedMLPImplementation | None = None,
) -> tuple[Float[Array, "B T *P D"], RecurrentState]:
    """r = x + recurrent_block(RMSNorm(x)); with a "channel_mlp", r + MLP(RMSNorm(r)). Keeps x's dtype.

    The RMSNorms multiply by 1 + scale, epsilon 1e-6. Arguments as in `recurrent_block`, and:

    Args:
      gated_mlp: implementation of the "channel_mlp", see `gated_gelu_mlp`.
    """
    normed = rms_norm(x, 1 + params["temporal_norm"]["scale"], NORM_EPS)
    update, state = recurrent_block(normed, params["recurrent"], positions, state, dtype, implementation)
    x = x + update.astype(x.dtype)
    if "channel_mlp" in params:
        normed = rms_norm(x, 1 + params["channel_norm"]["scale"], NORM_EPS)
        x = x + gated_gelu_mlp(normed, params["channel_mlp"], dtype, gated_mlp).astype(x.dtype)
    return x, state


def a_param_from_uniform(
    u: Float[Array, "*B"], min_rad: float, max_rad: float = MAX_RADIUS
) -> Float[Array, "*B"]:
    """Lambda with exp(-softplus(Lambda)) = radius, radius^2 = u (max^2 - min^2) + min^2 (uniform by area)."""
    log_radius = 0.5 * jnp.log(u * (max_rad**2 - min_rad**2) + min_rad**2 + 1e-8)
    return jnp.log(jnp.exp(-log_radius) - 1.0)


@dataclasses.dataclass(frozen=True)
class RadiusInit:
    """Draws Lambda so that the squared radius is uniform in [min_rad^2, max_rad^2]."""

    min_rad: float
    max_rad: float = MAX_RADIUS

    def __call__(self, key: Key, shape: tuple[int, ...]) -> Array:
        return a_param_from_uniform(jax.random.uniform(key, shape, jnp.float32), self.min_rad, self.max_rad)


def rg_lru_specs(
    width: int,
    num_blocks: int,
    min_rad: float,
    max_rad: float = MAX_RADIUS,
    official: str = "",
    real: bool = True,
) -> dict[str, ParamSpec]:
    """Parameters of `rg_lru` by flat name: width E, G blocks; `real` = False for the complex recurrence.

    The gates' standard deviation is 1 / sqrt(E), not of the block's size: the official initialiser counts the
    block axis as fan-in.
    """
    size, inner = width // num_blocks, (width if real else width // 2) // num_blocks
    channels = inner * num_blocks
    start = Init("custom", draw=RadiusInit(min_rad, max_rad))
    specs = {"a_param": ParamSpec((channels,), ("norm",), start, f"{official}a_param")}
    if not real:
        theta = Init("uniform", 0.1 * math.pi)
        specs["a_imag_param"] = ParamSpec((channels,), ("norm",), theta, f"{official}a_imag_param")
    for gate in ("input_gate", "a_gate"):
        kernel = Init("normal", width**-0.5)
        shape = (num_blocks, size, inner)
        specs[f"{gate}/kernel"] = ParamSpec(shape, ("heads", "embed", None), kernel, f"{official}{gate}/w")
        specs[f"{gate}/bias"] = ParamSpec((num_blocks, inner), ("heads", None), ZEROS, f"{official}{gate}/b")
    return specs


def residual_block_specs(
    width: int,
    recurrent_width: int,
    num_blocks: int,
    taps: int,
    num_layers: int,
    min_rad: float,
    channel_mlp_size: int | None = None,
    official: str = "",
    real: bool = True,
) -> dict[str, ParamSpec]:
    """Parameters of `residual_block` by flat name.

    Args:
      width, recurrent_width, num_blocks, taps: D, E, G, J.
      num_layers: L; output projections start with variance 2 / (L fan_in).
      channel_mlp_size: hidden size of the gated MLP; None = no MLP.
      official: prefix of the official names, with its "/".
    """
    inner = f"{official}recurrent_block"
    into, out = Init("normal", width**-0.5), Init("normal", math.sqrt(2 / (num_layers * recurrent_width)))
    conv = Init("normal", math.sqrt(0.01 / taps))
    shape = (taps, recurrent_width)

    def norm(name: str) -> dict[str, ParamSpec]:
        return {"scale": ParamSpec((width,), ("norm",), ZEROS, f"{official}{name}/scale")}

    specs = grouped(
        {
            "temporal_norm": norm("temporal_pre_norm"),
            "recurrent/linear_y": linear_specs(
                width, recurrent_width, ("embed", "heads"), into, f"{inner}/linear_y"
            ),
            "recurrent/linear_x": linear_specs(
                width, recurrent_width, ("embed", "heads"), into, f"{inner}/linear_x"
            ),
            "recurrent/conv": {
                "kernel": ParamSpec(shape, (None, "norm"), conv, f"{inner}/conv_1d/w"),
                "bias": ParamSpec(shape[1:], ("norm",), ZEROS, f"{inner}/conv_1d/b"),
            },
            "recurrent/rglru": rg_lru_specs(
                recurrent_width, num_blocks, min_rad, official=f"{inner}/rg_lru/", real=real
            ),
            "recurrent/linear_out": linear_specs(
                recurrent_width, width, ("heads", "embed"), out, f"{inner}/linear_out"
            ),
        }
    )
    if channel_mlp_size is None:
        return specs
    size, mlp = channel_mlp_size, f"{official}mlp_block"
    up = Init("normal", (2 * width) ** -0.5)  # the official fan-in counts the leading 2
    down = Init("normal", math.sqrt(2 / (num_layers * size)))
    return specs | grouped(
        {
            "channel_norm": norm("channel_pre_norm"),
            "channel_mlp/up": {
                "kernel": ParamSpec((2, width, size), (None, "embed", "mlp"), up, f"{mlp}/ffw_up/w"),
                "bias": ParamSpec((2, size), (None, "mlp"), ZEROS, f"{mlp}/ffw_up/b", (2, 1, 1, size)),
            },
            "channel_mlp/down": linear_specs(size, width, ("mlp", "embed"), down, f"{mlp}/ffw_down"),
        }
    )
