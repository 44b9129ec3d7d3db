"""RandAugment (arXiv:1909.13719) for clips: a few random operations of one magnitude, in sequence.

A clip is float32 [T, H, W, 3] in [0, 1], and all of its frames get the same operation, drawn once. Operations
that look at the pixels (autocontrast, equalize, contrast) look at all frames together: done frame by frame
they would flicker. A clip of one frame gets what PIL gives an image, but for the rounding to 8 bits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from models.common.shapes import Key
from tasks.video.geometry import Clip, Scalar, rotation, shear, translation, warp

_FILL = 0.5  # grey, for what an operation leaves empty
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's
# What full strength means. Those of the paper, but for the last, which it does not have.
_MOST_DEGREES = 30.0
_MOST_SHEAR = 0.3
_MOST_SHIFT = 150 / 331
_MOST_BLEND = 0.9
_MOST_BITS_LOST = 8
_MOST_CUTOUT = 0.4


class Draw(NamedTuple):
    """What an operation may use.

    Attributes:
      strength: 0 to 1 (full range) and beyond.
      sign: -1 or 1.
      place: two numbers in [0, 1).
    """

    strength: float
    sign: Float[Array, ""]
    place: Float[Array, "2"]


def luma(clip: Clip) -> Float[Array, "T height width 1"]:
    """Brightness as the eye sees it, ITU-R 601."""
    return jnp.sum(clip * jnp.asarray(_LUMA), axis=-1, keepdims=True)


def blend(base: Float[Array, "..."], clip: Clip, factor: Scalar) -> Clip:
    """base + factor (clip - base), in [0, 1]: factor 0 gives the base, 1 the clip, 2 its exaggeration."""
    return jnp.clip(base + factor * (clip - base), 0.0, 1.0)


def brightness(clip: Clip, factor: Scalar) -> Clip:
    """Towards black (below 1), or away from it."""
    return jnp.clip(clip * factor, 0.0, 1.0)


def contrast(clip: Clip, factor: Scalar) -> Clip:
    """Towards a grey of the clip's mean brightness, or away from it."""
    return blend(jnp.mean(luma(clip)), clip, factor)


def saturation(clip: Clip, factor: Scalar) -> Clip:
    """Towards grey levels, or away from them; "color" in PIL and the paper."""
    return blend(luma(clip), clip, factor)


def sharpness(clip: Clip, factor: Scalar) -> Clip:
    """Towards a frame smoothed by (1 1 1; 1 5 1; 1 1 1) / 13, or away from it; edge pixels stay."""
    if min(clip.shape[1:3]) < 3:
        return clip
    rows = clip[:, :-2] + clip[:, 1:-1] + clip[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    smooth = (box + 4 * clip[:, 1:-1, 1:-1]) / 13
    return blend(clip.at[:, 1:-1, 1:-1].set(smooth), clip, factor)


def autocontrast(clip: Clip) -> Clip:
    """Stretches each colour so that its darkest pixel is 0 and its lightest 1."""
    low = jnp.min(clip, axis=(0, 1, 2))
    span = jnp.max(clip, axis=(0, 1, 2)) - low
    return jnp.where(span > 0, (clip - low) / jnp.where(span > 0, span, 1.0), clip)


def equalize(clip: Clip) -> Clip:
    """Maps the 256 levels of each colour so that all are about equally frequent (PIL's rule)."""
    level = _levels(clip) + 256 * jnp.arange(3)
    counts = jnp.zeros((3 * 256,), jnp.int32).at[level.ravel()].add(1).reshape(3, 256)
    lightest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1)
    pixels = clip.size // 3
    step = (pixels - jnp.take_along_axis(counts, lightest[:, None], axis=1)) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    table = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    table = jnp.where(step > 0, table, jnp.arange(256))
    return (table.ravel()[level] / 255).astype(clip.dtype)


def posterize(clip: Clip, bits: int) -> Clip:
    """Keeps the `bits` highest of the 8 bits of every value."""
    lost = 8 - bits
    return ((_levels(clip) >> lost << lost) / 255).astype(clip.dtype)


def solarize(clip: Clip, threshold: float) -> Clip:
    """Inverts what is at least `threshold` of 255."""
    return jnp.where(_levels(clip) >= threshold, 1.0 - clip, clip)


