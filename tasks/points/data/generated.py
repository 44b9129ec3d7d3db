"""The embedded source: generated clips with exact tracks, made when they are read. Clip k is a pure function
of the configuration and k, at any length and size."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tasks.common.photographs import SPLITS, photographs_digest
from tasks.points.data.appearance import AppearanceConfig, draw_exposure, finish
from tasks.points.data.clips import PointClip
from tasks.points.data.render import render
from tasks.points.data.scene import Scene, SceneConfig, draw_scene
from tasks.points.data.scene_points import choose_points, track_points
from tasks.points.data.textures import Photographs

VERSION = 1  # of the clips: raise it with any change that alters one


@dataclass(frozen=True)
class GeneratedClips:
    """Clips by index.

    photographs: whose textures, and which split.
    count: how many there are.
    frames, height, width: of each, numbers and pixels.
    points: N of each.
    seed: of everything.
    scene, appearance: what they are like.
    """

    photographs: Photographs
    count: int
    frames: int = 24
    height: int = 64
    width: int = 64
    points: int = 128
    seed: int = 0
    scene: SceneConfig = field(default_factory=SceneConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)

    def __post_init__(self) -> None:
        if self.count < 1 or self.points < 1:
            raise ValueError(f"{self.count} clips of {self.points} points: need at least 1 of each")
        if self.frames < 1 or min(self.height, self.width) < 16:
            raise ValueError(
                f"{self.frames} frames of {self.height} x {self.width} pixels: need at least 1 and 16 x 16"
            )

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"generated:{self.photographs.split}:{self.seed}:{index}"

    def key(self, index: int) -> Any:
        given = {"photographs": list(self.photographs.files) or photographs_digest(), "index": index}
        config = {k: v for k, v in asdict(self).items() if k not in ("photographs", "count")}
        return [VERSION, self.photographs.split, config, given]

    def draw(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of a clip, and the generator that goes on to draw the rest of it."""
        split = sorted(SPLITS).index(self.photographs.split)
        rng = np.random.default_rng([self.seed % 2**63, split, index])
        return draw_scene(rng, self.photographs, self.height, self.width, self.frames, self.scene), rng

    def open(self, index: int) -> PointClip:
        """The clip. Raises IndexError: there is no such clip."""
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index} of {self.count}")
        scene, rng = self.draw(index)
        return film_scene(rng, scene, self.points, self.appearance)


def film_scene(
    rng: np.random.Generator, scene: Scene, points: int, appearance: AppearanceConfig
) -> PointClip:
    """A scene as a clip: points of it with their exact tracks, and its pictures as a camera takes them.

    Args:
        rng: of all draws.
        scene: what is seen.
        points: N.
        appearance: what the camera adds.
    """
    layers, query_frames, places = choose_points(rng, scene, points)
    tracks_yx, visible = track_points(scene, layers, places)
    # It was seen there; an alpha of exactly a half might round to the other side.
    visible[np.arange(len(layers)), query_frames] = True
    frames = render(scene, draw_exposure(rng, appearance))
    video = finish(rng, frames, appearance)
    return PointClip(video, tracks_yx, visible, query_frames.astype(np.int32))
