"""Tracks in Kubric's scenes, by the rule of TAP-Vid-Kubric (TAP-Vid, arXiv 2211.03726, and its public
loader).

Points are pixels of a grid with a random phase, `choose_places` of them. A point of the background stays
where it is in the world; a point of a thing moves with the corners of the box around it. A point is hidden if
it is outside the frame or behind the camera, if all four pixels around it are nearer by a hundredth, if all
four show another thing, or if its surface is turned away, where that can be told.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.data.clips import inside
from tasks.points.data.point_budget import choose_places
from tasks.points.data.projection import Camera, hidden_by_depth, hidden_by_segment, out_of_sight

_STRIDE = 4  # of the grid, in frames and in pixels
_SMOOTH = 0.95  # length of the mean normal of 3 x 3 pixels from which on they are one surface


@dataclass(frozen=True, eq=False)
class Rendered:
    """What is known of the frames of a clip.

    camera: at every frame.
    distances: [T, H, W], from the camera to what each pixel shows.
    segments: [T, H, W], 0: background, k: thing k - 1.
    boxes: [n, T, 8, 3], corners around every thing, in the world.
    normals: [T, H, W, 3], in the world; None: not known.
    """

    camera: Camera
    distances: Float[np.ndarray, "T H W"]
    segments: Int[np.ndarray, "T H W"]
    boxes: Float[np.ndarray, "n T 8 3"]
    normals: Float[np.ndarray, "T H W 3"] | None = None


def sample_points(
    rng: np.random.Generator, scene: Rendered, wanted: int
) -> tuple[Float[np.ndarray, "N 3"], Int[np.ndarray, " N"]]:
    """(query_tyx at centres of pixels, what each is on: 0 the background, k thing k - 1).

    Args:
        rng: of all draws.
        scene: of the clip.
        wanted: N, if the grid has as many places.
    """
    phases = [int(rng.integers(min(_STRIDE, size))) for size in scene.segments.shape]
    axes = [np.arange(p, size, _STRIDE) for p, size in zip(phases, scene.segments.shape, strict=True)]
    t, y, x = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    things = scene.segments[t, y, x]
    chosen = choose_places(rng, things, wanted)
    query_tyx = np.stack([t, y + 0.5, x + 0.5], axis=-1)[chosen].astype(np.float64)
    return query_tyx, things[chosen]


def track_points(
    scene: Rendered, query_tyx: Float[np.ndarray, "N 3"], things: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N T 2"], Bool[np.ndarray, "N T"]]:
    """(tracks_yx, float32; visible) of points that are asked for at centres of pixels."""
    camera = scene.camera
    t, pixels = query_tyx[:, 0].astype(np.int64), np.floor(query_tyx[:, 1:]).astype(np.int64)
    distance = scene.distances[t, pixels[:, 0], pixels[:, 1]]
    places = query_tyx[:, 1:]
    world = camera.unproject(places, t, distance * camera.depth_of_distance(places))
    points, turns = _move(scene, world, t, things)
    tracks_yx, depth = camera.project(points)
    away = np.linalg.norm(points - camera.positions, axis=-1)
    hidden = (depth <= 0) | hidden_by_depth(scene.distances, tracks_yx, away)
    hidden |= hidden_by_segment(scene.segments, tracks_yx, things)
    if scene.normals is not None:
        hidden |= _turned_away(scene, points, turns, t, pixels)
    rows = np.arange(len(t))
    # Where it was taken from, it is seen, whatever lies around it; and it is there, without rounding.
    tracks_yx[rows, t], hidden[rows, t] = places, False
    tracks_yx = out_of_sight(camera, tracks_yx, depth)
    return tracks_yx, ~hidden & inside(tracks_yx, camera.height, camera.width)


def _move(
    scene: Rendered, world: Float[np.ndarray, "N 3"], t: Int[np.ndarray, " N"], things: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N T 3"], Float[np.ndarray, "N T 3 3"]]:
    """Where points of the world, each of its own time, are at every time; and how their surroundings
    turned."""
    frames = len(scene.distances)
    points = np.repeat(world[:, None], frames, axis=1)
    turns = np.tile(np.eye(3), (len(world), frames, 1, 1))
    for thing in np.unique(things[things > 0]):
        corners = scene.boxes[thing - 1]
        middles = corners.mean(axis=1)
        spread = corners - middles[:, None]
        members = np.flatnonzero(things == thing)
        for time in np.unique(t[members]):
            # The linear map of the corners at that time to those at each time: whatever their order is.
            maps = np.swapaxes(np.linalg.pinv(spread[time], rcond=1e-4) @ spread, -1, -2)
            rows = members[t[members] == time]
            away = points[rows, 0] - middles[time]
            points[rows] = middles + np.einsum("tij,nj->nti", maps, away)
            turns[rows] = maps
    return points, turns


def _turned_away(
    scene: Rendered, points: np.ndarray, turns: np.ndarray, t: np.ndarray, pixels: np.ndarray
) -> Bool[np.ndarray, "N T"]:
    """Whether the surface of a point faces away from the camera; False where its normal is not sure."""
    assert scene.normals is not None
    height, width = scene.normals.shape[1:3]
    around = [(down, along) for down in (-1, 0, 1) for along in (-1, 0, 1)]
    rows = np.stack([np.clip(pixels[:, 0] + down, 0, height - 1) for down, _ in around])
    columns = np.stack([np.clip(pixels[:, 1] + along, 0, width - 1) for _, along in around])
    mean = scene.normals[t, rows, columns].mean(axis=0)
    smooth = np.linalg.norm(mean, axis=-1) > _SMOOTH
    normals = np.einsum("ntij,nj->nti", turns, mean)
    facing = np.einsum("nti,nti->nt", normals, scene.camera.positions - points)
    return smooth[:, None] & (facing < 0)
