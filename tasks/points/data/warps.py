"""Maps between the places of a picture and the places of a frame, both ways, exactly.

Places here are (x, y), as matrices have them; columns of everything that leaves this folder are (y, x).
Coordinates are raster: (0, 0) is the outer corner of the first pixel, whose centre is (0.5, 0.5).

A layer's texture lies in the frame by a homography, behind which its material may ripple:

    texture place u = v + D(v, t),   v = M(t)^-1 x,   x the place in the frame

with D a sum of sine waves whose slopes add up to less than one, so that u -> v is one to one: the fixed point
of v = u - D(v, t), which iteration finds.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tasks.points.data.paths import Spline, wander

Matrices = Float[np.ndarray, "n 3 3"]
Places = Float[np.ndarray, "*places 2"]
STEEPEST = 0.4  # largest slope of a ripple
_ITERATIONS = 24  # 0.4^24 = 3e-10 of a displacement of some pixels


def project(matrix: Float[np.ndarray, "*#lead 3 3"], xy: Float[np.ndarray, "*lead 2"]) -> Places:
    """Places under a homography; leading dimensions broadcast."""
    x, y = xy[..., 0], xy[..., 1]
    m = matrix
    w = m[..., 2, 0] * x + m[..., 2, 1] * y + m[..., 2, 2]
    px = m[..., 0, 0] * x + m[..., 0, 1] * y + m[..., 0, 2]
    py = m[..., 1, 0] * x + m[..., 1, 1] * y + m[..., 1, 2]
    return np.stack([px / w, py / w], axis=-1)


def translations(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Matrices:
    """Homographies that move places by (x, y)."""
    matrices = np.tile(np.eye(3), (len(x), 1, 1))
    matrices[:, 0, 2], matrices[:, 1, 2] = x, y
    return matrices


def placements(values: Float[np.ndarray, "n 8"], centre: tuple[float, float]) -> Matrices:
    """Homographies that turn, stretch and tilt a picture about `centre` and put that at (x, y).

    Args:
        values: x, y (pixels of the result); log of the scale; angle (radians); log of the aspect; shear;
          tilts about the two axes (per pixel of the picture: the scale falls by that share a pixel).
        centre: (x, y) in the picture.
    """
    x, y, log_scale, angle, log_aspect, shear, tilt_x, tilt_y = values.T
    n = len(values)
    cos, sin = np.cos(angle), np.sin(angle)
    wide, high = np.exp(log_scale + log_aspect), np.exp(log_scale - log_aspect)
    linear = np.zeros((n, 3, 3))
    linear[:, 0, 0], linear[:, 0, 1] = cos * wide, cos * wide * shear - sin * high
    linear[:, 1, 0], linear[:, 1, 1] = sin * wide, sin * wide * shear + cos * high
    linear[:, 2, 0], linear[:, 2, 1], linear[:, 2, 2] = tilt_x, tilt_y, 1.0
    away = translations(np.full(n, -centre[0]), np.full(n, -centre[1]))
    return translations(x, y) @ linear @ away


@dataclass(frozen=True)
class Ripple:
    """D(v, t): waves over the texture whose strengths change with time.

    waves: [K, 2], radians per pixel of the texture.
    phases: [K].
    directions: [K, 2], unit vectors.
    strengths: a path of K amplitudes, in pixels of the texture.
    """

    waves: Float[np.ndarray, "K 2"]
    phases: Float[np.ndarray, " K"]
    directions: Float[np.ndarray, "K 2"]
    strengths: Spline

    def amplitudes(self, times: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n K"]:
        """Of every wave at times in frames."""
        return self.strengths(times)

    def displace(self, amplitudes: Float[np.ndarray, "*#lead K"], xy: Float[np.ndarray, "*lead 2"]) -> Places:
        """D at places, for the amplitudes at their times."""
        swing = np.sin(xy @ self.waves.T.astype(xy.dtype) + self.phases.astype(xy.dtype))
        return (swing * amplitudes.astype(xy.dtype)) @ self.directions.astype(xy.dtype)

    def undo(self, amplitudes: Float[np.ndarray, "*#lead K"], xy: Float[np.ndarray, "*lead 2"]) -> Places:
        """The v with v + D(v) = xy."""
        found = xy
        for _ in range(_ITERATIONS):
            found = xy - self.displace(amplitudes, found)
        return found

    @property
    def reach(self) -> float:
        """Most pixels that anything is displaced by."""
        return float(np.abs(self.strengths.knots).sum(axis=1).max())


def random_ripple(rng: np.random.Generator, frames: int, size: float, spacing: float) -> Ripple:
    """Up to three waves, half to one and a half times as long as a texture of `size` pixels."""
    count = int(rng.integers(1, 4))
    angles = rng.uniform(0, 2 * np.pi, (2, count))
    lengths = rng.uniform(0.5, 1.5, count) * size
    waves = 2 * np.pi / lengths[:, None] * np.stack([np.cos(angles[0]), np.sin(angles[0])], axis=1)
    most = rng.uniform(0.4, 1.0) * STEEPEST / count * lengths / (2 * np.pi)
    strengths = wander(rng, frames, spacing, most * rng.uniform(0.2, 1.0), -most, most)
    directions = np.stack([np.cos(angles[1]), np.sin(angles[1])], axis=1)
    return Ripple(waves, rng.uniform(0, 2 * np.pi, count), directions, strengths)
