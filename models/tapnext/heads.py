"""From features to tracks: the two heads, the truncated soft-argmax, certainty and visibility.

All in float32 (sheet 1.5, 1.6). Of the coordinate logits those of y come first; bin k is pixel k, its centre
k + 0.5.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from models.common.layers import at_least_float32, linear
from models.common.shapes import Params
from models.common.vit import gelu, layer_norm
from models.tapnext.config import TAPNextConfig

Anywhere = Array | np.ndarray


class Readout(NamedTuple):
    """What the model says of every point in every frame, float32.

    Attributes:
      tracks_yx: [*L, B, Q, T, 2], (y, x) in pixels of the native image, between 0.5 and its size - 0.5.
      track_logits: [*L, B, Q, T, bins], of the bins along y, then along x.
      visible_logits: [*L, B, Q, T], of the point being visible; above 0 it is.
    """

    tracks_yx: Float[Array, "*L B Q T 2"]
    track_logits: Float[Array, "*L B Q T bins"]
    visible_logits: Float[Array, "*L B Q T"]


def mlp_head(config: TAPNextConfig, params: Params, features: Float[Array, "*B D"]) -> Float[Array, "*B out"]:
    """Dense, LayerNorm, GELU, dense, LayerNorm, GELU, dense, in float32.

    Args:
      params: "dense_0", "norm_0", "dense_1", "norm_1", "out".
    """
    x = at_least_float32(features)
    for layer in ("0", "1"):
        x = linear(x, params[f"dense_{layer}"], x.dtype)
        x = gelu(layer_norm(x, params[f"norm_{layer}"], config.head_eps), config.approximate_gelu)
    return linear(x, params["out"], x.dtype)


def read_out(
    config: TAPNextConfig, params: Params, features: Float[Array, "*L B Q T D"], last: bool = True
) -> Readout:
    """Both heads on features of the points.

    Args:
      params: canonical tree of the model.
      features: of the last layer, or of any.
      last: whether the final norm comes first. It does for the model's answer; the read-outs of the layers
        do without (and so the last layer is read twice, once each way).
    """
    x = at_least_float32(features)
    if last:
        x = layer_norm(x, params["norm"], config.head_eps)
    logits = mlp_head(config, params["coordinate_head"], x)
    visible = mlp_head(config, params["visible_head"], x)[..., 0]
    return Readout(decode_tracks(config, logits), logits, visible)


def decode_tracks(config: TAPNextConfig, track_logits: Float[Array, "*B bins"]) -> Float[Array, "*B 2"]:
    """(y, x) in pixels from the logits of both axes; see `soft_argmax`."""
    rows, columns = split_bins(config, track_logits)
    return jnp.stack(
        [soft_argmax(x, config.decode_radius, config.decode_temperature) for x in (rows, columns)], axis=-1
    )


def split_bins(
    config: TAPNextConfig, track_logits: Float[Array, "*B bins"]
) -> tuple[Float[Array, "*B rows"], Float[Array, "*B columns"]]:
    """Logits along y and along x.

    Raises:
      ValueError: another number of logits than the config's bins.
    """
    if track_logits.shape[-1] != sum(config.bins):
        raise ValueError(
            f"track_logits has {track_logits.shape[-1]} bins; this TAPNextConfig has {config.bins} (y, x)"
        )
    return track_logits[..., : config.bins[0]], track_logits[..., config.bins[0] :]


def soft_argmax(logits: Float[Array, "*B bins"], radius: int, temperature: float) -> Float[Array, "*B"]:
    """sum_k p_k k + 0.5 over the bins within `radius` of the first largest logit, p = softmax(temperature l).

    The window counts as constant: gradients flow through the weights in it only.
    """
    bins = jnp.arange(logits.shape[-1])
    peak = jax.lax.stop_gradient(jnp.argmax(logits, axis=-1, keepdims=True))
    near = jnp.abs(bins - peak) <= radius
    weights = jax.nn.softmax(temperature * logits, axis=-1, where=near)
    # A sum of products, not a matmul: on GPUs and TPUs that would round pixels to 8 or 11 bits.
    return jnp.sum(weights * bins.astype(logits.dtype), axis=-1) + 0.5


def certainty(
    config: TAPNextConfig,
    track_logits: Float[Array, "*B bins"],
    tracks_yx: Float[Array, "*B 2"],
    radius: float = 8.0,
) -> Float[Array, "*B"]:
    """Probability that the point is within `radius` pixels of the prediction (sheet 1.6).

    The mass, under softmax(l_y) x softmax(l_x), of the bins whose centres lie within that distance of
    (y, x): by definition, at any radius and next to any border (the official implementations are not).

    Raises:
      ValueError: a radius that is not positive.
    """
    if not radius > 0:
        raise ValueError(f"radius = {radius}; it must be positive (pixels)")
    masses, squares = [], []
    for axis, logits in enumerate(split_bins(config, track_logits)):
        place, bins = tracks_yx[..., axis, None], logits.shape[-1]
        # Only bins this close can count: a window of fixed size, shifted to lie inside the image.
        size = min(bins, 2 * math.ceil(radius) + 2)
        start = jnp.clip(jnp.floor(place - radius - 0.5).astype(jnp.int32), 0, bins - size)
        index = start + jnp.arange(size)
        masses.append(jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), index, axis=-1))
        squares.append((index.astype(place.dtype) + 0.5 - place) ** 2)
    inside = squares[0][..., :, None] + squares[1][..., None, :] <= radius**2 + 1e-8
    rows = jnp.sum(jnp.where(inside, masses[1][..., None, :], 0), axis=-1)
    return jnp.sum(masses[0] * rows, axis=-1)


def is_visible(
    visible_logits: Float[Anywhere, "*B"], certainty: Float[Array, "*B"] | None = None
) -> Bool[Anywhere, "*B"]:
    """Visibility logit > 0; gated by certainty: sigmoid(v) certainty > 0.5.

    Without certainty, logits on the host are judged there.
    """
    if certainty is None:
        return visible_logits > 0
    return jax.nn.sigmoid(visible_logits) * certainty > 0.5
