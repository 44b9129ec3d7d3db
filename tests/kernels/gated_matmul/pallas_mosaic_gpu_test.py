"""The Hopper kernel: interpreted on the CPU with detection of races, and lowered for CUDA at real sizes.

The interpreter lets each CTA of a cluster load all of what the device has them share, so what one CTA writes
into the other's shared memory is seen on a device only (`pallas_mosaic_gpu_device_test.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.common.hopper_product import SHARED_BYTES
from kernels.gated_matmul import explain, gated_matmul
from kernels.gated_matmul import pallas_mosaic_gpu as kernel
from kernels.gated_matmul._mosaic_gpu_sm90 import DEPTH, Tile, make_plan
from kernels.gated_matmul.workloads import Workload
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

OP, NAME = "gated_matmul", "pallas_mosaic_gpu"
HOPPER = functools.partial(compiling_for, "gpu", "9.0", "NVIDIA H100", 132)
# Rounding of the result to 8 bits of mantissa, and the kernel's sums in another order.
ROUNDED = 2.0**-8
SHAPES = {
    # (cores, tile, call): more tiles than CTAs, rows beyond the last tile; slots that are filled again; a
    # cluster whose second CTA has no rows, tiles taken row by row; one step, fewer rows than a tile.
    "one_cta": (1, Tile(shared="nothing"), Workload((3, 43), 320, 128)),
    "pairs": (2, Tile(), Workload((300,), 192, 256)),
    "columns_first": (2, Tile(), Workload((290,), 64, 128)),
    "beside": (4, Tile(shared="x"), Workload((136,), 320, 512)),
    "few_rows": (4, None, Workload((2, 5), 64, 128)),
    "together": (1, Tile(shared="nothing", staggered=False), Workload((129,), 320, 128)),
    "three_warpgroups": (1, Tile(192, 64, shared="nothing"), Workload((200,), 320, 64)),
}


def in_float64(arrays: dict[str, jax.Array]) -> np.ndarray:
    return expected(OP, arrays, {})[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_without_races(shape: str) -> None:
    cores, tile, work = SHAPES[shape]
    dtype = "float16" if shape == "few_rows" else "bfloat16"
    arrays, _ = inputs(OP, work, dtype)
    run = jax.jit(functools.partial(kernel.gated_matmul, tile=tile))
    with compiling_for("gpu", "9.0", cores=cores), extended_interpreter(time_limit=300):
        found = np.asarray(run(**arrays), np.float64)
    assert_close([found], [in_float64(arrays)], ROUNDED)


def test_a_float32_bias_is_not_rounded() -> None:
    arrays, _ = inputs(OP, Workload((8,), 64, 128), "bfloat16")
    arrays["x"] *= 0
    arrays["bias"] = jnp.full_like(arrays["bias"], 1 + 2.0**-12, jnp.float32)
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = jax.jit(kernel.gated_matmul)(
            **{n: x.astype("float16") if n != "bias" else x for n, x in arrays.items()}
        )
    wanted = jax.nn.gelu(jnp.float32(1 + 2.0**-12)) * (1 + 2.0**-12)
    np.testing.assert_array_equal(found, np.full((8, 128), wanted.astype(jnp.float16)))


def test_gradients_are_those_of_xla() -> None:
    """And one axis is mapped: over x alone it joins the rows."""
    work = Workload((40,), 64, 128)
    arrays, options = inputs(OP, work, "bfloat16")
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = [np.asarray(x, np.float64) for x in compiled(OP, options, NAME)(arrays)]
    assert_close(found, expected(OP, arrays, options), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("same", [("kernel", "bias"), ("x",), ("bias",)])
def test_a_mapped_axis(same: tuple[str, ...]) -> None:
    """Of x alone: more rows. Of the matrix: one call after the other."""
    calls = [inputs(OP, Workload((5,), 64, 128), "bfloat16", seed=seed)[0] for seed in range(2)]
    stacked = {name: jnp.stack([arrays[name] for arrays in calls]) for name in calls[0]}
    args = {name: calls[0][name] if name in same else x for name, x in stacked.items()}
    axes = {name: None if name in same else 0 for name in args}
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = jax.jit(jax.vmap(lambda arrays: kernel.gated_matmul(**arrays), in_axes=(axes,)))(args)
    wanted = [in_float64({n: x if n in same else x[i] for n, x in args.items()}) for i in range(2)]
    assert_close([np.asarray(found, np.float64)], [np.stack(wanted)], ROUNDED)


@pytest.mark.parametrize("rows", [1280, 2048, 61440, 1274, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lowers_for_cuda(rows: int, dtype: str) -> None:
    shapes = ((1, 1, rows, 768), (768, 6144), (6144,))
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    run = jax.jit(functools.partial(gated_matmul, implementation=NAME))
    with HOPPER():
        program = export.export(run, platforms=["cuda"])(*args).mlir_module()
    assert program.count("custom_call @mosaic_gpu") == 1
    assert ("stablehlo.pad" in program) == bool(rows % 8), "rows are copied exactly where TMA needs it"


@pytest.mark.parametrize("tile", [Tile(192, 64), Tile(192, 128), Tile(128, 64), Tile(128, 128, "x", False)])
def test_other_tiles_lower(tile: Tile) -> None:
    args = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1280, 768), (768, 6144), (6144,))]
    with HOPPER():
        run = jax.jit(functools.partial(kernel.gated_matmul, tile=tile))
        program = export.export(run, platforms=["cuda"])(*args).mlir_module()
    assert "custom_call @mosaic_gpu" in program


@pytest.mark.parametrize("width", [64, 192, 768, 4096])
@pytest.mark.parametrize(
    "tile", [Tile(), Tile(shared="nothing"), Tile(128, 64), Tile(192, 64), Tile(192, 128)]
)
def test_plans_fit_shared_memory_and_cover_the_result(width: int, tile: Tile) -> None:
    for rows in (192, 256, 1280, 2048, 61440):
        for features in (128, 384, 3072):
            plan = make_plan(rows, width, features, 132, tile)
            assert plan.row_tiles * tile.cluster * tile.rows >= rows
            assert plan.column_tiles * tile.columns == features
            assert 1 <= plan.stages <= plan.steps == width // DEPTH
            assert plan.lead < plan.stages, "the first warpgroup would wait for the others, and they for it"
            assert plan.clusters * tile.cluster <= 132
            slot = (tile.rows + 2 * tile.columns) * DEPTH * 2
            assert plan.stages * slot + tile.rows * tile.columns * 2 + 8 * tile.columns <= SHARED_BYTES


def test_features_that_are_no_whole_tiles_are_refused() -> None:
    for tile, whole in ((Tile(), 128), (Tile(shared="x"), 256), (Tile(128, 64, shared="x"), 128)):
        assert make_plan(1280, 768, 2 * whole, 132, tile).tile == tile
        with pytest.raises(ValueError, match=rf"a multiple of {whole} features, not {3 * whole // 2}"):
            make_plan(1280, 768, 3 * whole // 2, 132, tile)


def test_the_default_has_four_slots() -> None:
    plan = make_plan(1280, 768, 3072, 132)
    assert (plan.stages, plan.lead, plan.clusters, plan.jobs) == (4, 2, 66, 120)


@pytest.mark.parametrize(
    ("rows", "features", "shared", "cost"),
    [
        (1280, 3072, "matrix", (2, 240)),
        (1288, 3072, "x", (2, 264)),  # sharing the matrix, 12 tiles of rows would take a third wave
        (2048, 3072, "matrix", (3, 384)),
        (61440, 3072, "matrix", (88, 11520)),
        (128, 3072, "x", (1, 24)),
        (128, 128, "nothing", (1, 1)),
    ],
)
def test_what_is_shared_leaves_the_least_to_do(
    rows: int, features: int, shared: str, cost: tuple[int, int]
) -> None:
    plan = make_plan(rows, 768, features, 132)
    assert (plan.tile.shared, plan.cost) == (shared, tuple(128 * 128 * tiles for tiles in cost))
    if shared == "x":
        assert plan.column_tiles * 2 * plan.tile.columns == features


def shapes(rows: int = 8, width: int = 64, features: int = 128, **dtypes: Any) -> list[jax.ShapeDtypeStruct]:
    sizes = {"x": (rows, width), "kernel": (width, 2 * features), "bias": (2 * features,)}
    return [jax.ShapeDtypeStruct(size, dtypes.get(name, "bfloat16")) for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("platform", "capability", "args", "why"),
    [
        ("gpu", "10.0", shapes(), "is written for compute capability 9.0"),
        ("cpu", None, shapes(), "needs an NVIDIA Hopper GPU"),
        (
            "gpu",
            "9.0",
            shapes(x="float32"),
            "takes x and kernel of one dtype, bfloat16 or float16, not float32",
        ),
        ("gpu", "9.0", shapes(kernel="float16"), "not bfloat16 and float16"),
        ("gpu", "9.0", shapes(bias="float64"), "takes a bias of bfloat16, float16, float32, not float64"),
        ("gpu", "9.0", shapes(width=96), "takes x of a multiple of 64 channels, not 96"),
        ("gpu", "9.0", shapes(features=64), "takes a multiple of 128 features, not 64"),
    ],
)
def test_refusals_say_why(platform: str, capability: str | None, args: Any, why: str) -> None:
    with compiling_for(platform, capability), jax.enable_x64(True):
        assert why in explain(*args)
        with pytest.raises(ImplementationError, match=why):
            jax.eval_shape(functools.partial(gated_matmul, implementation=NAME), *args)
        run = functools.partial(gated_matmul, implementation=[NAME, "xla"])
        assert jax.eval_shape(run, *args).shape == (args[0].shape[0], args[1].shape[1] // 2)
