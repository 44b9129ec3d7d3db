"""Losses of video training: soft-target cross-entropy, and masked auto-encoding. All sums are float32.

Both loss functions augment inside: the loader's uint8 frames go to the device, and one key decides the rest.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from models.common.shapes import Key
from models.common.sharding import per_shard
from models.trecvit import change_targets, pixel_targets
from tasks.common.errors import ConfigError
from tasks.video.augment import AugmentConfig, augment, augment_frames

LossFn = Callable[[Any, dict[str, Any], Any], tuple[Any, dict[str, Any]]]
Painted = Literal["masked", "all"]
Target = Literal["pixels", "change"]


@runtime_checkable
class Classify(Protocol):
    """A classifier: parameters, frames [B, T, h, w, 3] in [0, 1] and a key to logits [B, C]."""

    def __call__(self, params: Any, frames: Any, rng: Any, is_training: bool) -> Any: ...


@runtime_checkable
class Reconstruct(Protocol):
    """An auto-encoder: parameters, frames, visible tubes [B, Q], a key to predictions [B, T, P, pixels]."""

    def __call__(self, params: Any, frames: Any, kept: Any, rng: Any, is_training: bool) -> Any: ...


class Scores(NamedTuple):
    """Of every row, float32 [B]: loss in nats; 1 where the target is the first, or among the first 5."""

    loss: Float[Array, " B"]
    top1: Float[Array, " B"]
    top5: Float[Array, " B"]


def classification_scores(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Scores:
    """Cross-entropy -sum_c target_c log softmax(logits)_c, and hits, row by row.

    A row's class is the one with the largest target (with mixup: of the clip with the larger share). Equal
    logits rank by class index, so that logits that say nothing are right once in C times; NaN is never right.

    Args:
      logits: of any float dtype; computed in float32.
      targets: soft targets; each row sums to 1.
    """

    def local(logits: Array, targets: Array) -> Scores:
        logits = logits.astype(jnp.float32)
        # A class without mass adds 0, not 0 times the infinity that a logit of -inf would give.
        terms = jnp.where(targets == 0, 0.0, targets * jax.nn.log_softmax(logits, axis=-1))
        label = jnp.argmax(targets, axis=-1, keepdims=True)
        own = jnp.take_along_axis(logits, label, axis=-1)
        tied = (logits == own) & (jnp.arange(logits.shape[-1]) < label)
        rank = jnp.sum((logits > own) | tied, axis=-1)
        usable = ~jnp.any(jnp.isnan(logits), axis=-1)
        hits = [((rank < k) & usable).astype(jnp.float32) for k in (1, 5)]
        return Scores(-jnp.sum(terms, axis=-1), *hits)

    return per_shard(local)(logits, targets)


def classification_loss(
    logits: Float[Array, "B C"], targets: Float[Array, "B C"], valid: Bool[Array, " B"] | None = None
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Mean cross-entropy in nats, and what the training step reports.

    Args:
      logits, targets: see `classification_scores`.
      valid: rows that count; None: all.

    Returns:
      (loss, 0 if no row counts; aux: (sum, rows) pairs "loss", "top1", "top5", and "weight", the rows).
    """
    scores = classification_scores(logits, targets)
    if valid is None:
        count = jnp.float32(logits.shape[0])
        sums = [jnp.sum(x) for x in scores]
    else:
        count = jnp.sum(valid.astype(jnp.float32))
        sums = [jnp.sum(per_shard(lambda v, x: jnp.where(v, x, 0.0))(valid, x)) for x in scores]
    aux: dict[str, Any] = dict(zip(Scores._fields, ((total, count) for total in sums), strict=True))
    return sums[0] / jnp.maximum(count, 1.0), {**aux, "weight": count}


def video_loss_fn(classify: Classify, config: AugmentConfig, num_classes: int) -> LossFn:
    """Makes the supervised loss for the shared training loop.

    Args:
      classify: called with is_training=True.
      config: of the augmentation, done inside the loss.
      num_classes: C.

    Returns:
      loss_fn(params, batch, rng) -> (loss, aux). `batch` holds "frames" uint8 [B, T, H, W, 3] and "label"
      [B]; what else it holds is not looked at. Loss and aux as in `classification_loss`, of repeats x B rows.

    Raises:
      ConfigError: num_classes below 1.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes = {num_classes}: must be at least 1")

    def loss_fn(params: Any, batch: dict[str, Any], rng: Any) -> tuple[Any, dict[str, Any]]:
        augment_key, model_key = jax.random.split(rng)
        rows = augment(config, batch["frames"], batch["label"], augment_key, num_classes=num_classes)
        logits = classify(params, rows.frames, model_key, is_training=True)
        if logits.shape != rows.targets.shape:
            raise ValueError(
                f"the model gives logits of shape {logits.shape}; {num_classes} classes and "
                f"{rows.targets.shape[0]} clips need {rows.targets.shape}"
            )
        return classification_loss(logits, rows.targets)

    return loss_fn


def masked_count(tokens: int, ratio: float) -> int:
    """Tubes that are masked: int(ratio tokens), as in VideoMAE.

    Raises:
      ConfigError: ratio outside (0, 1), or one that masks no tube or all.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"mask_ratio = {ratio}: must be between 0 and 1")
    count = int(ratio * tokens)
    if not 0 < count < tokens:
        raise ConfigError(
            f"mask_ratio = {ratio} masks {count} of {tokens} tubes: at least one must be masked and one kept"
        )
    return count


