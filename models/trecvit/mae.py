"""Masked auto-encoding (TRecViT; VideoMAE): most tubes of patches are dropped, then painted back.

A tube is one patch through all frames. The encoder sees the kept tubes only: a tenth of the tokens. The
decoder, layers of the same kind, sees every patch: an encoded token where one was kept, else the mask token.
Both are causal in time, so the auto-encoder streams as the model does.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from models.common.layers import at_least_float32, linear
from models.common.params import (
    Init,
    ParamSpec,
    check_params,
    grouped,
    initialize,
    lecun_normal,
    linear_specs,
    logical_axes,
    norm_specs,
)
from models.common.recurrent_state import RecurrentState
from models.common.rglru import frame_positions
from models.common.shapes import Key, Params
from models.common.sharding import constrain, gathered, per_shard
from models.common.vit import as_float, patchify, sincos_positions
from models.trecvit.config import MAEConfig, TRecViTRuntime
from models.trecvit.model import Video, check_video, encode, tokenize
from models.trecvit.parameters import layer_specs, own, param_specs
from models.trecvit.state import init_layers

Kept = Int[Array, "B Q"]

# About the standard deviation of pixels in [0, 1]. Far smaller targets than what a fresh decoder says (of
# variance 1) teach it to say nothing before it has learnt anything.
CHANGE_UNIT = 0.25


class MAEState(NamedTuple):
    """Memory of encoder and decoder; every leaf has the batch first. The kept tubes are not part of it.

    Attributes:
      length: [B] int32, frames of the current clip seen so far.
      encoder, decoder: "0", "1", ... -> the recurrent block's memory.
    """

    length: Int[Array, " B"]
    encoder: dict[str, RecurrentState]
    decoder: dict[str, RecurrentState]


def mae_param_specs(config: MAEConfig) -> dict[str, ParamSpec]:
    """All parameters: "encoder/..." is a TRecViT without head; "decoder/..." has no official names."""
    small = config.decoder
    width, pixels = small.width, math.prod(small.patch_size) * 3
    layers = {f"layers/{i}": layer_specs(small, i) for i in range(small.depth)}
    decoder = grouped(
        {
            "embed": linear_specs(
                config.encoder.width, width, ("embed", "heads"), lecun_normal(config.encoder.width), ""
            ),
            **layers,
            "norm": norm_specs(width, ""),
            "pixels": linear_specs(width, pixels, ("embed", None), lecun_normal(width), ""),
        }
    )
    decoder["mask_token"] = ParamSpec((width,), ("norm",), Init("normal", 0.02), "")
    return grouped({"encoder": param_specs(config.encoder), "decoder": own(decoder)})


def init_mae_params(config: MAEConfig, key: Key) -> Params:
    """Initial parameters, float32; `params["encoder"]` is what a TRecViT of the same encoder takes."""
    return initialize(mae_param_specs(config), key)


def mae_param_axes(config: MAEConfig) -> Params:
    """Tree like the parameters whose leaves are tuples of logical axis names."""
    return logical_axes(mae_param_specs(config))


def init_mae_state(config: MAEConfig, batch: int, dtype: DTypeLike = jnp.float32) -> MAEState:
    """Empty memory of fixed shapes.

    Raises:
      ValueError: batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch}; it must be at least 1")
    tokens = config.num_kept + (config.encoder.pool == "tok")
    return MAEState(
        length=jnp.zeros((batch,), jnp.int32),
        encoder=init_layers(config.encoder, batch, tokens, dtype),
        decoder=init_layers(config.decoder, batch, config.decoder.num_tokens, dtype),
    )


def draw_kept_tubes(config: MAEConfig, key: Key, batch: int) -> Kept:
    """Which patches each video keeps, in all its frames: a random set per row, in ascending order."""
    patches, kept = config.encoder.num_patches, config.num_kept
    noise = jax.random.uniform(key, (batch, patches))
    return jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1).astype(jnp.int32)


def masked_patches(kept: Kept, num_patches: int) -> Bool[Array, "B P"]:
    """True for the patches that are not kept."""

    def local(kept: Array) -> Array:
        return ~jnp.any(kept[:, :, None] == jnp.arange(num_patches), axis=1)

    return per_shard(local)(kept)


def pixel_targets(
    video: Video, patch_size: tuple[int, int], normalize: bool = True
) -> Float[Array, "B T P pixels"]:
    """What the decoder should say: the pixels of every patch, float32.

    Args:
      video: pixels in [0, 1], or uint8.
      normalize: per patch and colour, (pixels - mean) / (std + 1e-6), std with the n - 1 divisor (VideoMAE).
    """
    patches = patchify(at_least_float32(as_float(video)), patch_size)
    if not normalize:
        return patches
    colours = patches.reshape(*patches.shape[:-1], -1, 3)
    centred = colours - colours.mean(axis=-2, keepdims=True)
    return (centred / (colours.std(axis=-2, keepdims=True, ddof=1) + 1e-6)).reshape(patches.shape)


