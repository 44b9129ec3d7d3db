"""Which points of a scene are asked for, and where they are: exact tracks, exact occlusion."""

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.points.data.clips import inside
from tasks.points.data.point_budget import choose_places, early_share
from tasks.points.data.scene import Scene
from tasks.points.data.view import View

_POOL = 40  # places drawn for every point wanted


def choose_points(
    rng: np.random.Generator, scene: Scene, wanted: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Float[np.ndarray, "N 2"]]:
    """Points to ask for, in random order: (layer, query frame, place (x, y) in the layer's texture).

    Args:
        rng: of all draws.
        scene: what is seen.
        wanted: N, see `choose_places`.
    """
    size = np.array([scene.width, scene.height])
    count = _POOL * wanted
    frames = (scene.frames * early_share(rng, count)).astype(np.int64)
    # Centres of pixels, as a person or a data set would ask for.
    places = np.floor(rng.random((count, 2)) * size) + 0.5
    view = View(scene, np.arange(scene.frames, dtype=np.float64))
    top = view.at(frames).on_top(places[None])[0]
    chosen = choose_places(rng, top, wanted)
    textures = np.empty((len(chosen), 2))
    for thing in np.unique(top[chosen]):
        members = np.flatnonzero(top[chosen] == thing)
        at = view.at(frames[chosen[members]])
        textures[members] = at.to_texture(int(thing), places[chosen[members]][None])[0]
    return top[chosen], frames[chosen], textures


def track_points(
    scene: Scene, layers: Int[np.ndarray, " N"], texture_xy: Float[np.ndarray, "N 2"]
) -> tuple[Float[np.ndarray, "N T 2"], Bool[np.ndarray, "N T"]]:
    """(tracks_yx in pixels, float32; visible) of places on the layers' textures, at every frame.

    Visible is: inside the frame, and no nearer layer is there (alpha above a half).
    """
    view = View(scene, np.arange(scene.frames, dtype=np.float64))
    tracks = np.empty((len(layers), scene.frames, 2))
    visible = np.zeros((len(layers), scene.frames), bool)
    for layer in np.unique(layers):
        members = np.flatnonzero(layers == layer)
        xy = view.to_frame(int(layer), texture_xy[members])
        tracks[members] = xy[..., ::-1]
        visible[members] = ~view.covered(int(layer), xy)
    rounded = tracks.astype(np.float32)
    return rounded, visible & inside(rounded, scene.height, scene.width)
