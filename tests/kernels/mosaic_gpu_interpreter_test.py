"""The extended GPU interpret mode computes, and complains about, what the device would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.mosaic_gpu_interpreter import RaceError, extended_interpreter

F32 = jnp.float32
TILE = 64  # rows of a tile, and head dimension


def swizzled(
    rows: int, columns: int = TILE, dtype=jnp.bfloat16, swizzle: int = 128, slots: tuple[int, ...] = ()
):
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((*slots, rows, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def f32(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in arrays]


def two_products_kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, loaded):
    """init + a @ b + a @ b.T and a.T @ b, in two accumulators, `a` of the first product in registers."""
    plgpu.copy_gmem_to_smem(a_gmem, a_smem, loaded)
    plgpu.copy_gmem_to_smem(b_gmem, b_smem, loaded)
    plgpu.barrier_wait(loaded)
    a = plgpu.load(a_smem, layout=plgpu.Layout.WGMMA)
    init = plgpu.layout_cast(jnp.full((TILE, TILE), 2.0, F32), plgpu.Layout.WGMMA)

    def multiply(accumulators):
        first, second = accumulators
        plgpu.wgmma(first, a, b_smem)
        plgpu.wgmma(second, a_smem.transpose((1, 0)), b_smem)
        plgpu.wgmma(first, a_smem, b_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    first, second = pl.run_state(multiply)((plgpu.ACC.init(init), plgpu.ACC.init(jnp.zeros_like(init))))
    out_gmem[0] = first
    out_gmem[1] = second


def call_two_products(a: jax.Array, b: jax.Array) -> jax.Array:
    operand = swizzled(TILE, dtype=a.dtype)
    return plgpu.kernel(
        two_products_kernel,
        out_type=jax.ShapeDtypeStruct((2, TILE, TILE), F32),
        scratch_types=[operand, operand, plgpu.Barrier(num_arrivals=2)],
    )(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_two_accumulators_registers_and_transposes(dtype):
    a, b = normal(0, TILE, TILE, dtype=dtype), normal(1, TILE, TILE, dtype=dtype)
    with extended_interpreter():
        out = call_two_products(a, b)
    a, b = f32(a, b)
    np.testing.assert_allclose(out, [2 + a @ b + a @ b.T, a.T @ b], atol=1e-4)


def test_the_stock_interpreter_cannot():
    a = normal(0, TILE, TILE)
    with plgpu.force_gpu_interpret_mode(), pytest.raises(Exception, match="wgmma"):
        call_two_products(a, a)


def attention_kernel(
    q, k, v, ranges, out, q_smem, k_smem, v_smem, q_full, full, free, *, releases_early=False
):
    """Two consumer warpgroups and a producer; key tiles ranges[head, query tile] to the next, in a ring of two."""
    head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
    start, stop = ranges[head, tile], ranges[head, tile + 1]

    @pl.when(wg == 2)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(start, stop)
        def _load(step):
            slot = lax.rem(step - start, 2)
            pl.when(step - start >= 2)(lambda: plgpu.barrier_wait(free.at[slot]))
            rows = pl.ds(step * TILE, TILE)
            plgpu.copy_gmem_to_smem(k.at[head, rows], k_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(v.at[head, rows], v_smem.at[slot], full.at[slot])

        @pl.loop(jnp.maximum(stop - 2, start), stop)
        def _drain(step):
            plgpu.barrier_wait(free.at[lax.rem(step - start, 2)])

    @pl.when(wg < 2)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds((tile * 2 + wg) * TILE, TILE)
        plgpu.copy_gmem_to_smem(q.at[head, rows], q_smem.at[wg], q_full.at[wg])
        plgpu.barrier_wait(q_full.at[wg])

        def step_forward(step, carry):
            acc, top, total = carry
            slot = lax.rem(step - start, 2)
            plgpu.barrier_wait(full.at[slot])

            def scores(ref):
                plgpu.wgmma(ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                return ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((TILE, TILE), F32))
            new_top = jnp.maximum(top, s.max(axis=1))
            alpha = jnp.exp(top - new_top)
            p = jnp.exp(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])

            def weigh(ref):
                plgpu.wgmma(ref, p.astype(v.dtype), v_smem.at[slot])
                if releases_early:
                    plgpu.barrier_arrive(free.at[slot])
                plgpu.wgmma_wait(0)

            acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
            if not releases_early:
                plgpu.barrier_arrive(free.at[slot])
            return acc, new_top, total * alpha + p.sum(axis=1)

        acc = plgpu.layout_cast(jnp.zeros((TILE, TILE), F32), plgpu.Layout.WGMMA)
        row = plgpu.layout_cast(jnp.zeros(TILE, F32), plgpu.Layout.WGMMA.reduce(1))
        acc, _, total = lax.fori_loop(start, stop, step_forward, (acc, row - 1e30, row))
        acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
        q_smem[wg] = acc.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], out.at[head, rows])
        plgpu.wait_smem_to_gmem(0)


def call_attention(q, k, v, ranges, **options) -> jax.Array:
    ring = swizzled(TILE, dtype=q.dtype, slots=(2,))
    barriers = [
        plgpu.Barrier(num_arrivals=1, num_barriers=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
    ]
    return plgpu.kernel(
        functools.partial(attention_kernel, **options),
        out_type=q,
        scratch_types=[ring, ring, ring, *barriers],
        grid=(q.shape[0], q.shape[1] // (2 * TILE)),
        grid_names=("head", "tile"),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, ranges)


def test_flash_attention_over_a_range_of_tiles():
    q, k, v = (normal(seed, 1, 256, TILE) for seed in range(3))
    ranges = jnp.array([[0, 3, 4]], jnp.int32)
    with extended_interpreter():
        out = call_attention(q, k, v, ranges)
    q, k, v = f32(q, k, v)
    for rows, keys in ((slice(0, 128), slice(0, 192)), (slice(128, 256), slice(192, 256))):
        p = np.exp(q[0, rows] @ k[0, keys].T)
        want = p / p.sum(axis=1, keepdims=True) @ v[0, keys]
        np.testing.assert_allclose(np.float32(out[0, rows]), want, atol=2e-2)


def test_a_slot_released_before_the_wgmma_is_awaited_is_a_race():
    q, k, v = (normal(seed, 1, 128, TILE) for seed in range(3))
    k, v = (jnp.concatenate([x, x], axis=1) for x in (k, v))
    with pytest.raises(RaceError, match="read of"), extended_interpreter():
        call_attention(q, k, v, jnp.array([[0, 4]], jnp.int32), releases_early=True)
