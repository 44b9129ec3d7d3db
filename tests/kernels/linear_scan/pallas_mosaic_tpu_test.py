"""TPU kernels on the CPU: interpreted with race detection and NaN in unwritten memory, and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where it says what it found
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common.dispatch import compiling_for
from kernels.linear_scan import linear_scan, pallas_mosaic_tpu, rglru_scan
from kernels.linear_scan.pallas_mosaic_tpu import Blocks
from kernels.linear_scan.workloads import Workload
from tests.contracts.kernel_contract import TOLERANCE, assert_close, compiled, expected, inputs

NAME = "pallas_mosaic_tpu"
# Blocks of 128 channels and 16 steps: several of each, in part outside of the arrays.
WORKLOADS = {
    "resets": Workload(3, 40, 200, state=True, resets=(3, 17)),
    "reverse": Workload(2, 21, 130, reverse=True, state=True),
    "reverse_resets": Workload(2, 35, 130, reverse=True, resets=(34, 20)),
    "narrow": Workload(5, 7, 30),
}


def cases() -> list[Any]:
    quick = {("resets", "float32"), ("reverse", "bfloat16")}
    return [
        pytest.param(shape, dtype, marks=() if (shape, dtype) in quick else (pytest.mark.slow,))
        for shape in WORKLOADS
        for dtype in ("float32", "bfloat16")
    ]


def interpreted(run: Any, arrays: Any) -> Any:
    with (
        compiling_for("tpu"),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
    ):
        return run(arrays)


@pytest.mark.parametrize(("shape", "dtype"), cases())
def test_equals_reference_without_races(monkeypatch: pytest.MonkeyPatch, shape: str, dtype: str) -> None:
    monkeypatch.setattr(pallas_mosaic_tpu, "WIDEST", 128)
    monkeypatch.setattr(pallas_mosaic_tpu, "LONGEST", 16)
    arrays, options = inputs("linear_scan", WORKLOADS[shape], dtype)
    actual = interpreted(compiled("linear_scan", options, NAME), arrays)
    assert_close(actual, expected("linear_scan", arrays, options), TOLERANCE[dtype])
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
def test_mapped_axes_become_grid_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Pallas' own interpreter: that of the TPU loses count of mapped grid axes (jax 0.11.2)."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    work = WORKLOADS["narrow"]
    calls = [inputs("linear_scan", work, "float32", seed=seed) for seed in range(2)]
    run = compiled("linear_scan", calls[0][1], NAME)
    stacked = {n: jnp.stack([arrays[n] for arrays, _ in calls]) for n in calls[0][0]}
    with compiling_for("tpu"):
        mapped = jax.vmap(run)(stacked)
    for index, (arrays, options) in enumerate(calls):
        assert_close([x[index] for x in mapped], expected("linear_scan", arrays, options), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [(8, 4096, 2048), (1568, 32, 1536), (3, 37, 200)])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_passes_lower_for_a_tpu(size: tuple[int, int, int], dtype: str, reverse: bool) -> None:
    def passes(x: Any, a: Any, a_param: Any, reset: Any, h0: Any) -> Any:
        def both(x: Any, a: Any, a_param: Any, h0: Any) -> Any:
            options: dict[str, Any] = {"reverse": reverse, "implementation": NAME}
            h, state = linear_scan(x, a, h0, **options)
            return rglru_scan(h, x, a, a_param, state, reset, **options)

        out, pullback = jax.vjp(both, x, a, a_param, h0)
        return out, pullback(out)

    shapes = (size, size, size[2:], size[:2], (size[0], size[2]))
    dtypes = (dtype, "float32", "float32", "bool", "float32")
    arguments = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, dtypes, strict=True)]
    with compiling_for("tpu"):
        program = export.export(jax.jit(passes), platforms=["tpu"])(*arguments).mlir_module()
    assert program.count("tpu_custom_call") == 4


def test_blocks_fit_into_vmem_and_waste_little() -> None:
    for size in [(8, 4096, 2048), (1568, 32, 1536), (1576, 32, 768), (1, 4100, 640), (3, 37, 200)]:
        blocks = Blocks.of([jax.ShapeDtypeStruct(size, jnp.float32)] * 2, False)
        # Of the RG-LRU's backward pass: x, gates, h, dh and three gradients, and reset, which fills lanes.
        entries = blocks.rows * blocks.steps * (8 * blocks.channels + 128)
        assert 2 * 4 * entries < 14 * 2**20, size
        assert blocks.length < size[1] + blocks.tile * blocks.count
        assert blocks.channels == size[2] or blocks.channels % 128 == 0
