"""The causal depthwise convolution over time of the recurrent block, in chunks and over split frames."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.common.layers import at_least_float32, recomputed
from models.common.shapes import Params
from models.common.sharding import gathered, time_axis

# The inputs of the last frames, oldest first.
Taps = tuple[Float[Array, "B *P E"], ...]


def temporal_conv(
    x: Float[Array, "B T *P E"],
    params: Params,
    positions: Int[Array, "B T"],
    cache: Taps | None = None,
) -> tuple[Float[Array, "B T *P E"], Taps]:
    """Causal depthwise convolution: out_t = b + sum_s w[J-1-s] x_{t-s}, s = 0 .. J-1, within the segment.

    Args:
      params: "kernel" [J, E], whose last row multiplies the current frame, and "bias" [E].
      positions: tap s counts where positions >= s.
      cache: the J - 1 raw inputs before the call; None = zeros.

    Returns:
      (output in x's dtype, computed in float32; the cache after the call, for chunks of any length, in the
      dtype of the one before).
    """
    kernel, bias = gathered(params["kernel"]), gathered(params["bias"])
    taps, frames = kernel.shape[0], x.shape[1]
    if (axis := time_axis(x)) is not None:
        return _split_conv(x, kernel, bias, positions, cache, axis)
    if cache is not None and frames == 1:  # nothing is put together, so that nothing is copied
        windows = [x, *(tap.astype(x.dtype)[:, None] for tap in reversed(cache))]
        convolved = _weighted(windows, kernel, bias, positions)
    else:
        convolved = _convolved(_behind(x, taps - 1, cache), kernel, bias, positions)
    return convolved, last_inputs(x, taps - 1, cache)


def _behind(x: Array, before: int, cache: Taps | None) -> Array:
    """Frames behind those before them, or as many zeros."""
    if cache is None:
        padding = [(0, 0)] * x.ndim
        padding[1] = (before, 0)
        return jnp.pad(x, padding)
    return jnp.concatenate([*(tap.astype(x.dtype)[:, None] for tap in cache), x], axis=1)


def last_inputs(x: Float[Array, "B T *P E"], count: int, cache: Taps | None) -> Taps:
    """The cache after these frames, as `temporal_conv` has it: the last `count` frames of all so far."""
    if count == 0:
        return ()
    if cache is None:
        cache = (jnp.zeros_like(x[:, 0]),) * count
    newest = _frames(x[:, max(x.shape[1] - count, 0) :])
    return (*cache, *(tap.astype(cache[0].dtype) for tap in newest))[-count:]


def _frames(x: Array) -> Taps:
    return tuple(x[:, t] for t in range(x.shape[1]))


@recomputed
def _convolved(padded: Array, kernel: Array, bias: Array, positions: Array) -> Array:
    """Of frames behind the taps - 1 that come before them."""
    taps, frames = kernel.shape[0], positions.shape[1]
    windows = [padded[:, taps - 1 - s : taps - 1 - s + frames] for s in range(taps)]
    return _weighted(windows, kernel, bias, positions)


def _weighted(windows: Sequence[Array], kernel: Array, bias: Array, positions: Array) -> Array:
    """b + sum_s w[J-1-s] windows[s]: the frames, those one before them, and so on."""
    total = bias
    for s, window in enumerate(windows):
        inside = (positions >= s).reshape(*positions.shape, *[1] * (window.ndim - 2))
        total = total + kernel[len(windows) - 1 - s] * jnp.where(inside, at_least_float32(window), 0)
    return total.astype(windows[0].dtype)


def _split_conv(
    x: Array, kernel: Array, bias: Array, positions: Array, cache: Taps | None, axis: str
) -> tuple[Array, Taps]:
    """Of frames that are split over a mesh axis: every device gets the last frames of the one before it."""
    mesh, before = jax.sharding.get_abstract_mesh(), kernel.shape[0] - 1
    shards = mesh.shape[axis]
    if x.shape[1] < shards * before:
        raise ValueError(
            f"{x.shape[1]} frames over {shards} devices: the convolution needs {before} frames on each"
        )
    rows = jax.typeof(x).sharding.spec[0]
    if cache is None:
        zero = jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), out_sharding=PartitionSpec(rows))
        cache = (zero,) * before

    def local(x: Array, kernel: Array, bias: Array, positions: Array, cache: Taps) -> tuple[Array, Taps]:
        last = x[:, x.shape[1] - before :]
        ring = [(shard, (shard + 1) % shards) for shard in range(shards)]
        handed = jax.lax.ppermute(last, axis, ring)  # the last device's goes round, to be replaced
        is_first = jax.lax.axis_index(axis) == 0
        given = jnp.stack([tap.astype(x.dtype) for tap in cache], axis=1)
        padded = jnp.concatenate([jnp.where(is_first, given, handed), x], axis=1)
        is_last = jax.lax.axis_index(axis) == shards - 1
        after = jax.lax.psum(jnp.where(is_last, last, 0), axis)
        return _convolved(padded, kernel, bias, positions), _frames(after)

    split, whole, batch = PartitionSpec(rows, axis), PartitionSpec(), PartitionSpec(rows)
    convolved, after = jax.shard_map(
        local, in_specs=(split, whole, whole, split, batch), out_specs=(split, batch), check_vma=False
    )(x, kernel, bias, positions, cache)
    return convolved, tuple(tap.astype(old.dtype) for tap, old in zip(after, cache, strict=True))
