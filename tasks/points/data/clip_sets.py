"""Clips of any training source as videos to evaluate on: held-out ones, scored as TAP-Vid scores its own."""

import dataclasses
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from tasks.common.video.errors import VideoError
from tasks.common.video.frames import Clip
from tasks.points.data.assemble import TRAIN, VALIDATION, open_points_data
from tasks.points.data.clips import Clips, check_clip
from tasks.points.data.config import PointsDataConfig, SourceName
from tasks.points.data.tracked_video import ArrayClip, PointDataError, TrackedSet, TrackedVideo, unique_names

CLIP_SOURCES = ("generated", "records", "npz", "pointodyssey")


class ClipSet(NamedTuple):
    """Clips to evaluate on.

    Attributes:
      videos: the clips as annotated videos.
      described: which clips of the source these are, in words.
    """

    videos: TrackedSet
    described: str


@dataclasses.dataclass(frozen=True)
class ClipOpener:
    """Opens the frames of a clip of a source, read (or drawn) anew."""

    clips: Clips
    index: int

    def __call__(self) -> Clip:
        """Raises VideoError."""
        return ArrayClip(self.clips.open(self.index).video, self.clips.name(self.index))


def tracked_clips(clips: Clips, most: int = 0) -> TrackedSet:
    """Clips of a source as a set to evaluate on.

    Every clip is read once for its tracks, and again when its frames are asked for. A point is occluded where
    the clip says that it is not visible, and so wherever it is beyond the frame. The frame at which the clip
    asks for a point has no meaning here: TAP-Vid samples queries of its own.

    Args:
      clips: of any source.
      most: the first so many; 0: all.

    Raises:
      PointDataError: a clip that cannot be used, or two of one name.
    """
    count = min(most, len(clips)) if most else len(clips)
    videos = [_tracked(clips, index) for index in range(count)]
    return TrackedSet(unique_names(videos, "the clips"), ())


def _tracked(clips: Clips, index: int) -> TrackedVideo:
    name = clips.name(index)
    try:
        clip = check_clip(clips.open(index), name)
    except VideoError as error:
        raise PointDataError(str(error)) from error
    height, width = clip.video.shape[1:3]
    tracks_xy = clip.tracks_yx[..., ::-1].astype(np.float64) / (width, height)
    tracks_xy.flags.writeable = False
    return TrackedVideo(name, tracks_xy, ~clip.visible, ClipOpener(clips, index), np.arange(len(clip.video)))


def open_clip_set(
    source: str, path: Path | str | None, trained_on: PointsDataConfig | None = None, most: int = 0
) -> ClipSet:
    """The held-out clips of a source.

    Args:
      source: one of `CLIP_SOURCES`.
      path: its folder. If there are train/ and validation/ in it, the latter is taken; else all of it, unless
        `trained_on` says that a part of it was trained on. Of "generated" there is none.
      trained_on: the data of the run that is evaluated: of the folder it was trained on, what it held out is
        taken. It says how clips are generated, too; otherwise the defaults do.
      most: clips, at most; 0: all.

    Raises:
      PointDataError: no such source or folder, nothing held out, or a clip that cannot be used.
    """
    if source not in CLIP_SOURCES:
        raise PointDataError(f"no clips of source {source!r}: there are {', '.join(CLIP_SOURCES)}")
    if most < 0:
        raise PointDataError(f"{most} clips: must be at least 1, or 0 for all")
    config = trained_on or PointsDataConfig()
    try:
        if source == "generated":
            clips, described = _generated(config, path)
        elif path is None:
            raise PointDataError(f"dataset {source}: needs --data_path=FOLDER")
        else:
            clips, described = _of_folder(cast(SourceName, source), Path(path).expanduser(), config)
    except (ValueError, ImportError) as error:
        raise error if isinstance(error, PointDataError) else PointDataError(str(error)) from error
    if clips is None:
        raise PointDataError(f"dataset {source}: nothing is held out of {path or 'it'} to evaluate on")
    return ClipSet(tracked_clips(clips, most), described)


def _generated(config: PointsDataConfig, path: Path | str | None) -> tuple[Clips | None, str]:
    if path is not None:
        raise PointDataError("dataset generated: reads no files: leave out --data_path")
    # No clips are made ahead: none are trained on.
    config = dataclasses.replace(config, source="generated", path="", generated_cached=0)
    size = f"{config.frames} frames of {config.height} x {config.width} pixels"
    return open_points_data(config).held_out_clips, f"held-out clips of {size}, seed {config.generated_seed}"


def _of_folder(source: SourceName, path: Path, config: PointsDataConfig) -> tuple[Clips | None, str]:
    if not path.is_dir():
        raise PointDataError(f"{path}: no such folder")
    if config.source == source and Path(config.path).expanduser().resolve() == path.resolve():
        return open_points_data(config).held_out_clips, f"what the run held out of {path}"
    if (path / VALIDATION).is_dir():
        path = path / VALIDATION
    elif (path / TRAIN).is_dir():
        return None, ""
    whole = dataclasses.replace(config, source=source, path=str(path), held_out_fraction=0.0)
    return open_points_data(whole).train_clips, f"all clips of {path}"
