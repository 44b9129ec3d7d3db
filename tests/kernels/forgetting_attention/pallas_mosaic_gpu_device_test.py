"""What the kernel contract does not ask of the Hopper kernels, on such a GPU: partial attention, skipping
tiles, long context.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import (
    TileConfig,
    attend_partial,
    explain,
    forgetting_attention,
    gate_sums,
    merge_partials,
)
from kernels.forgetting_attention.visits import own_tiles
from tests.contracts.kernel_contract import TOLERANCE, assert_close

pytestmark = pytest.mark.gpu

NAME = "pallas_mosaic_gpu"
BATCH, PAST, CHUNK, HEADS, KV_HEADS, HEAD_DIM = 2, 400, 230, 4, 2, 64


def draw(
    seed: int, queries: int, keys: int, *, batch: int = BATCH, heads: int = HEADS, kv_heads: int = KV_HEADS
) -> tuple[jax.Array, ...]:
    """q, k, v in bfloat16 and float32 log gates from -1 to 0."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, HEAD_DIM))
    k, v = (rng.standard_normal((batch, keys, kv_heads, HEAD_DIM)) for _ in range(2))
    gates = -rng.random((batch, keys, heads)) * np.geomspace(1, 1e-3, heads)
    return (*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(gates, jnp.float32))


def with_gradients(function: Any, args: tuple[jax.Array, ...], rounded: Any = None) -> list[jax.Array]:
    """(out, lse) and the gradients of all arguments, for cotangents rounded to the dtypes of `rounded`."""

    def both(*args: jax.Array) -> list[jax.Array]:
        outputs, pullback = jax.vjp(function, *args)
        rng = np.random.default_rng(1)
        cotangents = [
            rng.standard_normal(o.shape).astype(r.dtype)
            for o, r in zip(outputs, rounded or outputs, strict=True)
        ]
        pulled = pullback(tuple(jnp.asarray(c, o.dtype) for c, o in zip(cotangents, outputs, strict=True)))
        return [*outputs, *pulled]

    return jax.jit(both)(*args)


