"""Choosing the next token from logits: greedy, temperature, top-k, top-p.

All pure functions of (logits, keys). Every row has a key of its own, so what a row draws does not depend on
the rows beside it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

NOT_A_TOKEN = -1
_SMALLEST_TEMPERATURE = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Filters apply in the order temperature, top-k, top-p.

    Attributes:
      temperature: divides the logits; 0 means greedy.
      top_k: keep the k most likely tokens; None or 0 keeps all. Of equally likely ones, lower ids come first.
      top_p: keep the fewest most likely tokens whose probabilities sum to at least top_p; 1 keeps all.
      greedy: take the most likely token (the lowest id among equals); the rest is ignored.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 or None for no limit, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; 1 keeps all tokens; got {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.greedy or self.temperature == 0


def filter_logits(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Log-weights to draw from: float32 logits over temperature, -inf where top-k or top-p excludes a token.

    At least one token is always kept. For a greedy `sampling` only the first most likely token is.
    """
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    k = min(sampling.top_k or vocab, vocab)
    if sampling.is_greedy:
        k = 1
    else:
        # Shifted first: a small temperature would otherwise overflow large logits, or divide 0 by 0.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = logits / max(sampling.temperature, _SMALLEST_TEMPERATURE)
    top_p = 1.0 if sampling.is_greedy else sampling.top_p
    if k == vocab and top_p == 1.0:
        return logits
    # A stable descending sort puts lower ids first among equals; a rank is a token's place in that order.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    keep = rank < k
    if top_p < 1.0:
        ordered = jnp.take_along_axis(jnp.where(keep, logits, -jnp.inf), order, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        keep &= jnp.take_along_axis(before < top_p, rank, axis=-1) | (rank == 0)
    return jnp.where(keep, logits, -jnp.inf)


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """One token id per row, int32; `NOT_A_TOKEN` where a row's logits hold NaN or no finite value.

    Args:
      logits: any float dtype.
      keys: one typed PRNG key per row (`jax.random.key`).
      sampling: static.
    """
    logits = logits.astype(jnp.float32)
    usable = ~jnp.any(jnp.isnan(logits), axis=-1) & jnp.isfinite(jnp.max(logits, axis=-1))
    if sampling.is_greedy:
        ids = jnp.argmax(logits, axis=-1)
    else:
        ids = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))
    return jnp.where(usable, ids, NOT_A_TOKEN).astype(jnp.int32)


def step_keys(key: Key[Array, ""], rows: Int[Array, " B"], index: Int[Array, ""] | int) -> Key[Array, " B"]:
    """The keys of `rows` for their token number `index`: a pure function of (key, row, index)."""
    base = jax.random.fold_in(key, index)
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(rows)
