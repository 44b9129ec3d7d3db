"""Heads: what becomes of the encoded tokens. Each is causal: per frame, what it says of the clip so far.

"classes" averages tanh features over time (TRecViT), "readout" pools all tokens by attention, "dense"
classifies every patch of every frame.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels.linear_scan import linear_scan
from models.common.joined import PROJECTIONS, taken_apart
from models.common.layers import at_least_float32, linear
from models.common.shapes import Key, Params
from models.common.sharding import gathered, per_shard
from models.common.vit import dropout, layer_norm, mlp
from models.trecvit.config import TRecViTConfig, TRecViTRuntime
from models.trecvit.state import ReadoutState

Encoded = Float[Array, "B T P D"]
PerFrame = Float[Array, "B T C"]


class ClipOutput(NamedTuple):
    """Results for whole videos.

    Attributes:
      logits: [B, C] float32, mean over the clips.
      probs: [B, C], mean over the clips of their softmax (with several clips not the softmax of `logits`).
    """

    logits: Float[Array, "B C"]
    probs: Float[Array, "B C"]


def split_clips(frames: int, frames_per_clip: int) -> tuple[int, int]:
    """(clips, frames of each): n = max(floor(T / frames_per_clip), 1) equal clips.

    Fewer frames than `frames_per_clip` are one short clip; up to twice as many one long clip.

    Raises:
      ValueError: T is not divisible by n.
    """
    clips = max(frames // frames_per_clip, 1)
    if frames % clips:
        fitting = [t for t in range(frames - 1, 0, -1) if t % max(t // frames_per_clip, 1) == 0]
        raise ValueError(
            f"{frames} frames make {clips} clips of frames_per_clip = {frames_per_clip}, and do not divide"
            f" into them; drop frames, for instance to {fitting[0]}"
        )
    return clips, frames // clips


def frame_features(
    config: TRecViTConfig, params: Params, encoded: Encoded, dtype: DTypeLike
) -> Float[Array, "B T R"]:
    """tanh(W pooled + b) per frame, float32; pooled is the class token, or the mean over the patches."""
    pooled = pool_tokens(config, encoded)
    return jnp.tanh(at_least_float32(linear(pooled, params["head"]["pre_logits"], dtype)))


def pool_tokens(config: TRecViTConfig, encoded: Encoded) -> Float[Array, "B T D"]:
    """One vector per frame."""
    if config.pool == "tok":
        return encoded[:, :, 0]
    return jnp.mean(at_least_float32(encoded), axis=2).astype(encoded.dtype)


def running_mean(
    x: Float[Array, "B T R"], positions: Int[Array, "B T"], mean: Float[Array, "B R"] | None
) -> tuple[Float[Array, "B T R"], Float[Array, "B R"]]:
    """Mean over the frames of the clip so far: m_t = p/(p+1) m_{t-1} + x_t/(p+1), a linear recurrence.

    At a start p = 0: the factor of the past is 0. The mean never grows, so a stream has no longest length.
    """
    before = positions[..., None].astype(x.dtype)
    decay = jnp.broadcast_to(before / (before + 1), x.shape)

    def local(x: Array, decay: Array, mean: Array | None) -> tuple[Array, Array]:
        means, last = linear_scan(x, decay, mean)[:2]
        return means, last

    return per_shard(local)(x / (before + 1), decay, mean)


def classify(
    params: Params, features: Float[Array, "*B R"], dtype: DTypeLike, rate: float, key: Key | None
) -> Float[Array, "*B C"]:
    """Dropout, then the linear classifier; float32 logits."""
    return at_least_float32(linear(dropout(features, rate, key), params["head"]["classes"], dtype))


def stream_classes(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    encoded: Encoded,
    positions: Int[Array, "B T"],
    mean: Float[Array, "B R"] | None = None,
    rng: Key | None = None,
) -> tuple[PerFrame, Float[Array, "B R"]]:
    """Per frame the logits of the clip up to it: what the model says of frames 0..t. And the memory after."""
    features = frame_features(config, params, encoded, runtime.compute_dtype)
    means, last = running_mean(features, positions, mean)
    return classify(params, means, runtime.compute_dtype, config.head_dropout, rng), last


def clip_classes(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    encoded: Encoded,
    clips: int,
    rng: Key | None = None,
) -> ClipOutput:
    """Whole clips, laid one after the other in time."""
    features = frame_features(config, params, encoded, runtime.compute_dtype)
    features = features.reshape(features.shape[0], clips, -1, features.shape[-1]).mean(axis=2)
    return average_clips(classify(params, features, runtime.compute_dtype, config.head_dropout, rng))


def average_clips(logits: Float[Array, "B clips C"]) -> ClipOutput:
    """Mean of the logits, and mean of the softmaxes."""
    return ClipOutput(logits.mean(axis=1), jax.nn.softmax(logits, axis=-1).mean(axis=1))


def stream_readout(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    encoded: Encoded,
    positions: Int[Array, "B T"],
    state: ReadoutState | None = None,
    rng: Key | None = None,
) -> tuple[PerFrame, ReadoutState]:
    """Attention read-out: one learnt query attends to every token of the clip up to the frame, then an MLP.

    z = q + W_o attend(q, LN(tokens)); z = z + MLP(LN(z)); logits = W LN(z) + b. The softmax over space and
    time is carried on from frame to frame by its running maximum and sums, so streaming is exact.
    """
    head, dtype, heads = params["head"], runtime.compute_dtype, config.num_heads
    tokens, maps = layer_norm(encoded, head["norm"]), taken_apart(head["attn"], PROJECTIONS)
    k, v = (
        linear(tokens, maps[name], dtype).reshape(*tokens.shape[:-1], heads, -1)
        for name in ("k_proj", "v_proj")
    )
    query = gathered(head["query"])
    q = linear(query, maps["q_proj"], dtype).reshape(heads, -1)
    queries = jnp.broadcast_to(q, (encoded.shape[0], *q.shape))  # the batch first, as `per_shard` needs it

    def local(
        q: Array, k: Array, v: Array, positions: Array, state: ReadoutState | None
    ) -> tuple[ReadoutState, ReadoutState]:
        return _running_softmax(_frame_softmax(q, k, v), positions, state)

    sums, last = per_shard(local)(queries, k, v, positions, state)
    pooled = (sums.values / sums.total[..., None]).reshape(*positions.shape, -1)
    z = query + at_least_float32(linear(pooled, head["attn"]["out_proj"], dtype))
    z = z + at_least_float32(mlp(layer_norm(z, head["mlp_norm"]), head["mlp"], dtype))
    return classify(params, layer_norm(z, head["final_norm"]), dtype, config.head_dropout, rng), last


def _frame_softmax(q: Array, k: Array, v: Array) -> ReadoutState:
    """Sums over the tokens of each frame, float32: leaves [B, T, N, ...]."""
    scores = jnp.einsum("bnh,btpnh->btnp", at_least_float32(q), at_least_float32(k)) * q.shape[-1] ** -0.5
    highest = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - highest[..., None])
    return ReadoutState(
        highest, weights.sum(axis=-1), jnp.einsum("btnp,btpnh->btnh", weights, at_least_float32(v))
    )


def _running_softmax(
    frames: ReadoutState, positions: Int[Array, "B T"], state: ReadoutState | None
) -> tuple[ReadoutState, ReadoutState]:
    """Sums over the clip up to each frame, and after the last one: a linear recurrence.

    Relative to the largest score M_t so far, S_t = exp(M_{t-1} - M_t) S_{t-1} + exp(m_t - M_t) s_t.
    """
    # The gradient of an associative scan over (maximum, sums) under a mesh crashes XLA's CPU compiler
    # (jaxlib 0.11.2); that of the linear scan is its own.
    starts = (positions == 0)[..., None]
    highest = _running_max(frames.highest, starts)
    if state is not None:
        continues = (positions > jnp.arange(positions.shape[1]))[..., None]
        highest = jnp.where(continues, jnp.maximum(highest, state.highest[:, None]), highest)
    first = highest[:, :1] if state is None else state.highest[:, None]
    before = jnp.concatenate([first, highest[:, :-1]], axis=1)
    decay = jnp.where(starts, 0, jnp.exp(before - highest))
    scale = jnp.exp(frames.highest - highest)
    size = frames.values.shape[-1] + 1
    sums = _joined(frames) * scale[..., None]
    flat, last = linear_scan(
        sums.reshape(*positions.shape, -1),
        jnp.repeat(decay, size, axis=-1),
        None if state is None else _joined(state).reshape(len(positions), -1),
    )[:2]
    flat, last = flat.reshape(sums.shape), last.reshape(len(positions), -1, size)
    return (
        ReadoutState(highest, flat[..., 0], flat[..., 1:]),
        ReadoutState(highest[:, -1], last[..., 0], last[..., 1:]),
    )


def _joined(state: ReadoutState) -> Array:
    """[..., N, 1 + H]: the total, then the values."""
    return jnp.concatenate([state.total[..., None], state.values], axis=-1)


def _running_max(x: Array, starts: Array) -> Array:
    """Largest value since the last start; no gradient passes (sums relative to any maximum are the same)."""

    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(late[1], late[0], jnp.maximum(early[0], late[0])), early[1] | late[1]

    whole = jnp.broadcast_to(starts, x.shape)
    return jax.lax.associative_scan(combine, (jax.lax.stop_gradient(x), whole), axis=1)[0]


def clip_readout(
    config: TRecViTConfig,
    runtime: TRecViTRuntime,
    params: Params,
    encoded: Encoded,
    positions: Int[Array, "B T"],
    clips: int,
    rng: Key | None = None,
) -> ClipOutput:
    """What the read-out says at the last frame of every clip."""
    logits, _ = stream_readout(config, runtime, params, encoded, positions, rng=rng)
    size = logits.shape[1] // clips
    return average_clips(logits[:, size - 1 :: size])


def dense_classes(
    config: TRecViTConfig, runtime: TRecViTRuntime, params: Params, encoded: Encoded, rng: Key | None = None
) -> Float[Array, "B T rows columns C"]:
    """Logits for every patch of every frame, on the grid of patches."""
    patches = encoded[:, :, 1:] if config.pool == "tok" else encoded
    logits = classify(params, patches, runtime.compute_dtype, config.head_dropout, rng)
    return logits.reshape(*logits.shape[:2], *config.grid, -1)
