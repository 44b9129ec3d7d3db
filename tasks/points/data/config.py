"""The data section of a configuration."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.common.video.decoding import Limits
from tasks.points.data.appearance import AppearanceConfig
from tasks.points.data.augment import AugmentConfig
from tasks.points.data.examples import Shape
from tasks.points.data.motion_paths import Border
from tasks.points.data.scene import SceneConfig

SourceName = Literal["generated", "folder", "npz", "pointodyssey", "records"]
SOURCES = ("generated", "folder", "npz", "pointodyssey", "records")


@dataclass(frozen=True)
class PointsDataConfig:
    """Which clips, and what is done to them. Validates itself.

    source: generated (embedded: drawn while training), folder (your own videos and tracks), npz (a file a
      clip), pointodyssey, records (what `prepare`, `simulate` and `convert-movi` make; several folders,
      separated by commas, are mixed).
    path: the folder. Where it holds train/ and validation/, these are the splits.
    held_out_fraction: of the clips, by name, where there is no validation/.
    frames, stride: T frames of an example, every so manieth of the clip's.
    height, width: of the frames, in pixels.
    tracks: Q, points of an example.
    repeats: times a clip is shown in a row, with other points and augmentations each time, and opened once:
      where opening clips is slower than training. A batch shows batch_size / repeats clips.
    max_pixels, max_frames, max_seconds: limits on a file, see `Limits`.
    generated_clips: how many different ones; generated_held_out: of other photographs; generated_seed.
    generated_cached: this many clips are made once, kept in the cache, and seen again and again, each time
      with other points and augmentations, where drawing new ones is slower than training; 0: every clip is
      new.
    generated_photographs: folder of pictures for textures; "": those in installed packages.
    generated_fewest, generated_most, generated_smallest, generated_largest, generated_slowest,
      generated_fastest, generated_soonest, generated_latest, generated_camera, generated_ripple,
      generated_wash: see `SceneConfig`.
    generated_exposure, generated_noise, generated_drift, generated_compressed: see `AppearanceConfig`.
    augment_...: see `AugmentConfig`; of training clips only.
    cache_dir: where cached clips go (default: $FOXTROT_CACHE or ~/.cache/foxtrot).
    """

    source: SourceName = "generated"
    path: str = ""
    held_out_fraction: float = 0.05
    frames: int = 24
    stride: int = 1
    height: int = 64
    width: int = 64
    tracks: int = 64
    repeats: int = 1
    max_pixels: int = Limits.pixels
    max_frames: int = Limits.frames
    max_seconds: float = Limits.seconds
    generated_clips: int = 1_000_000
    generated_held_out: int = 64
    generated_cached: int = 0
    generated_seed: int = 0
    generated_photographs: str = ""
    generated_fewest: int = SceneConfig.fewest
    generated_most: int = SceneConfig.most
    generated_smallest: float = SceneConfig.smallest
    generated_largest: float = SceneConfig.largest
    generated_slowest: float = SceneConfig.slowest
    generated_fastest: float = SceneConfig.fastest
    generated_soonest: float = SceneConfig.soonest
    generated_latest: float = SceneConfig.latest
    generated_camera: float = SceneConfig.camera
    generated_ripple: float = SceneConfig.ripple
    generated_wash: float = SceneConfig.wash
    generated_exposure: float = AppearanceConfig.exposure
    generated_noise: float = AppearanceConfig.noise
    generated_drift: float = AppearanceConfig.drift
    generated_compressed: float = AppearanceConfig.compressed
    augment_roll: float = 0.0
    augment_homography: float = 0.0
    augment_rotate: bool = True
    augment_strength: float = 1.0
    augment_border: Border = "constant"
    augment_flip_horizontal: float = 0.0
    augment_flip_vertical: float = 0.0
    augment_crop: float = 0.0
    augment_colour: float = 0.0
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise ValueError(f"data.held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        if self.source == "generated" and self.path:
            raise ValueError("data.source='generated' reads no files: data.path has no meaning")
        if self.source != "generated" and not self.path:
            raise ValueError(f"data.source={self.source!r} needs data.path")
        for name, least in (
            ("repeats", 1), ("generated_clips", 1), ("generated_held_out", 0), ("generated_cached", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        self.shape()
        self.limits()
        self.scene()
        self.appearance()
        self.augment()

    def shape(self) -> Shape:
        """Of an example."""
        return Shape(self.frames, self.height, self.width, self.tracks, self.stride)

    def limits(self) -> Limits:
        """On one file."""
        return Limits(pixels=self.max_pixels, frames=self.max_frames, seconds=self.max_seconds)

    def scene(self) -> SceneConfig:
        """Of generated clips."""
        return SceneConfig(
            fewest=self.generated_fewest, most=self.generated_most, smallest=self.generated_smallest,
            largest=self.generated_largest, slowest=self.generated_slowest, fastest=self.generated_fastest,
            soonest=self.generated_soonest, latest=self.generated_latest, camera=self.generated_camera,
            ripple=self.generated_ripple, wash=self.generated_wash,
        )  # fmt: skip

    def appearance(self) -> AppearanceConfig:
        """Of generated clips."""
        return AppearanceConfig(
            exposure=self.generated_exposure, noise=self.generated_noise, drift=self.generated_drift,
            compressed=self.generated_compressed,
        )  # fmt: skip

    def augment(self) -> AugmentConfig:
        """Of training clips."""
        return AugmentConfig(
            roll=self.augment_roll, homography=self.augment_homography, rotate=self.augment_rotate,
            strength=self.augment_strength, border=self.augment_border,
            flip_horizontal=self.augment_flip_horizontal, flip_vertical=self.augment_flip_vertical,
            crop=self.augment_crop, colour=self.augment_colour,
        )  # fmt: skip

    def cache(self) -> Path:
        """The folder for things made once."""
        return Path(self.cache_dir or os.environ.get("FOXTROT_CACHE") or "~/.cache/foxtrot").expanduser()