def change_targets(video: Video, patch_size: tuple[int, int]) -> Float[Array, "B changes P pixels"]:
    """Of every patch of frames 1..T-1 its pixels minus those of the frame before: zero where nothing moves.

    What stands still, most of a video's pixels, asks nothing of the model: motion does.

    Args:
      video: at least two frames, pixels in [0, 1], or uint8.

    Returns:
      [B, T - 1, P, pixels], float32, in units of `CHANGE_UNIT`.

    Raises:
      ValueError: a single frame.
    """
    if video.shape[1] < 2:
        raise ValueError(f"video has {video.shape[1]} frame: what changes needs at least two")
    patches = pixel_targets(video, patch_size, normalize=False)
    return (patches[:, 1:] - patches[:, :-1]) / CHANGE_UNIT


def apply_mae(
    config: MAEConfig,
    runtime: TRecViTRuntime,
    params: Params,
    video: Video,
    kept: Kept,
    state: MAEState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    rng: Key | None = None,
) -> tuple[Float[Array, "B T P pixels"], MAEState | None]:
    """Paints every patch of every frame from the kept tubes of the frames up to it.

    Args:
      params: canonical tree (`init_mae_params`).
      video: [B, T, height, width, 3], pixels in [0, 1], or uint8.
      kept: [B, Q] patches the encoder sees (`draw_kept_tubes`), without repeats, the same in every call of a
        stream.
      state, reset, rng: as in `models.trecvit.apply`.

    Returns:
      (predictions in float32 for `pixel_targets` or `change_targets`; the state after the call, None if none
      was given).

    Raises:
      ValueError: parameters that are not this config's, or inputs that do not fit together.
    """
    check_params(mae_param_specs(config), params, config)
    check_video(config.encoder, video, None if state is None else state.length.shape[0], reset)
    if kept.shape != (video.shape[0], config.num_kept):
        raise ValueError(f"kept has shape {kept.shape}; it must be {(video.shape[0], config.num_kept)}")
    video = constrain(video, ("batch", "length", None, None, None))
    kept = constrain(kept, ("batch", None))
    positions = frame_positions(video, None if state is None else state.length, reset)
    encoder_rng, decoder_rng = (None, None) if rng is None else jax.random.split(rng)
    tokens = _take(tokenize(config.encoder, runtime, params["encoder"], video), kept, config)
    states = None if state is None else state.encoder
    encoded, encoder = encode(
        config.encoder, runtime, params["encoder"], tokens, positions, states, encoder_rng
    )
    x = _decoder_tokens(config, runtime, params["decoder"], encoded, kept)
    states = None if state is None else state.decoder
    x, decoder = encode(config.decoder, runtime, params["decoder"], x, positions, states, decoder_rng)
    pixels = at_least_float32(linear(x, params["decoder"]["pixels"], runtime.compute_dtype))
    if encoder is None or decoder is None:
        return pixels, None
    return pixels, MAEState(positions[:, -1] + 1, encoder, decoder)


def _take(tokens: Array, kept: Array, config: MAEConfig) -> Array:
    """The class token, if there is one, and the kept patches."""
    first = int(config.encoder.pool == "tok")

    def local(tokens: Array, kept: Array) -> Array:
        index = kept[:, None, :, None] + first
        patches = jnp.take_along_axis(tokens, index, axis=2)
        return jnp.concatenate([tokens[:, :, :first], patches], axis=2)

    return per_shard(local)(tokens, kept)


def _decoder_tokens(
    config: MAEConfig, runtime: TRecViTRuntime, params: Params, encoded: Array, kept: Array
) -> Any:
    """Kept tokens in their places, the mask token elsewhere, plus fixed positions; no class token."""
    small = config.decoder
    patches = encoded[:, :, 1:] if config.encoder.pool == "tok" else encoded
    seen = linear(patches, params["embed"], runtime.compute_dtype).astype(runtime.residual_dtype)
    shape = (*seen.shape[:2], small.num_patches, small.width)
    blank = jnp.broadcast_to(gathered(params["mask_token"]).astype(seen.dtype), shape)
    blank = constrain(blank, ("batch", "length", None, None))

    def local(blank: Array, seen: Array, kept: Array) -> Array:
        row = jnp.arange(kept.shape[0])[:, None]
        # Advanced indices around a slice come first: [B, Q, T, D].
        return blank.at[row, :, kept].set(jnp.swapaxes(seen, 1, 2), unique_indices=True)

    x = per_shard(local)(blank, seen, kept)
    return x + sincos_positions(small.grid, small.width).astype(x.dtype)
