"""A scene at given times: from texture to frame and back, and what is in front, for tracks and for
pictures."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.data.scene import Layer, Scene
from tasks.points.data.warps import project

HALF = 127.5  # of alpha: a layer is there where it is more


@dataclass(frozen=True, eq=False)
class View:
    """A scene at n times. Places are (x, y), float64, in pixels.

    scene: what is seen.
    times: [n], in frames.
    """

    scene: Scene
    times: Float[np.ndarray, " n"]

    @cached_property
    def matrices(self) -> Float[np.ndarray, "L n 3 3"]:
        """Texture (behind its ripple) to frame, of every layer."""
        camera = self.scene.camera(self.times)
        return np.stack([camera @ layer.placing(self.times) for layer in self.scene.layers])

    @cached_property
    def inverses(self) -> Float[np.ndarray, "L n 3 3"]:
        """Frame to texture."""
        return np.linalg.inv(self.matrices)

    @cached_property
    def amplitudes(self) -> list[Float[np.ndarray, "n K"] | None]:
        """Of every layer's ripple; None: it has none."""
        ripples = (layer.ripple for layer in self.scene.layers)
        return [None if ripple is None else ripple.amplitudes(self.times) for ripple in ripples]

    def at(self, indices: Int[np.ndarray, " m"]) -> "View":
        """The view at some of its times, in any order; they may repeat."""
        view = View(self.scene, self.times[indices])
        view.__dict__["matrices"] = self.matrices[:, indices]
        view.__dict__["inverses"] = self.inverses[:, indices]
        return view

    def to_frame(self, layer: int, texture_xy: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N n 2"]:
        """Where places of a layer's texture are in the frame, at every time."""
        places = np.broadcast_to(texture_xy[:, None], (len(texture_xy), len(self.times), 2))
        ripple, amplitudes = self.scene.layers[layer].ripple, self.amplitudes[layer]
        if ripple is not None and amplitudes is not None:
            places = ripple.undo(amplitudes, places)
        return project(self.matrices[layer], places)

    def to_texture(self, layer: int, frame_xy: Float[np.ndarray, "N n 2"]) -> Float[np.ndarray, "N n 2"]:
        """The place of a layer's texture that lies at a place of the frame, for one place a time."""
        places = project(self.inverses[layer], frame_xy)
        ripple, amplitudes = self.scene.layers[layer].ripple, self.amplitudes[layer]
        if ripple is not None and amplitudes is not None:
            places = places + ripple.displace(amplitudes, places)
        return places

    def covers(self, layer: int, frame_xy: Float[np.ndarray, "N n 2"]) -> Bool[np.ndarray, "N n"]:
        """Whether a layer is there, at places of the frame, one a time."""
        return opacity(self.scene.layers[layer], self.to_texture(layer, frame_xy)) > HALF

    def covered(self, layer: int, frame_xy: Float[np.ndarray, "N n 2"]) -> Bool[np.ndarray, "N n"]:
        """Whether any layer in front of this one is there."""
        found = np.zeros(frame_xy.shape[:2], bool)
        for nearer in range(layer + 1, len(self.scene.layers)):
            found |= self.covers(nearer, frame_xy)
        return found

    def on_top(self, frame_xy: Float[np.ndarray, "N n 2"]) -> Int[np.ndarray, "N n"]:
        """The layer that is seen at places of the frame, one a time."""
        top = np.zeros(frame_xy.shape[:2], np.int64)
        for layer in range(1, len(self.scene.layers)):
            top[self.covers(layer, frame_xy)] = layer
        return top


def opacity(layer: Layer, texture_xy: Float[np.ndarray, "*places 2"]) -> Float[np.ndarray, "*places"]:
    """Alpha, 0..255, at places of a texture: bilinear, 0 outside it. As the pictures are sampled."""
    alpha = layer.texture[..., 3]
    height, width = alpha.shape
    inside = np.all((texture_xy >= 0) & (texture_xy < (width, height)), axis=-1)
    x = np.clip(np.where(inside, texture_xy[..., 0], 0.0) - 0.5, 0, width - 1)
    y = np.clip(np.where(inside, texture_xy[..., 1], 0.0) - 0.5, 0, height - 1)
    left, top = x.astype(np.int64), y.astype(np.int64)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    along, down = x - left, y - top
    upper = alpha[top, left] * (1 - along) + alpha[top, right] * along
    lower = alpha[bottom, left] * (1 - along) + alpha[bottom, right] * along
    return np.where(inside, upper * (1 - down) + lower * down, 0.0)
