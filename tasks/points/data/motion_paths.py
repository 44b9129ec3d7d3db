"""TAPNext++'s motion augmentations (arXiv 2604.10582): a whole clip rolls, or sways by homographies.

Paths are sums of low and high sine waves, drawn from an explicit `np.random.RandomState` in the order in
which the official code draws from numpy's global one. Places here are (x, y) counted from the middle of the
first pixel, as there; raster coordinates are half a pixel more.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from tasks.common.optional import need
from tasks.points.data.warps import project

Border = Literal["constant", "replicate"]
_WAVES = 5  # low ones, and as many high ones, of a path of the roll
_CORNER_WAVES = 3  # idem, of one coordinate of one corner
_BOX = 0.3  # share of a side that a corner may move by
# Top left, top right, bottom right, bottom left.
_CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64)
_INWARD = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float64)


@dataclass(frozen=True)
class RollPath:
    """A roll: shifts of the padded frame, each cyclic, and turns about its middle.

    pad: pixels added on every side first.
    shift_xy: [T, 2], whole pixels.
    angles: [T], degrees, counter-clockwise as seen.
    """

    pad: int
    shift_xy: Int[np.ndarray, "T 2"]
    angles: Float[np.ndarray, " T"]

    def matrices(self, height: int, width: int) -> Float[np.ndarray, "T 3 3"]:
        """The turns, of places in the padded frame counted from the middle of its first pixel."""
        padded_height, padded_width = height + 2 * self.pad, width + 2 * self.pad
        x, y = padded_width // 2, padded_height // 2
        angles = np.deg2rad(self.angles)
        cos, sin, zero, one = np.cos(angles), np.sin(angles), np.zeros(len(angles)), np.ones(len(angles))
        rows = (
            (cos, sin, (1 - cos) * x - sin * y),
            (-sin, cos, sin * x + (1 - cos) * y),
            (zero, zero, one),
        )
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    def move(self, xy: Float[np.ndarray, "N T 2"], height: int, width: int) -> Float[np.ndarray, "N T 2"]:
        """Places (x, y) of the frame, counted from the middle of its first pixel, after the roll."""
        size = np.array([width, height]) + 2 * self.pad
        rolled = np.mod(xy + self.pad + self.shift_xy, size)
        return project(self.matrices(height, width), rolled) - self.pad


def _waves(
    rng: np.random.RandomState, amplitudes: tuple[float, float], strength: float, times: np.ndarray
) -> Float[np.ndarray, " T"]:
    """Five low and five high waves A (sin(t f + p) - sin p), summed, at times in 0..1."""
    total = np.zeros(len(times))
    for amplitude, (slowest, fastest) in zip(amplitudes, ((1, 4), (8, 16)), strict=True):
        sizes = rng.uniform(0, amplitude, _WAVES) * strength
        frequencies = rng.uniform(slowest, fastest, _WAVES) * np.pi
        phases = rng.uniform(0, 2 * np.pi, _WAVES)
        total += (np.sin(times[:, None] * frequencies + phases) - np.sin(phases)) @ sizes
    return total


def roll_path(
    rng: np.random.RandomState, frames: int, height: int, width: int, strength: float = 1.0,
    rotate: bool = True,
) -> RollPath:  # fmt: skip
    """The path of a roll (TAPNext++), drawn in the official order; the first draw chooses whether it is done
    there, and is left to the caller here.

    Args:
        rng: of all draws.
        frames: T.
        height, width: of the frames.
        strength: scales all amplitudes.
        rotate: whether it turns too; the frame is then padded so that no corner is ever empty of itself.
    """
    times = np.arange(frames) / frames
    x = _waves(rng, (30.0, 10.0), strength, times)
    y = _waves(rng, (20.0, 7.0), strength, times)
    angles = _waves(rng, (10.0, 5.0), strength, times) if rotate else np.zeros(frames)
    pad = int(np.ceil((np.hypot(height, width) - min(height, width)) / 2)) if rotate else 0
    return RollPath(pad, np.stack([np.round(x), np.round(y)], axis=-1).astype(np.int64), angles)


def roll_video(video: UInt8[np.ndarray, "T H W 3"], path: RollPath) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames after a roll."""
    height, width = video.shape[1:3]
    inverses = np.linalg.inv(path.matrices(height, width))
    result = np.empty_like(video)
    for i, frame in enumerate(video):
        padded = np.pad(frame, ((path.pad, path.pad), (path.pad, path.pad), (0, 0)))
        x, y = path.shift_xy[i]
        padded = np.roll(padded, (int(y), int(x)), axis=(0, 1))
        if path.angles[i] == 0:
            result[i] = padded[path.pad : path.pad + height, path.pad : path.pad + width]
        else:
            result[i] = _warp(padded, inverses[i], (height, width), path.pad)
    return result


