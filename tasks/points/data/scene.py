"""A scene: textured layers, one before the other, on paths of their own, seen by a moving camera."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from tasks.points.data.paths import Spline, constant, wander
from tasks.points.data.textures import Photographs, cut_texture, draw_shape, wash
from tasks.points.data.warps import Matrices, Ripple, placements, project, random_ripple

_PAN = 0.4  # how far the camera looks to the side, in shorter sides of the frame
_OVER = 4  # pixels of background beyond what is ever seen
# Bounds of log scale, angle, log aspect, shear; and steps a frame, as shares of the typical speed.
_CAMERA_BOUNDS = np.array([0.3, 0.35, 0.0, 0.0])
_LAYER_BOUNDS = np.array([0.4, 20.0, 0.25, 0.25])
_RATES = np.array([0.6, 1.2, 0.25, 0.25])


@dataclass(frozen=True)
class SceneConfig:
    """What scenes are like. Speeds are in shorter sides of the frame per frame.

    fewest, most: layers before the background.
    smallest, largest: size of a layer, in shorter sides of the frame.
    slowest, fastest: typical speed of a layer, log-uniform.
    still: share of layers that do not move by themselves.
    camera: share of clips whose camera moves.
    ripple: share of layers whose material ripples.
    tilt: most perspective: change of scale from a layer's middle to its edge.
    soonest, latest: frames until a path turns, uniform. Paths keep near the frame: what is fast must turn
      soon.
    wash: share of a smooth wash of colours in every texture, see `textures.wash`; 0: photographs alone.
    """

    fewest: int = 2
    most: int = 8
    smallest: float = 0.15
    largest: float = 0.7
    slowest: float = 0.004
    fastest: float = 0.06
    still: float = 0.15
    camera: float = 0.7
    ripple: float = 0.25
    tilt: float = 0.2
    soonest: float = 5.0
    latest: float = 20.0
    wash: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fewest <= self.most <= 64:
            raise ValueError(f"{self.fewest} to {self.most} layers: need 0 <= fewest <= most <= 64")
        for low, high in (("smallest", "largest"), ("slowest", "fastest"), ("soonest", "latest")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"{low} = {getattr(self, low)}, {high} = {getattr(self, high)}: need 0 < {low} <= {high}"
                )
        for name in ("still", "camera", "ripple", "wash"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a share is between 0 and 1")
        if not 0 <= self.tilt < 0.5:
            raise ValueError(f"tilt = {self.tilt}: must be at least 0 and below 0.5")


@dataclass(frozen=True)
class Placing:
    """A homography that changes with time.

    path: its eight numbers, see `placements`.
    centre: (x, y) in the picture that it places.
    """

    path: Spline
    centre: tuple[float, float]

    def __call__(self, times: Float[np.ndarray, " n"]) -> Matrices:
        """Picture to result, at times in frames."""
        return placements(self.path(times), self.centre)


@dataclass(frozen=True, eq=False)
class Layer:
    """One thing.

    texture: RGBA: it is there where alpha is above a half.
    placing: texture to scene.
    ripple: of its material, see `warps.py`; None: it is rigid.
    """

    texture: UInt8[np.ndarray, "h w 4"]
    placing: Placing
    ripple: Ripple | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """What a clip shows.

    height, width, frames: of the clip.
    layers: from back to front; the first is the background, which fills every frame.
    camera: scene to frame.
    """

    height: int
    width: int
    frames: int
    layers: tuple[Layer, ...]
    camera: Placing


def draw_scene(
    rng: np.random.Generator, photographs: Photographs, height: int, width: int, frames: int,
    config: SceneConfig | None = None,
) -> Scene:  # fmt: skip
    """A random scene.

    Args:
        rng: of all draws.
        photographs: for the textures.
        height, width, frames: of the clip, pixels and number.
        config: what scenes are like.

    Raises:
        ValueError: a clip without frames, or of less than 16 pixels.
    """
    config = config or SceneConfig()
    if frames < 1 or min(height, width) < 16:
        raise ValueError(f"{frames} frames of {height} x {width} pixels: need at least 1 frame and 16 pixels")
    moves = rng.random() < config.camera
    camera = draw_camera(rng, height, width, frames, config, moves)
    count = int(rng.integers(config.fewest, config.most + 1))
    layers = [_layer(rng, photographs, height, width, frames, config) for _ in range(count)]
    background = _background(rng, photographs, height, width, frames, camera, config.wash)
    return Scene(height, width, frames, (background, *layers), camera)


def _placing(
    rng: np.random.Generator, frames: int, config: SceneConfig, speed: float, unit: float,
    bounds: np.ndarray, tilt: float, middle: tuple[float, float], reach: tuple[float, float],
    centre: tuple[float, float],
) -> Placing:  # fmt: skip
    """A path about `middle`, up to `reach` pixels from it, at a typical speed in units a frame."""
    spacing = rng.uniform(config.soonest, config.latest)
    middles = np.array([*middle, 0, 0, 0, 0, 0, 0.0])
    bounds = np.array([*reach, *bounds, tilt, tilt])
    rates = np.array([unit, unit, *_RATES * rng.uniform(0, 1, 4), tilt, tilt]) * speed
    rates[6:] *= 3 * rng.uniform(0, 1, 2)
    return Placing(wander(rng, frames, spacing, rates * spacing, middles - bounds, middles + bounds), centre)


def draw_camera(
    rng: np.random.Generator, height: int, width: int, frames: int, config: SceneConfig, moves: bool = True
) -> Placing:
    """A camera that pans, zooms, turns and tilts, or (not `moves`) one that stands still: scene to frame."""
    centre = (width / 2, height / 2)
    if not moves:
        return Placing(constant(np.array([*centre, 0, 0, 0, 0, 0, 0.0])), centre)
    unit = min(height, width)
    speed = 0.75 * _speed(rng, config)
    tilt = 0.3 * config.tilt / unit
    return _placing(
        rng, frames, config, speed, unit, _CAMERA_BOUNDS, tilt, centre, (_PAN * unit, _PAN * unit), centre
    )


def _speed(rng: np.random.Generator, config: SceneConfig) -> float:
    return float(np.exp(rng.uniform(np.log(config.slowest), np.log(config.fastest))))


def _layer(
    rng: np.random.Generator, photographs: Photographs, height: int, width: int, frames: int,
    config: SceneConfig,
) -> Layer:  # fmt: skip
    unit = min(height, width)
    size = unit * np.exp(rng.uniform(np.log(config.smallest), np.log(config.largest)))
    alpha = draw_shape(rng, size)
    picture = wash(rng, cut_texture(rng, photographs, *alpha.shape), config.wash)
    texture = np.dstack([picture, alpha])
    placing = draw_placing(rng, (alpha.shape[0], alpha.shape[1]), height, width, frames, config)
    ripple = None
    if rng.random() < config.ripple:
        turn = rng.uniform(config.soonest, config.latest)
        ripple = random_ripple(rng, frames, float(max(alpha.shape)), turn)
    return Layer(texture, placing, ripple)


def draw_placing(
    rng: np.random.Generator, shape: tuple[int, int], height: int, width: int, frames: int,
    config: SceneConfig,
) -> Placing:  # fmt: skip
    """The path of a layer whose texture is `shape` (rows, columns) pixels large, about the frame's middle."""
    speed = 0.0 if rng.random() < config.still else _speed(rng, config)
    return _placing(
        rng, frames, config, speed, min(height, width), _LAYER_BOUNDS, config.tilt / max(shape),
        (width / 2, height / 2), (0.6 * width, 0.6 * height), (shape[1] / 2, shape[0] / 2),
    )  # fmt: skip


