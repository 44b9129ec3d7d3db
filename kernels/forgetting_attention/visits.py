"""Which share of the causal tiles each pass visits, with an implementation's own tiles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.common.dispatch import choose, target
from kernels.forgetting_attention.api import IMPLEMENTATIONS, PREFERENCE, Threshold, forgetting_attention
from kernels.forgetting_attention.config import Options, Request, Tile, TileConfig
from kernels.forgetting_attention.operands import attention_operands
from kernels.forgetting_attention.pruning import acp_threshold, without_dead
from kernels.forgetting_attention.tile_ranges import Decay, TileRange, column_tiles, pruned_tiles, row_tiles

# Products of one tile in the passes (README.md, "Cost"): what a share of tiles weighs.
PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}


class Visits(NamedTuple):
    """Share of the causal tiles that each pass visits, in [0, 1]."""

    forward: float
    backward_kv: float
    backward_q: float

    @property
    def both(self) -> float:
        """Of forward and backward together, by their products."""
        parts = self._asdict()
        return sum(PRODUCTS[name] * parts[name] for name in parts) / sum(PRODUCTS.values())


def own_tiles(q: Any, k: Any, implementation: str | Sequence[str] | None = None) -> tuple[str, TileConfig]:
    """The implementation that would run plain causal attention of these shapes here, and its tiles.

    Args:
      q, k: [B, T, N, H] and [B, S, K, H], arrays or `jax.ShapeDtypeStruct`s.
      implementation: None chooses.

    Raises:
      ImplementationError: the named one cannot take them.
    """
    op, device = "forgetting_attention", target()
    batch, queries, heads, head_dim = q.shape
    request = Request(
        op=op, platform=device.platform, capability=device.capability, device=device.kind, dtype=str(q.dtype),
        batch=batch, queries=queries, keys=k.shape[1], heads=heads, kv_heads=k.shape[2], head_dim=head_dim,
    )  # fmt: skip
    name, chosen = choose(op, IMPLEMENTATIONS, request, implementation, PREFERENCE)
    return name, chosen.default_tiles(request)


def forward_visits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    tile: Tile,
    adaptive_threshold: Threshold = None,
    log_pruning_tolerance: float = -10.0,
    seq_start: Int[Array, " B"] | None = None,
) -> Float[Array, "B N"]:
    """Share of the causal tiles that the forward pass visits, for every head of every batch entry.

    Works inside jit; arguments as in `forgetting_attention`, with the default scale.
    """
    share = _counter(q, k, log_fgate, adaptive_threshold, log_pruning_tolerance, seq_start)
    return share(tile, column_tiles, 0, None)


def measure_visits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    tiles: TileConfig,
    adaptive_threshold: Threshold = None,
    log_pruning_tolerance: float = -10.0,
    implementation: str | Sequence[str] | None = None,
) -> Visits:
    """Counts the tiles of a causal call with the default scale; arguments as in `forgetting_attention`."""
    mode = adaptive_threshold if isinstance(adaptive_threshold, str) else None
    limit = None if mode is not None or adaptive_threshold is None else jnp.asarray(adaptive_threshold)

    @jax.jit
    def count(q: Array, k: Array, log_fgate: Array, limit: Array | None) -> list[Array]:
        rule: Threshold = limit if mode is None else mode
        share = _counter(q, k, log_fgate, rule, log_pruning_tolerance, None)
        known = None
        if mode == "tight":
            # Backward passes know the log-normaliser, which the tight rule uses.
            _, lse = forgetting_attention(
                q, k, k, log_fgate, adaptive_threshold="tight", return_lse=True,
                log_pruning_tolerance=log_pruning_tolerance, tiles=tiles, implementation=implementation,
            )  # fmt: skip
            known = lse.swapaxes(1, 2)
        return [
            share(tiles.forward, column_tiles, 0, None),
            share(tiles.backward_kv, row_tiles, 1, known),
            share(tiles.backward_q, column_tiles, 0, known),
        ]

    return Visits(*(float(np.mean(share)) for share in count(q, k, log_fgate, limit)))


def _counter(
    q: Array,
    k: Array,
    log_fgate: Array,
    rule: Threshold,
    log_eps: float,
    seq_start: Array | None,
) -> Callable[[Tile, Any, int, Array | None], Array]:
    """share(tile, ranges, side, lse) [B, N]: visited tiles of a pass over those it would visit unpruned."""
    keys, scale = k.shape[1], q.shape[3] ** -0.5
    mode, limit = (rule, None) if isinstance(rule, str) else (None, rule)
    tight = log_eps - float(np.log(keys)) if mode == "tight" else None
    if mode == "auto":
        live = without_dead(q, k, seq_start, None)
        limit = acp_threshold(*live, sm_scale=scale, num_keys=keys, log_pruning_tolerance=log_eps)
    if limit is not None:
        limit = jnp.broadcast_to(limit, (q.shape[0], q.shape[2])).astype(jnp.float32)
    o, _ = attention_operands(
        q, k, k, log_fgate, seq_start=seq_start, segment_ids=None, kv_length=None, threshold=limit,
        options=Options(scale, tight, TileConfig()),  # every pass below brings its own
    )  # fmt: skip
    sides = (o.row_hi, o.col_hi, o.row_lo, o.col_lo)
    decay = Decay(*(x.swapaxes(1, 2) for x in sides if x is not None))

    def share(tile: Tile, ranges: Any, side: int, lse: Array | None) -> Array:
        def visited(kept: Array | None) -> Array:
            found: TileRange = ranges(o.first, o.last, o.head_first, kept, tile, keys)
            return (found.end - found.begin).sum(axis=-1)

        pruned = pruned_tiles(decay, o.threshold, o.norms, tight, tile, lse)
        return visited(None if pruned is None else pruned[side]) / jnp.maximum(visited(None), 1)

    return share
