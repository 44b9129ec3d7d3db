"""Learning from clips without labels, as in BootsTAP (arXiv 2402.00847): a teacher's tracks of a clip are the
truth for a student who sees less of it.

The teacher is the averaged model. Of a clip's draws, all made with it (`data.unlabelled`),

1. the teacher tracks random queries Q1 to both ends of the clip, backwards in time to its beginning;
2. Q2 is a random visible point of the teacher's track, not later than Q1;
3. tracked from Q2, the teacher must come back to Q1 (cycle consistency), or the track does not count;
4. the student sees the clip cut, moved and compressed, is asked for Q2 there, and is to say what the teacher
   says. What has left the student's picture counts as hidden.

No draw needs the host: the step is one compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from models.common.sharding import constrain, per_shard
from tasks.points.losses import PointLossConfig, TrackerOutput, point_losses

# (video, query_tyx) or (video, query_tyx, whether every block is read) -> output.
Track = Callable[..., TrackerOutput]
Affine = Float[Array, "B T 2 3"]


@dataclasses.dataclass(frozen=True)
class SelfTrainingConfig:
    """Unlabelled clips beside the labelled ones, one for each; the teacher needs train.ema.

    Attributes:
      path: folder of video files, or of records made of them; "": no self-training.
      weight: of its loss, beside 1 for the labelled clips.
      tracks: queries of a clip.
      cycle: a track counts if the teacher comes back to where it started within this share of the image's
        larger side (BootsTAP: a few pixels of 256).
      zoom: range of the share of the picture's width and height that the student sees.
      drift: how far its window wanders over the clip, as a share of what there is room for.
      quality: range of the JPEG quality of the student's frames.
    """

    path: str = ""
    weight: float = 1.0
    tracks: int = 64
    cycle: float = 4 / 256
    zoom: tuple[float, float] = (0.6, 1.0)
    drift: float = 1.0
    quality: tuple[int, int] = (20, 90)

    def __post_init__(self) -> None:
        ranges = {"zoom": (self.zoom, 0.05, 1.0), "quality": (self.quality, 1, 100)}
        for name, (pair, least, most) in ranges.items():
            if len(pair) != 2 or not least <= pair[0] <= pair[1] <= most:
                raise ValueError(f"{name} = {pair}: must be a range within [{least}, {most}]")
        if not (0 <= self.weight < float("inf") and self.cycle > 0 and 0 <= self.drift <= 1):
            raise ValueError(
                f"weight = {self.weight}, cycle = {self.cycle}, drift = {self.drift}: must be at least 0, "
                "positive, and in [0, 1]"
            )
        if self.tracks < 1:
            raise ValueError(f"tracks = {self.tracks}: must be at least 1")


class PseudoLabels(NamedTuple):
    """What a teacher says of a clip.

    Attributes:
      query_tyx: Q2, points of the tracks.
      tracks_yx, visible: of the whole clip.
      consistent: tracks that count.
    """

    query_tyx: Float[Array, "B Q 3"]
    tracks_yx: Float[Array, "B Q T 2"]
    visible: Bool[Array, "B Q T"]
    consistent: Bool[Array, "B Q"]


def track_both_ways(
    track: Track, video: Array, query_tyx: Float[Array, "B Q 3"]
) -> tuple[Float[Array, "B Q T 2"], Bool[Array, "B Q T"]]:
    """A causal tracker's tracks before the queries too: there those of the clip run backwards.

    Args:
      track: sees what is before a frame only.
      video: [B, T, ...].
      query_tyx: whole frames.

    Returns:
      (tracks, visible), from the forward pass on the query's frame and after it.
    """
    frames = video.shape[1]
    forward, forward_logits = _ask(track, video, query_tyx)
    at = query_tyx[..., 0]
    turned = jnp.stack([frames - 1 - at, query_tyx[..., 1], query_tyx[..., 2]], axis=-1)
    backward, backward_logits = _ask(track, jnp.flip(video, axis=1), turned)
    later = jnp.arange(frames) >= at[..., None]
    tracks = jnp.where(later[..., None], forward, jnp.flip(backward, axis=-2))
    logits = jnp.where(later, forward_logits, jnp.flip(backward_logits, axis=-1))
    return tracks, logits > 0


def _ask(
    track: Track, video: Array, query_tyx: Float[Array, "B Q 3"]
) -> tuple[Float[Array, "B Q T 2"], Float[Array, "B Q T"]]:
    """(tracks, logits of visibility), each clip's whole even if devices share its frames: they are small, and
    their order in time is changed."""
    answer = track(video, query_tyx)
    tracks = constrain(answer.tracks_yx, ("batch", None, None, None))
    return tracks, constrain(answer.visible_logits, ("batch", None, None))


def pseudo_labels(
    track: Track,
    video: Array,
    query_tyx: Float[Array, "B Q 3"],
    noise: Float[Array, "B Q T"],
    cycle: float,
) -> PseudoLabels:
    """A teacher's tracks of a clip, queries on them, and which are consistent.

    Args:
      track: the teacher.
      video: clean clips.
      query_tyx: Q1, at whole frames.
      noise: uniform, for drawing Q2 among the frames on which the teacher sees the point.
      cycle: largest distance in pixels between Q1 and where the teacher, started at Q2, is on Q1's frame.
    """
    frames = video.shape[1]
    tracks, visible = track_both_ways(track, video, query_tyx)
    first = query_tyx[..., 0].astype(jnp.int32)
    candidates = visible & (jnp.arange(frames) <= first[..., None])
    second = jnp.argmax(jnp.where(candidates, noise, -1.0), axis=-1)
    place = _at(tracks, second)
    queries = jnp.concatenate([second[..., None].astype(jnp.float32), place], axis=-1)
    again, logits = _ask(track, video, queries)
    gap = jnp.linalg.norm(_at(again, first) - query_tyx[..., 1:], axis=-1)
    seen = _at(logits[..., None] > 0, first)[..., 0]
    consistent = jnp.any(candidates, axis=-1) & (gap <= cycle) & seen
    return PseudoLabels(queries, tracks, visible, consistent)


def _at(values: Float[Array, "B Q T n"] | Bool[Array, "B Q T n"], frame: Integer[Array, "B Q"]) -> Array:
    """The values of one frame of each track, [B, Q, n]."""
    chosen = jnp.arange(values.shape[2]) == frame[..., None]
    return jnp.sum(jnp.where(chosen[..., None], values, 0), axis=2, dtype=values.dtype)


def transform_points(affine: Affine, points_yx: Float[Array, "B Q T 2"]) -> Float[Array, "B Q T 2"]:
    """Points by the affine map of their frame: out = A[:, :2] yx + A[:, 2]."""
    # Sums of products, not a matmul: on GPUs and TPUs that would round pixels to 8 or 11 bits.
    rows = affine[:, None]
    return jnp.sum(rows[..., :2] * points_yx[..., None, :], axis=-1) + rows[..., 2]


def student_targets(
    labels: PseudoLabels, affine: Affine, size: tuple[int, int]
) -> dict[str, Float[Array, "..."] | Bool[Array, "..."]]:
    """The teacher's tracks as truth for the student's picture, in the form `point_losses` takes.

    Args:
      affine: from the clean clip's (y, x) to the student's, frame by frame.
      size: height, width of the student's picture; points outside count as hidden, a query must be inside.
    """
    tracks = transform_points(affine, labels.tracks_yx)
    inside = jnp.all((tracks >= 0) & (tracks <= jnp.asarray(size, jnp.float32)), axis=-1)
    frame = labels.query_tyx[..., 0].astype(jnp.int32)
    place = _at(tracks, frame)
    queried_inside = _at(inside[..., None], frame)[..., 0]
    return {
        "query_tyx": jnp.concatenate([labels.query_tyx[..., :1], place], axis=-1),
        "tracks_yx": tracks,
        "visible": labels.visible & inside,
        "valid": labels.consistent & queried_inside,
    }


def self_training_loss(
    student: Track,
    teacher: Track,
    batch: dict[str, Any],
    rng: Array,
    config: SelfTrainingConfig,
    loss: PointLossConfig,
    size: tuple[int, int],
    read_layer: Callable[[Any], Any] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of a batch's unlabelled clips.

    Args:
      student, teacher: the model with its own, and with the averaged, parameters.
      batch: "real_video" and "student_video" uint8 [B, T, H, W, 3], the clip and what the student sees of it;
        "student_affine" [B, T, 2, 3]; "real_query_tyx" [B, Q, 3]: Q1.
      rng: for Q2.
      config, loss: of self-training, and of the losses.
      size: of the model's image, in pixels.
      read_layer: see `point_losses`.

    Returns:
      (loss; aux: "own_coordinate", the student's coordinate loss, and "consistent", the share of tracks that
      count).
    """
    video, first = batch["real_video"], batch["real_query_tyx"]
    drawn = _uniform(rng, (*first.shape[:2], video.shape[1]), first)
    labels = jax.lax.stop_gradient(pseudo_labels(teacher, video, first, drawn, config.cycle * max(size)))
    targets = student_targets(labels, batch["student_affine"], size)
    output = student(batch["student_video"], targets["query_tyx"], loss.deep)
    value, aux = point_losses(output, targets, loss, size, read_layer)
    consistent = targets["valid"].astype(jnp.float32)
    counted = (jnp.sum(consistent), jnp.float32(consistent.size))
    return value, {"own_coordinate": aux["coordinate"], "consistent": counted}


def _uniform(key: Array, shape: tuple[int, ...], like: Array) -> Array:
    """Uniform noise that lies on the mesh as the rows of `like` do."""
    noise = jax.random.uniform(key, shape)
    return per_shard(lambda _, noise: noise)(like, noise)
