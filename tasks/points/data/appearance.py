"""What a camera adds to a scene: drifting light and colour, noise, compression. Nothing moves by it."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from tasks.common.optional import need
from tasks.points.data.paths import wander

_NOISE_BANK = 1.5  # side of the picture that every frame's noise is a window of, in sides of a frame


@dataclass(frozen=True)
class AppearanceConfig:
    """How much of each.

    exposure: share of clips with motion blur; the shutter is then open for up to 0.8 of a frame.
    drift: most change of brightness, contrast and colours over a clip, as a share.
    noise: most standard deviation of a pixel's noise, in grey levels.
    compressed: share of clips whose frames went through JPEG.
    quality: worst and best quality of it.
    """

    exposure: float = 0.5
    drift: float = 0.2
    noise: float = 8.0
    compressed: float = 0.4
    worst: int = 30
    best: int = 95

    def __post_init__(self) -> None:
        for name in ("exposure", "compressed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a share is between 0 and 1")
        if not 0 <= self.drift < 1 or self.noise < 0:
            raise ValueError(f"drift = {self.drift} must be in [0, 1), noise = {self.noise} at least 0")
        if not 1 <= self.worst <= self.best <= 100:
            raise ValueError(f"JPEG qualities {self.worst} to {self.best}: need 1 <= worst <= best <= 100")


def draw_exposure(rng: np.random.Generator, config: AppearanceConfig) -> float:
    """How long the shutter of a clip is open, as a share of the time between frames."""
    blurred, length = rng.random(2)
    return 0.2 + 0.6 * float(length) if blurred < config.exposure else 0.0


def finish(
    rng: np.random.Generator, frames: Float[np.ndarray, "T H W 3"], config: AppearanceConfig
) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames as a camera stores them.

    Args:
        rng: of all draws.
        frames: 0..255; used as scratch space.
        config: how much of each effect.
    """
    count, height, width = frames.shape[:3]
    gains, fall = _light(rng, count, height, width, config.drift)
    bank = _noise(rng, height, width, config.noise)
    compressed = rng.random() < config.compressed
    quality = int(rng.integers(config.worst, config.best + 1))
    result = np.empty(frames.shape, np.uint8)
    for i, frame in enumerate(frames):
        if config.drift > 0:
            frame *= gains[i, :3]
            frame += gains[i, 3:]
            frame *= fall[i]
        if bank is not None:
            top, left = rng.integers(np.subtract(bank.shape, frame.shape)[:2] + 1)
            frame += bank[top : top + height, left : left + width]
        frame += 0.5
        np.clip(frame, 0, 255, out=frame)
        result[i] = frame
        if compressed:
            result[i] = through_jpeg(result[i], quality)
    return result


def _light(
    rng: np.random.Generator, count: int, height: int, width: int, drift: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gains and offsets of the channels, [T, 6]; and a light that falls off to one side, [T, H, W, 1]."""
    bounds = np.array([*[drift] * 3, *[20 * drift] * 3, drift, drift])
    # All channels change together, and each a little by itself.
    path = wander(rng, count, rng.uniform(4, 24), bounds * rng.uniform(0.05, 0.4, 8), -bounds, bounds)
    values = path(np.arange(count))
    gains = 1 + 0.7 * values[:, :1] + 0.3 * values[:, :3]
    offsets = 0.7 * values[:, 3:4] + 0.3 * values[:, 3:6]
    y = np.linspace(-0.5, 0.5, height)[:, None]
    x = np.linspace(-0.5, 0.5, width)[None, :]
    fall = 1 + values[:, 6, None, None] * y + values[:, 7, None, None] * x
    return np.concatenate([gains, offsets], axis=1).astype(np.float32), fall[..., None].astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, most: float) -> np.ndarray | None:
    """A picture larger than a frame, windows of which are the frames' noise; None: there is none."""
    deviation = most * rng.random() ** 2
    if deviation < 0.3:
        return None
    shape = (int(height * _NOISE_BANK), int(width * _NOISE_BANK), 3)
    return rng.standard_normal(shape, np.float32) * np.float32(deviation)


def through_jpeg(frame: UInt8[np.ndarray, "H W 3"], quality: int) -> UInt8[np.ndarray, "H W 3"]:
    """A frame after JPEG of that quality (1..100)."""
    image_module = need("PIL.Image", "compressing frames")
    file = io.BytesIO()
    image_module.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(image_module.open(file))
