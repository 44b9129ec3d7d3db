"""Losses of point tracking: where a point is (Huber, cross-entropy over bins), whether it is seen, certainty.

TAPNext's losses: element by element, then means over those that count. All are float32, whatever comes in,
and elementwise or sums, so nothing but sums travels on a mesh that splits clips or frames.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.common.sharding import constrain
from tasks.points.metrics import METRIC_SIZE, THRESHOLDS

HUBER_DELTA = 1.0  # pixels
CERTAIN_RADIUS = 1.0  # pixels
_LARGEST_ERROR = 1e8
_SMALLEST_SQUARE = 1e-12  # under the root: its gradient at 0 is finite
_FRAMES = ("batch", None, "length")  # where [B, Q, T] lie on a mesh
_FEWEST = 1e-8  # floor of a mean's denominator, as in the official code

Points = Float[Array, "*n 2"]
Values = Float[Array, "*n"]
Pair = tuple[Float[Array, "*layers"], Float[Array, "*layers"]]
Normalize = Literal["mask", "values"]


@dataclasses.dataclass(frozen=True)
class PointLossConfig:
    """What is added up.

    Attributes:
      huber, coordinate, visibility: weights of the three losses; the defaults are the official ones.
      final: weight of the read-out after the last norm.
      layers: weight of the read-out of every block (deep supervision; the official weights are not public);
        0: they are not computed.
      layer_weights: one weight per block instead of `layers`; empty: not used.
      occluded: weight in the coordinate losses of points that are hidden but inside the frame (TAPNext++:
        0.2, for synthetic data, where the position is known). TAPNext: 0.
      from_query: only frames from the query's on count; before, a causal model cannot know the point.
      normalize: what the coordinate losses' sums are divided by: "mask", the elements that count, by their
        weight; or "values", all elements of valid tracks. With "values" gradients accumulated over
        micro-batches are exactly those of the whole batch; with "mask" micro-batches count by their number
        of visible points, which is exact for coordinates and nearly so for visibility.
    """

    huber: float = 0.1
    coordinate: float = 1.0
    visibility: float = 1.0
    final: float = 1.0
    layers: float = 1.0
    layer_weights: tuple[float, ...] = ()
    occluded: float = 0.0
    from_query: bool = True
    normalize: Normalize = "mask"

    def __post_init__(self) -> None:
        weights = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:5]}
        weights |= {f"layer_weights[{i}]": w for i, w in enumerate(self.layer_weights)}
        for name, value in (weights | {"occluded": self.occluded}).items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value}: must be a finite number from 0 on")
        if not (self.huber or self.coordinate or self.visibility):
            raise ValueError("huber, coordinate and visibility are all 0: nothing would be learnt")
        if not (self.final or self.deep):
            raise ValueError("final and layers are both 0: nothing would be learnt")
        if self.normalize not in ("mask", "values"):
            raise ValueError(f"normalize = {self.normalize!r}: must be 'mask' or 'values'")

    @property
    def deep(self) -> bool:
        """Whether the blocks' read-outs are needed."""
        return bool(self.layers) or any(self.layer_weights)

    def weights_of_layers(self, depth: int) -> tuple[float, ...]:
        """One weight per block.

        Raises:
          ValueError: `layer_weights` for another number of blocks.
        """
        if self.layer_weights and len(self.layer_weights) != depth:
            raise ValueError(f"{len(self.layer_weights)} layer_weights for a model of {depth} blocks")
        return self.layer_weights or (self.layers,) * depth


class ReadOut(NamedTuple):
    """What the heads say: [B, Q, T, ...], or [L, B, Q, T, ...] of all blocks.

    Attributes:
      tracks_yx: decoded, in pixels of the model's image.
      track_logits: over bins of y, then of x.
      visible_logits: of "visible".
    """

    tracks_yx: Float[Array, "*n 2"]
    track_logits: Float[Array, "*n bins"]
    visible_logits: Float[Array, "*n"]


def huber(tracks_yx: Points, target_yx: Points, bins: tuple[int, int]) -> Values:
    """Huber loss of the distance in pixels, delta 1, of each point.

    Args:
      tracks_yx: decoded.
      target_yx: clipped to [0, bins - 1], as the official code does (although bin centres end at bins - 0.5).
      bins: along y and x.
    """
    target = jnp.clip(target_yx.astype(jnp.float32), 0.0, jnp.asarray(bins, jnp.float32) - 1)
    error = jnp.clip(tracks_yx.astype(jnp.float32) - target, -_LARGEST_ERROR, _LARGEST_ERROR)
    squared = jnp.sum(jnp.square(error), axis=-1)
    distance = jnp.sqrt(squared + _SMALLEST_SQUARE)
    return jnp.where(distance < HUBER_DELTA, squared / 2, HUBER_DELTA * (distance - HUBER_DELTA / 2))


