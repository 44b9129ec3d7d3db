"""Tracks of points on rigid bodies, from depth, segmentation and the bodies' poses: exact, but for the depth
buffer's rounding."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.data.clips import inside
from tasks.points.data.point_budget import choose_places, early_share
from tasks.points.data.projection import Camera, hidden_by_depth, hidden_by_segment, out_of_sight

_POOL = 20  # pixels drawn for every point wanted


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is known of the frames of a clip.

    camera: at every frame.
    depths: [T, H, W], along the view.
    bodies: [T, H, W], which of B bodies each pixel shows; -1: none, only what is infinitely far.
    positions, rotations: [B, T, 3], [B, T, 3, 3], of the bodies' own axes in the world; 0 is the world.
    """

    camera: Camera
    depths: Float[np.ndarray, "T H W"]
    bodies: Int[np.ndarray, "T H W"]
    positions: Float[np.ndarray, "B T 3"]
    rotations: Float[np.ndarray, "B T 3 3"]


def sample_pixels(
    rng: np.random.Generator, scene: Recorded, wanted: int
) -> tuple[Float[np.ndarray, "N 3"], Int[np.ndarray, " N"]]:
    """(query_tyx at centres of pixels, the body each is on), of at most `wanted` points in random order."""
    frames, height, width = scene.bodies.shape
    count = _POOL * wanted
    t = np.minimum((frames * early_share(rng, count)).astype(np.int64), frames - 1)
    y, x = rng.integers(height, size=count), rng.integers(width, size=count)
    bodies = scene.bodies[t, y, x]
    usable = np.flatnonzero(bodies >= 0)
    chosen = usable[choose_places(rng, bodies[usable], wanted)]
    query_tyx = np.stack([t, y + 0.5, x + 0.5], axis=-1)[chosen].astype(np.float64)
    return query_tyx, bodies[chosen]


def track_pixels(
    scene: Recorded, query_tyx: Float[np.ndarray, "N 3"], bodies: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N T 2"], Bool[np.ndarray, "N T"]]:
    """(tracks_yx, float32; visible) of points that are asked for at centres of pixels.

    A pixel is brought into the world by its depth, into its body's own axes by the pose of that time, and
    back by the poses of all others. It is hidden outside the frame, behind the camera, and where all four
    pixels around it are nearer by a hundredth or show other bodies.
    """
    camera = scene.camera
    t, pixels = query_tyx[:, 0].astype(np.int64), np.floor(query_tyx[:, 1:]).astype(np.int64)
    world = camera.unproject(query_tyx[:, 1:], t, scene.depths[t, pixels[:, 0], pixels[:, 1]])
    own = np.einsum("nji,nj->ni", scene.rotations[bodies, t], world - scene.positions[bodies, t])
    points = scene.positions[bodies] + np.einsum("ntij,nj->nti", scene.rotations[bodies], own)
    places, depth = camera.project(points)
    hidden = hidden_by_depth(scene.depths, places, depth) | hidden_by_segment(scene.bodies, places, bodies)
    rows = np.arange(len(t))
    hidden[rows, t] = False  # it is what that pixel shows
    tracks_yx = out_of_sight(camera, places, depth)
    return tracks_yx, ~hidden & inside(tracks_yx, camera.height, camera.width)
