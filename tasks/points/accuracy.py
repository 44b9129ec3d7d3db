"""Accuracy of bfloat16: the same weights on the same films in both precisions, in pixels.

    python -m launch.bench tasks.points --accuracy FILM.mp4 ... --checkpoint=RUN|FILE

The weights must be trained ones: random logits have no peak, so that rounding moves a track anywhere.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from ml_collections import ConfigDict

from models import tapnext
from models.common.shapes import Params
from models.tapnext import TAPNextConfig, TAPNextRuntime, Tracks
from tasks.common.bench import NOTHING
from tasks.common.config import freeze, override_all, with_defaults
from tasks.common.errors import ConfigError
from tasks.common.video.decoding import Limits, VideoFile
from tasks.common.video.errors import VideoDataError
from tasks.points.query_points import grid_points, model_queries
from tasks.points.resize import resize_video
from tasks.points.trained import open_model

GRID = 16  # points in a row and in a column
FRAMES = 48  # what the released weights were trained on
_LIMITS = Limits(seconds=600.0)


class Difference(NamedTuple):
    """Of the points of one film in each of its frames.

    Attributes:
      pixels: between the two tracks.
      visible: whether float32 says the point is seen.
      agrees: whether both say the same of that.
    """

    pixels: Float[np.ndarray, "Q T"]
    visible: Bool[np.ndarray, "Q T"]
    agrees: Bool[np.ndarray, "Q T"]


def rows(
    *,
    videos: Sequence[str] = (),
    checkpoint: Path | None = None,
    settings: str = "",
    grid: int = GRID,
    frames: int = FRAMES,
) -> list[dict[str, Any]]:
    """Tracks a grid of points from the first frame on, in float32 and in bfloat16, and compares.

    float32 is that of the matrix products too, which GPUs by default round to TF32.

    Args:
      videos: files; each is stretched to the model's image, as in TAP-Vid's evaluation.
      checkpoint: a run's workdir, or an official .npz, .pt or .ckpt.
      settings: values for the `TAPNextRuntime` that is compared with float32, such as
        "runtime.attention_implementation=cudnn,runtime.residual_dtype=bfloat16"; with
        "runtime.compute_dtype=float32" it is the GPU's TF32 that is compared.
      grid: points in a row and in a column.
      frames: of each film, at most.

    Returns:
      Two rows for each film, over all points and frames and over those that float32 says are seen; with
      several films two more, over all of them: {case, compared, implementation, values, mean px, median px,
      95 % px, largest px, visibility agreement, measured}. Pixels are those of the model's image; values are
      the compared points times frames.

    Raises:
      ConfigError: no films or no weights are given, or some cannot be read.
    """
    if not videos:
        raise ConfigError("--accuracy: on which films? --accuracy FILE ... (real ones: noise has no tracks)")
    if checkpoint is None:
        raise ConfigError("--checkpoint=RUN|FILE is missing: bfloat16 is compared on trained weights")
    runtime = _runtime(settings)
    trained = open_model(checkpoint)
    config, params = trained.config, jax.device_put(trained.params)
    found, names = [], []
    for name in videos:
        clip, size = read_film(name, config, frames)
        query_tyx = model_queries(grid_points(grid, *size), *size, config.image_size)
        found.append(compare(config, params, clip, query_tyx, runtime))
        names.append(f"{Path(name).name}, {len(clip)} frames of {size[1]} x {size[0]}")
    if len(videos) > 1:
        found.append(
            Difference(
                *(np.concatenate([x.ravel() for x in each])[None] for each in zip(*found, strict=True))
            )
        )
        names.append(f"all {len(videos)} films")
    height, width = config.image_size
    facts = {
        "measured": f"{grid} x {grid} points from the first frame on, pixels of {width} x {height}, "
        f"weights {Path(checkpoint).name}"
    }
    return [
        {"case": name, **summary, "implementation": _implementation(runtime)} | facts
        for name, difference in zip(names, found, strict=True)
        for summary in summaries(difference)
    ]


def read_film(
    name: str, config: TAPNextConfig, frames: int
) -> tuple[UInt8[np.ndarray, "T h w 3"], tuple[int, int]]:
    """The first frames at the model's size, and the (height, width) that they had.

    Raises:
      ConfigError: not a video of at least two frames.
    """
    try:
        with VideoFile(Path(name).expanduser(), limits=_LIMITS, partial=True) as video:
            clip = resize_video(itertools.islice(video.stream(), frames), *config.image_size)
            size = video.info.height, video.info.width
    except (VideoDataError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"--accuracy {name}: {error}") from error
    if len(clip) < 2:
        raise ConfigError(f"--accuracy {name}: it has one frame: there is nothing to track")
    return clip, size


def compare(
    config: TAPNextConfig,
    params: Params,
    clip: UInt8[np.ndarray, "T h w 3"],
    query_tyx: Float[np.ndarray, "Q 3"],
    runtime: TAPNextRuntime,
) -> Difference:
    """Tracks by `runtime` against those in float32. The clip has the model's size."""
    with jax.default_matmul_precision("highest"):
        exact = _tracks(config, params, clip, query_tyx, TAPNextRuntime())
    rounded = _tracks(config, params, clip, query_tyx, runtime)
    pixels = np.linalg.norm(rounded.tracks_yx - exact.tracks_yx, axis=-1)
    return Difference(pixels, exact.visible, rounded.visible == exact.visible)


def _tracks(
    config: TAPNextConfig, params: Params, clip: np.ndarray, query_tyx: np.ndarray, runtime: TAPNextRuntime
) -> Tracks:
    return tapnext.track_clip(config, params, clip, query_tyx, runtime=runtime, both_ways=False)


def summaries(difference: Difference) -> list[dict[str, Any]]:
    """Columns of the row over all points, and of that over those that float32 says are seen."""
    every = np.ones_like(difference.visible)
    return [
        _summary(name, difference.pixels[kept], difference.agrees[kept])
        for name, kept in (("all points", every), ("visible points", difference.visible))
    ]


def _summary(name: str, pixels: np.ndarray, agrees: np.ndarray) -> dict[str, Any]:
    columns = ("mean px", "median px", "95 % px", "largest px", "visibility agreement")
    figures: dict[str, Any] = dict.fromkeys(columns, NOTHING)
    if len(pixels):
        found = [pixels.mean(), np.median(pixels), np.percentile(pixels, 95), pixels.max()]
        shown = [*(float(f"{x:.3g}") for x in found), round(float(agrees.mean()), 4)]
        figures = dict(zip(columns, shown, strict=True))
    return {"compared": name, "values": len(pixels), **figures}


def _runtime(settings: str) -> TAPNextRuntime:
    given = ConfigDict({"runtime": {"compute_dtype": "bfloat16"}})
    config = with_defaults(given, {"runtime": TAPNextRuntime})
    override_all(config, settings)
    return freeze(config.runtime, TAPNextRuntime, "runtime")


def _implementation(runtime: TAPNextRuntime) -> str:
    attention = runtime.attention_implementation or "xla"
    return f"{runtime.compute_dtype}, attention {attention}, residual {runtime.residual_dtype}"
