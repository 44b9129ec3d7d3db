"""The extended GPU interpret mode computes, and complains about, what the device would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.mosaic_gpu_interpreter import (
    DeadlockError,
    RaceError,
    extended_interpreter,
    gpu_interpreter,  # noqa: F401  a fixture
)

F32 = jnp.float32
TILE = 64  # rows of a tile, and head dimension
WGMMA = plgpu.Layout.WGMMA


def swizzled(*shape: int, dtype=jnp.bfloat16, swizzle: int = 128):
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(tiling, plgpu.SwizzleTransform(swizzle)),  # type: ignore[abstract]
    )


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def f32(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in arrays]


# wgmma: accumulators with initial values, A in registers, transposes, several in flight.


def products_kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, loaded):
    plgpu.copy_gmem_to_smem(a_gmem, a_smem.at[0], loaded)
    plgpu.copy_gmem_to_smem(b_gmem, b_smem, loaded)
    plgpu.barrier_wait(loaded)
    a = plgpu.load(a_smem.at[0], layout=WGMMA)
    init = plgpu.layout_cast(jnp.full((TILE, TILE), 2.0, F32), WGMMA)

    def multiply(accumulators):
        first, second = accumulators
        plgpu.wgmma(first, a, b_smem)
        plgpu.wgmma(second, a_smem.at[0].transpose((1, 0)), b_smem)
        plgpu.wgmma(first, a_smem.at[0], b_smem.transpose((1, 0)))
        plgpu.wgmma_wait(1)
        plgpu.wgmma_wait(0)

    zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), F32), WGMMA)
    out_gmem[0], out_gmem[1] = pl.run_state(multiply)((plgpu.ACC.init(init), plgpu.ACC.init(zeros)))


def call_products(a, b, swizzle=128):
    operand = functools.partial(swizzled, dtype=a.dtype, swizzle=swizzle)
    return plgpu.kernel(
        products_kernel,
        out_type=jax.ShapeDtypeStruct((2, TILE, TILE), F32),
        scratch_types=[operand(1, TILE, TILE), operand(TILE, TILE), plgpu.Barrier(num_arrivals=2)],
    )(a, b)


@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize(
    ("dtype", "swizzle"), [(jnp.bfloat16, 128), (jnp.float16, 128), (jnp.bfloat16, 64), (jnp.float16, 32)]
)
def test_accumulators_registers_and_transposes(dtype, swizzle):
    a, b = normal(0, TILE, TILE, dtype=dtype), normal(1, TILE, TILE, dtype=dtype)
    out = call_products(a, b, swizzle)
    a, b = f32(a, b)
    np.testing.assert_allclose(out, [2 + a @ b + a @ b.T, a.T @ b], atol=1e-4)


def test_nothing_of_it_outlives_the_context():
    a = normal(0, TILE, TILE)
    with extended_interpreter():
        call_products(a, a)
    with plgpu.force_gpu_interpret_mode(), pytest.raises(Exception, match="wgmma"):
        call_products(a, a)


def asynchronous_kernel(x, out, x_smem, y_smem, loaded, *, stores, commits, awaits):
    """out = x @ y with y = 2 x written by hand, and the product read too early unless `awaits`."""
    plgpu.copy_gmem_to_smem(x, x_smem, loaded)
    plgpu.barrier_wait(loaded)
    y_smem[...] = plgpu.load(x_smem, layout=WGMMA) * 2
    if commits:
        plgpu.commit_smem()

    def multiply(acc):
        plgpu.wgmma(acc, x_smem, y_smem)
        if stores:
            y_smem[...] = plgpu.layout_cast(jnp.zeros((TILE, TILE), y_smem.dtype), WGMMA)
        early = plgpu.wgmma_accumulator_load(acc, wait_n=None)
        if awaits:
            return acc[...]
        plgpu.wgmma_wait(0)
        return early

    out[...] = pl.run_scoped(multiply, plgpu.ACC((TILE, TILE), F32))


def call_asynchronous(x, *, stores=False, commits=True, awaits=True):
    return plgpu.kernel(
        functools.partial(asynchronous_kernel, stores=stores, commits=commits, awaits=awaits),
        out_type=jax.ShapeDtypeStruct((TILE, TILE), F32),
        scratch_types=[swizzled(TILE, TILE), swizzled(TILE, TILE), plgpu.Barrier()],
    )(x)


def test_a_product_is_there_once_awaited():
    x = normal(0, TILE, TILE)
    with extended_interpreter():
        np.testing.assert_allclose(call_asynchronous(x), f32(x)[0] @ (2 * f32(x)[0]), atol=1e-4)
        np.testing.assert_array_equal(call_asynchronous(x, awaits=False), 0)


@pytest.mark.parametrize("mistake", [{"commits": False}, {"stores": True}])
def test_operands_of_wgmma_take_part_in_race_detection(mistake):
    with pytest.raises(RaceError, match="RACE DETECTED"), extended_interpreter():
        call_asynchronous(normal(0, TILE, TILE), **mistake)


def test_wgmmas_left_in_flight_are_an_error():
    def body(x, out, x_smem, loaded):
        plgpu.copy_gmem_to_smem(x, x_smem, loaded)
        plgpu.barrier_wait(loaded)
        pl.run_scoped(lambda acc: plgpu.wgmma(acc, x_smem, x_smem), plgpu.ACC((TILE, TILE), F32))

    with pytest.raises(ValueError, match="never awaited"), extended_interpreter():
        plgpu.kernel(body, out_type=normal(0, 8), scratch_types=[swizzled(TILE, TILE), plgpu.Barrier()])(
            normal(0, TILE, TILE)
        )


def test_an_accumulator_takes_a_new_value_only_between_products():
    def body(x, out, x_smem, loaded, *, awaits):
        plgpu.copy_gmem_to_smem(x, x_smem, loaded)
        plgpu.barrier_wait(loaded)

        def multiply(acc):
            plgpu.wgmma(acc, x_smem, x_smem)
            plgpu.wgmma_wait(0 if awaits else 1)
            acc[...] = plgpu.layout_cast(jnp.full((TILE, TILE), 3.0, F32), WGMMA)
            plgpu.wgmma(acc, x_smem, x_smem)
            return acc[...]

        out[...] = pl.run_scoped(multiply, plgpu.ACC((TILE, TILE), F32))

    def call(x, awaits):
        return plgpu.kernel(
            functools.partial(body, awaits=awaits),
            out_type=jax.ShapeDtypeStruct((TILE, TILE), F32),
            scratch_types=[swizzled(TILE, TILE), plgpu.Barrier()],
        )(x)

    x = normal(0, TILE, TILE)
    with extended_interpreter():
        np.testing.assert_allclose(call(x, awaits=True), 3 + f32(x)[0] @ f32(x)[0], atol=1e-4)
    with pytest.raises(ValueError, match="in flight"), extended_interpreter():
        call(x, awaits=False)


# Warp specialisation: two consumer warpgroups, a producer, a ring of two slots.


def attention_kernel(q, k, v, ranges, out, q_smem, k_smem, v_smem, q_full, full, free, *, drains, mistake):
    """Key tiles ranges[head, tile] up to ranges[head, tile + 1] for each tile of 128 queries."""
    head, tile, wg = lax.axis_index("head"), lax.axis_index("tile"), lax.axis_index("wg")
    start, stop = ranges[head, tile], ranges[head, tile + 1]

    @pl.when(wg == 2)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(start, stop)
        def _load(step):
            slot, rows = lax.rem(step - start, 2), pl.ds(step * TILE, TILE)
            pl.when(step - start >= 2)(lambda: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(k.at[head, rows], k_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(v.at[head, rows], v_smem.at[slot], full.at[slot])

        if drains:

            @pl.loop(jnp.maximum(stop - 2, start), stop)
            def _drain(step):
                plgpu.barrier_wait(free.at[lax.rem(step - start, 2)])

    def weigh(step, carry):
        acc, top, total = carry
        slot = lax.rem(step - start, 2)
        plgpu.barrier_wait(full.at[slot])

        def scores(ref):
            plgpu.wgmma(ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
            return ref[...]

        s = pl.run_scoped(scores, plgpu.ACC((TILE, TILE), F32))
        new_top = jnp.maximum(top, s.max(axis=1))
        p = jnp.exp(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        alpha = jnp.exp(top - new_top)

        def accumulate(ref):
            plgpu.wgmma(ref, p.astype(v.dtype), v_smem.at[slot])
            if mistake == "releases early":
                plgpu.barrier_arrive(free.at[slot])
            plgpu.wgmma_wait(0)

        acc = pl.run_state(accumulate)(plgpu.ACC.init(acc * lax.broadcast_in_dim(alpha, acc.shape, [0])))
        if mistake not in ("releases early", "keeps slots"):
            plgpu.barrier_arrive(free.at[slot])
        return acc, new_top, total * alpha + p.sum(axis=1)

    @pl.when(wg < 2)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds((tile * 2 + wg) * TILE, TILE)
        plgpu.copy_gmem_to_smem(q.at[head, rows], q_smem.at[wg], q_full.at[wg])
        plgpu.barrier_wait(q_full.at[wg])
        acc = plgpu.layout_cast(jnp.zeros((TILE, TILE), F32), WGMMA)
        row = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA.reduce(1))
        acc, _, total = lax.fori_loop(start, stop, weigh, (acc, row - 1e30, row))
        q_smem[wg] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], out.at[head, rows])
        plgpu.wait_smem_to_gmem(0)


def call_attention(q, k, v, ranges, *, drains=True, mistake=None):
    def pair(arrivals):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=2)

    return plgpu.kernel(
        functools.partial(attention_kernel, drains=drains, mistake=mistake),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[swizzled(2, TILE, TILE) for _ in range(3)] + [pair(1), pair(2), pair(2)],
        grid=(q.shape[0], q.shape[1] // (2 * TILE)),
        grid_names=("head", "tile"),
        num_threads=3,
        thread_name="wg",
    )(q, k, v, ranges)


def attention_inputs():
    return *(normal(seed, 1, 256, TILE) for seed in range(3)), jnp.array([[0, 3, 4]], jnp.int32)


@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("drains", [True, False])
def test_attention_over_a_range_of_tiles(drains):
    q, k, v, ranges = attention_inputs()
    out = call_attention(q, k, v, ranges, drains=drains)
    q, k, v, out = f32(q, k, v, out)
    for rows, keys in ((slice(0, 128), slice(0, 192)), (slice(128, 256), slice(192, 256))):
        p = np.exp(q[0, rows] @ k[0, keys].T)
        want = p / p.sum(axis=1, keepdims=True) @ v[0, keys]
        np.testing.assert_allclose(out[0, rows], want, atol=2e-2)


def test_these_kernels_are_what_hopper_gets():
    a = normal(0, TILE, TILE)
    for call, args in (
        (call_products, (a, a)),
        (call_asynchronous, (a,)),
        (call_attention, attention_inputs()),
    ):
        export.export(jax.jit(call), platforms=["cuda"])(*args)


def test_a_slot_released_before_the_wgmma_is_awaited_is_a_race():
    with pytest.raises(RaceError, match="write of"), extended_interpreter():
        call_attention(*attention_inputs(), mistake="releases early")


def test_a_deadlock_is_reported_at_once_and_leaves_no_state():
    with pytest.raises(DeadlockError, match=r"warpgroup 0(.|\n)*warpgroup 2"), extended_interpreter():
        call_attention(*attention_inputs(), mistake="keeps slots")
    test_a_product_is_there_once_awaited()


def test_an_endless_loop_runs_into_the_time_limit():
    def body(x, out):
        lax.while_loop(lambda _: x[0] == 0, lambda i: i + 1, jnp.int32(0))

    with pytest.raises(TimeoutError, match="after 2 seconds"), extended_interpreter(time_limit=2):
        plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((8,), F32))(jnp.zeros(8))
