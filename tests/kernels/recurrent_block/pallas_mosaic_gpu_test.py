"""The Hopper kernel: interpreted on the CPU with detection of races, and lowered for CUDA at real sizes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.common.hopper import SHARED_LIMIT
from kernels.recurrent_block import Frame, explain, has_kernel, recurrent_clip, recurrent_frame
from kernels.recurrent_block._mosaic_gpu_clip import shared
from kernels.recurrent_block._mosaic_gpu_frame import ROWS
from kernels.recurrent_block._mosaic_gpu_step import SIZES
from kernels.recurrent_block.api import clip_shapes, shapes
from kernels.recurrent_block.workloads import Workload, run
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

OP, NAME = "recurrent_block", "pallas_mosaic_gpu"
HOPPER = functools.partial(compiling_for, "gpu", "9.0", "NVIDIA H100", 132)
# What enters the gates' product is rounded to 8 bits of mantissa, and so is the result.
ROUNDED = 2.0**-7
SHAPES = {
    # Rows beyond the last tile, streams at every age, two groups; groups of 128; fewer rows than a tile.
    "ages": Workload(136, 2, 64, positions=(0, 1, 2, 3, 4)),
    "wide_groups": Workload(72, 1, 128, taps=3, positions=(7, 0)),
    "few_rows": Workload(8, 1, 64, taps=2, positions=(1,)),
}
CLIPS = {
    # Groups as wide as a warpgroup's channels; both warpgroups' channels in one group, tokens beyond the last
    # tile, streams that go on beside one that starts; a start within the clip.
    "apart": Workload(8, 2, 64, taps=3, frames=3, memory=False, positions=(0,)),
    "together": Workload(72, 1, 128, frames=5, batch=2, positions=(1, 0)),
    "starts_again": Workload(16, 2, 64, taps=2, frames=4, positions=(-2,)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_without_races(shape: str) -> None:
    arrays, options = inputs(OP, SHAPES[shape], "float16" if shape == "few_rows" else "bfloat16")
    with compiling_for("gpu", "9.0", cores=4), extended_interpreter(time_limit=300):
        found = jax.jit(lambda arrays: run(arrays, options, NAME))(arrays)
    wanted = expected(OP, arrays, options)[:3]
    assert_close([np.asarray(y, np.float64) for y in found], wanted, ROUNDED)
    np.testing.assert_array_equal(found[2], arrays["branches"][:, : found[2].shape[1]])


@pytest.mark.parametrize("shape", CLIPS)
def test_clips_equal_reference_without_races(shape: str) -> None:
    arrays, options = inputs(OP, CLIPS[shape], "float16" if shape == "apart" else "bfloat16")
    # Negative ones are frames before the start within the clip, of a segment that began long ago.
    options["positions"] = jnp.where(options["positions"] < 0, options["positions"] + 9, options["positions"])
    with compiling_for("gpu", "9.0", cores=4), extended_interpreter(time_limit=300):
        found = jax.jit(lambda arrays: run(arrays, options, NAME))(arrays)
    wanted = expected(OP, arrays, options)[:2]
    assert_close([np.asarray(y, np.float64) for y in found], wanted, ROUNDED)


def test_a_clip_looks_at_nothing_before_its_start() -> None:
    arrays, options = inputs(OP, Workload(8, 2, 64, taps=3, frames=2, positions=(0,)), "bfloat16")
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        step = jax.jit(lambda arrays: run(arrays, options, NAME))
        bad = {name: arrays[name] * jnp.nan for name in ("tap0", "tap1", "gate_h")}
        found, wanted = step(arrays | bad), step(arrays)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_start_does_not_look_at_may_be_nan() -> None:
    arrays, options = inputs(OP, Workload(16, 1, 64, taps=2, positions=(0,)), "bfloat16")
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        step = jax.jit(lambda arrays: run(arrays, options, NAME))
        bad = {name: arrays[name] * jnp.nan for name in ("tap0", "gate_h")}
        found, wanted = step(arrays | bad), step(arrays)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_are_those_of_xla() -> None:
    arrays, options = inputs(OP, Workload(8, 1, 64, taps=2), "bfloat16")
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = [np.asarray(y, np.float64) for y in compiled(OP, options, NAME)(arrays)]
    assert_close(found, expected(OP, arrays, options), TOLERANCE["bfloat16"])


def test_calls_follow_one_another_where_an_axis_is_mapped() -> None:
    calls = [inputs(OP, Workload(8, 1, 64, taps=2), "bfloat16", seed=seed) for seed in range(2)]
    stacked = {name: jnp.stack([arrays[name] for arrays, _ in calls]) for name in calls[0][0]}
    options = calls[0][1]
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        found = jax.jit(jax.vmap(lambda arrays: run(arrays, options, NAME)))(stacked)
    for index, (arrays, _) in enumerate(calls):
        wanted = expected(OP, arrays, options)[:3]
        assert_close([np.asarray(y[index], np.float64) for y in found], wanted, ROUNDED)


@pytest.mark.parametrize(("rows", "width", "size"), [(1280, 768, 64), (2048, 768, 64), (200, 1536, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lowers_for_cuda_and_writes_in_place(rows: int, width: int, size: int, dtype: str) -> None:
    args = shapes(rows, width, size, 4, dtype)
    step = jax.jit(functools.partial(recurrent_frame, implementation=NAME))
    with HOPPER():
        program = export.export(step, platforms=["cuda"])(*args).mlir_module()
    assert program.count("custom_call @mosaic_gpu") == 1
    assert program.count("#stablehlo.output_operand_alias<") >= 2, "state and oldest input"
    # Else XLA for GPUs lets the call read slices in place, and forgets where it writes.
    assert program.count("stablehlo.optimization_barrier") == 2, "before the call and after it"


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes", [(8, 32, 200, 1536, 128, 4), (1, 48, 1280, 768, 64, 4), (2, 5, 8, 256, 64, 2)]
)
def test_clips_lower_for_cuda(sizes: tuple[int, ...], dtype: str) -> None:
    clip, params = clip_shapes(*sizes, dtype)
    step = jax.jit(functools.partial(recurrent_clip, implementation=NAME))
    for call in (clip, clip._replace(memory=None)):
        with HOPPER():
            program = export.export(step, platforms=["cuda"])(call, params).mlir_module()
        assert program.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize(("size", "taps"), [(128, 3), (64, 3), (128, 1)])
def test_clips_fit_shared_memory(size: int, taps: int) -> None:
    """Counted from the scratch itself, with its barriers."""
    scratch = shared(size, taps, jnp.bfloat16, remembers=True)
    memory = [x for name, x in scratch.items() if name.endswith("_smem")]
    barriers = [math.prod(x.num_barriers) for name, x in scratch.items() if not name.endswith("_smem")]
    total = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in memory) + 8 * sum(barriers)
    assert total + 128 * len(memory) <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("sizes", "worth"),
    [((1, 32, 200, 1536, 128, 4), True), ((1, 32, 136, 1536, 128, 4), False), ((1, 8, 8, 128, 64, 4), True)],
)
def test_long_clips_of_few_tokens_are_left_to_the_layers(sizes: tuple[int, ...], worth: bool) -> None:
    call = clip_shapes(*sizes, "bfloat16")
    with HOPPER():
        assert has_kernel(*call) == worth
        assert "pallas_mosaic_gpu" in explain(*call), "by name it may be asked for"


@pytest.mark.parametrize("size", SIZES)
def test_it_fits_shared_memory(size: int) -> None:
    tiles = ROWS * size * (2 * (2 + 3 + 1) + 4) + 2 * size * 2 * size
    vectors = 4 * (ROWS + size * (4 + 1 + 2 + 1))
    assert tiles + vectors + 4096 <= SHARED_LIMIT // (2 if size == 64 else 1), "two CTAs of 64"


def changed(part: str, **dtypes: Any) -> tuple[Any, Any]:
    frame, params = shapes(8, 64, 64, 4, "bfloat16")
    of = {"frame": frame, "params": params}
    fields = {n: jax.ShapeDtypeStruct(getattr(of[part], n).shape, d) for n, d in dtypes.items()}
    of[part] = of[part]._replace(**fields)
    return of["frame"], of["params"]


@pytest.mark.parametrize(
    ("platform", "capability", "args", "why"),
    [
        ("gpu", "10.0", shapes(8, 64, 64, 4, "bfloat16"), "is written for compute capability 9.0"),
        ("cpu", None, shapes(8, 64, 64, 4, "bfloat16"), "needs an NVIDIA Hopper GPU"),
        (
            "gpu",
            "9.0",
            shapes(8, 64, 64, 4, "float32"),
            "takes bfloat16 or float16 and a float32 state, not float32",
        ),
        ("gpu", "9.0", changed("params", gate_blocks="float16"), "not bfloat16, float16, float32"),
        ("gpu", "9.0", changed("params", rate="float16"), "not bfloat16, float16, float32"),
        ("gpu", "9.0", shapes(12, 64, 64, 4, "bfloat16"), "takes a multiple of 8 rows, not 12"),
        ("gpu", "9.0", shapes(8, 96, 32, 4, "bfloat16"), "takes groups of 64 or 128 channels, not 32"),
        ("gpu", "9.0", shapes(8, 64, 64, 6, "bfloat16"), "takes convolutions over 2 to 4 frames, not 6"),
        (
            "gpu",
            "9.0",
            clip_shapes(1, 2, 8, 192, 64, 4, "bfloat16"),
            "takes clips of a multiple of 128 channels, not 192",
        ),
        ("gpu", "9.0", clip_shapes(1, 2, 9, 128, 64, 4, "bfloat16"), "takes a multiple of 8 rows, not 9"),
    ],
)
def test_refusals_say_why(platform: str, capability: str | None, args: Any, why: str) -> None:
    op = recurrent_frame if isinstance(args[0], Frame) else recurrent_clip
    with compiling_for(platform, capability):
        assert why in explain(*args)
        assert not has_kernel(*args)
        with pytest.raises(ImplementationError, match=why):
            jax.eval_shape(functools.partial(op, implementation=NAME), *args)
        result = jax.eval_shape(functools.partial(op, implementation=[NAME, "xla"]), *args)
    assert result.h.shape[-1] == args[1].rate.shape[0]


def test_workloads_of_the_device_are_taken() -> None:
    from kernels.recurrent_block.workloads import DEVICE_SHAPES

    with HOPPER():
        for work in DEVICE_SHAPES.values():
            for dtype in work.dtypes:
                sizes = (work.rows, work.groups * work.block, work.block, work.taps)
                clip = clip_shapes(work.batch, work.frames, *sizes, dtype)
                lines = explain(*(clip if work.frames else shapes(*sizes, dtype))).splitlines()
                assert ["pallas_mosaic_gpu", "runs"] in [line.split() for line in lines]