def cutout(clip: Clip, side: float, place: Float[Array, "2"]) -> Clip:
    """Greys out a rectangle of `side` times the frame's height and width, in all frames.

    Its middle is at `place` (y, x), shares of the frame; what would lie outside is cut off.
    """
    masks = []
    for size, middle in zip(clip.shape[1:3], place, strict=True):
        distance = jnp.abs((jnp.arange(size) + 0.5) / size - middle)
        masks.append(distance < side / 2)
    return jnp.where((masks[0][:, None] & masks[1])[..., None], _FILL, clip)


def _levels(clip: Clip) -> Array:
    return jnp.round(clip * 255).astype(jnp.int32)


def _factor(draw: Draw) -> Scalar:
    # A factor of 0 or less would show nothing, or a negative.
    return jnp.maximum(1 + draw.sign * _MOST_BLEND * draw.strength, 0.1)


def _rotate(clip: Clip, draw: Draw) -> Clip:
    return warp(clip, rotation(jnp.deg2rad(draw.sign * _MOST_DEGREES * draw.strength)), _FILL)


def _shear(clip: Clip, draw: Draw, x: int, y: int) -> Clip:
    amount = draw.sign * _MOST_SHEAR * draw.strength
    return warp(clip, shear(x * amount, y * amount), _FILL)


def _translate(clip: Clip, draw: Draw, x: int, y: int) -> Clip:
    amount = draw.sign * _MOST_SHIFT * draw.strength
    return warp(clip, translation(x * amount * clip.shape[2], y * amount * clip.shape[1]), _FILL)


def _posterize(clip: Clip, draw: Draw) -> Clip:
    return posterize(clip, max(1, 8 - round(_MOST_BITS_LOST * draw.strength)))


Operation = Callable[[Clip, Draw], Clip]
OPERATIONS: dict[str, Operation] = {
    "identity": lambda clip, draw: clip,
    "autocontrast": lambda clip, draw: autocontrast(clip),
    "equalize": lambda clip, draw: equalize(clip),
    "invert": lambda clip, draw: 1.0 - clip,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda clip, draw: solarize(clip, 256 * max(0.0, 1 - draw.strength)),
    "color": lambda clip, draw: saturation(clip, _factor(draw)),
    "contrast": lambda clip, draw: contrast(clip, _factor(draw)),
    "brightness": lambda clip, draw: brightness(clip, _factor(draw)),
    "sharpness": lambda clip, draw: sharpness(clip, _factor(draw)),
    "shear_x": functools.partial(_shear, x=1, y=0),
    "shear_y": functools.partial(_shear, x=0, y=1),
    "translate_x": functools.partial(_translate, x=1, y=0),
    "translate_y": functools.partial(_translate, x=0, y=1),
    "cutout": lambda clip, draw: cutout(clip, _MOST_CUTOUT * draw.strength, draw.place),
}


def randaugment(
    clip: Clip, key: Key, *, layers: int, strength: float, operations: tuple[str, ...] = tuple(OPERATIONS)
) -> Clip:
    """`layers` operations drawn with replacement, each in a random direction where it has two.

    Only the operation drawn is computed, unless the call is batched by `vmap`: use `lax.map` over clips.

    Args:
      clip: frames in [0, 1].
      key: of the draws.
      layers: operations in sequence (N of the paper).
      strength: magnitude over the magnitude of full range. 1 means 30 degrees, a shear of 0.3, a shift of
        45 % of the side, a factor of 1 +- 0.9, 1 bit left, everything solarized, a grey rectangle of 40 % of
        the sides.
      operations: names to draw from, keys of `OPERATIONS`.

    Raises:
      KeyError: an unknown name.
    """
    chosen = [OPERATIONS[name] for name in operations]

    def apply(operation: Operation, clip: Clip, sign: Array, place: Array) -> Clip:
        return operation(clip, Draw(strength, sign, place))

    branches = [functools.partial(apply, operation) for operation in chosen]

    def layer(clip: Clip, draw: Array) -> tuple[Clip, None]:
        index = (draw[0] * len(branches)).astype(jnp.int32)
        sign = jnp.where(draw[1] < 0.5, -1.0, 1.0)
        return lax.switch(index, branches, clip, sign, draw[2:]), None

    return lax.scan(layer, clip, jax.random.uniform(key, (layers, 4)))[0]
