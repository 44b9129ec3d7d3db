"""Smooth random paths through time: splines whose knots walk at random and turn back at their bounds.

Times are in frames, real numbers: what happens between two frames (motion blur) is on the path too.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

_BEFORE = 1.0  # frames before frame 0 that a path covers, as an exposure may begin there


@dataclass(frozen=True)
class Spline:
    """A uniform cubic B-spline: twice differentiable, and inside the bounds that its knots keep to.

    knots: [K, C] float64.
    spacing: frames from one knot to the next.
    """

    knots: Float[np.ndarray, "K C"]
    spacing: float

    def __call__(self, times: Num[np.ndarray, " n"]) -> Float[np.ndarray, "n C"]:
        """Values at times, in frames, -1 <= time <= frames."""
        place = (np.asarray(times, np.float64) + _BEFORE) / self.spacing
        first = np.clip(np.floor(place).astype(np.int64), 0, len(self.knots) - 4)
        f = (place - first)[:, None]
        weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
        values = np.zeros((len(first), self.knots.shape[1]))
        for offset, weight in enumerate(weights):
            values += weight * self.knots[first + offset]
        return values / 6.0


def fold(
    values: Float[np.ndarray, "n C"], low: Float[np.ndarray, " C"], high: Float[np.ndarray, " C"]
) -> Float[np.ndarray, "n C"]:
    """Values reflected into [low, high], as often as it takes; low where both are equal."""
    width = high - low
    period = np.where(width > 0, 2 * width, 1.0)
    inside = np.abs(np.mod(values - low + width, period) - width)
    return np.where(width > 0, low + inside, low)


def wander(
    rng: np.random.Generator,
    frames: int,
    spacing: float,
    step: Float[np.ndarray, " C"],
    low: Float[np.ndarray, " C"],
    high: Float[np.ndarray, " C"],
) -> Spline:
    """A path of C numbers over `frames` frames that starts anywhere within its bounds.

    Args:
        rng: of all draws.
        frames: T.
        spacing: frames from knot to knot: how soon the direction changes.
        step: standard deviation of what is walked from knot to knot.
        low, high: bounds, where the walk turns back; equal ones fix a number.

    Raises:
        ValueError: no frames, a spacing that is not positive, or low above high.
    """
    if frames < 1 or not spacing > 0 or np.any(low > high):
        raise ValueError(f"{frames} frames, spacing {spacing}, bounds {low} to {high}: nothing can move so")
    count = int(np.ceil((frames + _BEFORE) / spacing)) + 4
    start = rng.uniform(low, high)
    steps = rng.standard_normal((count, len(low))) * step
    return Spline(fold(start + np.cumsum(steps, axis=0) - steps[0], low, high), float(spacing))


def constant(values: Float[np.ndarray, " C"]) -> Spline:
    """A path that stays where it is, whatever the time."""
    return Spline(np.tile(np.asarray(values, np.float64), (4, 1)), np.inf)
