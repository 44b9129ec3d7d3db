"""Forgetting attention as its definition, O(T*S) in time and memory: the meaning of "right" for every
implementation.

Everything is computed in the dtype of the inputs (at least float32), so float64 inputs give float64
results. Without pruning the gradients come from automatic differentiation; with pruning, whose tiles differ
between the passes, the backward pass is written out (see `_pruned_softmax`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.forgetting_attention.config import Options, Request, Tile, TileConfig
from kernels.forgetting_attention.spans import KeySpans


def supports(request: Request) -> str | None:
    """Takes everything."""
    return None


def default_tiles(request: Request) -> TileConfig:
    """Tiles only matter with pruning."""
    return TileConfig()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    log_fgate: Float[Array, "B S N"],
    *,
    seq_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B S"] | None,
    kv_length: Int[Array, " B"] | None,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Forgetting Transformer (arXiv 2503.02130) eq. 10: softmax(scale q k^T + D) v with D_ij = sum of log f
    over (j, i].

    Args:
      q, k, v, log_fgate, seq_start, segment_ids, kv_length: as in the public function.
      threshold: tiles whose largest D is below it are pruned (ACP, arXiv 2504.06949 section 3); None prunes
        nothing.
      options: scale, the "tight" rule (excludes `threshold`), and which tiles are pruned together.

    Returns:
      (out, lse): lse is the natural-log normaliser, -inf on rows that see no key.
    """
    batch, rows = q.shape[:2]
    columns = jnp.arange(k.shape[1])
    length = jnp.full((batch,), k.shape[1]) if kv_length is None else kv_length
    first = jnp.zeros((batch,), int) if seq_start is None else seq_start
    row_at = length[:, None] - rows + jnp.arange(rows)
    row_at_clipped = jnp.clip(row_at, 0, k.shape[1] - 1)
    ids = jnp.zeros(k.shape[:2], int) if segment_ids is None else segment_ids
    new_run = jnp.concatenate([jnp.ones((batch, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    new_run |= columns == first[:, None]
    run = jnp.cumsum(new_run, axis=1)
    live = (columns >= first[:, None]) & (columns < length[:, None])

    visible = (columns <= row_at[:, :, None]) & live[:, None, :]
    visible &= jnp.take_along_axis(run, row_at_clipped, axis=1)[:, :, None] == run[:, None, :]

    # The gate of a run's first key decays nothing inside the run, so it is switched off with the dead
    # columns.
    silent = new_run if options.zero_first_gate else new_run & (columns > 0)
    gates = jnp.where((live & ~silent)[:, :, None], log_fgate, 0)
    decay = jnp.cumsum(gates, axis=1)
    # Only differences inside a run count, so nothing before a run may get a gradient from it. Passes that
    # prune different tiles would leave some: take the sum before the run out of the gradient, not the value.
    run_start = jax.lax.cummax(jnp.where(new_run, columns, 0), axis=1)
    before = jnp.take_along_axis(decay - gates, run_start[:, :, None], axis=1)
    decay = decay - (before - jax.lax.stop_gradient(before))
    row_decay = jnp.take_along_axis(decay, row_at_clipped[:, :, None], axis=1)
    return _attend(
        q, k, v, row_decay, -decay, visible, threshold=threshold, self_column=row_at_clipped, options=options
    )  # fmt: skip


def partial(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    row_decay: Float[Array, "B T N"],
    col_decay: Float[Array, "B S N"],
    *,
    spans: KeySpans,
    threshold: Float[Array, "B N"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention of any rows to any columns with D_ij = row_decay_i + col_decay_j, where `spans` allows it."""
    visible = spans.visible(k.shape[1])
    return _attend(
        q, k, v, row_decay, col_decay, visible, threshold=threshold, self_column=None, options=options
    )  # fmt: skip


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    row_decay: Float[Array, "B T N"],
    col_decay: Float[Array, "B S N"],
    visible: Bool[Array, "B T S"] | Bool[Array, "B N T S"],
    *,
    threshold: Float[Array, "B N"] | None,
    self_column: Int[Array, "B T"] | None,
    options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention where `visible`, with D_ij = row_decay_i + col_decay_j.

    Args:
      self_column: column of each row's own key; only the "tight" rule needs it.

    Returns:
      (out, lse), as `forgetting_attention`; out in q's dtype.
    """
    sm_scale, tight_log_eps, tiles = options.sm_scale, options.tight_log_eps, options.tiles
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    visible = visible[:, None] if visible.ndim == 3 else visible
    visible = jnp.broadcast_to(visible, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    # Rows and columns that take no part may hold anything, NaN included: 0 * NaN must not reach the result.
    used_row = visible.any(axis=(1, 3))[:, :, None, None]
    used_column = visible.any(axis=(1, 2))[:, :, None, None]
    group = q.shape[2] // k.shape[2]
    q_h = jnp.where(used_row, q, 0).astype(dtype).swapaxes(1, 2)
    k_h = jnp.repeat(jnp.where(used_column, k, 0).astype(dtype), group, axis=2).swapaxes(1, 2)
    v_h = jnp.repeat(jnp.where(used_column, v, 0).astype(dtype), group, axis=2).swapaxes(1, 2)
    row = row_decay.astype(dtype).swapaxes(1, 2)
    col = col_decay.astype(dtype).swapaxes(1, 2)

    if threshold is None and tight_log_eps is None:
        out, lse = _softmax(q_h, k_h, v_h, row, col, visible, sm_scale)
    else:
        directions = ((tiles.forward, "q"), (tiles.backward_kv, "kv"), (tiles.backward_q, "q"))
        if threshold is not None:
            rules = [kept_by_threshold(row, col, threshold, tile) for tile, _ in directions]
        else:
            assert tight_log_eps is not None
            assert self_column is not None
            constants = jax.lax.stop_gradient((q_h, k_h, row, col))
            bound = functools.partial(kept_by_tile_bound, *constants, sm_scale, tight_log_eps)
            own_score = _own_scores(*constants[:2], used_row[:, :, 0, 0], self_column, sm_scale)
            kept = bound(own_score, *directions[0])
            # The backward passes know the log-normaliser of what the forward pass kept.
            _, lse = _softmax(*constants[:2], v_h, *constants[2:], visible & kept, sm_scale)
            known = jax.lax.stop_gradient(jnp.where(lse > -jnp.inf, lse, jnp.inf))
            rules = [kept, *(bound(known, *direction) for direction in directions[1:])]
        out, lse = _pruned_softmax(q_h, k_h, v_h, row, col, visible, *rules, sm_scale)
    return out.swapaxes(1, 2).astype(q.dtype), lse.swapaxes(1, 2)


def kept_by_threshold(
    row: Float[Array, "B N T"], col: Float[Array, "B N S"], threshold: Float[Array, "B N"], tile: Tile
) -> Bool[Array, "B N T S"]:
    """ACP's rule: a tile is kept unless its largest D, at its first row and last column, is below the
    threshold.
    """
    first_row = jnp.arange(row.shape[2]) // tile[0] * tile[0]
    last_col = jnp.minimum(jnp.arange(col.shape[2]) // tile[1] * tile[1] + tile[1], col.shape[2]) - 1
    return row[:, :, first_row, None] + col[:, :, None, last_col] >= threshold[:, :, None, None]


def kept_by_tile_bound(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"],
    row: Float[Array, "B N T"],
    col: Float[Array, "B N S"],
    sm_scale: float,
    log_eps: float,
    normaliser: Float[Array, "B N T"],
    tile: Tile,
    direction: str,
) -> Bool[Array, "B N T S"]:
    """The "tight" rule: prune a tile if the norms inside it bound each weight by eps / keys; then fill gaps.

    `normaliser` is at most each row's log-normaliser: its score with its own key, or the log-normaliser
    itself; +inf on dead rows.
    Tiles pruned by the bound need not form a prefix. For direction "q" every column tile after the first
    kept one is kept; for "kv" every row tile before the last kept one.
    """
    tiles_n = (-(-row.shape[2] // tile[0]), -(-col.shape[2] // tile[1]))
    row_tile, col_tile = jnp.arange(row.shape[2]) // tile[0], jnp.arange(col.shape[2]) // tile[1]
    reach = row - row[:, :, row_tile * tile[0]] - normaliser
    first_row = jnp.arange(tiles_n[0]) * tile[0]
    last_col = jnp.minimum(jnp.arange(1, tiles_n[1] + 1) * tile[1], col.shape[2]) - 1

    def tile_max(values: Array, index: Array, count: int) -> Array:
        return jax.vmap(jax.vmap(lambda one: jax.ops.segment_max(one, index, count)))(values)

    q_norm = tile_max(jnp.linalg.norm(q, axis=-1), row_tile, tiles_n[0])
    k_norm = tile_max(jnp.linalg.norm(k, axis=-1), col_tile, tiles_n[1])
    gap = row[:, :, first_row, None] + col[:, :, None, last_col]
    bound = abs(sm_scale) * q_norm[..., None] * k_norm[..., None, :]
    bound += tile_max(reach, row_tile, tiles_n[0])[..., None] + gap
    kept = bound >= log_eps
    axis, reverse = (3, False) if direction == "q" else (2, True)
    kept = jax.lax.cummax(kept.astype(jnp.int32), axis=axis, reverse=reverse).astype(bool)
    return kept[:, :, row_tile][:, :, :, col_tile]


def _own_scores(q: Array, k: Array, live: Array, self_column: Array, sm_scale: float) -> Array:
    """Score of every row with its own key, +inf on dead rows."""
    own = jnp.take_along_axis(k, self_column[:, None, :, None], axis=2)
    return jnp.where(live[:, None], sm_scale * jnp.sum(q * own, axis=-1), jnp.inf)


def _scores(q: Array, k: Array, row: Array, col: Array, visible: Array, sm_scale: float) -> Array:
    """Decayed scores, -inf where invisible; D above the diagonal may be huge: it is selected away first."""
    decay = jnp.where(visible, row[..., :, None] + col[..., None, :], 0)
    scores = sm_scale * jnp.einsum("bnth,bnsh->bnts", q, k) + decay
    return jnp.where(visible, scores, -jnp.inf)


def _softmax(
    q: Array, k: Array, v: Array, row: Array, col: Array, visible: Array, sm_scale: float
) -> tuple[Array, Array]:
    scores = _scores(q, k, row, col, visible, sm_scale)
    alive = visible.any(axis=-1)
    top = jax.lax.stop_gradient(jnp.where(alive, scores.max(axis=-1), 0))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, 0) - top[..., None]), 0)
    total = jnp.where(alive, weights.sum(axis=-1), 1)
    out = jnp.einsum("bnts,bnsh->bnth", weights / total[..., None], v)
    return out, jnp.where(alive, top + jnp.log(total), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _pruned_softmax(
    q: Array, k: Array, v: Array, row: Array, col: Array, visible: Array,
    kept: Array, kept_kv: Array, kept_q: Array, sm_scale: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax over kept entries; its gradients use the normaliser of `kept` but the entries each pass
    keeps.
    """
    return _softmax(q, k, v, row, col, visible & kept, sm_scale)


def _pruned_softmax_fwd(
    q: Array, k: Array, v: Array, row: Array, col: Array, visible: Array,
    kept: Array, kept_kv: Array, kept_q: Array, sm_scale: float,
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:  # fmt: skip
    out, lse = _softmax(q, k, v, row, col, visible & kept, sm_scale)
    return (out, lse), (q, k, v, row, col, visible & kept_kv, visible & kept_q, out, lse)


def _pruned_softmax_bwd(
    sm_scale: float, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, row, col, entries_kv, entries_q, out, lse = saved
    d_out, d_lse = cotangents
    alive = jnp.isfinite(lse)
    norm = jnp.where(alive, lse, 0)[..., None]
    # delta folds the gradient of lse in: dS = P (dP - rowsum(O dO) + dlse).
    delta = (jnp.sum(d_out * out, axis=-1) - jnp.where(alive, d_lse, 0))[..., None]
    d_weights = jnp.einsum("bnth,bnsh->bnts", d_out, v)

    def weights_over(entries: Array) -> tuple[Array, Array]:
        scores = _scores(q, k, row, col, entries & alive[..., None], sm_scale)
        weights = jnp.exp(scores - norm)
        return weights, weights * (d_weights - delta)

    weights, d_scores = weights_over(entries_kv)
    d_v = jnp.einsum("bnts,bnth->bnsh", weights, d_out)
    d_k = sm_scale * jnp.einsum("bnts,bnth->bnsh", d_scores, q)
    d_col = d_scores.sum(axis=2)
    _, d_scores = weights_over(entries_q)
    d_q = sm_scale * jnp.einsum("bnts,bnsh->bnth", d_scores, k)
    return d_q, d_k, d_v, d_scores.sum(axis=3), d_col, None, None, None, None


_pruned_softmax.defvjp(_pruned_softmax_fwd, _pruned_softmax_bwd)
