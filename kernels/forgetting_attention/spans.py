"""Which keys a row may see: one interval of key positions per row.

Causality, buffers, left padding and packed segments all leave an interval [first, last] whose ends never decrease from
row to row. That is what lets loops skip by bounds instead of masking.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class KeySpans(NamedTuple):
    """Visible keys of row i of batch entry b, head n: max(first[b, i], head_first[b, n]) <= j <= last[b, i].

    Attributes:
      first, last: int32; a dead row has first > last. Non-decreasing in i.
      head_first: per-head start, or None.
      keeps_left: whether every row sees from key 0 on (static): then only `last` needs masks.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    head_first: Int[Array, "B N"] | None
    keeps_left: bool

    @classmethod
    def of(
        cls,
        batch: int,
        queries: int,
        keys: int,
        *,
        causal: bool,
        query_offset: int | Array | None,
        kv_length: Array | None,
        seq_start: Array | None,
        first_key: Array | None,
        segment_ids: Array | None,
        query_segment_ids: Array | None,
    ) -> Self:
        """Spans from the arguments of `attend_partial`."""
        length = jnp.full((batch,), keys, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
        last = jnp.broadcast_to(length[:, None] - 1, (batch, queries))
        if causal:
            offset = length - queries if query_offset is None else query_offset
            offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
            last = jnp.minimum(last, offset[:, None] + jnp.arange(queries, dtype=jnp.int32))
        first = jnp.zeros((batch, queries), jnp.int32)
        if seq_start is not None:
            first = jnp.maximum(first, seq_start.astype(jnp.int32)[:, None])
        if segment_ids is not None:
            assert query_segment_ids is not None
            # Positions beyond kv_length hold anything; the largest id keeps the search array sorted.
            filled = jnp.arange(keys) < length[:, None]
            sorted_ids = jnp.where(filled, segment_ids, jnp.iinfo(segment_ids.dtype).max)
            search = jax.vmap(jnp.searchsorted, in_axes=(0, 0))
            first = jnp.maximum(first, search(sorted_ids, query_segment_ids).astype(jnp.int32))
            after = jax.vmap(lambda ids, wanted: jnp.searchsorted(ids, wanted, side="right"))
            last = jnp.minimum(last, after(sorted_ids, query_segment_ids).astype(jnp.int32) - 1)
        return cls(first, last, first_key, seq_start is None and segment_ids is None and first_key is None)

    def visible(self, keys: int) -> Bool[Array, "B T S"] | Bool[Array, "B N T S"]:
        """The spans as a dense mask, O(T * S): for the reference only."""
        at = jnp.arange(keys)
        mask = (at >= self.first[:, :, None]) & (at <= self.last[:, :, None])
        if self.head_first is None:
            return mask
        return mask[:, None] & (at >= self.head_first[:, :, None, None])
