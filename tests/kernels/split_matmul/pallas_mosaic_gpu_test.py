"""The Hopper kernel: interpreted on the CPU with detection of races, and lowered for CUDA at real sizes.

What gated_matmul's tests ask of the same product (`kernels.common.hopper_product`) is not asked again: slots,
clusters, gradients and mapped axes. Here is what only this op does: parts, and the choice of a tile.
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
from kernels.split_matmul import explain, split_matmul
from kernels.split_matmul import pallas_mosaic_gpu as kernel
from kernels.split_matmul._mosaic_gpu_sm90 import DEPTH, Tile, make_plan
from kernels.split_matmul.workloads import Workload
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

OP, NAME = "split_matmul", "pallas_mosaic_gpu"
HOPPER = functools.partial(compiling_for, "gpu", "9.0", "NVIDIA H100", 132)
# Rounding of the result to 8 bits of mantissa, and the kernel's sums in another order.
ROUNDED = 2.0**-8
SHAPES = {
    # (cores, tile, call): a CTA whose tiles lie in several parts, rows beyond the last; a cluster whose two
    # CTAs write different parts; three warpgroups; a tile chosen, fewer rows than it has.
    "one_cta": (1, Tile(128, 64, shared="nothing"), Workload((2, 75), 192, 64, 3)),
    "beside": (4, Tile(128, 64, shared="x"), Workload((136,), 128, 64, 2)),
    "wide": (2, Tile(192, 192, shared="nothing"), Workload((200,), 128, 192, 2)),
    "chosen": (8, None, Workload((5,), 64, 192, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_without_races(shape: str) -> None:
    cores, tile, work = SHAPES[shape]
    arrays, options = inputs(OP, work, "float16" if shape == "chosen" else "bfloat16")
    run = jax.jit(functools.partial(kernel.split_matmul, parts=work.parts, tile=tile))
    with compiling_for("gpu", "9.0", cores=cores), extended_interpreter(time_limit=300):
        found = [np.asarray(y, np.float64) for y in run(**arrays)]
    wanted = expected(OP, arrays, options)[: work.parts]
    assert_close(found, wanted, ROUNDED)


def test_gradients_are_those_of_xla_and_mapped_rows_join() -> None:
    arrays, options = inputs(OP, Workload((40,), 64, 64, 2), "bfloat16")
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = [np.asarray(y, np.float64) for y in compiled(OP, options, NAME)(arrays)]
        mapped = jax.jit(jax.vmap(functools.partial(kernel.split_matmul, parts=2), in_axes=(0, None, None)))
        stacked = mapped(arrays["x"].reshape(2, 20, 64), arrays["kernel"], arrays["bias"])
    wanted = expected(OP, arrays, options)
    assert_close(found, wanted, TOLERANCE["bfloat16"])
    assert_close([np.asarray(y, np.float64).reshape(40, 64) for y in stacked], wanted[:2], ROUNDED)


@pytest.mark.parametrize("rows", [1280, 2048, 8192, 1274, 197, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lowers_for_cuda(rows: int, dtype: str) -> None:
    shapes = ((1, 1, rows, 768), (768, 2304), (2304,))
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    run = jax.jit(functools.partial(split_matmul, parts=3, implementation=NAME))
    with HOPPER():
        exported = export.export(run, platforms=["cuda"])(*args)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == 1
    assert [y.shape for y in exported.out_avals] == [(1, 1, rows, 768)] * 3


@pytest.mark.parametrize(
    ("rows", "features", "parts", "tile", "jobs"),
    [
        (1280, 768, 3, Tile(128, 192, "matrix"), 60),  # one wave of pairs
        (1288, 768, 3, Tile(192, 128, "x"), 63),
        (2048, 768, 3, Tile(192, 192, "x"), 66),  # all 132 multiprocessors, once
        (197, 768, 3, Tile(128, 64, "matrix"), 36),
        (512, 192, 3, Tile(128, 64, "matrix"), 18),
        (1280, 1024, 3, Tile(128, 256, "matrix"), 60),  # 192 does not divide a part
        (128, 64, 1, Tile(128, 64, "nothing"), 1),
    ],
)
def test_the_tile_leaves_the_least_to_do(rows: int, features: int, parts: int, tile: Tile, jobs: int) -> None:
    plan = make_plan(rows, 768, features, parts, 132)
    assert (plan.tile, plan.jobs) == (tile, jobs)


@pytest.mark.parametrize("width", [64, 768, 4096])
@pytest.mark.parametrize("features", [64, 192, 256, 768])
def test_plans_fit_shared_memory_and_cover_the_results(width: int, features: int) -> None:
    for rows in (128, 197, 1280, 2048, 8192):
        plan = make_plan(rows, width, features, 3, 132)
        tile = plan.tile
        below, beside = (2 if tile.shared == which else 1 for which in ("matrix", "x"))
        assert plan.row_tiles * below * tile.rows >= rows
        assert plan.column_tiles * beside * tile.columns == 3 * features
        assert features % tile.columns == 0
        assert 1 <= plan.stages <= plan.steps == width // DEPTH
        assert plan.clusters * tile.cluster <= 132
        slot = (tile.rows + tile.columns) * DEPTH * 2
        assert plan.stages * slot + tile.rows * tile.columns * 2 + 4 * tile.columns <= SHARED_BYTES


def test_a_part_that_is_no_whole_tiles_is_refused() -> None:
    assert make_plan(1280, 768, 384, 2, 132, Tile(128, 128)).column_tiles == 6
    with pytest.raises(ValueError, match="a multiple of 256 features, not 384"):
        make_plan(1280, 768, 384, 2, 132, Tile(128, 256))


def shapes(rows: int = 8, width: int = 64, features: int = 64, **dtypes: Any) -> list[jax.ShapeDtypeStruct]:
    sizes = {"x": (rows, width), "kernel": (width, 3 * features), "bias": (3 * features,)}
    return [jax.ShapeDtypeStruct(size, dtypes.get(name, "bfloat16")) for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("platform", "capability", "args", "why"),
    [
        ("gpu", "10.0", shapes(), "is written for compute capability 9.0"),
        ("cpu", None, shapes(), "needs an NVIDIA Hopper GPU"),
        ("gpu", "9.0", shapes(x="float32"), "takes x and kernel of one dtype, bfloat16 or float16"),
        ("gpu", "9.0", shapes(width=96), "takes x of a multiple of 64 channels, not 96"),
        ("gpu", "9.0", shapes(features=32), "takes a multiple of 64 features, not 32"),
    ],
)
def test_refusals_say_why(platform: str, capability: str | None, args: Any, why: str) -> None:
    with compiling_for(platform, capability):
        assert why in explain(*args, 3)
        with pytest.raises(ImplementationError, match=why):
            jax.eval_shape(functools.partial(split_matmul, parts=3, implementation=NAME), *args)
        run = functools.partial(split_matmul, parts=3, implementation=[NAME, "xla"])
        assert [y.shape for y in jax.eval_shape(run, *args)] == [
            (args[0].shape[0], args[1].shape[1] // 3)
        ] * 3


def test_a_float32_bias_is_not_rounded() -> None:
    arrays, _ = inputs(OP, Workload((8,), 64, 64, 1), "float16")
    arrays["x"] *= 0
    arrays["bias"] = jnp.full_like(arrays["bias"], 1 + 2.0**-10, jnp.float32)
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        (found,) = jax.jit(functools.partial(kernel.split_matmul, parts=1))(**arrays)
    np.testing.assert_array_equal(found, np.full((8, 64), np.float16(1 + 2.0**-10)))
