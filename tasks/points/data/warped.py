"""Real pictures with exact tracks: frames of films under random homography paths.

What moves in a real film is not known exactly, so nothing in these clips moves by itself. Each is made of
single frames: one fills the picture, seen by a camera that pans, zooms, turns and tilts over it. That is a
"still" clip. In a "cut" clip, regions of another frame, cut out by random shapes, move in front of it on
paths of their own. Tracks and occlusion are exact, as in generated clips (`scene.py`). Pictures are as fine
as the film is, and keep its colours, grain and compression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.photographs import SPLITS
from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import FileClip, Window
from tasks.common.video.shards import stamp
from tasks.points.data.appearance import AppearanceConfig
from tasks.points.data.clips import PointClip
from tasks.points.data.generated import film_scene
from tasks.points.data.scene import (
    Layer,
    Scene,
    SceneConfig,
    draw_camera,
    draw_placing,
    seen_part,
    still_layer,
)
from tasks.points.data.textures import Picture, draw_shape
from tasks.points.data.unlabelled import find_videos

VERSION = 1  # of the clips: raise it with any change that alters one
_HELD_OUT = 7  # every so manieth film of a folder without train/ and validation/ is for validation
_TRIES = 8  # frames of a film, or regions of a frame, that are looked at for one that shows something
_EMPTY = 12.0  # standard deviation of grey levels up to which a picture shows too little
_LARGEST = 4096  # pixels of a clip's side


@dataclass(frozen=True)
class WarpConfig:
    """What is made of films. Speeds are in shorter sides of the frame per frame.

    frames: of a clip.
    height, width: of its frames, in pixels.
    points: tracks of a clip.
    cut: share of clips with regions cut from another frame; the others are one still frame.
    fewest, most: such regions in a clip.
    slowest, fastest: typical speed of a path, log-uniform.
    tilt: most perspective, see `SceneConfig`.
    exposure: share of clips with motion blur.
    seed: of everything.
    """

    frames: int = 24
    height: int = 256
    width: int = 256
    points: int = 256
    cut: float = 0.5
    fewest: int = 1
    most: int = 3
    slowest: float = 0.004
    fastest: float = 0.04
    tilt: float = 0.4
    exposure: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.points < 1:
            raise ValueError(f"{self.frames} frames, {self.points} points: need at least 1 of each")
        if not (16 <= self.height <= _LARGEST and 16 <= self.width <= _LARGEST):
            raise ValueError(f"frames of {self.height} x {self.width} pixels: need 16 to {_LARGEST}")
        if not 0 <= self.cut <= 1:
            raise ValueError(f"cut = {self.cut}: a share is between 0 and 1")
        if self.fewest < 1:
            raise ValueError(f"fewest = {self.fewest}: need at least 1 region where any are cut")
        self.scene()
        self.appearance()

    def scene(self) -> SceneConfig:
        """Bounds and speeds of the paths, number and size of the regions."""
        return SceneConfig(
            fewest=self.fewest, most=self.most, smallest=0.2, largest=0.6, slowest=self.slowest,
            fastest=self.fastest, ripple=0.0, tilt=self.tilt,
        )  # fmt: skip

    def appearance(self) -> AppearanceConfig:
        """Motion blur; light, noise and compression are the film's own."""
        return AppearanceConfig(exposure=self.exposure, drift=0.0, noise=0.0, compressed=0.0)


