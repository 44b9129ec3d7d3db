"""Judging videos by a model: logits of test views on a mesh, added up per video.

The functions serve the eval command and, as hooks, the training loop. The batch is split over all devices;
scores are added up on the host in float64.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from models import trecvit
from tasks.common.data import Batches
from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.mesh import put_whole_batch
from tasks.common.progress import Progressing, no_progress
from tasks.video import metrics
from tasks.video.augment import AugmentConfig, prepare_eval
from tasks.video.data import TestViews, VideoData
from tasks.video.metrics import Average, Judged, ViewScores


class Classifier:
    """Logits of clips as the loader gives them, computed on a mesh.

    Args:
      config, runtime: the model and how it is run.
      augment: its `size` says how frames are cut for the model.
      mesh: devices the batch is split over.
      batch_size: clips at a time; rounded up to a multiple of the mesh's devices.
      average: what the several clips of a long view are averaged as.
    """

    def __init__(
        self,
        config: trecvit.TRecViTConfig,
        runtime: trecvit.TRecViTRuntime,
        augment: AugmentConfig,
        mesh: Mesh,
        batch_size: int,
        average: Average = "probabilities",
    ):
        self.mesh, self.average = mesh, average
        self.num_classes = config.num_classes
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._run = functools.partial(_logits, config, runtime, augment, average)

    def logits(self, params: Any, frames: np.ndarray) -> np.ndarray:
        """[B, C], float32, of uint8 frames [B, T, H, W, 3], B = batch_size."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._run(params, put_whole_batch({"frames": frames}, self.mesh)["frames"]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _logits(
    config: trecvit.TRecViTConfig,
    runtime: trecvit.TRecViTRuntime,
    augment: AugmentConfig,
    average: Average,
    params: Any,
    frames: jax.Array,
) -> jax.Array:
    output, _ = trecvit.apply(config, runtime, params, prepare_eval(augment, frames), output="clip")
    # Logarithms of probabilities are logits, too: of the average over the clips that a long view is cut into.
    logits = output.logits if average == "logits" else jnp.log(output.probs)
    # Whole on every device, so that every process can read all of it.
    return jax.sharding.reshard(logits, PartitionSpec())


def judge(
    classifier: Classifier,
    params: Any,
    views: TestViews,
    *,
    num_workers: int = 0,
    progress: Progressing = no_progress,
) -> Judged:
    """Every video of the views, by the mean over its views.

    Args:
      views: filled up to whole batches of the classifier's size.
      num_workers: processes that read; 0: threads.

    Raises:
      ValueError: views of another batch size.
    """
    size = classifier.batch_size
    if len(views) % size:
        raise ValueError(f"{len(views)} views are no multiple of the batch size {size}")
    scores = ViewScores(classifier.num_classes, classifier.average)
    reader = Batches(views, size, order="sequential").iterate(num_workers=num_workers, prefetch=4)
    count = len(views) // size
    with reader:
        for _ in progress(range(count), count, "views"):
            batch = next(reader)
            logits = classifier.logits(params, batch["frames"])
            scores.add(logits, batch["label"], batch["clip"], batch["valid"])
    return scores.judged()


def write_judgement(folder: Path, judged: Judged, names: tuple[str, ...]) -> None:
    """Writes per_class.csv and confusion.png into a folder."""
    with writing(folder, "the evaluation"):
        folder.mkdir(parents=True, exist_ok=True)
        metrics.write_per_class(folder / "per_class.csv", metrics.per_class_table(judged), names)
        metrics.plot_confusion(folder / "confusion.png", metrics.confusion_matrix(judged), names)


def class_names(known: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """Names of all outputs of a model, those beyond the known ones by number."""
    known = known or ()
    return (*known[:count], *(f"class {index}" for index in range(len(known), count)))


def validation_hook(
    classifier: Classifier, data: VideoData, *, videos: int, clips: int, crops: int, last: int
) -> Hook:
    """Top-1 and top-5 of (some of) the held-out videos as training goes; the end has its own evaluation.

    Args:
      videos: so many of them; 0: all.
      clips, crops: views of each.
      last: the run's last step, at which nothing is done.
    """
    views = data.views(classifier.batch_size, clips=clips, crops=crops, most=videos)

    def run(params: Any, step: int) -> dict[str, float] | None:
        if step >= last:
            return None
        return _shown(metrics.summarize(judge(classifier, params, views)))

    return Hook("validation", run)


def final_hook(classifier: Classifier, data: VideoData, folder: Path) -> Hook:
    """At the end of the run: every held-out video by all its views; tables and picture in `folder`."""
    views = data.views(classifier.batch_size)

    def run(params: Any, step: int) -> dict[str, float]:
        del step
        judged = judge(classifier, params, views)
        if jax.process_index() == 0:
            write_judgement(folder, judged, class_names(data.classes, classifier.num_classes))
        return _shown(metrics.summarize(judged))

    return Hook("held_out", run, 0)


def _shown(summary: dict[str, float]) -> dict[str, float]:
    """Shares are shown as training goes; counts are details."""
    return {
        name if name in ("top1", "top5", "mean_class") else f"count/{name}": float(value)
        for name, value in summary.items()
    }