def seen_part(camera: Placing, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
    """(left, top, columns, rows) of a box, in whole pixels of the scene, around all that the camera ever sees
    in a clip of so many frames of height x width pixels, exposures at its ends included."""
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
    times = np.arange(-1.0, frames + 0.25, 0.25)
    seen = project(np.linalg.inv(camera(times))[:, None], np.broadcast_to(corners, (len(times), 4, 2)))
    low = np.floor(seen.reshape(-1, 2).min(axis=0)) - _OVER
    high = np.ceil(seen.reshape(-1, 2).max(axis=0)) + _OVER
    (left, top), (columns, rows) = low.astype(int).tolist(), (high - low).astype(int).tolist()
    return left, top, columns, rows


def still_layer(texture: UInt8[np.ndarray, "h w 3"], left: float, top: float) -> Layer:
    """An opaque picture that does not move in the scene, its top left corner at (left, top)."""
    opaque = np.full((*texture.shape[:2], 1), 255, np.uint8)
    placed = np.array([left, top, 0, 0, 0, 0, 0, 0.0])
    return Layer(np.concatenate([texture, opaque], axis=2), Placing(constant(placed), (0.0, 0.0)))


def _background(
    rng: np.random.Generator, photographs: Photographs, height: int, width: int, frames: int,
    camera: Placing, washed: float,
) -> Layer:  # fmt: skip
    """A photograph, mirrored at its edges until it fills everything that the camera ever sees."""
    left, top, columns, rows = seen_part(camera, height, width, frames)
    side = int(1.3 * min(height, width))
    tile = wash(rng, cut_texture(rng, photographs, min(rows, side), min(columns, side)), washed)
    before = ((rows - tile.shape[0]) // 2, (columns - tile.shape[1]) // 2)
    pads = [(b, n - size - b) for b, n, size in zip(before, (rows, columns), tile.shape, strict=False)]
    return still_layer(np.pad(tile, [*pads, (0, 0)], mode="symmetric"), left, top)
