"""Augmentations of clips with point tracks: pictures and places change together, visibility is recomputed.

Coordinates are raster (y, x): (0, 0) is the outer corner of the first pixel.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tasks.common.optional import need
from tasks.points.data.clips import PointClip, inside
from tasks.points.data.motion_paths import (
    Border,
    corner_paths,
    homographies,
    roll_path,
    roll_video,
    warp_video,
)
from tasks.points.data.warps import project

_NATIVE = 256  # pixels of a side
_ATTEMPTS = 10  # windows drawn before the whole frame is taken


@dataclass(frozen=True)
class AugmentConfig:
    """How often each is done, as a share of clips; all are off by default.

    roll, homography: TAPNext++ (0.8 each in the paper).
    rotate: whether the roll also turns.
    strength: of both: scales every amplitude; the roll's are pixels at 256, and scaled with the frame.
    border: of the homography: black ("constant") or the edge ("replicate").
    flip_horizontal, flip_vertical: mirrored.
    crop: a window of random area and aspect, brought to the size of the frames.
    least_area: of the window, as a share; the most is 1.
    least_aspect, most_aspect: its width / height.
    colour: brightness, contrast, saturation and hue, the same in all frames.
    """

    roll: float = 0.0
    homography: float = 0.0
    rotate: bool = True
    strength: float = 1.0
    border: Border = "constant"
    flip_horizontal: float = 0.0
    flip_vertical: float = 0.0
    crop: float = 0.0
    least_area: float = 0.3
    least_aspect: float = 0.5
    most_aspect: float = 2.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name in ("roll", "homography", "flip_horizontal", "flip_vertical", "crop", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} = {getattr(self, name)}: a share is between 0 and 1")
        if self.border not in ("constant", "replicate"):
            raise ValueError(f"augment.border must be 'constant' or 'replicate', got {self.border!r}")
        if not self.strength >= 0 or not 0 < self.least_area <= 1:
            raise ValueError(
                f"augment.strength = {self.strength} must be at least 0, augment.least_area = "
                f"{self.least_area} above 0 and at most 1"
            )
        if not 0 < self.least_aspect <= self.most_aspect:
            raise ValueError(
                f"augment.least_aspect = {self.least_aspect}, augment.most_aspect = {self.most_aspect}: need "
                "0 < least_aspect <= most_aspect"
            )


def augment(
    clip: PointClip, rng: np.random.Generator, config: AugmentConfig, size: tuple[int, int] | None = None
) -> PointClip:
    """A clip after all augmentations that its draws choose.

    Args:
        clip: checked.
        rng: of all draws.
        config: how often each is done.
        size: height and width that the frames are brought to; default: as they are.
    """
    chosen = rng.random(6)
    # All draws are made, whatever is chosen: one option does not change another's.
    official = np.random.RandomState(rng.integers(2**32, dtype=np.uint64).astype(np.uint32))
    height, width = clip.video.shape[1:3]
    window = area_window(rng, height, width, config)
    if chosen[0] >= config.crop:
        window = (0.0, 0.0, float(height), float(width))
    clip = crop_resize(clip, window, size or (height, width))
    if chosen[1] < config.flip_horizontal:
        clip = flip_horizontally(clip)
    if chosen[2] < config.flip_vertical:
        clip = flip_vertically(clip)
    if chosen[3] < config.roll:
        # Its amplitudes are pixels of TAPNext's 256 x 256.
        strength = config.strength * min(clip.video.shape[1:3]) / _NATIVE
        clip = roll(clip, official, strength, rotate=config.rotate)
    if chosen[4] < config.homography:
        clip = sway(clip, official, config.strength, config.border)
    if chosen[5] < config.colour:
        clip = replace(clip, video=recolour(clip.video, *draw_colours(rng)))
    return clip


def recompute_visible(clip: PointClip) -> PointClip:
    """A clip whose points are visible only inside the frame, and asked for only where they are visible.

    A query frame at which its point is no longer visible becomes -1: any.
    """
    count, (height, width) = len(clip.tracks_yx), clip.video.shape[1:3]
    visible = clip.visible & inside(clip.tracks_yx, height, width)
    still = visible[np.arange(count), clip.query_frames] & (clip.query_frames >= 0)
    return replace(
        clip, visible=visible, query_frames=np.where(still, clip.query_frames, -1).astype(np.int32)
    )


def roll(
    clip: PointClip, rng: np.random.RandomState, strength: float = 1.0, *, rotate: bool = True
) -> PointClip:
    """The TAPNext++ roll. Frames keep their size (the official code's grow, when it rotates).

    What leaves the padded frame on one side comes in on the other, tracks with it. A point that was outside
    the padded frame has no place in the rolled one: it is put one frame size before the first pixel.
    """
    frames, height, width = clip.video.shape[:3]
    path = roll_path(rng, frames, height, width, strength, rotate)
    xy = clip.tracks_yx[..., ::-1].astype(np.float64) - 0.5
    tracks_yx = (path.move(xy, height, width) + 0.5)[..., ::-1]
    on_canvas = inside(clip.tracks_yx + path.pad, height + 2 * path.pad, width + 2 * path.pad)
    tracks_yx = np.where(on_canvas[..., None], tracks_yx, (-height, -width)).astype(np.float32)
    return recompute_visible(replace(clip, video=roll_video(clip.video, path), tracks_yx=tracks_yx))


def sway(
    clip: PointClip, rng: np.random.RandomState, strength: float = 1.0, border: Border = "constant"
) -> PointClip:
    """The TAPNext++ homography: the frame's corners move inward, each on its own path.

    Args:
        clip: with raster coordinates.
        rng: of all draws.
        strength: scales all amplitudes.
        border: what lies where the frame was: black, or its edge.
    """
    frames, height, width = clip.video.shape[:3]
    matrices = homographies(corner_paths(rng, frames, height, width, strength), height, width)
    xy = clip.tracks_yx[..., ::-1].astype(np.float64) - 0.5
    tracks_yx = (project(matrices, xy) + 0.5)[..., ::-1].astype(np.float32)
    return recompute_visible(
        replace(clip, video=warp_video(clip.video, matrices, border), tracks_yx=tracks_yx)
    )


def flip_horizontally(clip: PointClip) -> PointClip:
    """Left and right exchanged."""
    tracks = np.stack([clip.tracks_yx[..., 0], clip.video.shape[2] - clip.tracks_yx[..., 1]], axis=-1)
    return recompute_visible(replace(clip, video=clip.video[:, :, ::-1], tracks_yx=tracks))


def flip_vertically(clip: PointClip) -> PointClip:
    """Up and down exchanged."""
    tracks = np.stack([clip.video.shape[1] - clip.tracks_yx[..., 0], clip.tracks_yx[..., 1]], axis=-1)
    return recompute_visible(replace(clip, video=clip.video[:, ::-1], tracks_yx=tracks))


def area_window(
    rng: np.random.Generator, height: int, width: int, config: AugmentConfig
) -> tuple[float, float, float, float]:
    """A random window (top, left, height, width), in pixels: the first of ten draws that fits, or
    everything."""
    draws = rng.random((_ATTEMPTS, 4))
    for area, aspect, down, along in draws:
        pixels = (config.least_area + area * (1 - config.least_area)) * height * width
        ratio = config.least_aspect + aspect * (config.most_aspect - config.least_aspect)
        rows, columns = round(np.sqrt(pixels / ratio)), round(np.sqrt(pixels * ratio))
        if 1 <= rows <= height and 1 <= columns <= width:
            top, left = int(down * (height - rows + 1)), int(along * (width - columns + 1))
            return float(top), float(left), float(rows), float(columns)
    return 0.0, 0.0, float(height), float(width)


def crop_resize(
    clip: PointClip, window: tuple[float, float, float, float], size: tuple[int, int]
) -> PointClip:
    """A window of every frame, brought to `size` (height, width) with antialiasing; coordinates with it.

    Args:
        clip: with raster coordinates.
        window: top, left, height, width, inside the frames.
        size: of the result.
    """
    top, left, rows, columns = window
    if (top, left, rows, columns) == (0, 0, *clip.video.shape[1:3]) and size == clip.video.shape[1:3]:
        return clip
    images: Any = need("PIL.Image", "resizing frames")
    box, bilinear = (left, top, left + columns, top + rows), images.Resampling.BILINEAR
    frames = [images.fromarray(frame).resize((size[1], size[0]), bilinear, box=box)
              for frame in np.ascontiguousarray(clip.video)]  # fmt: skip
    scale = np.array([size[0] / rows, size[1] / columns])
    tracks_yx = ((clip.tracks_yx - np.array([top, left])) * scale).astype(np.float32)
    return recompute_visible(
        replace(clip, video=np.stack([np.asarray(f) for f in frames]), tracks_yx=tracks_yx)
    )


def draw_colours(
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]]:
    """A change of colours (matrix, offset): rgb -> matrix rgb + offset, in grey levels.

    Hue turns by up to 18 degrees about the grey axis; saturation 0.5..1.5, and none in a tenth of clips;
    contrast 0.7..1.3 about middle grey; brightness by up to 32 grey levels.
    """
    hue, saturation = rng.uniform(-0.1, 0.1) * np.pi, rng.uniform(0.5, 1.5)
    contrast, brightness, grey = rng.uniform(0.7, 1.3), rng.uniform(-32, 32), rng.random() < 0.1
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(hue) * np.eye(3) + np.sin(hue) * cross + (1 - np.cos(hue)) * axis
    saturation = 0.0 if grey else saturation
    luma = np.tile(np.array([0.299, 0.587, 0.114]), (3, 1))
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * luma) @ turn
    return matrix, np.full(3, 127.5 * (1 - contrast) + brightness)


def recolour(
    video: UInt8[np.ndarray, "T H W 3"], matrix: Float[np.ndarray, "3 3"], offset: Float[np.ndarray, " 3"]
) -> UInt8[np.ndarray, "T H W 3"]:
    """Every pixel's colour under matrix and offset, clipped."""
    result = np.empty_like(video)
    for i, frame in enumerate(video):
        changed = frame.astype(np.float32) @ matrix.T.astype(np.float32) + offset.astype(np.float32)
        result[i] = np.clip(changed + 0.5, 0, 255)
    return result
