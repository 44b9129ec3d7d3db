"""Next-token cross-entropy straight from hidden states, a slice of the sequence at a time.

At 16k tokens and 50k words the logits of one batch are larger than the model. Nothing here ever holds them:
the output projection, the softmax and their gradients run on `chunk_size` positions at a time.

`chunked_cross_entropy` is the training path. Its gradient is formed during the forward pass, while a chunk's
logits exist, because the summed loss has a scalar cotangent: three matmuls with the head in place of the four
that recomputation needs. `token_losses` gives one loss per position and is what evaluation uses.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from models import fox
from models.common.sharding import active_mesh, gathered

# Logits one chunk may hold on one device: 2^28 float32 values are 1 GiB. Every chunk reads and writes the
# head's whole float32 gradient, so that small ones cost time.
_CHUNK_ELEMENTS = 1 << 28
# Rows of a chunk come in multiples of this where that is possible: matmul tiles.
_CHUNK_MULTIPLE = 128
# A sequence is always cut at least this often, so that a chunk is never the whole [B, T, V].
_MIN_CHUNKS = 4

LossFn = Callable[[Any, dict[str, Any], Any], tuple[Float[Array, ""], dict[str, Any]]]


class _Gradients(NamedTuple):
    """What the forward pass leaves for the backward pass: d(loss sum)/d(hidden) and /d(head)."""

    hidden: jax.Array
    head: jax.Array


def default_chunk_size(batch: int, length: int, vocab_size: int) -> int:
    """Positions per chunk: as many as keep batch x chunk x vocabulary under 2^28, at most a quarter of T.

    A few more chunks are taken if they then divide T into multiples of 128.

    Args:
      batch: sequences on one device.
      length: positions of a sequence.
      vocab_size: columns of the head.
    """
    most = max(1, _CHUNK_ELEMENTS // max(1, batch * vocab_size))
    chunks = max(_MIN_CHUNKS, -(-length // most))
    even = (n for n in range(chunks, 2 * chunks) if length % (n * _CHUNK_MULTIPLE) == 0)
    return max(1, -(-length // next(even, chunks)))


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    *,
    compute_dtype: Any = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over the masked-in tokens of -log softmax(hidden @ head)[label], and how many tokens that is.

    Matmuls take `compute_dtype` inputs and accumulate in float32; logits, softmax and the head's gradient are
    float32. Under a mesh the batch stays split as `hidden` is, and the head's gradient is summed over devices
    once, not once per chunk.

    Args:
      hidden: final hidden states (after the last norm).
      head: output projection, in its stored dtype and sharding.
      labels: the token to be predicted at each position. Where `mask` is False any value is accepted; where
        it is True a label outside [0, V) makes the loss NaN.
      mask: which positions count; None means all of them.
      chunk_size: positions of T processed at a time, any number; None chooses (`default_chunk_size`).
      compute_dtype: dtype of the matmul inputs; None means the dtype of `hidden`.

    Returns:
      (loss sum in nats, number of masked-in tokens), both float32 scalars. Differentiable once, in `hidden`
      and `head`.

    Raises:
      ValueError: shapes that do not fit together, or chunk_size < 1.
    """
    weights = _checked_weights(hidden, head, labels, mask, chunk_size)
    dtype = jnp.dtype(hidden.dtype if compute_dtype is None else compute_dtype)
    total = _summed_loss(hidden, head, labels, weights, chunk_size, dtype)
    return total, lax.stop_gradient(jnp.sum(weights))


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    *,
    compute_dtype: Any = None,
) -> Float[Array, "B T"]:
    """The loss of every position, in nats, 0 where `mask` is False: L(i) of the paper's evaluation.

    Arguments, memory and errors as in `chunked_cross_entropy`. Gradients come from ordinary differentiation,
    each chunk recomputed.
    """
    weights = _checked_weights(hidden, head, labels, mask, chunk_size)
    dtype = jnp.dtype(hidden.dtype if compute_dtype is None else compute_dtype)
    length = hidden.shape[1]
    chunk = _resolve_chunk(hidden.shape, head.shape[1], chunk_size)
    kernel = gathered(head.astype(dtype))
    padded = [_pad_time(x, chunk) for x in (hidden, labels, weights)]

    @jax.checkpoint
    def one_chunk(kernel: jax.Array, start: jax.Array) -> jax.Array:
        h, y, w = (lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in padded)
        logits = jnp.einsum("btd,dv->btv", h.astype(dtype), kernel, preferred_element_type=jnp.float32)
        return _losses_of(logits, y, w)[0]

    starts = jnp.arange(padded[0].shape[1] // chunk) * chunk
    _, parts = lax.scan(lambda carry, start: (carry, one_chunk(kernel, start)), None, starts)
    return jnp.moveaxis(parts, 0, 1).reshape(hidden.shape[0], -1)[:, :length]


def lm_loss_fn(config: fox.FoxConfig, runtime: fox.FoxRuntime, *, chunk_size: int | None = None) -> LossFn:
    """Makes the task's loss for the shared training loop.

    Args:
      config: the model.
      runtime: how it is run; its `compute_dtype` is also that of the output projection.
      chunk_size: see `chunked_cross_entropy`.

    Returns:
      loss_fn(params, batch, rng) -> (loss, aux). `batch` holds "tokens", "labels" [B, T] int32 and optionally
      "reset" (document starts) and "loss_mask" [B, T] bool. The loss is the mean in nats over masked-in
      tokens (0 if there are none); aux is {"loss": (sum, tokens), "weight": tokens}. `rng` is not used.
    """

    def loss_fn(params: Any, batch: dict[str, Any], rng: Any) -> tuple[jax.Array, dict[str, Any]]:
        del rng
        hidden, _ = fox.apply(
            config, runtime, params, batch["tokens"], reset=batch.get("reset"), output="hidden"
        )
        total, count = chunked_cross_entropy(
            hidden,
            params["lm_head"]["kernel"],
            batch["labels"],
            batch.get("loss_mask"),
            chunk_size,
            compute_dtype=runtime.compute_dtype,
        )
        return total / jnp.maximum(count, 1.0), {"loss": (total, count), "weight": count}

    return loss_fn


def _checked_weights(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array | None, chunk_size: int | None
) -> jax.Array:
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[0]:
        raise ValueError(
            f"hidden must be [B, T, D] and head [D, V] with the same D; got {hidden.shape} and {head.shape}"
        )
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels must have shape {hidden.shape[:2]} like hidden's [B, T]; got {labels.shape}"
        )
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(f"mask must have the labels' shape {labels.shape}; got {mask.shape}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it; got {chunk_size}")
    return jnp.ones_like(labels, jnp.float32) if mask is None else mask.astype(jnp.float32)


