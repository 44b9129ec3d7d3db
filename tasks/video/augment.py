"""Augmentation of video clips on the device, under jit: a pure function of the frames and a key.

Cut to size (with scale jitter or a random area), mirror, RandAugment, colour jitter, colour drop, mixup or
cutmix, label smoothing, in this order. One transform is drawn per clip and applied to all its frames. What is
switched off is not compiled, and with everything off the frames are only divided by 255.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from configs.common import nearest
from models.common.shapes import Key
from models.common.sharding import per_shard
from tasks.common.errors import ConfigError
from tasks.video import geometry, randaugment
from tasks.video.geometry import Clip
from tasks.video.mixing import mix, soft_targets

Frames = UInt8[Array, "B T height width 3"]
Crop = Literal["middle", 0, 1, 2]

# Source pixels turned to float32 at a time: 2^27 take half a GiB.
_CHUNK_PIXELS = 1 << 27


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What happens to training clips. By default they are only cut to `size`, at a random place.

    size: height and width of the frames the model sees, in pixels.
    crop: "scale": resize by a random factor of `scale`, then cut `size` at random (ViViT, TRecViT); "area":
      cut a random share of the area, of random aspect, and resize it to `size` (torchvision's
      RandomResizedCrop).
    scale: least and largest factor of "scale", of the loader's frames; (0.875, 1.33) for TRecViT on frames of
      256 and size 224. Raised where the crop would not fit.
    area, aspect: of "area": least and largest share, least and largest width / height.
    flip: probability of mirroring left and right; 0 where classes tell left from right (SSv2).
    randaugment_layers: RandAugment operations per clip (N); 0: off; 2 for SSv2.
    randaugment_magnitude: M; 20 for SSv2.
    randaugment_full: the magnitude of full range (`randaugment.randaugment`): 30, as in torchvision. On the
      scale of the paper's TensorFlow code it is 10, and a magnitude of 20 doubles the ranges.
    randaugment_operations: names to draw from.
    color_probability: of colour jitter: brightness, contrast and saturation times a factor of 1 +- their
      strength, hue turned by up to +- `hue` of the colour circle, in random order.
    brightness, contrast, saturation, hue: strengths.
    gray_probability: of dropping all colour.
    mixup_alpha, cutmix_alpha: of Beta(alpha, alpha); 0: off.
    cutmix_probability: share of the clips that get cutmix rather than mixup, where both are on.
    label_smoothing: mass of the targets spread over all classes.
    repeats: times each clip is augmented anew within a batch: the loss sees repeats x B rows.
    """

    size: tuple[int, int] = (224, 224)
    crop: Literal["scale", "area"] = "scale"
    scale: tuple[float, float] = (1.0, 1.0)
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0
    randaugment_layers: int = 0
    randaugment_magnitude: float = 20.0
    randaugment_full: float = 30.0
    randaugment_operations: tuple[str, ...] = tuple(randaugment.OPERATIONS)
    color_probability: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray_probability: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_probability: float = 0.5
    label_smoothing: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        low, high = "least first, then largest", "above 0"
        checks = {
            "size": (len(self.size) == 2 and min(self.size) >= 1, "(height, width), at least 1 pixel each"),
            "crop": (self.crop in ("scale", "area"), "'scale' or 'area'"),
            "scale": (_is_range(self.scale), f"two factors {high}, {low}"),
            "area": (_is_range(self.area) and self.area[1] <= 1, f"two shares in (0, 1], {low}"),
            "aspect": (_is_range(self.aspect), f"two ratios width / height {high}, {low}"),
            "randaugment_layers": (self.randaugment_layers >= 0, "0 (off) or more"),
            "randaugment_magnitude": (0 <= self.randaugment_magnitude <= 30, "between 0 and 30"),
            "randaugment_full": (self.randaugment_full > 0, "positive: 30, or 10"),
            "randaugment_operations": (bool(self.randaugment_operations), "at least one name"),
            "hue": (0 <= self.hue <= 0.5, "between 0 and 0.5 of the colour circle"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "repeats": (self.repeats >= 1, "at least 1"),
        }
        for name in ("flip", "color_probability", "gray_probability", "cutmix_probability"):
            checks[name] = (0 <= getattr(self, name) <= 1, "a probability, between 0 and 1")
        for name in ("brightness", "contrast", "saturation", "mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            checks[name] = (0 <= value < math.inf, "0 (off) or more")
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"augment.{name} = {getattr(self, name)!r}: must be {wanted}")
        for name in self.randaugment_operations:
            if name not in randaugment.OPERATIONS:
                hint = nearest(name, list(randaugment.OPERATIONS))
                raise ConfigError(f"augment.randaugment_operations: unknown operation {name!r}: {hint}")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed with each other."""
        return bool(self.mixup_alpha or self.cutmix_alpha)

    @property
    def paints(self) -> bool:
        """Whether pixels change by more than cutting and mirroring."""
        return bool(self.randaugment_layers or self.color_probability or self.gray_probability)


def _is_range(pair: tuple[float, float]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf


class Augmented(NamedTuple):
    """A batch for the model: float32 frames in [0, 1], and targets [rows, C] that sum to 1."""

    frames: Float[Array, "rows T h w 3"]
    targets: Float[Array, "rows C"]


def augment(
    config: AugmentConfig, frames: Frames, labels: Int[Array, " B"], key: Key, *, num_classes: int
) -> Augmented:
    """Training batch: augmented clips and their soft targets. The same key gives the same on any devices.

    Args:
      config: what to do.
      frames: uint8, of the loader.
      labels: of the clips; one outside [0, C) gives NaN targets.
      key: of all draws.
      num_classes: C.

    Returns:
      frames [repeats B, T, h, w, 3] (copies of one clip side by side) and targets [repeats B, C].

    Raises:
      ValueError: frames that are not uint8 [B, T, height, width, 3], or not one label per clip.
    """
    if labels.shape != frames.shape[:1]:
        raise ValueError(f"labels must have shape {frames.shape[:1]}, one per clip; got {labels.shape}")
    clip_key, mix_key = jax.random.split(key)
    clips = augment_frames(config, frames, clip_key)
    targets = soft_targets(labels, num_classes, config.label_smoothing)
    if config.repeats > 1:
        targets = per_shard(lambda x: jnp.repeat(x, config.repeats, axis=0))(targets)
    return Augmented(
        *mix(
            clips,
            targets,
            mix_key,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            cutmix_probability=config.cutmix_probability,
        )
    )


def augment_frames(config: AugmentConfig, frames: Frames, key: Key) -> Float[Array, "rows T h w 3"]:
    """The clips of `augment`, before any mixing: what masked auto-encoding trains on. Arguments as there."""
    _check(frames)
    keys = jax.random.split(key, (frames.shape[0], config.repeats, 2))

    def local(frames: Array, keys: Array) -> Array:
        if config.repeats > 1:
            frames = jnp.repeat(frames, config.repeats, axis=0)
        keys = keys.reshape(frames.shape[0], *keys.shape[2:])
        pixels = max(1, math.prod(frames.shape[1:]))
        # Several clips at a time, or small ones would be a long row of small steps.
        clips = lax.map(
            lambda row: cut(config, *row),
            (frames, keys[:, 0]),
            batch_size=max(1, min(frames.shape[0], _CHUNK_PIXELS // pixels)),
        )
        if not config.paints:
            return clips
        # One at a time: of several, every operation would be computed for all.
        return lax.map(lambda row: paint(config, *row), (clips, keys[:, 1]))

    return per_shard(local)(frames, keys)


def cut(config: AugmentConfig, clip: UInt8[Array, "T height width 3"], key: Key) -> Float[Array, "T h w 3"]:
    """One clip cut to size and mirrored, in [0, 1]."""
    window_key, flip_key = jax.random.split(key)
    source, size = (clip.shape[1], clip.shape[2]), config.size
    flip = jax.random.bernoulli(flip_key, config.flip) if config.flip else None
    if config.crop == "scale" and config.scale == (1.0, 1.0) and geometry.covering_scale(source, size) <= 1:
        part = geometry.crop(clip, window_key, size).astype(jnp.float32) / 255
        return part if flip is None else jnp.where(flip, part[:, :, ::-1], part)
    if config.crop == "scale":
        window = geometry.scale_window(window_key, source, size, config.scale)
    else:
        window = geometry.area_window(window_key, source, config.area, config.aspect)
    return jnp.clip(geometry.resample(clip, window, size, flip) / 255, 0.0, 1.0)


def paint(config: AugmentConfig, clip: Clip, key: Key) -> Clip:
    """RandAugment, colour jitter and colour drop of one clip."""
    random_key, color_key, gray_key = jax.random.split(key, 3)
    if config.randaugment_layers:
        clip = randaugment.randaugment(
            clip,
            random_key,
            layers=config.randaugment_layers,
            strength=config.randaugment_magnitude / config.randaugment_full,
            operations=config.randaugment_operations,
        )
    if config.color_probability:
        clip = jitter_color(config, clip, color_key)
    if config.gray_probability:
        gray = jax.random.bernoulli(gray_key, config.gray_probability)
        clip = jnp.where(gray, randaugment.luma(clip), clip)
    return clip


def jitter_color(config: AugmentConfig, clip: Clip, key: Key) -> Clip:
    """With `color_probability`: brightness, contrast, saturation, hue changed at random, in random order."""
    draw = jax.random.uniform(key, (9,))

    def factor(index: int, strength: float) -> Array:
        least = max(0.0, 1 - strength)
        return least + draw[index] * (1 + strength - least)

    turn = config.hue * (2 * draw[3] - 1)
    steps = [
        (config.brightness, lambda x: randaugment.brightness(x, factor(0, config.brightness))),
        (config.contrast, lambda x: randaugment.contrast(x, factor(1, config.contrast))),
        (config.saturation, lambda x: randaugment.saturation(x, factor(2, config.saturation))),
        (config.hue, lambda x: turn_hue(x, turn)),
    ]
    branches = [step for strength, step in steps if strength]
    if not branches:
        return clip
    order = jnp.argsort(draw[4 : 4 + len(branches)])

    def jittered(clip: Clip) -> Clip:
        return lax.fori_loop(0, len(branches), lambda i, x: lax.switch(order[i], branches, x), clip)

    return lax.cond(draw[8] < config.color_probability, jittered, lambda x: x, clip)


def turn_hue(clip: Clip, turn: Float[Array, ""] | float) -> Clip:
    """Turns every colour by `turn` of the colour circle, with its HSV saturation and value kept."""
    red, green, blue = clip[..., 0], clip[..., 1], clip[..., 2]
    value = jnp.max(clip, axis=-1)
    chroma = value - jnp.min(clip, axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    hue = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    place = hue[..., None] + 6 * turn + jnp.asarray((5.0, 3.0, 1.0))
    place = jnp.mod(place, 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def prepare_eval(config: AugmentConfig, frames: Frames, crop: Crop = "middle") -> Float[Array, "B T h w 3"]:
    """Clips cut to `config.size` for evaluation, in [0, 1]; of their size already, only divided by 255.

    Frames that do not cover `size` are enlarged until they do. Otherwise nothing is resized: whole pixels.

    Args:
      config: its `size` counts.
      frames: uint8, of the loader.
      crop: "middle", or 0, 1, 2: left, middle, right; or top, middle, bottom if more is cut off there.

    Raises:
      ValueError: frames that are not uint8 [B, T, height, width, 3], or an unknown crop.
    """
    _check(frames)
    if crop not in ("middle", 0, 1, 2):
        raise ValueError(
            f"crop = {crop!r}: must be 'middle', or 0, 1 or 2 of three crops along the longer side"
        )
    source, size = (frames.shape[2], frames.shape[3]), config.size
    scale = max(1.0, geometry.covering_scale(source, size))
    extent = [min(size[axis] / scale, source[axis]) for axis in (0, 1)]
    spare = [source[axis] - extent[axis] for axis in (0, 1)]
    position = [0.5, 0.5]
    if crop != "middle":
        position[int(spare[1] >= spare[0])] = crop / 2
    start = [spare[axis] * position[axis] for axis in (0, 1)]
    if scale == 1.0:
        top, left = (int(s) for s in start)
        part = frames[:, :, top : top + size[0], left : left + size[1]]
        return part.astype(jnp.float32) / 255
    window = geometry.Window(start[0], start[1], extent[0], extent[1])

    def local(frames: Array) -> Array:
        clips = lax.map(lambda clip: geometry.resample(clip, window, size), frames)
        return jnp.clip(clips / 255, 0.0, 1.0)

    return per_shard(local)(frames)


def _check(frames: Array) -> None:
    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != jnp.uint8:
        raise ValueError(
            f"frames must be uint8 [B, T, height, width, 3], as the loader gives them; got {frames.dtype} "
            f"{frames.shape}"
        )
