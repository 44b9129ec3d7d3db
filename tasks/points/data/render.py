"""Pictures of a scene: every layer resampled where it is seen, front over back, averaged over the exposure.

Layers without ripples are resampled by Pillow's perspective transform, which is exact and written in C; the
others by the bilinear sampling here.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tasks.common.optional import need
from tasks.points.data.scene import Scene
from tasks.points.data.view import View
from tasks.points.data.warps import project

_MOST_PARTS = 6  # pictures that one exposure is averaged over, at most
_SMEAR = 1.5  # pixels that anything may move from one of them to the next, before there are more


def render(scene: Scene, exposure: float = 0.0) -> Float[np.ndarray, "T H W 3"]:
    """The frames, float32, 0..255.

    Args:
        scene: what is seen.
        exposure: share of the time between two frames during which the shutter is open, its middle at the
            frame's time; 0: an instant.

    Raises:
        ValueError: an exposure below 0 or above 1.
    """
    if not 0 <= exposure <= 1:
        raise ValueError(f"exposure = {exposure}: must be between 0 and 1")
    middles = np.arange(scene.frames, dtype=np.float64)
    parts = _parts(scene, middles, exposure)
    times = np.concatenate(
        [t + exposure * ((np.arange(n) + 0.5) / n - 0.5) for t, n in zip(middles, parts, strict=True)]
    )
    painter = _Painter(View(scene, times))
    frames = np.empty((scene.frames, scene.height, scene.width, 3), np.float32)
    start = 0
    for frame, count in enumerate(parts):
        total = painter.paint(start).astype(np.float32)
        for part in range(start + 1, start + count):
            total += painter.paint(part)
        frames[frame] = total / count
        start += count
    return frames


def _parts(scene: Scene, middles: np.ndarray, exposure: float) -> list[int]:
    """Pictures that each frame is averaged over: more, the faster anything in it moves."""
    if exposure == 0:
        return [1] * scene.frames
    start, stop = View(scene, middles - exposure / 2), View(scene, middles + exposure / 2)
    most = np.zeros(scene.frames)
    frame = np.array([scene.width, scene.height])
    for number, layer in enumerate(scene.layers):
        height, width = layer.texture.shape[:2]
        corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
        if number == 0:  # far corners of the background are never seen
            corners = View(scene, middles[:1]).to_texture(0, np.array([[[0.0, 0.0]], [frame]]))[:, 0]
        before, after = start.to_frame(number, corners), stop.to_frame(number, corners)
        most = np.maximum(most, np.linalg.norm(after - before, axis=-1).max(axis=0))
    return np.clip(np.ceil(most / _SMEAR), 1, _MOST_PARTS).astype(int).tolist()


class _Painter:
    """Draws a view's pictures one after the other."""

    def __init__(self, view: View):
        self._view = view
        self._images = need("PIL.Image", "drawing clips")
        # As Pillow resamples them, converted once: colours times alpha; the background has no alpha.
        modes = ["RGB"] + ["RGBa"] * (len(view.scene.layers) - 1)
        self._pictures = [
            self._images.fromarray(layer.texture).convert(mode)
            for layer, mode in zip(view.scene.layers, modes, strict=True)
        ]
        self._boxes = [_boxes(view, number) for number in range(len(view.scene.layers))]
        self._background: tuple[np.ndarray, Any] | None = None

    def paint(self, at: int) -> UInt8[np.ndarray, "H W 3"]:
        """The picture at the view's time number `at`."""
        canvas = self._backdrop(at)
        for number in range(1, len(self._pictures)):
            left, top, right, bottom = self._boxes[number][at]
            if left < right and top < bottom:
                canvas.alpha_composite(self._sample(number, at), (left, top))
        return np.asarray(canvas)[..., :3]

    def _backdrop(self, at: int) -> Any:
        """The background; drawn again only if the camera has moved."""
        inverse = self._view.inverses[0, at]
        if self._background is None or not np.array_equal(self._background[0], inverse):
            self._background = (inverse, self._sample(0, at))
        return self._background[1].copy()

    def _sample(self, number: int, at: int) -> Any:
        """What is seen of a layer within its box, RGBA."""
        left, top, right, bottom = self._boxes[number][at]
        matrix = self._view.inverses[number, at]
        ripple, amplitudes = self._view.scene.layers[number].ripple, self._view.amplitudes[number]
        if ripple is not None and amplitudes is not None:
            x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
            places = project(matrix, np.stack([x, y], axis=-1)).astype(np.float32)
            places += ripple.displace(amplitudes[at], places)
            return self._images.fromarray(sample(self._view.scene.layers[number].texture, places))
        matrix = matrix.copy()
        matrix[:, 2] += matrix[:, 0] * left + matrix[:, 1] * top  # the box's first pixel is (0, 0)
        data = (matrix / matrix[2, 2]).ravel()[:8].tolist()
        method, resample = self._images.Transform.PERSPECTIVE, self._images.Resampling.BILINEAR
        drawn = self._pictures[number].transform((right - left, bottom - top), method, data, resample)
        return drawn.convert("RGBA")


def _boxes(view: View, number: int) -> list[list[int]]:
    """The part of the frame where a layer can be, at every time: left, top, right, bottom."""
    scene, layer = view.scene, view.scene.layers[number]
    if number == 0:  # the background fills every frame
        return [[0, 0, scene.width, scene.height]] * len(view.times)
    height, width = layer.texture.shape[:2]
    over = layer.ripple.reach if layer.ripple else 0.0
    corners = np.array([[x, y] for x in (-over, width + over) for y in (-over, height + over)], np.float64)
    places = project(view.matrices[number][:, None], np.broadcast_to(corners, (len(view.times), 4, 2)))
    size = (scene.width, scene.height)
    low, high = np.floor(places.min(axis=1)).clip(0, size), np.ceil(places.max(axis=1)).clip(0, size)
    return np.concatenate([low, high], axis=1).astype(int).tolist()


def sample(
    pixels: UInt8[np.ndarray, "h w c"], places: Float[np.ndarray, "rows columns 2"]
) -> UInt8[np.ndarray, "rows columns c"]:
    """Bilinear samples at raster places (x, y); 0 outside the picture."""
    height, width, channels = pixels.shape
    x, y = places[..., 0].ravel(), places[..., 1].ravel()
    result = np.zeros((len(x), channels), np.uint8)
    inside = np.flatnonzero((x >= 0) & (x < width) & (y >= 0) & (y < height))
    x = np.clip(x[inside] - np.float32(0.5), 0, width - 1)
    y = np.clip(y[inside] - np.float32(0.5), 0, height - 1)
    left, top = x.astype(np.int32), y.astype(np.int32)
    along, down = (x - left)[:, None], (y - top)[:, None]
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1) * width
    rows = top * width
    flat = pixels.reshape(-1, channels)
    total = flat[rows + left] * ((1 - along) * (1 - down))
    total += flat[rows + right] * (along * (1 - down))
    total += flat[below + left] * ((1 - along) * down)
    total += flat[below + right] * (along * down)
    result[inside] = (total + np.float32(0.5)).astype(np.uint8)
    return result.reshape(*places.shape[:2], channels)
