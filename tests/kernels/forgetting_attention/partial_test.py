"""attend_partial and merge_partials: two pieces equal the whole, in values and in every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import (
    TileConfig,
    attend_partial,
    forgetting_attention,
    gate_sums,
    merge_partials,
)

TILES = TileConfig((16, 16), (16, 16), (16, 16))
BATCH, PAST, CHUNK, HEADS = 2, 40, 23, 4


def inputs(seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    length = PAST + CHUNK
    q = rng.standard_normal((BATCH, CHUNK, HEADS, 8))
    k, v = (rng.standard_normal((BATCH, length, 2, 8)) for _ in range(2))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, -rng.random((BATCH, length, HEADS))))


def in_two(
    q: jax.Array, k: jax.Array, v: jax.Array, log_fgate: jax.Array, implementation: str,
    first_key: jax.Array | None, spare: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Past keys in a buffer with `spare` unused places, then the chunk, relative to the last past key."""
    hi, lo = gate_sums(log_fgate)
    decay = (hi - hi[:, PAST - 1 : PAST]) + (lo - lo[:, PAST - 1 : PAST])

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :PAST], [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2), constant_values=jnp.nan)

    common: dict[str, Any] = {"tiles": TILES, "implementation": implementation}
    filled = jnp.full((BATCH,), PAST)
    buffer = (pad(k), pad(v), decay[:, PAST:], pad(-decay))
    past = attend_partial(q, *buffer, kv_length=filled, first_key=first_key, **common)
    chunk = (k[:, PAST:], v[:, PAST:], decay[:, PAST:], -decay[:, PAST:])
    here = attend_partial(q, *chunk, causal=True, **common)
    return merge_partials(past, here)


@pytest.mark.parametrize("implementation", ["xla_chunked", "reference"])
@pytest.mark.parametrize("start", [None, pytest.param((0, 50), marks=pytest.mark.slow)])
def test_two_partials_equal_the_whole(implementation: str, start: tuple[int, int] | None) -> None:
    args = inputs()
    seq_start = None if start is None else jnp.asarray(start)
    first_key = None
    if start is not None:
        # Key 50 lies in the chunk: entry 1 sees no past key at all, and its first ten rows nothing but
        # themselves.
        first_key = jnp.asarray(start)[:, None] * jnp.ones((1, HEADS), jnp.int32)
        seq_start = jnp.asarray([0, PAST])
    rng = np.random.default_rng(1)
    cotangents = (
        jnp.asarray(rng.standard_normal((BATCH, CHUNK, HEADS, 8)), jnp.float32),
        jnp.asarray(rng.standard_normal((BATCH, CHUNK, HEADS)), jnp.float32),
    )

    @jax.jit
    def both(*args):
        whole, pull_whole = jax.vjp(
            lambda *a: forgetting_attention(*a, seq_start=seq_start, return_lse=True, tiles=TILES), *args
        )
        parts, pull_parts = jax.vjp(lambda *a: in_two(*a, implementation, first_key, 9), *args)
        return (whole, pull_whole(cotangents)), (parts, pull_parts(cotangents))

    whole, parts = both(*args)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def options_of(kind: str) -> dict:
    rng = np.random.default_rng(2)
    return {
        "causal_offset": {"causal": True, "query_offset": jnp.asarray([-5, 30])},
        "heads_start_apart": {"first_key": jnp.asarray(rng.integers(0, 63, (BATCH, HEADS)), jnp.int32)},
        "padded_buffer": {"kv_length": jnp.asarray([0, 50]), "seq_start": jnp.asarray([0, 7])},
        "segments": {
            "segment_ids": jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, 63)), axis=1)),
            "query_segment_ids": jnp.asarray(np.sort(rng.integers(0, 6, (BATCH, CHUNK)), axis=1)),
            "kv_length": jnp.asarray([60, 63]),
        },
        "pruned": {"causal": True, "adaptive_threshold": -2.0},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["causal_offset", "heads_start_apart", "padded_buffer", "segments", "pruned"]
)
def test_options_equal_reference(kind: str) -> None:
    q, k, v, log_fgate = inputs(3)
    decay = np.cumsum(np.asarray(log_fgate, np.float64), axis=1)
    decay -= decay[:, PAST : PAST + 1]
    args = (q, k, v, jnp.asarray(decay[:, PAST:], jnp.float32), jnp.asarray(-decay, jnp.float32))

    def both(implementation: str):
        def run(*args):
            fixed = {"tiles": TILES, "implementation": implementation, **options_of(kind)}
            (out, lse), pullback = jax.vjp(lambda *a: attend_partial(*a, **fixed), *args)
            return out, lse, pullback((jnp.cos(jnp.arange(out.size)).reshape(out.shape), jnp.ones_like(lse)))

        return jax.jit(run)(*args)

    ours, wanted = both("xla_chunked"), both("reference")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_merging_rows_that_see_nothing_gives_zero_without_nan() -> None:
    out, lse = jnp.ones((1, 2, 1, 4)), jnp.asarray([[[-jnp.inf], [0.5]]])

    def total(out: jax.Array, lse: jax.Array) -> jax.Array:
        merged, norm = merge_partials((out, lse), (out, lse))
        return merged.sum() + jnp.where(jnp.isfinite(norm), norm, 0).sum()

    merged, norm = merge_partials((out, lse), (out, lse))
    np.testing.assert_array_equal(merged[:, 0], 0)
    assert norm[0, 0, 0] == -jnp.inf
    np.testing.assert_allclose(norm[0, 1, 0], 0.5 + np.log(2), rtol=1e-6)
    for gradient in jax.grad(total, argnums=(0, 1))(out, lse):
        assert jnp.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 0], 0)


def test_merge_refuses_bad_input(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge_partials()
    one = (jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1)))
    with pytest.raises(ValueError, match="one shape"):
        merge_partials(one, (jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1))))
