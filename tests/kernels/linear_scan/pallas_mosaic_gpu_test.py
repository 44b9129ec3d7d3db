"""The Hopper scans: interpreted on the CPU with detection of races, and lowered for CUDA at real sizes.

Few and small shapes: an interpreted chunk takes about a second. `tests/contracts/device_kernel_test.py` runs
more on a GPU; here every path through the kernels runs once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.linear_scan import explain, linear_scan, rglru_scan
from kernels.linear_scan._mosaic_gpu_stream import (
    CHANNELS,
    OUTPUT_BUFFERS,
    SHARED_BYTES,
    SHORT,
    UNROLL,
    make_plan,
)
from kernels.linear_scan.workloads import Workload
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

OP, NAME = "linear_scan", "pallas_mosaic_gpu"
HOPPER = functools.partial(compiling_for, "gpu", "9.0", "NVIDIA H200", 132)
SHAPES = {
    # Two strips, the second in part; chunks, rows beside groups of eight; more strips than CTAs.
    "plain": Workload(2, 77, 136),
    "reverse": Workload(1, 13, 24, reverse=True, state=True, resets=(12, 7)),
    "resets": Workload(3, 21, 8, state=True, resets=(0, 9, 10), first_segment_unused=True),
    "shorter_than_a_chunk": Workload(2, 3, 10, state=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_without_races(shape: str) -> None:
    dtype = "bfloat16" if shape == "plain" else "float32"
    with compiling_for("gpu", "9.0", cores=2):
        arrays, options = inputs(OP, SHAPES[shape], dtype, name=NAME)
        with extended_interpreter(time_limit=300):
            found = [np.asarray(x, np.float64) for x in compiled(OP, options, NAME)(arrays)]
    assert_close(found, expected(OP, arrays, options), TOLERANCE[dtype])


def test_a_mapped_axis_joins_the_batch() -> None:
    """Inputs mapped, parameters shared, and the other way round."""
    rng = np.random.default_rng(0)
    x, gate_x, gate_a = (jnp.asarray(rng.normal(size=(2, 2, 9, 8)), jnp.float32) for _ in range(3))
    rates = jnp.asarray(rng.uniform(-6, 0, (2, 8)), jnp.float32)

    def last(name: str, *args: jax.Array) -> jax.Array:
        return rglru_scan(*args, implementation=name)[1]

    for axes, args in (
        ((0, 0, 0, None), (x, gate_x, gate_a, rates[0])),
        ((None, 0, None, 0), (x[0], gate_x, gate_a[0], rates)),
    ):
        wanted = jax.vmap(functools.partial(last, "reference"), axes)(*args)
        with compiling_for("gpu", "9.0", cores=2), extended_interpreter(time_limit=300):
            found = jax.jit(jax.vmap(functools.partial(last, NAME), axes))(*args)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def both_passes(x: jax.Array, gate_x: jax.Array, gate_a: jax.Array, a_param: jax.Array, reset: Any) -> Any:
    def loss(x: jax.Array, gate_x: jax.Array, gate_a: jax.Array, a_param: jax.Array) -> jax.Array:
        gated, _ = rglru_scan(x, gate_x, gate_a, a_param, reset=reset)
        plain, _ = linear_scan(x, jax.nn.sigmoid(gate_a))
        return (gated + plain).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, gate_x, gate_a, a_param)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1568, 32, 1536), "bfloat16"),
        ((1, 7, 30), "float32"),
        *(
            pytest.param(size, dtype, marks=pytest.mark.slow)
            for size in ((8, 4096, 2048), (1280, 48, 768))
            for dtype in ("bfloat16", "float32")
        ),
    ],
)
def test_both_passes_lower_by_automatic_choice(size: tuple[int, int, int], dtype: str) -> None:
    x = jax.ShapeDtypeStruct(size, dtype)
    rest = jax.ShapeDtypeStruct(size[2:], jnp.float32), jax.ShapeDtypeStruct(size[:2], jnp.bool_)
    with HOPPER():
        program = export.export(jax.jit(both_passes), platforms=["cuda"])(x, x, x, *rest).mlir_module()
    assert program.count("custom_call @mosaic_gpu") == 4


def test_states_that_are_zero_are_not_written_for_the_kernels_to_read() -> None:
    """Neither h0 nor the gradient of an h_last that nothing depends on, if they are not given."""
    x, a_param = jax.ShapeDtypeStruct((16, 32, 384), "bfloat16"), jax.ShapeDtypeStruct((384,), jnp.float32)
    with HOPPER():
        lowered = jax.jit(functools.partial(both_passes, reset=None)).trace(x, x, x, a_param)
        program = lowered.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in program.splitlines() if "custom_call @mosaic_gpu" in line]
    operands = [line[line.rindex(" : (") : line.rindex(" -> ")] for line in calls]
    assert sorted(types.count("<16x32x384xbf16>") for types in operands) == [2, 3, 3, 5]
    assert [types.count("<16x384xf32>") for types in operands] == [0] * 4


@pytest.mark.parametrize("read", [4, 8, 12, 20])
@pytest.mark.parametrize("size", [(1, 1), (8, 2048), (1568, 1536), (3, 300)])
def test_plans_fit_shared_memory_and_give_every_strip_away(size: tuple[int, int], read: int) -> None:
    written = read // 2
    for length in (*range(1, 100), 511, 600, 1000, 4096):
        plan = make_plan((size[0], length, size[1]), read, written, 132, descending=False)
        assert plan.steps % UNROLL == 0
        assert plan.steps <= (length if length >= SHORT else length + -length % UNROLL)
        assert plan.steps * plan.chunks >= length
        assert plan.stages >= 2
        used = CHANNELS * (plan.stages * (plan.steps + 1) * read + OUTPUT_BUFFERS * plan.steps * written)
        assert used * max(1, plan.ctas // 132) <= SHARED_BYTES
        assert plan.ctas <= plan.strips


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "why"),
    [
        ("gpu", "10.0", "float32", "is written for compute capability 9.0"),
        ("cpu", None, "float32", "needs an NVIDIA Hopper GPU"),
        ("gpu", "9.0", "complex64", "takes bfloat16, float16 and float32, not complex64"),
    ],
)
def test_refusals_say_why(platform: str, capability: str | None, dtype: str, why: str) -> None:
    x = jax.ShapeDtypeStruct((2, 8, 16), dtype)
    with compiling_for(platform, capability):
        assert why in explain(x)
        with pytest.raises(ImplementationError, match=why):
            jax.eval_shape(functools.partial(linear_scan, implementation=NAME), x, x)
