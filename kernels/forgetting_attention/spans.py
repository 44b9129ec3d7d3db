"""Which keys a row may see: one interval of key positions per row.

Causality, buffers, left padding and packed segments all leave an interval [first, last] whose ends never
decrease from row to row. That is what lets loops skip by bounds instead of masking.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class KeySpans(NamedTuple):
    """Visible keys of row i, batch entry b, head n: max(first[b, i], head_first[b, n]) <= j <= last[b, i].

    Attributes:
      first, last: int32, non-decreasing in i; a dead row has first > last.
      head_first: per-head start, or None.
      keeps_left: whether every row sees from key 0 on (static): then only `last` needs masks.
      all_filled: whether every row and key takes part (static): otherwise the others may hold anything.
      plain_causal: whether row i sees exactly the keys up to i + S - T (static): spans need not be read.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    head_first: Int[Array, "B N"] | None
    keeps_left: bool
    all_filled: bool
    plain_causal: bool

    @classmethod
    def of(
        cls,
        batch: int,
        queries: int,
        keys: int,
        *,
        causal: bool,
        query_offset: int | Array | None = None,
        kv_length: Array | None = None,
        seq_start: Array | None = None,
        first_key: Array | None = None,
        segment_ids: Array | None = None,
        query_segment_ids: Array | None = None,
    ) -> Self:
        """Spans from the arguments of `attend_partial`, whose ids never decrease."""
        length = jnp.full((batch,), keys, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
        last = jnp.broadcast_to(length[:, None] - 1, (batch, queries))
        if causal:
            offset = length - queries if query_offset is None else query_offset
            offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
            last = jnp.minimum(last, offset[:, None] + jnp.arange(queries, dtype=jnp.int32))
        first = jnp.zeros((batch, queries), jnp.int32)
        if seq_start is not None:
            first = jnp.maximum(first, seq_start.astype(jnp.int32)[:, None])
        if segment_ids is not None and query_segment_ids is not None:
            # Positions beyond kv_length hold anything; the largest id keeps the search array sorted.
            filled = jnp.arange(keys) < length[:, None]
            sorted_ids = jnp.where(filled, segment_ids, jnp.iinfo(segment_ids.dtype).max)
            first = jnp.maximum(first, _search(sorted_ids, query_segment_ids, "left"))
            last = jnp.minimum(last, _search(sorted_ids, query_segment_ids, "right") - 1)
        keeps_left = seq_start is None and segment_ids is None and first_key is None
        all_filled = all(x is None for x in (kv_length, seq_start, first_key, query_offset))
        return cls(
            first,
            last,
            None if first_key is None else first_key.astype(jnp.int32),
            keeps_left,
            all_filled,
            plain_causal=causal and keeps_left and all_filled and queries <= keys,
        )

    def in_runs(self, run_start: Int[Array, "B S"], row_at: Int[Array, "B T"]) -> Self:
        """Keeps rows inside their run: `run_start` is the first position of every key's run."""
        first = jnp.take_along_axis(run_start, row_at, axis=1)
        return self._replace(first=jnp.maximum(self.first, first), keeps_left=False, plain_causal=False)

    def visible(self, keys: int) -> Bool[Array, "B T S"] | Bool[Array, "B N T S"]:
        """The spans as a dense mask, O(T * S): for the reference only."""
        at = jnp.arange(keys)
        mask = (at >= self.first[:, :, None]) & (at <= self.last[:, :, None])
        if self.head_first is None:
            return mask
        return mask[:, None] & (at >= self.head_first[:, :, None, None])


def _search(sorted_ids: Int[Array, "B S"], ids: Int[Array, "B T"], side: str) -> Int[Array, "B T"]:
    return jax.vmap(lambda s, i: jnp.searchsorted(s, i, side=side))(sorted_ids, ids).astype(jnp.int32)


def positions(
    batch: int, queries: int, keys: int, kv_length: Int[Array, " B"] | None
) -> Int[Array, "{batch} {queries}"]:
    """Key position of every query row: rows end at kv_length; negative where there are fewer keys than
    rows.
    """
    length = jnp.full((batch,), keys, jnp.int32) if kv_length is None else kv_length.astype(jnp.int32)
    return length[:, None] - queries + jnp.arange(queries, dtype=jnp.int32)


def live_keys(
    batch: int, keys: int, seq_start: Int[Array, " B"] | None, kv_length: Int[Array, " B"] | None
) -> Bool[Array, "{batch} {keys}"]:
    """Keys in [seq_start, kv_length)."""
    at = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
    live = jnp.ones((batch, keys), bool)
    if seq_start is not None:
        live &= at >= seq_start[:, None]
    if kv_length is not None:
        live &= at < kv_length[:, None]
    return live


def run_starts(
    batch: int, keys: int, seq_start: Int[Array, " B"] | None, segment_ids: Int[Array, "B S"] | None
) -> Bool[Array, "{batch} {keys}"]:
    """Marks the first key of every run: key 0, seq_start, and every change of segment id."""
    at = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
    starts = at == 0
    if seq_start is not None:
        starts |= at == seq_start[:, None]
    if segment_ids is not None:
        starts |= segment_ids != jnp.roll(segment_ids, 1, axis=1)
    return starts