def corner_paths(
    rng: np.random.RandomState, frames: int, height: int, width: int, strength: float = 1.0
) -> Float[np.ndarray, "T 4 2"]:
    """How far each corner moves inward, (x, y) in pixels: TAPNext++'s homography, in the official order."""
    times = np.arange(frames)[:, None] / frames
    values = np.empty((frames, 8))
    for place in range(8):
        low = rng.uniform(0, 0.05, _CORNER_WAVES) * strength
        high = rng.uniform(0, 0.02, _CORNER_WAVES) * strength
        total = np.zeros(frames)
        for sizes, (slowest, fastest) in ((low, (1, 4)), (high, (8, 16))):
            frequencies = rng.uniform(slowest, fastest, _CORNER_WAVES) * np.pi
            phases = rng.uniform(0, 2 * np.pi, _CORNER_WAVES)
            total += (np.sin(times * frequencies + phases) - np.sin(phases)) @ sizes
        values[:, place] = np.abs(total)
    # Reflected into a box of 30 % of the frame at its corner, however large the waves are.
    values = _BOX - np.abs(np.mod(values, 2 * _BOX) - _BOX)
    return values.reshape(frames, 4, 2) * (width, height)


def homographies(inward: Float[np.ndarray, "T 4 2"], height: int, width: int) -> Float[np.ndarray, "T 3 3"]:
    """The homographies that take the frame's corners inward, of places (x, y) counted from the middle of its
    first pixel."""
    corners = _CORNERS * (width - 1, height - 1)
    moved = corners + inward * _INWARD
    equations = np.zeros((len(inward), 8, 8))
    for corner, (x, y) in enumerate(corners):
        u, v = moved[:, corner, 0], moved[:, corner, 1]
        even, odd = equations[:, 2 * corner], equations[:, 2 * corner + 1]
        even[:, 0], even[:, 1], even[:, 2] = x, y, 1
        odd[:, 3], odd[:, 4], odd[:, 5] = x, y, 1
        even[:, 6], even[:, 7] = -u * x, -u * y
        odd[:, 6], odd[:, 7] = -v * x, -v * y
    solved = np.linalg.solve(equations, moved.reshape(len(inward), 8, 1))[..., 0]
    return np.concatenate([solved, np.ones((len(inward), 1))], axis=1).reshape(-1, 3, 3)


def warp_video(
    video: UInt8[np.ndarray, "T H W 3"], matrices: Float[np.ndarray, "T 3 3"], border: Border = "constant"
) -> UInt8[np.ndarray, "T H W 3"]:
    """Every frame under its own homography, bilinear.

    Args:
        video: frames.
        matrices: of places (x, y) counted from the middle of the first pixel; frame to result.
        border: what lies outside the frame: black, or its edge.
    """
    height, width = video.shape[1:3]
    inverses, result = np.linalg.inv(matrices), np.empty_like(video)
    corners = _CORNERS * (width - 1, height - 1)
    for i, frame in enumerate(video):
        inverse = inverses[i]
        if border == "replicate":
            looked_at = project(inverse[None], corners)
            beyond = max(0.0, float((-looked_at).max()), float((looked_at - (width, height)).max()))
            pad = int(beyond) + 2
            frame = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
            inverse = np.array([[1, 0, pad], [0, 1, pad], [0, 0, 1.0]]) @ inverse
        result[i] = _warp(frame, inverse, (height, width), 0)
    return result


def _warp(
    frame: UInt8[np.ndarray, "h w 3"], inverse: Float[np.ndarray, "3 3"], size: tuple[int, int], first: int
) -> np.ndarray:
    """uint8 [*size, 3]: what an inverse homography, of places counted from the middle of the first pixel,
    shows at the places from (first, first) on; black outside."""
    images: Any = need("PIL.Image", "warping frames")
    # One black pixel around it: the frame's edge fades within a pixel, as any other edge does.
    frame = np.pad(frame, ((1, 1), (1, 1), (0, 0)))
    half, back = np.eye(3), np.eye(3)
    half[:2, 2], back[:2, 2] = 1.5, first - 0.5
    matrix = half @ inverse @ back  # as Pillow counts: from the outer corner
    data = (matrix / matrix[2, 2]).ravel()[:8].tolist()
    method, resample = images.Transform.PERSPECTIVE, images.Resampling.BILINEAR
    return np.asarray(images.fromarray(frame).transform((size[1], size[0]), method, data, resample))