def tube_mask(key: Key, batch: int, tokens: int, ratio: float) -> Bool[Array, "B P"]:
    """Random tubes (VideoMAE): True for the patches hidden in all frames of a clip, drawn anew for each clip.

    Args:
      key: of the draws.
      batch: clips.
      tokens: P, patches of a frame.
      ratio: share that is hidden: exactly `masked_count(tokens, ratio)` in every row.

    Raises:
      ConfigError: as `masked_count`.
    """
    count = masked_count(tokens, ratio)
    # Ranks of ranks: equal noise, which float32 does give, would leave another count behind a threshold.
    order = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    return jnp.argsort(order, axis=1) < count


def visible_tubes(masked: Bool[Array, "B P"], count: int) -> Int[Array, "B Q"]:
    """Indices of the `count` patches per row that are not masked, ascending: `kept` of `apply_mae`."""
    return jnp.argsort(masked, axis=1, stable=True)[:, :count].astype(jnp.int32)


def mae_loss(
    predictions: Float[Array, "B T P pixels"],
    frames: Float[Array, "B T height width 3"] | UInt8[Array, "B T height width 3"],
    masked: Bool[Array, "B P"],
    *,
    patch_size: tuple[int, int],
    normalize: bool = True,
    on: Painted = "masked",
    target: Target = "pixels",
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Mean squared error of the painted pixels, per pixel value.

    Args:
      predictions: of every patch of every frame.
      frames: the truth, in [0, 1] (or uint8).
      masked: patches the encoder did not see.
      patch_size: height and width of a patch.
      normalize: compare with the pixels standardised per patch and colour (VideoMAE; `pixel_targets`).
      on: "masked" patches (VideoMAE), or "all" of them (TRecViT's wording).
      target: the "pixels" of a frame; or its "change" from the frame before (`change_targets`; not
        standardised, whatever `normalize` says): what is said at the first frame does not count.

    Returns:
      (loss; aux: "loss" (sum over the patches that count of their mean squared error, their number) and
      "weight", that number).

    Raises:
      ValueError: predictions that are not of the frames' patches; the change of a single frame.
    """
    if on not in ("masked", "all"):
        raise ValueError(f"on = {on!r}: must be 'masked' or 'all'")
    if target not in ("pixels", "change"):
        raise ValueError(f"target = {target!r}: must be 'pixels' or 'change'")

    def local(predictions: Array, frames: Array, masked: Array) -> tuple[Array, Array]:
        if target == "change":
            targets, predictions = change_targets(frames, patch_size), predictions[:, 1:]
        else:
            targets = pixel_targets(frames, patch_size, normalize)
        if predictions.shape != targets.shape:
            raise ValueError(f"predictions have shape {predictions.shape}; the patches {targets.shape}")
        errors = jnp.mean(jnp.square(predictions.astype(jnp.float32) - targets), axis=-1)
        counts = masked if on == "masked" else jnp.ones_like(masked)
        kept = jnp.where(counts[:, None], errors, 0.0)
        return jnp.sum(kept, axis=(1, 2)), jnp.sum(counts, axis=1) * float(errors.shape[1])

    total, count = (jnp.sum(x) for x in per_shard(local)(predictions, frames, masked))
    return total / jnp.maximum(count, 1.0), {"loss": (total, count), "weight": count}


def mae_loss_fn(
    reconstruct: Reconstruct,
    config: AugmentConfig,
    *,
    patch_size: tuple[int, int],
    mask_ratio: float = 0.9,
    normalize: bool = True,
    on: Painted = "masked",
    target: Target = "pixels",
) -> LossFn:
    """Makes the loss of masked auto-encoding for the shared training loop.

    Args:
      reconstruct: called with is_training=True; its `kept` are the tubes the encoder may see.
      config: of the augmentation (cutting, mirroring, colour); mixing has no meaning here.
      patch_size: height and width of a patch.
      mask_ratio: share of the tubes that are hidden.
      normalize, on, target: see `mae_loss`.

    Returns:
      loss_fn(params, batch, rng) -> (loss, aux); `batch` holds "frames" uint8 [B, T, H, W, 3].

    Raises:
      ConfigError: mixing or smoothing is switched on, patches do not divide config.size, or a bad mask_ratio.
    """
    for name in ("mixup_alpha", "cutmix_alpha", "label_smoothing"):
        if getattr(config, name):
            raise ConfigError(
                f"augment.{name} = {getattr(config, name)}: must be 0 for masked auto-encoding: no labels"
            )
    if any(size % patch for size, patch in zip(config.size, patch_size, strict=True)):
        raise ConfigError(f"augment.size = {config.size}: must be a multiple of the patch size {patch_size}")
    tokens = (config.size[0] // patch_size[0]) * (config.size[1] // patch_size[1])
    hidden = masked_count(tokens, mask_ratio)

    def loss_fn(params: Any, batch: dict[str, Any], rng: Any) -> tuple[Any, dict[str, Any]]:
        augment_key, mask_key, model_key = jax.random.split(rng, 3)
        frames = augment_frames(config, batch["frames"], augment_key)
        masked = tube_mask(mask_key, frames.shape[0], tokens, mask_ratio)
        kept = visible_tubes(masked, tokens - hidden)
        predictions = reconstruct(params, frames, kept, model_key, is_training=True)
        return mae_loss(
            predictions, frames, masked, patch_size=patch_size, normalize=normalize, on=on, target=target
        )

    return loss_fn