def _resolve_chunk(shape: tuple[int, ...], vocab_size: int, chunk_size: int | None) -> int:
    batch, length = shape[:2]
    if chunk_size is None:
        return default_chunk_size(batch, length, vocab_size)
    return min(chunk_size, max(length, 1))


def _pad_time(x: jax.Array, chunk: int) -> jax.Array:
    extra = -x.shape[1] % chunk
    if not extra:
        return x
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))


def _losses_of(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted loss [B, C] and log-normaliser [B, C] of float32 logits [B, C, V]."""
    vocab = logits.shape[-1]
    lse = _log_normaliser(logits)
    hit = lax.broadcasted_iota(jnp.int32, (1, 1, vocab), 2) == labels[..., None]
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    in_range = (labels >= 0) & (labels < vocab)
    loss = jnp.where(in_range, lse - picked, jnp.nan)
    return jnp.where(weights > 0, loss * weights, 0.0), lse


def _log_normaliser(logits: jax.Array) -> jax.Array:
    """logsumexp over the last axis."""
    return lax.platform_dependent(logits, cuda=_logsumexp_in_one_pass, default=_logsumexp)


def _logsumexp(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


@jax.custom_jvp
def _logsumexp_in_one_pass(logits: jax.Array) -> jax.Array:
    """Maximum and sum reduced together: more exponentials, but the logits are read once.

    On a GPU reading them takes longer; a CPU's vector units only do plain maxima and sums.
    """

    def combine(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    # The maximum starts at a finite value: the difference of two infinite ones is NaN.
    lowest = jnp.asarray(jnp.finfo(logits.dtype).min, logits.dtype)
    start = (lowest, jnp.zeros((), logits.dtype))
    top, total = lax.reduce((logits, jnp.ones_like(logits)), start, combine, (logits.ndim - 1,))
    return top + jnp.log(total)


_logsumexp_in_one_pass.defjvp(lambda logits, tangents: jax.jvp(_logsumexp, logits, tangents))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed_loss(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk_size: int | None,
    dtype: jnp.dtype,
) -> jax.Array:
    return _over_mesh(hidden, head, labels, weights, chunk_size, dtype, with_gradients=False)[0]


def _summed_loss_fwd(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk_size: int | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, _Gradients]:
    total, d_hidden, d_head = _over_mesh(
        hidden, head, labels, weights, chunk_size, dtype, with_gradients=True
    )
    if active_mesh() is not None:
        d_head = jax.sharding.reshard(d_head, jax.typeof(head).sharding.spec)
    return total, _Gradients(d_hidden, d_head.astype(head.dtype))


def _summed_loss_bwd(
    chunk_size: int | None, dtype: jnp.dtype, gradients: _Gradients, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    del chunk_size, dtype
    d_hidden = (gradients.hidden.astype(jnp.float32) * cotangent).astype(gradients.hidden.dtype)
    return d_hidden, (gradients.head * cotangent).astype(gradients.head.dtype), None, None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _over_mesh(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk_size: int | None,
    dtype: jnp.dtype,
    *,
    with_gradients: bool,
) -> tuple[jax.Array, ...]:
    """Runs `_local_sum` on each device's own part of the batch and adds the results up."""
    kernel = gathered(head.astype(dtype))
    if active_mesh() is None:
        return _local_sum(hidden, kernel, labels, weights, chunk_size, with_gradients)
    spec = PartitionSpec(*jax.typeof(hidden).sharding.spec[:2])
    axes = tuple(name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))

    def per_device(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
        total, *grads = _local_sum(hidden, kernel, labels, weights, chunk_size, with_gradients)
        total = lax.psum(total, axes)
        return (total, grads[0], lax.psum(grads[1], axes)) if grads else (total,)

    return jax.shard_map(
        per_device,
        in_specs=(spec, PartitionSpec(), spec, spec),
        out_specs=(PartitionSpec(), spec, PartitionSpec()) if with_gradients else (PartitionSpec(),),
        check_vma=False,  # the sums above make the outputs equal on every device
    )(hidden, kernel, *(jax.sharding.reshard(x, spec) for x in (labels, weights)))


def _local_sum(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk_size: int | None,
    with_gradients: bool,
) -> tuple[jax.Array, ...]:
    """(loss sum,) or (loss sum, d/d hidden [B, T, D] in hidden's dtype, d/d kernel [D, V] float32)."""
    length = hidden.shape[1]
    width, vocab = kernel.shape
    chunk = _resolve_chunk(hidden.shape, vocab, chunk_size)
    padded = [_pad_time(x, chunk) for x in (hidden, labels, weights)]
    starts = jnp.arange(padded[0].shape[1] // chunk) * chunk

    def step(carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        total, *grads = carry
        h, y, w = (lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in padded)
        h = h.astype(kernel.dtype)
        logits = jnp.einsum("btd,dv->btv", h, kernel, preferred_element_type=jnp.float32)
        losses, lse = _losses_of(logits, y, w)
        total = total + jnp.sum(losses)
        if not grads:
            return (total,), None
        hit = lax.broadcasted_iota(jnp.int32, (1, 1, vocab), 2) == y[..., None]
        d_logits = (jnp.exp(logits - lse[..., None]) - hit) * w[..., None]
        d_logits = jnp.where(w[..., None] > 0, d_logits, 0.0).astype(kernel.dtype)
        d_h = jnp.einsum("btv,dv->btd", d_logits, kernel, preferred_element_type=jnp.float32)
        d_hidden = lax.dynamic_update_slice_in_dim(grads[0], d_h.astype(hidden.dtype), start, axis=1)
        d_kernel = grads[1] + jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (total, d_hidden, d_kernel), None

    init: tuple[jax.Array, ...] = (jnp.zeros((), jnp.float32),)
    if with_gradients:
        init += (jnp.zeros_like(padded[0]), jnp.zeros((width, vocab), jnp.float32))
    out, _ = lax.scan(step, init, starts)
    return (out[0], out[1][:, :length], out[2]) if with_gradients else out
