"""What a masked auto-encoder paints: its loss on held-out videos, and pictures of it."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, UInt8

from models import trecvit
from tasks.common.data import Batches
from tasks.common.errors import writing
from tasks.common.job import Hook
from tasks.common.mesh import put_whole_batch
from tasks.common.video.sheet import write_sheet
from tasks.video.augment import AugmentConfig, prepare_eval
from tasks.video.config import MAETrainConfig
from tasks.video.data import VideoData
from tasks.video.losses import mae_loss

_SHOWN = 4  # clips of a picture
_COLUMNS = 8


class Painter:
    """Runs an auto-encoder on held-out clips, every clip with the same tubes hidden whenever it is asked.

    Args:
      config, runtime: the model and how it is run.
      augment: its `size` says how frames are cut for the model.
      settings: which loss is reported.
      mesh: devices the batch is split over.
      batch_size: clips at a time; rounded up to a multiple of the mesh's devices.
    """

    def __init__(
        self,
        config: trecvit.MAEConfig,
        runtime: trecvit.TRecViTRuntime,
        augment: AugmentConfig,
        settings: MAETrainConfig,
        mesh: Mesh,
        batch_size: int,
    ):
        self.mesh = mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._loss = functools.partial(_losses, config, runtime, augment, settings)
        self._paint = functools.partial(_paint, config, runtime, augment, settings)

    def losses(self, params: Any, batch: dict[str, np.ndarray]) -> tuple[float, float]:
        """(sum of the patches' losses, their number) over the clips of a batch that can be read."""
        with jax.set_mesh(self.mesh):
            total, count = self._loss(params, self._placed(batch))
            return float(total), float(count)

    def pictures(self, params: Any, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Frames uint8 [B, T, h, w, 3]: the truth, what the encoder sees (the rest grey), what is painted.

        Kept patches are shown as they are; painted ones in the truth's mean and contrast if the model was
        trained on standardised patches, which know neither. Of changes: the truth of the frame before
        plus the painted change; in the first frame, which has none, the hidden patches stay grey.
        """
        with jax.set_mesh(self.mesh):
            return tuple(np.asarray(x) for x in self._paint(params, self._placed(batch)))

    def _placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_whole_batch({name: batch[name] for name in ("frames", "clip", "valid")}, self.mesh)


def _kept(config: trecvit.MAEConfig, clips: Array) -> Array:
    """Tubes the encoder sees, by the number of the clip."""

    def draw(clip: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(0), clip.astype(jnp.uint32))
        return trecvit.draw_kept_tubes(config, key, 1)[0]

    return jax.sharding.reshard(
        jax.vmap(draw)(jax.sharding.reshard(clips, PartitionSpec())), PartitionSpec(("data", "fsdp"))
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
    config: trecvit.MAEConfig,
    runtime: trecvit.TRecViTRuntime,
    augment: AugmentConfig,
    settings: MAETrainConfig,
    params: Any,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    frames, kept = prepare_eval(augment, batch["frames"]), _kept(config, batch["clip"])
    predictions, _ = trecvit.apply_mae(config, runtime, params, frames, kept)
    # A clip that cannot be read has no masked patch: it does not count.
    masked = trecvit.masked_patches(kept, config.encoder.num_patches) & batch["valid"][:, None]
    _, aux = mae_loss(
        predictions,
        frames,
        masked,
        patch_size=config.encoder.patch_size,
        normalize=settings.normalize,
        on="masked",
        target=settings.target,
    )
    return aux["loss"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _paint(
    config: trecvit.MAEConfig,
    runtime: trecvit.TRecViTRuntime,
    augment: AugmentConfig,
    settings: MAETrainConfig,
    params: Any,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, ...]:
    frames, kept = prepare_eval(augment, batch["frames"]), _kept(config, batch["clip"])
    predictions, _ = trecvit.apply_mae(config, runtime, params, frames, kept)
    whole = PartitionSpec()
    frames, predictions, kept = (jax.sharding.reshard(x, whole) for x in (frames, predictions, kept))
    truth = jax.sharding.reshard(trecvit.pixel_targets(frames, config.encoder.patch_size, False), whole)
    if settings.normalize:
        colours = truth.reshape(*truth.shape[:-1], -1, 3)
        painted = predictions.reshape(colours.shape)
        painted = painted * (colours.std(axis=-2, keepdims=True, ddof=1) + 1e-6)
        predictions = (painted + colours.mean(axis=-2, keepdims=True)).reshape(truth.shape)
    hidden = jax.sharding.reshard(trecvit.masked_patches(kept, config.encoder.num_patches), whole)
    hidden = hidden[:, None, :, None]
    if settings.target == "change":
        first = jnp.full_like(truth[:, :1], 0.5)
        later = truth[:, :-1] + trecvit.CHANGE_UNIT * predictions[:, 1:]
        predictions = jnp.concatenate([first, later], axis=1)
    pictures = truth, jnp.where(hidden, 0.5, truth), jnp.where(hidden, predictions, truth)
    return tuple(_to_frames(config.encoder, patches) for patches in pictures)


def _to_frames(
    config: trecvit.TRecViTConfig, patches: Float[Array, "B T P pixels"]
) -> UInt8[Array, "B T height width 3"]:
    """Inverse of `patchify`."""
    (rows, columns), (height, width) = config.grid, config.patch_size
    grid = patches.reshape(*patches.shape[:2], rows, columns, height, width, 3)
    frames = jnp.swapaxes(grid, 3, 4).reshape(*patches.shape[:2], rows * height, columns * width, 3)
    return jnp.round(jnp.clip(frames, 0.0, 1.0) * 255).astype(jnp.uint8)


def _held_out(painter: Painter, data: VideoData, most: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one clip of each held-out video."""
    views = data.views(painter.batch_size, clips=1, crops=1, most=most)
    with Batches(views, painter.batch_size, order="sequential").iterate(prefetch=4) as reader:
        for _ in range(len(views) // painter.batch_size):
            yield next(reader)


def reconstruction_hook(painter: Painter, data: VideoData, most: int) -> Hook:
    """Mean squared error of the hidden patches of (some of) the held-out videos."""

    def run(params: Any, step: int) -> dict[str, float]:
        del step
        pairs = [painter.losses(params, batch) for batch in _held_out(painter, data, most)]
        total, count = (float(np.sum(column)) for column in zip(*pairs, strict=True))
        return {"loss": total / max(count, 1.0)}

    return Hook("held_out", run)


def picture_hook(painter: Painter, data: VideoData, folder: Path) -> Hook:
    """A picture of a few held-out clips: truth, what the encoder sees, what is painted."""

    def run(params: Any, step: int) -> None:
        batch = next(_held_out(painter, data, painter.batch_size))
        shown = painter.pictures(params, batch)
        if jax.process_index() == 0:
            rows = [
                (f"{data.classes[int(batch['label'][clip])]}: {name}", pictures[clip])
                for clip in range(min(_SHOWN, painter.batch_size))
                for name, pictures in zip(("truth", "seen", "painted"), shown, strict=True)
            ]
            with writing(folder, "a picture"):
                folder.mkdir(parents=True, exist_ok=True)
                write_sheet(folder / f"step_{step:08d}.png", rows, _COLUMNS)

    return Hook("pictures", run)
