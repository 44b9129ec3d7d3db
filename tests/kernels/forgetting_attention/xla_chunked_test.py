"""What only the memory-linear implementation promises: memory, shard_map, packing, precision at long
context.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.forgetting_attention import TileConfig, benchmark, forgetting_attention
from kernels.forgetting_attention.workloads import gates

TILES = TileConfig((16, 16), (16, 16), (16, 16))


def arrays(seed: int, length: int, heads: int = 2, batch: int = 1, head_dim: int = 16) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    qkv = [rng.standard_normal((batch, length, heads, head_dim)) for _ in range(3)]
    return [jnp.asarray(x, jnp.float32) for x in (*qkv, gates("mixed", rng, (batch, length, heads)))]


def test_no_array_has_two_sequence_axes() -> None:
    length = 1536
    q, k, v, log_fgate = arrays(0, length)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, log_fgate: jax.Array, implementation: str) -> tuple:
        def loss(*args: jax.Array) -> jax.Array:
            return forgetting_attention(*args, adaptive_threshold="auto", implementation=implementation).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, log_fgate)

    def quadratic_arrays(implementation: str) -> list[str]:
        compiled = jax.jit(both, static_argnums=4).lower(q, k, v, log_fgate, implementation).compile()
        shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
        # Padding may lengthen an axis a little; a flattened pair of axes would be a huge one.
        big = [[int(n) for n in shape.split(",")] for shape in set(shapes)]
        return [str(s) for s in big if sum(n >= length for n in s) > 1 or max(s) >= length * length // 4]

    assert quadratic_arrays("xla_chunked") == []
    assert quadratic_arrays("reference"), "the check does not see the quadratic arrays of the reference"


@pytest.mark.slow
def test_packed_documents_equal_each_alone() -> None:
    lengths = (30, 1, 39)
    q, k, v, log_fgate = arrays(1, sum(lengths))
    ids = jnp.asarray(np.repeat([4, 7, 4], lengths))[None]
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(q.shape), jnp.float32)

    def pull(args: tuple, cotangent: jax.Array, **options: jax.Array) -> tuple:
        @jax.jit
        def both(*args: jax.Array) -> tuple:
            out, pullback = jax.vjp(lambda *a: forgetting_attention(*a, tiles=TILES, **options), *args)
            return out, *pullback(cotangent)

        return both(*args)

    packed = pull((q, k, v, log_fgate), cotangent, segment_ids=ids)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = pull(tuple(x[:, part] for x in (q, k, v, log_fgate)), cotangent[:, part])
        for a, b in zip(packed, alone, strict=True):
            # The gradient of a gate is a sum over its segment, added in another order: a few ulps of 4.
            np.testing.assert_allclose(a[:, part], b, rtol=0, atol=4e-6)
        np.testing.assert_array_equal(packed[4][:, begin], 0)
        begin += length


def test_first_gate_of_a_segment_may_be_anything() -> None:
    q, k, v, log_fgate = arrays(2, 40)
    ids = jnp.asarray(np.repeat([0, 1], 20))[None]
    closed = log_fgate.at[:, [0, 20]].set(-jnp.inf)
    run = jax.jit(lambda g: forgetting_attention(q, k, v, g, segment_ids=ids, tiles=TILES))
    np.testing.assert_array_equal(run(closed), run(log_fgate))


@pytest.mark.parametrize("pruning", [None, -3.0])
def test_heads_together_equal_heads_alone(pruning: float | None) -> None:
    args = arrays(3, 90, heads=4, batch=2)
    alone, together = (
        forgetting_attention(
            *args, adaptive_threshold=pruning, tiles=TileConfig((16, 16), (16, 16), (16, 16), heads_per_step)
        )
        for heads_per_step in (1, 8)
    )
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)


def test_long_context_matches_float64() -> None:
    """Fast gates at 16k tokens: the last rows against a float64 evaluation of their windows."""
    length, window = 16384, 256
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, length, 1, 16)).astype(np.float32) for _ in range(3))
    log_fgate = -np.logaddexp(0, 5 + rng.standard_normal((1, length, 1))).astype(np.float32)
    out = forgetting_attention(
        jnp.asarray(q[:, -4:]), *(jnp.asarray(x) for x in (k, v, log_fgate)), adaptive_threshold=-200.0
    )
    decay = np.cumsum(log_fgate[0, -window:, 0].astype(np.float64))
    scores = q[0, -4:, 0].astype(np.float64) @ k[0, -window:, 0].T.astype(np.float64) / 4
    scores += decay[-4:, None] - decay
    scores[np.arange(window) > np.arange(window - 4, window)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = weights / weights.sum(axis=1, keepdims=True) @ v[0, -window:, 0]
    # lambda is about -8e4 here: a plain float32 sum would be off by 8e-3 in the exponent.
    np.testing.assert_allclose(out[0, :, 0], wanted, rtol=0, atol=2e-6)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from kernels.forgetting_attention import TileConfig, attend_partial, forgetting_attention

mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
jax.set_mesh(mesh)
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((8, 40, 2, 8)), jnp.float32) for _ in range(3))
log_fgate = jnp.asarray(-rng.random((8, 40, 2)), jnp.float32)
start = jnp.asarray(rng.integers(0, 20, 8), jnp.int32)
tiles = TileConfig((16, 16), (16, 16), (16, 16))
batch = jax.P(("data", "fsdp"))
scale = jnp.float32(1.5)

def local(q, k, v, g, start, scale):
    out = forgetting_attention(q * scale, k, v, g, seq_start=start, adaptive_threshold=MODE, tiles=tiles)
    row = jnp.cumsum(g, axis=1)
    part, lse = attend_partial(q, k, v, row, -row, causal=True, tiles=tiles)
    return out + part + jnp.where(jnp.isfinite(lse), lse, 0)[..., None]

def loss(f, *args):
    return jnp.sum(jnp.sin(f(*args)))

sharded = jax.shard_map(local, in_specs=(batch,) * 5 + (jax.P(),), out_specs=batch)
args = (q, k, v, log_fgate, start, scale)
placed = tuple(jax.reshard(x, batch) for x in args[:5]) + (scale,)
diff = (0, 1, 2, 3, 5)
plain = jax.jit(jax.value_and_grad(lambda *a: loss(local, *a), argnums=diff))(*args)
split = jax.jit(jax.value_and_grad(lambda *a: loss(sharded, *a), argnums=diff))(*placed)
for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(split)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)
print("equal on", len(jax.devices()), "devices")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["None", "'auto'"])
def test_inside_shard_map_with_varying_axes(run_python, mode: str) -> None:
    done = run_python("-c", SHARDED.replace("MODE", mode), devices=8, timeout=600)
    assert "equal on 8 devices" in done.stdout


@pytest.mark.timing
def test_pruning_pays_on_the_cpu() -> None:
    """At T = 8192: fast gates at least 4 times faster than without pruning, gates of mixed speed at most
    0.75 times.
    """
    found = benchmark.rows(calls=3)
    print(found)
    for row, allowed in zip(found, (1 / 4, 0.75), strict=True):
        assert row["ratio"] <= allowed, row