def in_float64(function: Any, args: tuple[jax.Array, ...], like: list[jax.Array]) -> list[np.ndarray]:
    """The same of `function` on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        exact = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in args)
        return [np.asarray(x) for x in with_gradients(function, exact, like[:2])]


def in_two(
    q: jax.Array, k: jax.Array, v: jax.Array, log_fgate: jax.Array, first_key: np.ndarray | None
) -> tuple[jax.Array, jax.Array]:
    """Past keys in a buffer with unused places, then the chunk, relative to the last past key."""
    hi, lo = gate_sums(log_fgate)
    decay = (hi - hi[:, PAST - 1 : PAST]) + (lo - lo[:, PAST - 1 : PAST])

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, :PAST], [(0, 0), (0, 77)] + [(0, 0)] * (x.ndim - 2), constant_values=jnp.nan)

    buffer = (pad(k), pad(v), decay[:, PAST:], pad(-decay))
    filled = jnp.full((BATCH,), PAST)
    first_key = None if first_key is None else jnp.asarray(first_key)
    past = attend_partial(q, *buffer, kv_length=filled, first_key=first_key, implementation=NAME)
    chunk = (k[:, PAST:], v[:, PAST:], decay[:, PAST:], -decay[:, PAST:])
    return merge_partials(past, attend_partial(q, *chunk, causal=True, implementation=NAME))


@pytest.mark.parametrize("seq_start", [None, (0, PAST)])
def test_two_partials_equal_the_whole(seq_start: tuple[int, int] | None) -> None:
    """Entry 1 of the second case sees no past key at all."""
    args = draw(0, CHUNK, PAST + CHUNK)
    first_key = None if seq_start is None else np.repeat(np.asarray(seq_start, np.int32)[:, None], HEADS, 1)
    start = None if seq_start is None else np.asarray(seq_start, np.int32)

    def whole(*args: jax.Array) -> Any:
        begin = None if start is None else jnp.asarray(start)
        return forgetting_attention(*args, seq_start=begin, return_lse=True, implementation="reference")

    parts = with_gradients(lambda *args: in_two(*args, first_key), args)
    assert_close(parts, in_float64(whole, args, parts), TOLERANCE["bfloat16"])


def partial_options(kind: str) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    keys = PAST + CHUNK
    return {
        "causal_offset": {"causal": True, "query_offset": np.asarray([-50, 300], np.int32)},
        "heads_start_apart": {"first_key": rng.integers(0, keys, (BATCH, HEADS)).astype(np.int32)},
        "padded_buffer": {
            "kv_length": np.asarray([0, 500], np.int32), "seq_start": np.asarray([0, 70], np.int32),
        },
        "segments": {
            "segment_ids": np.sort(rng.integers(0, 4, (BATCH, keys)), axis=1).astype(np.int32),
            "query_segment_ids": np.sort(rng.integers(0, 6, (BATCH, CHUNK)), axis=1).astype(np.int32),
            "kv_length": np.asarray([600, keys], np.int32),
        },
        "pruned": {"causal": True, "adaptive_threshold": -2.0},
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["causal_offset", "heads_start_apart", "padded_buffer", "segments", "pruned"]
)
def test_options_of_partials_equal_reference(kind: str) -> None:
    q, k, v, log_fgate = draw(3, CHUNK, PAST + CHUNK)
    decay = np.cumsum(np.asarray(log_fgate, np.float64), axis=1)
    decay -= decay[:, PAST : PAST + 1]
    args = (q, k, v, jnp.asarray(decay[:, PAST:], jnp.float32), jnp.asarray(-decay, jnp.float32))
    options, tiles = partial_options(kind), own_tiles(q, k, NAME)[1]

    def run(implementation: str) -> Any:
        def partial(*args: jax.Array) -> Any:
            arrays = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
            return attend_partial(*args, **arrays, tiles=tiles, implementation=implementation)

        return partial

    ours = with_gradients(run(NAME), args)
    assert_close(ours, in_float64(run("reference"), args, ours), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("pruning", [-3.0, "auto", "tight"])
def test_pruned_tiles_are_not_read(pruning: float | str) -> None:
    """A gate shuts at key 300, and v is NaN before key 64: rows from 576 on and their dq do not meet it."""
    q, k, v, log_fgate = draw(4, 767, 767, batch=1)
    args = (q, k, v.at[:, :64].set(jnp.nan), log_fgate.at[:, 300].set(-300.0))

    def run(**options: Any) -> Any:
        def out(*args: jax.Array) -> jax.Array:
            return forgetting_attention(*args, implementation=NAME, **options)

        @jax.jit
        def both(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
            result, pullback = jax.vjp(out, *args)
            return result[:, 576:], pullback(jnp.ones_like(result))[0][:, 576:]

        return both(*args)

    for found in run(adaptive_threshold=pruning):
        assert jnp.isfinite(found).all()
    assert not jnp.isfinite(run()[0]).any(), "without pruning the NaN should have been met"


def test_long_context_matches_float64() -> None:
    """Fast gates at 64k tokens, lambda near -3e5: the last rows against float64 over their windows."""
    length, rows, window = 65536, 200, 512
    rng = np.random.default_rng(4)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, n, 1, HEAD_DIM)), jnp.float16) for n in (rows, length, length)
    )
    log_fgate = -np.logaddexp(0, 5 + rng.standard_normal((1, length, 1))).astype(np.float32)
    run = jax.jit(lambda *args: forgetting_attention(*args, implementation=NAME))
    out = run(q, k, v, jnp.asarray(log_fgate))
    decay = np.cumsum(log_fgate[0, -window:, 0].astype(np.float64))
    late_k, late_v = (np.asarray(x[0, -window:, 0], np.float64) for x in (k, v))
    scores = np.asarray(q[0, :, 0], np.float64) @ late_k.T / HEAD_DIM**0.5
    scores += decay[-rows:, None] - decay
    scores[np.arange(window) > np.arange(window - rows, window)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = weights / weights.sum(axis=1, keepdims=True) @ late_v
    np.testing.assert_allclose(np.asarray(out[0, :, 0], np.float64), wanted, rtol=0, atol=4e-3)


def test_automatic_choice_runs_it() -> None:
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    lines = [line.split() for line in explain(q, q).splitlines()]
    assert [NAME, "runs"] in lines
    assert ["xla_chunked", "could", "run"] in lines
    refused = explain(q, q, tiles=TileConfig((64, 64), (64, 64), (64, 64)))
    assert ["xla_chunked", "runs"] in [line.split() for line in refused.splitlines()]
