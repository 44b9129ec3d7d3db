"""Trackers without learning, to compare with: points that stay where they are, and pyramidal Lucas-Kanade.

Lucas-Kanade (1981) in its pyramidal form (Bouguet, 2001): from one frame to the next, a window around each
point is shifted until it fits, first in a small copy of the frame, then in larger ones. A point whose way
back does not lead to where it came from, or whose surroundings no longer look alike, is taken for hidden, for
good: nothing is remembered of it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from tasks.points.predictors import Prediction

_TINY = 1e-5  # keeps the normal equations of a window without texture, or with an edge only, solvable
_BLUR = np.asarray([1, 4, 6, 4, 1], np.float32) / 16

Image = Float[np.ndarray, "H W"]
Places = Float[np.ndarray, "Q 2"]


def static(video: UInt8[np.ndarray, "T H W 3"], query_tyx: Float[np.ndarray, "Q 3"]) -> Prediction:
    """Points do not move and are always seen; see `Predictor`."""
    shape = (len(query_tyx), len(video))
    tracks = np.broadcast_to(query_tyx[:, None, 1:], (*shape, 2)).astype(np.float32)
    return Prediction(tracks, np.ones(shape, bool))


class LucasKanade(NamedTuple):
    """The settings of Lucas-Kanade; called, it tracks.

    Attributes:
      radius: of the window, in pixels of the pyramid's level: 2 radius + 1 pixels square.
      levels: of the pyramid, the frame itself included; each halves the size. Of small frames fewer are used.
      iterations: at most, on a level.
      back_error: pixels between a point and where the way there and back leads, above which it is lost.
      least_correlation: between the windows around a point in two frames, below which it is lost.
      backward: also track from the query to the start of the video. If not, points stay there, hidden.
    """

    radius: int = 7
    levels: int = 4
    iterations: int = 12
    back_error: float = 1.0
    least_correlation: float = 0.7
    backward: bool = True

    def __call__(
        self, video: UInt8[np.ndarray, "T H W 3"], query_tyx: Float[np.ndarray, "Q 3"]
    ) -> Prediction:
        """Tracks points; see `Predictor`."""
        frames = [_gray(frame) for frame in video]
        start = np.round(query_tyx[:, 0]).astype(int)
        at = query_tyx[:, 1:].astype(np.float32)
        tracks, visible = self._pass(frames, start, at)
        if self.backward:
            last = len(frames) - 1
            before, seen = self._pass(frames[::-1], last - start, at)
            earlier = np.arange(len(frames)) < start[:, None]
            tracks = np.where(earlier[..., None], before[:, ::-1], tracks)
            visible = np.where(earlier, seen[:, ::-1], visible)
        return Prediction(tracks, visible)

    def _pass(
        self, frames: list[Image], start: Int[np.ndarray, " Q"], at: Places
    ) -> tuple[Float[np.ndarray, "Q T 2"], Bool[np.ndarray, "Q T"]]:
        """From each query's frame to the end."""
        place, known = at.copy(), np.zeros(len(at), bool)
        tracks = np.empty((len(at), len(frames), 2), np.float32)
        visible = np.zeros((len(at), len(frames)), bool)
        before: list[np.ndarray] = []
        for t, frame in enumerate(frames):
            now = self._pyramid(frame)
            moving = np.flatnonzero(known)
            if len(moving):
                place[moving], found = self._follow(before, now, place[moving])
                known[moving[~found]] = False
            known |= start == t
            tracks[:, t], visible[:, t], before = place, known, now
        return tracks, visible

    def _pyramid(self, frame: Image) -> list[Shaped[np.ndarray, "3 h w"]]:
        """Brightness and its derivatives along y and x on every level, the largest first."""
        levels = []
        for _ in range(self.levels):
            levels.append(np.stack([frame, _slope(frame, 0), _slope(frame, 1)]))
            if min(frame.shape) < 4 * (self.radius + 1):
                break
            frame = _halved(frame)
        return levels

    def _follow(
        self, old: list[np.ndarray], new: list[np.ndarray], place: Places
    ) -> tuple[Places, Bool[np.ndarray, " Q"]]:
        """(where the points are in the next frame, whether that can be believed); lost ones stay."""
        there = self._match(old, new, place)
        back = self._match(new, old, there)
        size = np.asarray(old[0].shape[1:], np.float32)
        found = np.linalg.norm(back - place, axis=-1) <= self.back_error
        found &= self._correlation(old[0][:1], place, new[0][:1], there) >= self.least_correlation
        found &= ((there >= 0) & (there <= size)).all(axis=-1)
        return np.where(found[:, None], there, place), found

    def _window(self) -> Float[np.ndarray, "P 2"]:
        """Places of the window's pixels, relative to the point."""
        span = np.arange(-self.radius, self.radius + 1, dtype=np.float32)
        return np.stack(np.meshgrid(span, span, indexing="ij"), axis=-1).reshape(-1, 2)

    def _correlation(
        self, old: np.ndarray, place: Places, new: np.ndarray, there: Places
    ) -> Float[np.ndarray, " Q"]:
        """Of the brightness in the two windows; 1 where there is no texture to compare."""
        windows = [
            _sample(image, at[:, None] + self._window())[0] for image, at in ((old, place), (new, there))
        ]
        first, second = (window - window.mean(axis=1, keepdims=True) for window in windows)
        scale = np.sqrt(np.sum(first**2, axis=1) * np.sum(second**2, axis=1))
        textured = scale > self._window().shape[0]  # a grey level of contrast
        return np.where(textured, np.sum(first * second, axis=1) / np.where(textured, scale, 1), 1.0)

    def _match(self, old: list[np.ndarray], new: list[np.ndarray], place: Places) -> Places:
        """Coarse to fine: the shift that makes the window in the new frame like the old one."""
        shift = np.zeros_like(place)
        for level in reversed(range(len(old))):
            shift = 2 * shift if level < len(old) - 1 else shift
            shift = self._refine(old[level], new[level][:1], place / 2**level, shift)
        return place + shift

    def _refine(self, old: np.ndarray, new: np.ndarray, place: Places, shift: Places) -> Places:
        """Gauss-Newton steps on one level, on the points that still move."""
        window = self._window()
        template = _sample(old, place[:, None] + window)  # [3, Q, pixels]
        gradient = template[1:]
        normal = np.einsum("iqp,jqp->qij", gradient, gradient)
        floor = _TINY * (1 + np.trace(normal, axis1=1, axis2=2))
        inverse = np.linalg.inv(normal + floor[:, None, None] * np.eye(2, dtype=np.float32))
        shift, left = shift.copy(), np.arange(len(place))
        for _ in range(self.iterations):
            moved = _sample(new, (place[left] + shift[left])[:, None] + window)[0]
            error = np.einsum("iqp,qp->qi", gradient[:, left], template[0, left] - moved)
            step = np.einsum("qij,qj->qi", inverse[left], error)
            # A step beyond the window is an accident of a window without texture.
            step = np.clip(step, -self.radius, self.radius)
            shift[left] += step
            left = left[np.abs(step).max(axis=-1) > 0.01]
            if not len(left):
                break
        return shift