def coordinate_cross_entropy(
    track_logits: Float[Array, "*n bins"], target_yx: Points, bins: tuple[int, int]
) -> Values:
    """Cross-entropy of y plus that of x, in nats, of each point, on the raw logits.

    The label of an axis is the bin whose centre (bin + 0.5) is nearest, halves to the even bin; points
    outside count as on the border.

    Raises:
      ValueError: logits that are not of so many bins.
    """
    if track_logits.shape[-1] != sum(bins):
        raise ValueError(
            f"{track_logits.shape[-1]} coordinate logits; {bins[0]} + {bins[1]} bins were expected"
        )
    logits = track_logits.astype(jnp.float32)
    of_y = _cross_entropy(logits[..., : bins[0]], target_yx[..., 0])
    return of_y + _cross_entropy(logits[..., bins[0] :], target_yx[..., 1])


def _cross_entropy(logits: Array, target: Array) -> Array:
    last = logits.shape[-1] - 1
    label = jnp.round(jnp.clip(target.astype(jnp.float32) - 0.5, 0.0, last)).astype(jnp.int32)
    # A comparison, not a gather: it is the same on every mesh, and a compiler fuses it with the sum.
    chosen = jnp.arange(last + 1) == label[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def visibility_cross_entropy(visible_logits: Values, visible: Bool[Array, "*n"]) -> Values:
    """Binary cross-entropy in nats of the logit of "visible"."""
    return _binary_cross_entropy(visible_logits.astype(jnp.float32), visible)


def certainty_cross_entropy(certain_logits: Values, tracks_yx: Points, target_yx: Points) -> Values:
    """Binary cross-entropy in nats of the logit of "the prediction is within 1 pixel of the target".

    As in TAPIR; TAPNext's released heads have no such logit. No gradient flows into the prediction.
    """
    error = jax.lax.stop_gradient(tracks_yx).astype(jnp.float32) - target_yx.astype(jnp.float32)
    return _binary_cross_entropy(
        certain_logits.astype(jnp.float32), jnp.sum(jnp.square(error), axis=-1) <= CERTAIN_RADIUS**2
    )


def _binary_cross_entropy(logits: Array, label: Array) -> Array:
    return jnp.where(label, jax.nn.softplus(-logits), jax.nn.softplus(logits))


def masked_mean(values: Values, mask: Float[Array, "*n"] | None, normalize: Normalize = "mask") -> Array:
    """Mean of the elements, weighted by a mask, which may be fractional.

    Args:
      mask: None: every element counts.
      normalize: divide by the mask's sum, or by the number of elements.
    """
    mask = jnp.ones_like(values) if mask is None else mask
    total = jnp.sum(mask) if normalize == "mask" else jnp.float32(values.size)
    return jnp.sum(jnp.where(mask > 0, values * mask, 0.0)) / jnp.maximum(total, _FEWEST)


class Masks(NamedTuple):
    """How much each point on each frame counts, float32 [B, Q, T].

    Attributes:
      coordinate: in the coordinate losses.
      visibility: in the visibility loss: 0 or 1.
    """

    coordinate: Float[Array, "B Q T"]
    visibility: Float[Array, "B Q T"]


def loss_masks(
    query_tyx: Float[Array, "B Q 3"],
    tracks_yx: Float[Array, "B Q T 2"],
    visible: Bool[Array, "B Q T"],
    valid: Bool[Array, "B Q"] | None,
    config: PointLossConfig,
    size: tuple[int, int],
) -> Masks:
    """Which elements the losses are taken over.

    Args:
      query_tyx: frame (a fraction is dropped, as the model does), y, x.
      tracks_yx: the truth, in pixels of the model's image.
      visible: not occluded and inside the frame.
      valid: false for tracks that only fill up the batch; None: all are.
      size: height, width of the model's image: a hidden point inside it counts by `config.occluded`.
    """
    counts = (
        jnp.ones(visible.shape, bool) if valid is None else jnp.broadcast_to(valid[..., None], visible.shape)
    )
    if config.from_query:
        query_frame = query_tyx[..., 0].astype(jnp.int32)
        counts = counts & (jnp.arange(visible.shape[-1]) >= query_frame[..., None])
    inside = jnp.all((tracks_yx >= 0) & (tracks_yx <= jnp.asarray(size, jnp.float32)), axis=-1)
    share = jnp.where(visible, 1.0, jnp.where(inside, config.occluded, 0.0))
    return Masks(jnp.where(counts, share, 0.0), counts.astype(jnp.float32))


@runtime_checkable
class TrackerOutput(Protocol):
    """What a tracker gives: the fields of `ReadOut`, and `layers`, those of every block [L, B, Q, T, ...]."""

    @property
    def tracks_yx(self) -> Any: ...

    @property
    def track_logits(self) -> Any: ...

    @property
    def visible_logits(self) -> Any: ...

    @property
    def layers(self) -> Any: ...


def point_losses(
    output: TrackerOutput,
    batch: dict[str, Any],
    config: PointLossConfig,
    bins: tuple[int, int],
    read_layer: Callable[[Any], Any] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of a batch of clips, and what the training step reports.

    loss = sum over the read-outs of weight (huber x Huber + coordinate x CE + visibility x BCE), each a mean
    over the elements that count (`loss_masks`).

    Args:
      output: read-outs of whole clips; its `layers` may be None if `config.deep` is false.
      batch: "query_tyx" [B, Q, 3], "tracks_yx" [B, Q, T, 2] in pixels of the model's image, "visible"
        [B, Q, T]; "valid" [B, Q] if tracks fill up the batch. The truth of what does not count may be NaN.
      config: see there.
      bins: of the coordinate logits, along y and x: the model's image size in pixels.
      read_layer: gives a block's read-out from its part of `output.layers`, which then holds the points'
        features. Logits of one block at a time are in memory, and computed again for the gradient.

    Returns:
      (loss; aux: (sum, weight) pairs "huber", "coordinate", "visibility" of the final read-out, "layers" (the
      coordinate loss averaged over blocks) if they are supervised, and of the final read-out the metrics
      "delta_avg" and "occlusion_accuracy" on the frames that count; "weight", the denominator of the loss).

    Raises:
      ValueError: deep supervision without read-outs of the blocks, or weights for another number of them.
    """
    weights = _layer_weights(output, config)
    # The truth lies on the mesh as the model's answers do: split over clips, and over frames if those are.
    target = constrain(batch["tracks_yx"].astype(jnp.float32), ("batch", None, "length", None))
    visible = constrain(batch["visible"], _FRAMES)
    masks = loss_masks(batch["query_tyx"], target, visible, batch.get("valid"), config, bins)
    # Unknown positions must not reach a gradient: 0 times NaN is NaN.
    target = jnp.where((masks.coordinate > 0)[..., None], target, 0.0)

    def terms_of(read_out: Any) -> dict[str, Pair]:
        return _terms(read_out, target, visible, masks, config, bins)

    terms = terms_of(output)
    loss = config.final * _total(terms, config)
    aux: dict[str, Any] = dict(terms)
    if weights:
        if read_layer is None:
            each = jax.vmap(terms_of)(ReadOut(*(getattr(output.layers, name) for name in ReadOut._fields)))
        else:
            each = jax.lax.map(jax.checkpoint(lambda block: terms_of(read_layer(block))), output.layers)
        loss += jnp.sum(jnp.asarray(weights, jnp.float32) * _total(each, config))
        aux["layers"] = (jnp.mean(each["coordinate"][0]), terms["coordinate"][1])
    aux |= _metrics(output, target, visible, masks, bins)
    return loss, {**aux, "weight": terms["coordinate"][1]}


def _layer_weights(output: TrackerOutput, config: PointLossConfig) -> tuple[float, ...]:
    """One weight per block; none without deep supervision."""
    if not config.deep:
        return ()
    if output.layers is None:
        raise ValueError("deep supervision needs the read-outs of every block, which the output lacks")
    return config.weights_of_layers(len(jax.tree.leaves(output.layers)[0]))


def _terms(
    read_out: Any,
    target: Array,
    visible: Array,
    masks: Masks,
    config: PointLossConfig,
    bins: tuple[int, int],
) -> dict[str, Pair]:
    """(sum, weight) of each loss of one read-out."""
    elements = jnp.sum(masks.visibility)
    weight = jnp.sum(masks.coordinate) if config.normalize == "mask" else elements
    values = {
        "huber": (huber(read_out.tracks_yx, target, bins), masks.coordinate, weight),
        "coordinate": (
            coordinate_cross_entropy(read_out.track_logits, target, bins),
            masks.coordinate,
            weight,
        ),
        "visibility": (
            visibility_cross_entropy(read_out.visible_logits, visible),
            masks.visibility,
            elements,
        ),
    }
    return {
        name: (jnp.sum(jnp.where(mask > 0, value * mask, 0.0)), total)
        for name, (value, mask, total) in values.items()
    }


def _total(terms: dict[str, Pair], config: PointLossConfig) -> Array:
    parts = [
        getattr(config, name) * total / jnp.maximum(weight, _FEWEST)
        for name, (total, weight) in terms.items()
        if getattr(config, name)
    ]
    return sum(parts[1:], parts[0])


def _metrics(
    read_out: Any, target: Array, visible: Array, masks: Masks, size: tuple[int, int]
) -> dict[str, Pair]:
    """TAP-Vid's delta_avg and occlusion accuracy over the frames that count, in pixels of 256 x 256.

    The query frame counts here, so they are a little above the evaluation's.
    """
    scale = METRIC_SIZE / jnp.asarray(size, jnp.float32)
    squared = jnp.sum(jnp.square((read_out.tracks_yx.astype(jnp.float32) - target) * scale), axis=-1)
    near = sum((squared < d**2).astype(jnp.float32) for d in THRESHOLDS) / len(THRESHOLDS)
    seen = masks.visibility * visible
    right = masks.visibility * ((read_out.visible_logits > 0) == visible)
    return {
        "delta_avg": (jnp.sum(near * seen), jnp.sum(seen)),
        "occlusion_accuracy": (jnp.sum(right), jnp.sum(masks.visibility)),
    }
