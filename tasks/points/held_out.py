"""Judging trackers on clips whose tracks are known: TAP-Vid's metrics per clip, and after an occlusion.

The functions serve the training loop as hooks, and the comparison with trackers that learn nothing. Examples
are those of `tasks.points.data`; distances are scaled to TAP-Vid's 256 x 256 pixels.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from kernels.common.compiler import jit_for_target
from models import tapnext
from tasks.common.data import Batch, Batches, Source
from tasks.common.mesh import batch_ways, put_whole_batch
from tasks.points.metrics import (
    AVERAGE_JACCARD,
    AVERAGE_WITHIN,
    METRIC_SIZE,
    OCCLUSION_ACCURACY,
    evaluated_frames,
    mean_over_videos,
    tapvid_metrics,
)
from tasks.points.predictors import Predictor

OCCLUDED = "delta_avg_of_occluded"
REAPPEARING = "delta_avg_after_occlusion"
SHOWN = {
    AVERAGE_JACCARD: "average_jaccard",
    AVERAGE_WITHIN: "delta_avg",
    OCCLUSION_ACCURACY: "occlusion_accuracy",
    OCCLUDED: OCCLUDED,
    REAPPEARING: REAPPEARING,
}


class ClipTracker:
    """Tracks in whole clips of the model's size, computed on a mesh.

    Args:
      config, runtime: the model and how it is run.
      mesh: devices the batch is split over.
      batch_size: clips at a time; rounded up to a multiple of the devices that split batches.
    """

    def __init__(
        self, config: tapnext.TAPNextConfig, runtime: tapnext.TAPNextRuntime, mesh: Mesh, batch_size: int
    ):
        self.mesh = mesh
        self.batch_size = -(-batch_size // batch_ways(mesh)) * batch_ways(mesh)
        self._run = functools.partial(_track_program(), config, runtime)

    def tracks(self, params: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(tracks_yx [B, Q, T, 2], visible [B, Q, T]) of a batch of `batch_size` clips."""
        with jax.set_mesh(self.mesh):
            given = {name: batch[name] for name in ("video", "query_tyx", "valid")}
            tracks, visible = self._run(params, put_whole_batch(given, self.mesh))
            return np.asarray(tracks), np.asarray(visible)


def _track(
    config: tapnext.TAPNextConfig,
    runtime: tapnext.TAPNextRuntime,
    params: Any,
    batch: dict[str, Array],
) -> tuple[Array, Array]:
    output, _ = tapnext.apply(
        config, runtime, params, batch["video"], batch["query_tyx"], in_use=batch["valid"]
    )
    # Whole on every device, so that every process can read all of it.
    whole = PartitionSpec()
    tracks, logits = (jax.sharding.reshard(x, whole) for x in (output.tracks_yx, output.visible_logits))
    return tracks, logits > 0


_track_program = jit_for_target(_track, static_argnums=(0, 1))


def batches_of(clips: Source, batch_size: int, most: int = 0) -> Iterator[tuple[Batch, int]]:
    """(a whole batch, how many of its rows count) over the first `most` clips (0: all)."""
    count = min(most, len(clips)) if most else len(clips)
    with Batches(clips, batch_size, order="sequential").iterate(prefetch=4) as reader:
        for start in range(0, count, batch_size):
            yield next(reader), min(batch_size, count - start)


def clip_metrics(
    clip: Mapping[str, np.ndarray], tracks_yx: Float[np.ndarray, "Q T 2"], visible: Bool[np.ndarray, "Q T"]
) -> dict[str, float]:
    """TAP-Vid's metrics of a clip (query mode "first"), and delta_avg of what was hidden in between.

    Args:
      clip: an example: video, query_tyx, tracks_yx, visible, valid.
      tracks_yx, visible: predicted, in pixels of the clip.

    Returns:
      Metric -> share in [0, 1]; NaN where there is nothing to count. `OCCLUDED` is delta_avg of the tracks
      that are hidden at some time after their query, `REAPPEARING` that on the frames they are seen on again.
    """
    used = np.asarray(clip["valid"], bool)
    scale = METRIC_SIZE / np.asarray(clip["video"].shape[1:3], np.float64)
    queries, truth, seen = (np.asarray(clip[name])[used] for name in ("query_tyx", "tracks_yx", "visible"))
    guess, guessed = np.asarray(tracks_yx)[used], np.asarray(visible)[used]
    truth = np.where(seen[..., None], truth, 0.0) * scale
    guess = np.where(np.isfinite(guess), guess, 0.0) * scale

    def measured(counted: np.ndarray) -> dict[str, np.ndarray]:
        return tapvid_metrics(
            queries[None], ~counted[None], truth[None], ~guessed[None], guess[None], "first"
        )

    found = {name: float(value[0]) for name, value in measured(seen).items()}
    hidden = hidden_before(queries, seen)
    for name, counted in ((OCCLUDED, hidden[:, -1:]), (REAPPEARING, hidden)):
        found[name] = float(measured(seen & counted)[AVERAGE_WITHIN][0])
    return found


def hidden_before(
    query_tyx: Float[np.ndarray, "Q 3"], visible: Bool[np.ndarray, "Q T"]
) -> Bool[np.ndarray, "Q T"]:
    """Frames on which a point has been hidden since its query."""
    after = evaluated_frames(query_tyx[None, :, 0], visible.shape[1], "first")[0]
    return np.cumsum(~visible & after, axis=1) > 0


def judge_model(tracker: ClipTracker, params: Any, clips: Source, most: int = 0) -> list[dict[str, float]]:
    """`clip_metrics` of a model on (the first `most` of) the clips."""
    rows = []
    for batch, count in batches_of(clips, tracker.batch_size, most):
        tracks, visible = tracker.tracks(params, batch)
        for row in range(count):
            clip = {name: values[row] for name, values in batch.items()}
            rows.append(clip_metrics(clip, tracks[row], visible[row]))
    return rows


def judge_predictor(predict: Predictor, clips: Source, most: int = 0) -> list[dict[str, float]]:
    """`clip_metrics` of any predictor on (the first `most` of) the clips."""
    count = min(most, len(clips)) if most else len(clips)
    examples = (clips[index] for index in range(count))
    return [clip_metrics(clip, *predict(clip["video"], clip["query_tyx"])) for clip in examples]


def shown_means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over clips of the metrics that are shown, by the names they are shown by."""
    means = mean_over_videos(rows)
    return {shown: means[name].value for name, shown in SHOWN.items()}
