"""Decode videos once, into shards of JPEG frames: by all cores, resumable after being killed at any moment.

See `tasks/common/video/shards.py` for how they are written.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.frame_records import pack_record
from tasks.common.video.shards import Progress, Stored, stamp, write_shards
from tasks.video.data.records import FORMAT
from tasks.video.data.sources import Videos

_READ_AT_ONCE = 64  # frames held decoded


@dataclass(frozen=True)
class PrepareConfig:
    """What is stored of a video.

    short_side: of the stored frames in pixels; smaller ones stay as they are; 0: all do.
    quality: of the JPEG files, 1..100.
    stride: every so many frames are kept.
    most_frames: of a video; later ones are left out; 0: all are kept.
    per_shard: videos in a shard.
    on_error: "skip" (leave out and list what cannot be read) or "fail" (stop at the first).
    """

    short_side: int = 256
    quality: int = 90
    stride: int = 1
    most_frames: int = 0
    per_shard: int = 64
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or self.stride < 1 or self.per_shard < 1:
            raise ValueError(
                f"quality {self.quality}, stride {self.stride}, per_shard {self.per_shard}: need a quality "
                "of 1..100, and at least 1 of the others"
            )
        if self.short_side < 0 or self.most_frames < 0:
            raise ValueError(
                f"short_side {self.short_side}, most_frames {self.most_frames}: need at least 0 (no limit)"
            )
        if self.on_error not in ("skip", "fail"):
            raise ValueError(f"on_error must be 'skip' or 'fail', got {self.on_error!r}")


@dataclass(frozen=True)
class _Recorder:
    """A source's videos as records of JPEG frames."""

    videos: Videos
    config: PrepareConfig

    def __len__(self) -> int:
        return len(self.videos)

    def name(self, index: int) -> str:
        return self.videos.name(index)

    def key(self, index: int) -> list[Any]:
        name = self.videos.name(index)
        return [name, int(self.videos.labels[index]), stamp(name)]

    def encode(self, index: int) -> tuple[bytes, dict[str, Any]]:
        frames, fps = encoded_frames(self.videos, index, self.config)
        return pack_record(frames, fps), {"label": int(self.videos.labels[index]), "frames": len(frames)}


def encoded_frames(videos: Videos, index: int, config: PrepareConfig) -> tuple[list[bytes], float]:
    """(JPEG files, fps) of one video, as they are stored.

    Raises:
        VideoError, VideoTimeout: it cannot be read.
    """
    with videos.open(index) as clip:
        wanted = list(range(0, clip.frames, config.stride))
        wanted = wanted[: config.most_frames or len(wanted)]
        encoded = []
        for start in range(0, len(wanted), _READ_AT_ONCE):
            frames = clip.read(wanted[start : start + _READ_AT_ONCE])
            encoded += [_jpeg(frame, config) for frame in frames]
        return encoded, clip.fps / config.stride


def _jpeg(frame: UInt8[np.ndarray, "H W 3"], config: PrepareConfig) -> bytes:
    image_module = need("PIL.Image", "encoding frames")
    image = image_module.fromarray(frame)
    short = min(image.size)
    if 0 < config.short_side < short:
        size = [max(1, round(side * config.short_side / short)) for side in image.size]
        image = image.resize(size, image_module.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=config.quality)
    return file.getvalue()


def prepare(
    videos: Videos,
    output: Path | str,
    config: PrepareConfig | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stores all frames of all videos of one split in a folder of shards. Returns the manifest.

    Args:
        videos: labelled videos.
        output: folder; what an earlier run has left there and is still right is kept.
        config: what is stored.
        workers: processes (default: one per core).
        progress: called with (videos done, in all, done by an earlier run).

    Raises:
        VideoDataError: nothing could be read, or (on_error="fail") something could not.
        VideoTimeout: idem, in time.
        ImportError: an optional package is missing.
    """
    config = config or PrepareConfig()
    options = {
        "short_side": config.short_side, "quality": config.quality, "stride": config.stride,
        "most_frames": config.most_frames, "on_error": config.on_error, "classes": list(videos.classes),
    }  # fmt: skip
    header = {"classes": list(videos.classes), "missing": list(videos.missing)}
    stored = Stored(FORMAT, options, header, config.per_shard, config.on_error)
    return write_shards(_Recorder(videos, config), output, stored, workers=workers, progress=progress)
