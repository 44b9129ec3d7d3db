"""Cutting, resizing and warping the frames of one clip; every frame of a clip gets the same transform.

A crop that is also resized is two small matrices, one for the rows and one for the columns, whose size does
not depend on what was drawn: `jit` compiles one program for windows of any size. Coordinates are continuous,
in pixels of the source, and the first pixel covers [0, 1): as in PIL.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from models.common.shapes import Key

Clip = Float[Array, "T height width 3"]
Scalar = Float[Array, ""] | float
Size = tuple[int, int]

_ATTEMPTS = 10  # windows drawn before `area_window` falls back on the middle: torchvision's number


class Window(NamedTuple):
    """Part of a frame, in pixels: top and left edge, height and width."""

    top: Scalar
    left: Scalar
    height: Scalar
    width: Scalar


def middle_window(source: Size, extent: tuple[Scalar, Scalar]) -> Window:
    """The window of size `extent` (height, width) in the middle of frames of size `source`."""
    return Window((source[0] - extent[0]) / 2, (source[1] - extent[1]) / 2, *extent)


def covering_scale(source: Size, size: Size) -> float:
    """The least factor by which frames of size `source` must grow to cover `size`."""
    return max(size[0] / source[0], size[1] / source[1])


def scale_window(key: Key, source: Size, size: Size, scales: tuple[float, float]) -> Window:
    """Scale jitter (ViViT, TRecViT): frames resized by a random factor, then a random crop of `size`.

    Args:
      key: of the draws.
      source: height and width of the frames.
      size: height and width of the crop.
      scales: least and largest factor, uniform. A factor too small for the crop to fit into the resized frame
        is raised until it fits.
    """
    draw = jax.random.uniform(key, (3,))
    scale = jnp.maximum(_between(draw[0], scales), covering_scale(source, size))
    height = jnp.minimum(size[0] / scale, source[0])
    width = jnp.minimum(size[1] / scale, source[1])
    return Window(draw[1] * (source[0] - height), draw[2] * (source[1] - width), height, width)


def area_window(key: Key, source: Size, areas: tuple[float, float], aspects: tuple[float, float]) -> Window:
    """Random resized crop (Inception; torchvision): a window of random area and aspect, in whole pixels.

    The first of ten draws that fits into the frame; if none does, the middle of it, as large as `aspects`
    lets it be.

    Args:
      key: of the draws.
      source: height and width of the frames.
      areas: least and largest share of the frame's area, uniform.
      aspects: least and largest width / height, uniform in its logarithm.
    """
    draw = jax.random.uniform(key, (4, _ATTEMPTS))
    aspect = jnp.exp(_between(draw[1], (math.log(aspects[0]), math.log(aspects[1]))))
    pixels = _between(draw[0], areas) * (source[0] * source[1])
    height, width = jnp.round(jnp.sqrt(pixels / aspect)), jnp.round(jnp.sqrt(pixels * aspect))
    fits = (height >= 1) & (height <= source[0]) & (width >= 1) & (width <= source[1])
    ratio = source[1] / source[0]
    closest = min(max(ratio, aspects[0]), aspects[1])
    fallback = max(1, round(source[1] / max(closest, ratio))), max(1, round(source[0] * min(closest, ratio)))
    middle = middle_window(source, (float(fallback[0]), float(fallback[1])))
    top = jnp.floor(draw[2] * (source[0] - height + 1))
    left = jnp.floor(draw[3] * (source[1] - width + 1))
    drawn = (part[jnp.argmax(fits)] for part in (top, left, height, width))
    return Window(*(jnp.where(jnp.any(fits), a, jnp.floor(b)) for a, b in zip(drawn, middle, strict=True)))


def _between(draw: Array, bounds: tuple[float, float]) -> Array:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def resize_weights(start: Scalar, extent: Scalar, source: int, target: int) -> Float[Array, "target source"]:
    """The matrix that turns `source` pixels of a line into `target` that cover [start, start + extent).

    Bilinear; where the line shrinks, the triangle is as wide as a target pixel (antialiasing), as in PIL.
    """
    scale = jnp.asarray(extent, jnp.float32) / target
    centre = start + (jnp.arange(target) + 0.5) * scale - 0.5
    distance = jnp.abs(jnp.arange(source) - centre[:, None])
    weights = jnp.maximum(0.0, 1.0 - distance / jnp.maximum(scale, 1.0))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def resample(
    clip: Shaped[Array, "T height width 3"], window: Window, size: Size, flip: Bool[Array, ""] | None = None
) -> Float[Array, "T h w 3"]:
    """The window of every frame, resized to `size`, in the units of the input, float32.

    Args:
      clip: frames of any dtype.
      window: inside the frame.
      size: height and width of the result.
      flip: whether to mirror left and right; None: no.
    """
    height, width = clip.shape[1:3]
    rows = resize_weights(window.top, window.height, height, size[0])
    columns = resize_weights(window.left, window.width, width, size[1])
    if flip is not None:
        columns = jnp.where(flip, columns[::-1], columns)
    # Exact products: the default of GPUs and TPUs would round pixels and weights to fewer bits.
    precision = lax.Precision.HIGHEST
    frames = jnp.einsum("yh,thwc->tywc", rows, clip.astype(jnp.float32), precision=precision)
    return jnp.einsum("xw,tywc->tyxc", columns, frames, precision=precision)


def crop(clip: Shaped[Array, "T height width 3"], key: Key, size: Size) -> Shaped[Array, "T h w 3"]:
    """A random window of whole pixels: nothing is resampled.

    Args:
      clip: frames at least as large as `size`.
      key: of the draws.
      size: height and width.
    """
    spare = jnp.asarray((clip.shape[1] - size[0], clip.shape[2] - size[1]))
    top, left = jnp.floor(jax.random.uniform(key, (2,)) * (spare + 1)).astype(jnp.int32)
    return lax.dynamic_slice(clip, (0, top, left, 0), (clip.shape[0], *size, 3))


def rotation(angle: Scalar) -> Float[Array, "2 3"]:
    """The matrix for `warp` that turns a frame about its middle by `angle` radians."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin, jnp.zeros(())]), jnp.stack([-sin, cos, jnp.zeros(())])])