@dataclass(frozen=True)
class WarpedClips:
    """Clips by index: a clip is a pure function of the configuration, the films, the split and the index.
    Picklable.

    config: what is made.
    root: folder that names of films are relative to.
    films: files, in order; clip k is made of film k modulo their number.
    split: "train" or "validation"; decides the draws.
    count: how many clips there are.
    limits: on a film.
    """

    config: WarpConfig
    root: str
    films: tuple[str, ...]
    split: str
    count: int
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.count < 1 or not self.films:
            raise ValueError(f"{self.count} clips of {len(self.films)} films: need at least 1 of each")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: there are {', '.join(SPLITS)}")

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.films[index % len(self.films)]}[{index}]"

    def key(self, index: int) -> Any:
        films = [[film, stamp(Path(self.root) / film)] for film in self.films]
        return [VERSION, asdict(self.config), films, self.split, index]

    def open(self, index: int) -> PointClip:
        """The clip.

        Raises:
            VideoError: a film that it is made of cannot be read, or shows nothing.
            IndexError: there is no such clip.
        """
        scene, rng = self.draw(index)
        return film_scene(rng, scene, self.config.points, self.config.appearance())

    def draw(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of a clip, and the generator that goes on to draw the rest of it; errors as of `open`."""
        if not 0 <= index < self.count:
            raise IndexError(f"clip {index} of {self.count}")
        config = self.config
        seed = [0x77617270, config.seed % 2**63, sorted(SPLITS).index(self.split), index]
        rng = np.random.default_rng(seed)
        film = index % len(self.films)
        is_cut = rng.random() < config.cut
        camera = draw_camera(rng, config.height, config.width, config.frames, config.scene())
        left, top, columns, rows = seen_part(camera, config.height, config.width, config.frames)
        window = Window(rows, columns, "crop", float(rng.random()))
        layers = [still_layer(window.apply(self._frame(rng, [film])), left, top)]
        if is_cut:
            # Another film if there is one, else another frame.
            others = [other for other in range(len(self.films)) if other != film]
            frame = self._frame(rng, others or [film])
            count = int(rng.integers(config.fewest, config.most + 1))
            layers += [_cut_out(rng, frame, config) for _ in range(count)]
        return Scene(config.height, config.width, config.frames, tuple(layers), camera), rng

    def _frame(self, rng: np.random.Generator, films: Sequence[int]) -> Picture:
        """A random frame of any of these films that is not empty, as between scenes and in titles."""
        for _ in range(_TRIES):
            name = self.films[films[int(rng.integers(len(films)))]]
            with FileClip(Path(self.root) / name, name, self.limits) as clip:
                (frame,) = clip.read([int(rng.integers(clip.frames))])
            if frame.std() > _EMPTY:
                return frame
        raise VideoError(
            name, f"{_TRIES} frames at random, all of (nearly) one colour: there is nothing to see"
        )


def _cut_out(rng: np.random.Generator, frame: UInt8[np.ndarray, "H W 3"], config: WarpConfig) -> Layer:
    """A region of a frame on a path of its own. Large films are reduced, as their frames are for a clip."""
    scene, unit = config.scene(), min(config.height, config.width)
    size = unit * np.exp(rng.uniform(np.log(scene.smallest), np.log(scene.largest)))
    alpha = draw_shape(rng, float(size))
    rows, columns = alpha.shape
    # Pixels of the film to one of the texture: 1 where the film's frame has a clip's size.
    scale = min(frame.shape[:2]) / unit
    scale = min(scale, frame.shape[0] / rows, frame.shape[1] / columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    for _ in range(_TRIES):
        top = int(rng.integers(max(frame.shape[0] - height, 0) + 1))
        left = int(rng.integers(max(frame.shape[1] - width, 0) + 1))
        region = frame[top : top + height, left : left + width]
        if region.std() > _EMPTY:
            break
    texture = np.dstack([Window(rows, columns, "stretch").apply(region), alpha])
    return Layer(
        texture, draw_placing(rng, (rows, columns), config.height, config.width, config.frames, scene)
    )


def find_films(path: Path | str, splits: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The films of a folder, at any depth, by split: names relative to it, in order.

    Args:
        path: with train/ or validation/ in it, these are the splits. Else, of two splits, "validation" is
            every seventh film by name and "train" the others; a single one has all films.
        splits: that are wanted.

    Raises:
        VideoDataError: no such folder, no films in it, or only one where two splits are wanted.
    """
    root = Path(path).expanduser()
    if any((root / split).is_dir() for split in SPLITS):
        return {split: _names(root, find_videos(root / split)) for split in splits}
    films = _names(root, find_videos(root))
    if len(splits) == 1:
        return {splits[0]: films}
    if len(films) < 2:
        raise VideoDataError(f"{root}: one film, {films[0]}: training and validation need different ones")
    held_out = films[:: min(_HELD_OUT, len(films))]
    return {"train": tuple(film for film in films if film not in held_out), "validation": held_out}


def _names(root: Path, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(file.relative_to(root)) for file in files)


def warped_clips(config: WarpConfig, path: Path | str, counts: Mapping[str, int]) -> dict[str, WarpedClips]:
    """Clips made of the films of a folder, by split.

    Args:
        config: what is made.
        path: see `find_films`.
        counts: clips of "train" and of "validation"; a split of 0 clips is left out.

    Raises:
        ValueError: no clips at all.
        VideoDataError: as `find_films`.
    """
    wanted = {split: count for split, count in counts.items() if count}
    if not wanted or min(wanted.values()) < 0:
        raise ValueError(f"clips of the splits: {dict(counts)}; need at least 1 in all, and none below 0")
    films, root = find_films(path, list(wanted)), str(Path(path).expanduser())
    return {split: WarpedClips(config, root, films[split], split, count) for split, count in wanted.items()}
