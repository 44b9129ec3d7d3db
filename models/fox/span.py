"""What a stretch of tokens says about itself, for all layers: document starts, padding, positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from models.common.shapes import Mask, Tokens


class Span(NamedTuple):
    """The T tokens of one call, row by row. Padding does not exist: it touches no result and no state.

    Attributes:
      positions: [B, T] int32, tokens since the start of the document, earlier calls included.
      has_past: [B, T] bool, the token's document began in an earlier call (it may see the cache).
      predecessor: [B, T] bool, the token before it in this call is its predecessor in the document.
      segment_ids: [B, T] int32, number of document starts in this call up to the token; None if `reset` was
        not given: the whole row is one document.
      mask: [B, T] bool, False on left padding; None = no padding.
      pads: [B] int32, padding tokens at the front of the row; None = no padding.
      malformed: [B] bool, the row's mask is not left padding (False after True); None = no padding.
    """

    positions: Int[Array, "B T"]
    has_past: Bool[Array, "B T"]
    predecessor: Bool[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    mask: Bool[Array, "B T"] | None
    pads: Int[Array, " B"] | None
    malformed: Bool[Array, " B"] | None

    @property
    def num_tokens(self) -> Int[Array, " B"] | int:
        """Tokens of each row that are not padding."""
        return self.positions.shape[1] if self.pads is None else self.positions.shape[1] - self.pads


def make_span(tokens: Tokens, length: Int[Array, " B"] | None, reset: Mask | None, mask: Mask | None) -> Span:
    """Describes a call.

    Args:
      tokens: the call's tokens (only their shape and layout matter).
      length: tokens of the current document that earlier calls saw; None = 0.
      reset: True where a new document starts.
      mask: False = left padding.

    Raises:
      ValueError: reset or mask of another shape than tokens, or (where its values are known) a mask that has
        padding after a token.
    """
    for name, given in (("reset", reset), ("mask", mask)):
        if given is not None and given.shape != tokens.shape:
            raise ValueError(f"{name} has shape {given.shape}; it must be that of tokens, {tokens.shape}")
    # `zeros_like` keeps the tokens' layout under an explicit mesh.
    index = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    past = jnp.zeros_like(tokens[:, 0]) if length is None else length
    pads = malformed = None
    if mask is not None:
        pads = jnp.sum(~mask, axis=1, dtype=jnp.int32)
        malformed = jnp.any(mask[:, :-1] & ~mask[:, 1:], axis=1)
        _check_left_padding(malformed)
    begin = jnp.zeros_like(past) if pads is None else pads
    relative = index - begin[:, None]
    if reset is None:
        return Span(
            positions=past[:, None] + relative,
            has_past=jnp.ones_like(tokens, dtype=bool),
            predecessor=relative > 0,
            segment_ids=None,
            mask=mask,
            pads=pads,
            malformed=malformed,
        )
    starts = reset if mask is None else reset & mask
    segment_ids = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    has_past = latest < 0
    return Span(
        positions=jnp.where(has_past, past[:, None] + relative, index - latest),
        has_past=has_past,
        predecessor=(relative > 0) & ~starts,
        segment_ids=segment_ids,
        mask=mask,
        pads=pads,
        malformed=malformed,
    )


def _check_left_padding(malformed: Bool[Array, " B"]) -> None:
    """Where values are known, refuses at once; under tracing the row's outputs become NaN instead."""
    if not isinstance(malformed, jax.core.Tracer) and bool(malformed.any()):
        rows = [int(row) for row in jnp.flatnonzero(malformed)]
        raise ValueError(f"mask must be left padding (False ... False True ... True); rows {rows} are not")
