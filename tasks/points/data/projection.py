"""A pinhole camera in a three-dimensional scene: places in the frame, points in the world, and what hides
them.

The camera looks along -z of its own axes, with y up (Blender, MuJoCo, OpenGL). Places in the frame are (y, x)
in raster pixels; its middle is (height / 2, width / 2).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

HIDDEN = 0.99  # a point is hidden where everything around it is nearer than this share of its distance


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera at T times.

    positions: [T, 3], in the world.
    rotations: [T, 3, 3], of its axes to the world's.
    focal: focal length, in pixels.
    height, width: of the frame, in pixels.
    """

    positions: Float[np.ndarray, "T 3"]
    rotations: Float[np.ndarray, "T 3 3"]
    focal: float
    height: int
    width: int

    def project(
        self, points: Float[np.ndarray, "N T 3"]
    ) -> tuple[Float[np.ndarray, "N T 2"], Float[np.ndarray, "N T"]]:
        """(places (y, x), depth) of points of the world, one for each time; depth is along the view, and
        negative behind the camera, where the place has no meaning."""
        local = np.einsum("tij,nti->ntj", self.rotations, points - self.positions)
        depth = -local[..., 2]
        safe = np.where(np.abs(depth) > 1e-9, depth, 1e-9)
        x = self.width / 2 + self.focal * local[..., 0] / safe
        y = self.height / 2 - self.focal * local[..., 1] / safe
        return np.stack([y, x], axis=-1), depth

    def rays(self, yx: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 3"]:
        """What lies at a depth of one behind places of the frame, in the camera's own axes."""
        x = (yx[:, 1] - self.width / 2) / self.focal
        y = (self.height / 2 - yx[:, 0]) / self.focal
        return np.stack([x, y, -np.ones(len(yx))], axis=-1)

    def unproject(
        self, yx: Float[np.ndarray, "N 2"], times: Int[np.ndarray, " N"], depth: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "N 3"]:
        """Points of the world at places of the frame, each at its own time and depth along the view."""
        local = self.rays(yx) * depth[:, None]
        return self.positions[times] + np.einsum("nij,nj->ni", self.rotations[times], local)

    def depth_of_distance(self, yx: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, " N"]:
        """Depth along the view of what is at distance one from the camera, behind places of the frame."""
        return 1.0 / np.linalg.norm(self.rays(yx), axis=-1)


def rotation_matrices(quaternions: Float[np.ndarray, "*lead 4"]) -> Float[np.ndarray, "*lead 3 3"]:
    """Rotations of quaternions (w, x, y, z), which are normalised first."""
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def neighbours(
    maps: Shaped[np.ndarray, "T H W"], yx: Float[np.ndarray, "N T 2"]
) -> Shaped[np.ndarray, "4 N T"]:
    """The values of the four pixels whose centres are around a place, one place a time; at the frame's edge,
    the nearest ones."""
    frames, height, width = maps.shape
    base = np.floor(np.clip(np.nan_to_num(yx), -1e6, 1e6) - 0.5).astype(np.int64)
    times = np.arange(frames)
    found = [
        maps[times, np.clip(base[..., 0] + down, 0, height - 1), np.clip(base[..., 1] + along, 0, width - 1)]
        for down in (0, 1)
        for along in (0, 1)
    ]
    return np.stack(found)


def hidden_by_depth(
    depths: Float[np.ndarray, "T H W"], yx: Float[np.ndarray, "N T 2"], own: Float[np.ndarray, "N T"]
) -> Bool[np.ndarray, "N T"]:
    """Whether all four pixels around a place are nearer than the point: the farthest of them by more than a
    hundredth of the point's own depth (or distance: as the maps). Points behind the camera are hidden."""
    return (own <= 0) | (neighbours(depths, yx).max(axis=0) < HIDDEN * own)


def hidden_by_segment(
    segments: Int[np.ndarray, "T H W"], yx: Float[np.ndarray, "N T 2"], own: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, "N T"]:
    """Whether all four pixels around a place belong to other things than the point."""
    return (neighbours(segments, yx) != own[None, :, None]).all(axis=0)


def out_of_sight(
    camera: Camera, places_yx: Float[np.ndarray, "N T 2"], depth: Float[np.ndarray, "N T"]
) -> Float[np.ndarray, "N T 2"]:
    """Places in the frame, those of points behind the camera put before its first pixel, and none farther
    away than some frames: float32, finite, and never by chance inside."""
    size = np.array([camera.height, camera.width])
    near = np.clip(places_yx, -4.0 * size, 5.0 * size)
    return np.where((depth > 0)[..., None], near, -size).astype(np.float32)
