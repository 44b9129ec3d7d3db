"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of clips, and the soft targets that go with them.

Row i is mixed with row B - 1 - i of the global batch, whatever devices hold them: batches come shuffled, so
the partner is random, and copies of a video that stand side by side (repeated augmentation) rarely meet. It
takes one exchange between pairs of devices, and a run gives the same on any number of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.common.shapes import Key
from models.common.sharding import ShardingRules, active_mesh, fit_spec, per_shard

Clips = Float[Array, "B T h w 3"]
Targets = Float[Array, "B C"]


def soft_targets(labels: Int[Array, " B"], num_classes: int, smoothing: float = 0.0) -> Targets:
    """One-hot targets, `smoothing` of their mass spread evenly over all C classes; float32.

    A label outside [0, C) gives NaN, so that the loss shows it.
    """

    def local(labels: Array) -> Array:
        hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        valid = (labels >= 0) & (labels < num_classes)
        return jnp.where(valid[:, None], hot * (1 - smoothing) + smoothing / num_classes, jnp.nan)

    return per_shard(local)(labels)


def reversed_rows(x: Array) -> Array:
    """Row B - 1 - i in the place of row i, of the global batch."""
    mesh = active_mesh()
    if mesh is None:
        return x[::-1]
    spec = fit_spec(PartitionSpec(ShardingRules().batch), (x.shape[0],), mesh)
    axes = spec[0]
    if axes is None:
        return per_shard(lambda x: x[::-1])(x)
    names = (axes,) if isinstance(axes, str) else axes
    devices = 1
    for name in names:
        devices *= mesh.shape[name]
    swaps = [(i, devices - 1 - i) for i in range(devices)]

    def local(x: Array) -> Array:
        return lax.ppermute(x[::-1], names, swaps)

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(jax.sharding.reshard(x, spec))


def cut_box(
    share: Float[Array, " B"], place: Float[Array, "B 2"], size: tuple[int, int]
) -> Float[Array, "B h w"]:
    """1 inside a rectangle of `share` of the frame's area and of its aspect, 0 outside; whole pixels.

    Args:
      share: of the area, before what lies outside the frame is cut off.
      place: middle (y, x) of the rectangle, shares of the frame.
      size: height and width of the frame.
    """
    sides = jnp.sqrt(share)
    masks = []
    for axis, pixels in enumerate(size):
        middle = jnp.floor(place[:, axis] * pixels)
        half = jnp.floor(sides * pixels / 2)
        low, high = middle - half, middle + jnp.floor(sides * pixels) - half
        index = jnp.arange(pixels)
        masks.append((index >= low[:, None]) & (index < high[:, None]))
    return (masks[0][:, :, None] & masks[1][:, None, :]).astype(jnp.float32)


def mix(
    frames: Clips,
    targets: Targets,
    key: Key,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    cutmix_probability: Float[Array, ""] | float = 0.5,
) -> tuple[Clips, Targets]:
    """Mixes every clip with its partner, each by its own share; targets in the proportion of the pixels.

    Mixup: lam frames + (1 - lam) partner, lam ~ Beta(alpha, alpha). Cutmix: a rectangle of (1 - lam) of the
    area, the same in all frames, comes from the partner; the targets follow the pixels really replaced.

    Args:
      frames: float32 clips.
      targets: of each.
      key: of the draws.
      mixup_alpha, cutmix_alpha: 0: not used.
      cutmix_probability: share of the clips that get cutmix, where both are used.
    """
    if not mixup_alpha and not cutmix_alpha:
        return frames, targets
    batch = frames.shape[0]
    draw_key, beta_key = jax.random.split(key)
    draws = jax.random.uniform(draw_key, (batch, 3))
    both = mixup_alpha and cutmix_alpha
    cut = draws[:, 0] < (cutmix_probability if both else float(not mixup_alpha))
    alpha = jnp.where(cut, cutmix_alpha or 1.0, mixup_alpha or 1.0)
    # X / (X + Y) of two gamma variables, by their logarithms: those of small alpha are too small for float32.
    one, two = jax.random.loggamma(beta_key, alpha, (2, batch), jnp.float32)
    lam = jax.nn.sigmoid(one - two)

    size = (frames.shape[2], frames.shape[3])

    def local(frames: Array, targets: Array, other: Array, hers: Array, *draws: Array) -> tuple[Array, Array]:
        lam, cut, place = draws
        share = jnp.broadcast_to(1 - lam[:, None, None], (lam.shape[0], *size))
        if cutmix_alpha:
            share = jnp.where(cut[:, None, None], cut_box(1 - lam, place, size), share)
        pixels = share[:, None, :, :, None]
        mean = jnp.mean(share, axis=(1, 2))[:, None]
        # Not frames + share (other - frames): a pixel that is replaced is to be exactly the partner's.
        return frames * (1 - pixels) + other * pixels, targets * (1 - mean) + hers * mean

    partners = reversed_rows(frames), reversed_rows(targets)
    return per_shard(local)(frames, targets, *partners, lam, cut, draws[:, 1:])