def lucas_kanade(video: UInt8[np.ndarray, "T H W 3"], query_tyx: Float[np.ndarray, "Q 3"]) -> Prediction:
    """Lucas-Kanade with its default settings; see `Predictor`."""
    return LucasKanade()(video, query_tyx)


def _gray(frame: UInt8[np.ndarray, "H W 3"]) -> Image:
    return frame.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)


def _slope(image: Image, axis: int) -> Image:
    """Central difference along an axis, the border's pixels repeated beyond it."""
    padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
    size = image.shape[axis]
    return (np.take(padded, range(2, size + 2), axis) - np.take(padded, range(size), axis)) / 2


def _halved(image: Image) -> Float[np.ndarray, "h w"]:
    """Blurred, then every second pixel in the sense of raster places: (y, x) becomes (y / 2, x / 2)."""
    for axis in (0, 1):
        padded = np.pad(image, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis)
        image = windows @ _BLUR
    height, width = (size // 2 * 2 for size in image.shape)
    image = image[:height, :width]
    # The mean of 2 x 2 pixels has its centre at twice the raster place of the result's pixel.
    return image.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3), dtype=np.float32)


def _sample(planes: Float[np.ndarray, "C H W"], places: Float[np.ndarray, "Q P 2"]) -> np.ndarray:
    """Bilinear values [C, Q, P] at raster places (y, x); beyond the border that of the nearest pixel."""
    _, height, width = planes.shape
    y = np.clip(places[..., 0] - 0.5, 0, height - 1)
    x = np.clip(places[..., 1] - 0.5, 0, width - 1)
    row = np.minimum(y.astype(np.int32), max(height - 2, 0))
    column = np.minimum(x.astype(np.int32), max(width - 2, 0))
    below, beside = (y - row).astype(np.float32), (x - column).astype(np.float32)
    flat, corner = planes.reshape(len(planes), -1), row * width + column
    right, down = min(1, width - 1), width if height > 1 else 0
    top = flat[:, corner] * (1 - beside) + flat[:, corner + right] * beside
    bottom = flat[:, corner + down] * (1 - beside) + flat[:, corner + down + right] * beside
    return top * (1 - below) + bottom * below
