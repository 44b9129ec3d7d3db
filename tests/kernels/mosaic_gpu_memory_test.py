"""Copies, loads, barriers and control flow of interpreted Pallas GPU kernels, and the rules between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.mosaic_gpu_interpreter import (
    extended_interpreter,
    gpu_interpreter,  # noqa: F401  a fixture
)

F32 = jnp.float32
TILE = 64


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def scale_kernel(x, rows, y, rows_out, x_smem, rows_smem, loaded):
    """y = 2 x and rows_out = 3 rows, in tiles of 64, of which the last may reach past the end."""
    here = pl.ds(lax.axis_index("tile") * TILE, TILE)
    plgpu.copy_gmem_to_smem(x.at[here], x_smem, loaded)
    plgpu.copy_gmem_to_smem(rows.at[here], rows_smem, loaded)
    plgpu.barrier_wait(loaded)
    x_smem[...] = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA) * 2
    rows_smem[...] = plgpu.load(rows_smem, layout=plgpu.Layout.WGMMA.reduce(1)) * 3
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, y.at[here], commit_group=False)
    plgpu.copy_smem_to_gmem(rows_smem, rows_out.at[here], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def call_scale(x, rows, transforms=()):
    length = x.shape[0]
    return plgpu.kernel(
        scale_kernel,
        out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, rows)],
        scratch_types=[
            plgpu.SMEM((TILE, TILE), x.dtype, transforms=transforms),
            plgpu.SMEM((TILE,), F32),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(pl.cdiv(length, TILE),),
        grid_names=("tile",),
    )(x, rows)


@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize(
    ("dtype", "swizzle"),
    [(F32, None), (jnp.bfloat16, 128), (jnp.float16, 128), (jnp.bfloat16, 64), (jnp.float16, 32)],
)
def test_copies_past_the_end_read_zeros_and_drop_writes(dtype, swizzle):
    transforms = ()
    if swizzle:
        transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    x, rows = normal(0, 152, TILE, dtype=dtype), normal(1, 152)
    y, rows_out = call_scale(x, rows, transforms)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_allclose(rows_out, 3 * rows, rtol=1e-6)


def past_the_end_kernel(x, sums, x_smem, loaded):
    """The sum of rows [128, 192) of x, of which only some, or none, exist."""
    plgpu.copy_gmem_to_smem(x.at[pl.ds(lax.axis_index("i") + 128, TILE)], x_smem, loaded)
    plgpu.barrier_wait(loaded)
    total = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).sum(axis=1)
    sums[...] = total


def call_past_the_end(x):
    return plgpu.kernel(
        past_the_end_kernel,
        out_type=jax.ShapeDtypeStruct((TILE,), F32),
        scratch_types=[plgpu.SMEM((TILE, TILE), F32), plgpu.Barrier()],
        grid=(1,),
        grid_names=("i",),
    )(x)


@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("length", [150, 128, 100])
def test_tiles_past_the_end_are_zero(length):
    x = jnp.ones((length, TILE), F32)
    sums = call_past_the_end(x)
    np.testing.assert_array_equal(sums, np.where(np.arange(128, 192) < length, float(TILE), 0))


def sums_kernel(x, bounds, out, bounds_smem, bounds_full):
    """out[b, h, row] = the sum of x[b, h, row, column] over bounds[0] <= column <= row + bounds[1]."""
    b, h, tile, wg = (lax.axis_index(name) for name in ("b", "h", "tile", "wg"))

    @pl.when(wg == 0)
    def _fetch():
        plgpu.copy_gmem_to_smem(bounds.at[b], bounds_smem, bounds_full)

    plgpu.barrier_wait(bounds_full)
    rows = pl.ds((tile * 2 + wg) * TILE, TILE)
    first, width = bounds_smem[0], bounds[b, 1]

    def scoped(x_smem, loaded):
        def add(state):
            step, total = state
            plgpu.copy_gmem_to_smem(x.at[b, h, rows, pl.ds(step * TILE, TILE)], x_smem.at[wg], loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            tile_shape = (TILE, TILE)
            column = plgpu.broadcasted_iota(jnp.int32, tile_shape, 1, layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, tile_shape, 0, layout=plgpu.Layout.WGMMA)
            column, row = column + step * TILE, row + (tile * 2 + wg) * TILE
            value = plgpu.load(x_smem.at[wg], layout=plgpu.Layout.WGMMA)
            value, column = lax.optimization_barrier((value, column))
            value = jnp.where((column >= first) & (column <= row + width), value, 0.0)
            return step + 1, total + lax.cond(step % 2 == 0, lambda: value, lambda: value * 1.0).sum(axis=1)

        zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), plgpu.Layout.WGMMA.reduce(1))
        steps = lax.div(first, TILE), lax.div(x.shape[3], TILE)
        _, total = lax.while_loop(lambda state: state[0] < steps[1], add, (steps[0], zeros))
        out[b, h, rows] = total

    barrier = plgpu.Barrier(num_arrivals=1, num_barriers=2)
    pl.run_scoped(scoped, plgpu.SMEM((2, TILE, TILE), F32), barrier, collective_axes="wg")


def call_sums(x, bounds):
    return plgpu.kernel(
        sums_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape[:3], F32),
        scratch_types=[plgpu.SMEM((4,), jnp.int32), plgpu.Barrier()],
        grid=(*x.shape[:2], x.shape[2] // (2 * TILE)),
        grid_names=("b", "h", "tile"),
        num_threads=2,
        thread_name="wg",
    )(x, bounds)


@pytest.mark.usefixtures("gpu_interpreter")
def test_loops_conditions_and_scalars():
    x, bounds = normal(0, 2, 1, 128, 192), jnp.array([[3, 5, 0, 0], [70, 64, 0, 0]], jnp.int32)
    out = call_sums(x, bounds)
    row, column = np.ogrid[:128, :192]
    for b, (first, width, *_) in enumerate(bounds):
        kept = (column >= first) & (column <= row + width)
        np.testing.assert_allclose(out[b], (x[b] * kept).sum(axis=2), atol=1e-4)


# Who may touch shared memory when.


def ring_kernel(x, out, x_smem, full, free, *, mistake):
    """Row sums of tiles that a producer brings, one after the other, into a single slot."""
    wg, tiles = lax.axis_index("wg"), x.shape[0] // TILE

    @pl.when(wg == 1)
    def _produce():
        @pl.loop(0, tiles)
        def _load(step):
            pl.when(step > 0)(lambda: plgpu.barrier_wait(free))
            plgpu.copy_gmem_to_smem(x.at[pl.ds(step * TILE, TILE)], x_smem, full)

    @pl.when(wg == 0)
    def _consume():
        @pl.loop(0, tiles)
        def _sum(step):
            if mistake != "does not wait":
                plgpu.barrier_wait(full)
            if mistake == "releases early":
                plgpu.barrier_arrive(free)
            value = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA.reduce(1))
            if mistake == "writes":
                x_smem[...] = value
            if mistake != "releases early":
                plgpu.barrier_arrive(free)
            out[pl.ds(step * TILE, TILE)] = value


def call_ring(x, mistake=None):
    return plgpu.kernel(
        functools.partial(ring_kernel, mistake=mistake),
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM((TILE,), F32), plgpu.Barrier(), plgpu.Barrier()],
        num_threads=2,
        thread_name="wg",
    )(x)


@pytest.mark.usefixtures("gpu_interpreter")
def test_a_slot_is_free_once_read():
    x = normal(0, 3 * TILE)
    np.testing.assert_array_equal(call_ring(x), x)


@pytest.mark.parametrize(
    ("mistake", "tiles"),
    [
        ("does not wait", 1),  # with more, barriers that nobody waits for are an error
        ("releases early", 3),
        ("writes", 3),  # and does not commit
    ],
)
def test_a_slot_that_two_may_use_at_once_is_a_race(mistake, tiles):
    with extended_interpreter(allow_races=True) as interpreter:
        call_ring(normal(0, tiles * TILE), mistake)
    assert any("RACE DETECTED" in report for report in interpreter.races)


def groups_kernel(x, out, x_smem, loaded, *, awaited):
    """Two stores in one group; their source is overwritten with at most `awaited` groups in flight."""
    plgpu.copy_gmem_to_smem(x, x_smem, loaded)
    plgpu.barrier_wait(loaded)
    for half in range(2):
        plgpu.copy_smem_to_gmem(x_smem.at[half], out.at[half], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(awaited, wait_read_only=True)
    x_smem[0] = plgpu.load(x_smem.at[1], layout=plgpu.Layout.WGMMA.reduce(1))
    plgpu.wait_smem_to_gmem(0)


@pytest.mark.parametrize("awaited", [0, 1])
def test_waiting_for_stores_counts_groups(awaited):
    x = normal(0, 2, TILE)
    with extended_interpreter(allow_races=True) as interpreter:
        out = plgpu.kernel(
            functools.partial(groups_kernel, awaited=awaited),
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types=[plgpu.SMEM(x.shape, F32), plgpu.Barrier()],
        )(x)
    np.testing.assert_array_equal(out, x)
    assert bool(interpreter.races) == (awaited == 1)


def test_barriers_left_undrained_must_be_the_last():
    def scope(x, smem, loaded):
        plgpu.copy_gmem_to_smem(x, smem, loaded)
        plgpu.barrier_wait(loaded)
        plgpu.copy_gmem_to_smem(x, smem, loaded)

    def body(x, out, *, scopes):
        for _ in range(scopes):
            pl.run_scoped(functools.partial(scope, x), plgpu.SMEM((TILE,), F32), plgpu.Barrier())

    def call(scopes):
        kernel = functools.partial(body, scopes=scopes)
        return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((TILE,), F32))(normal(0, TILE))

    with extended_interpreter(allow_races=True):
        call(1)
    with pytest.raises(ValueError, match="unobserved"), extended_interpreter(allow_races=True):
        call(2)
    with plgpu.force_gpu_interpret_mode(), pytest.raises(Exception, match="had only observed"):
        jax.block_until_ready(call(1))


@pytest.mark.usefixtures("gpu_interpreter")
def test_a_predicate_skips_a_store():
    def body(x, out, x_smem, loaded):
        plgpu.copy_gmem_to_smem(x, x_smem, loaded)
        plgpu.barrier_wait(loaded)
        for i in range(2):
            plgpu.copy_smem_to_gmem(x_smem, out.at[i], predicate=lax.axis_index("i") == i)
        plgpu.wait_smem_to_gmem(0)

    x = normal(0, TILE)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, TILE), F32),
        scratch_types=[plgpu.SMEM((TILE,), F32), plgpu.Barrier()],
        grid=(1,),
        grid_names=("i",),
    )(x)
    np.testing.assert_array_equal(out[0], x)
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("direction", ["in", "out"])
def test_copies_must_begin_where_the_device_can(direction):
    """The second row of 24 float32s is 96 bytes from the first: no place for TMA."""

    def body(x, out, rows_smem, loaded, *, begin):
        row = rows_smem.at[1, pl.ds(begin, 8)]
        if direction == "in":
            plgpu.copy_gmem_to_smem(x, row, loaded)
            plgpu.barrier_wait(loaded)
        else:
            plgpu.copy_smem_to_gmem(row, out)
            plgpu.wait_smem_to_gmem(0)

    def call(begin):
        return plgpu.kernel(
            functools.partial(body, begin=begin),
            out_type=jax.ShapeDtypeStruct((8,), F32),
            scratch_types=[plgpu.SMEM((2, 24), F32), plgpu.Barrier()],
        )(normal(0, 8))

    with extended_interpreter():
        call(begin=8)
    with pytest.raises(ValueError, match="byte 96 is no multiple of 128"), extended_interpreter():
        call(begin=0)


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (call_scale, [(152, TILE), (152,)]),
        (call_past_the_end, [(150, TILE)]),
        (call_ring, [(3 * TILE,)]),
    ],
)
def test_these_kernels_are_what_hopper_gets(call, shapes):
    args = [jax.ShapeDtypeStruct(shape, F32) for shape in shapes]
    export.export(jax.jit(call), platforms=["cuda"])(*args)