def shear(x: Scalar, y: Scalar) -> Float[Array, "2 3"]:
    """The matrix for `warp` that slants a frame: x pixels to the side per row, y pixels down per column."""
    return jnp.asarray([[1.0, x, 0.0], [y, 1.0, 0.0]], jnp.float32)


def translation(x: Scalar, y: Scalar) -> Float[Array, "2 3"]:
    """The matrix for `warp` that shows what lies x pixels to the right and y pixels below."""
    return jnp.asarray([[1.0, 0.0, x], [0.0, 1.0, y]], jnp.float32)


def warp(clip: Clip, matrix: Float[Array, "2 3"], fill: float) -> Clip:
    """Every frame under an affine map, by bilinear sampling; `fill` where it looks outside.

    Args:
      clip: frames.
      matrix: takes (x, y, 1) of a result pixel, counted from the middle of the frame, to (x, y) of the place
        in the frame that it shows.
      fill: value of pixels that show no part of the frame.
    """
    height, width = clip.shape[1:3]
    y = jnp.arange(height)[:, None] - (height - 1) / 2
    x = jnp.arange(width)[None, :] - (width - 1) / 2
    source_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + (width - 1) / 2
    source_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + (height - 1) / 2
    left, top = jnp.floor(source_x), jnp.floor(source_y)
    along, down = source_x - left, source_y - top
    result = jnp.zeros_like(clip)
    for row, row_weight in ((top, 1 - down), (top + 1, down)):
        for column, column_weight in ((left, 1 - along), (left + 1, along)):
            rows = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            columns = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            result += clip[:, rows, columns] * (row_weight * column_weight)[..., None]
    inside = (source_x >= -0.5) & (source_x < width - 0.5) & (source_y >= -0.5) & (source_y < height - 0.5)
    return jnp.where(inside[..., None], result, fill)
