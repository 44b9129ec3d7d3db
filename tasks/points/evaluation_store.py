"""The results of an evaluation on disk, one file per video: it can be stopped and continued at any time.

DIR/evaluation.json       what is evaluated on what, and how; another one does not continue it
DIR/videos/00012.npz      the 13th video: predicted tracks, metrics, reappearances; there whole or not at all
DIR/per_video.csv         one line per video
DIR/summary.json          means over the set, how many videos each is of, and evaluation.json again
DIR/config.json           command, device, versions and source revision, as every run has them
"""

import csv
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.common.official import read_npz
from tasks.common.errors import ConfigError, writing
from tasks.common.resolved import describe_differences, save_resolved
from tasks.common.storage import atomic_write, write_json
from tasks.points.data.tracked_video import TrackedSet
from tasks.points.evaluators import VideoResult
from tasks.points.metrics import METRICS, Mean, mean_over_videos
from tasks.points.reappearance import AJ_RD, Reappearances, aj_rd, concatenate

COLUMNS = (*METRICS, AJ_RD)
_SUMMARY, _TABLE, _IDENTITY = "summary.json", "per_video.csv", "evaluation.json"
POOLED = "aj_rd_pooled"


def set_fingerprint(videos: TrackedSet) -> str:
    """8 hex digits of the names and annotations of a set: equal if the same is evaluated on."""
    value = 0
    for video in videos.videos:
        for part in (video.name.encode(), video.tracks_xy, video.occluded, video.indices):
            value = zlib.crc32(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part, value)
    return f"{value:08x}"


class EvaluationStore:
    """Results of the videos of one set in a folder.

    Args:
      folder: made if need be.
      identity: plain JSON values that say what is evaluated on what.

    Raises:
      ConfigError: the folder holds another evaluation (each difference is named), or a damaged one.
      CheckpointError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self._identity = folder, dict(identity)
        path = folder / _IDENTITY
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: damaged ({error}); give another --output") from error
            if lines := describe_differences(before, self._identity):
                raise ConfigError(
                    f"{folder} holds another evaluation; give another --output, or undo:\n{lines}"
                )
        with writing(folder, "the evaluation"):
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            write_json(path, self._identity, allow_nan=False)
        save_resolved(folder, self._identity)

    def _path(self, index: int) -> Path:
        return self.folder / "videos" / f"{index:05d}.npz"

    def read(self, index: int) -> VideoResult | None:
        """The result of a video; None if there is none, or one that cannot be read."""
        try:
            arrays = read_npz(self._path(index))
            metrics = dict(zip(arrays["names"].tolist(), arrays["metrics"].tolist(), strict=True))
            events = Reappearances(*(arrays[f"events_{name}"] for name in Reappearances._fields))
            rest = {name: arrays[name] for name in ("tracks_xy", "visible", "query_tyx", "track")}
        except (OSError, ValueError, KeyError):
            return None
        return VideoResult(metrics, events, **rest) if tuple(metrics) == COLUMNS else None

    def write(self, index: int, result: VideoResult) -> None:
        """Keeps the result of a video."""
        file = io.BytesIO()
        arrays = result._asdict()
        metrics, events = arrays.pop("metrics"), arrays.pop("events")
        np.savez_compressed(
            file,
            allow_pickle=False,
            names=np.asarray(list(metrics)),
            metrics=np.asarray(list(metrics.values()), np.float64),
            **{f"events_{name}": value for name, value in events._asdict().items()},
            **arrays,
        )
        with writing(self.folder, "the evaluation"):
            atomic_write(self._path(index), file.getvalue())

    def finish(self, videos: TrackedSet, results: Sequence[VideoResult]) -> dict[str, Mean]:
        """Writes per_video.csv and summary.json.

        Returns:
          Metric -> mean over the videos where it is defined. "aj_rd_pooled" is AJ_RD of the events of all
          videos in one pool, whose `defined` counts the videos with any event.
        """
        means = summarize(results)
        rows = [
            [video.name, len(video), len(result.track), *(_cell(result.metrics[name]) for name in COLUMNS)]
            for video, result in zip(videos.videos, results, strict=True)
        ]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["video", "frames", "queries", *COLUMNS])
        table.writerows(rows)
        summary = {
            "means": {name: _number(mean.value) for name, mean in means.items()},
            "undefined_videos": {name: mean.undefined for name, mean in means.items()},
            "aj_rd_parts": {
                k: _number(v) for k, v in aj_rd(concatenate([r.events for r in results])).items()
            },
            "videos": len(results),
            "queries": sum(len(result.track) for result in results),
            "missing_videos": list(videos.missing),
            **self._identity,
        }
        with writing(self.folder, "the evaluation"):
            atomic_write(self.folder / _TABLE, text.getvalue())
            write_json(self.folder / _SUMMARY, summary, allow_nan=False)
        return means


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished evaluation.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    path = folder / _SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no finished evaluation (no {_SUMMARY}): give outputs of tasks.points.eval"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error}); evaluate again") from error
    if not isinstance(found, dict) or not {"means", "query_mode", "predictor", "videos"} <= found.keys():
        raise ConfigError(f"{path}: not the summary of an evaluation of points; evaluate again")
    return found


def summarize(results: Sequence[VideoResult]) -> dict[str, Mean]:
    """Means over videos, as `EvaluationStore.finish` gives them."""
    means = mean_over_videos([result.metrics for result in results])
    pooled = aj_rd(concatenate([result.events for result in results]))[AJ_RD]
    with_events = sum(len(result.events.durations) > 0 for result in results)
    return means | {POOLED: Mean(pooled, with_events, len(results) - with_events)}


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value
