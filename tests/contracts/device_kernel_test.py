"""The kernel contract for implementations of one kind of device, on that device (`pytest --device=gpu`).

As `kernel_test.py`, on 16-bit inputs, at lengths of several of the device's tiles. Compiling is what takes
time, so one compiled function answers every question that its shape raises. Processes can share the device:
`XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -n 8 --device=gpu tests/contracts/device_kernel_test.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.kernel_contract import (
    OPS,
    TOLERANCE,
    assert_bitwise_equal,
    assert_close,
    compiled,
    device_implementations,
    expected,
    inputs,
    workloads,
)

RUNS = 5


def cases(shapes: str = "DEVICE_SHAPES", dtype: str | None = None) -> list[Any]:
    """(op, name, shape, dtype), marked with the device: of the shapes that the workloads list under that
    name, by default all of them, with the dtypes they list.
    """
    found = []
    for op in OPS:
        for name, marker in device_implementations(op).items():
            known = workloads(op).DEVICE_SHAPES
            for shape in getattr(workloads(op), shapes):
                for each in known[shape].dtypes if dtype is None else (dtype,):
                    mark = getattr(pytest.mark, marker)
                    found.append(pytest.param(op, name, shape, each, marks=mark))
    return found


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), cases())
def test_equals_reference_and_itself(op: str, name: str, shape: str, dtype: str) -> None:
    """Outputs and all gradients against float64; every run bitwise the same, whatever unused places hold."""
    arrays, options = inputs(op, workloads(op).DEVICE_SHAPES[shape], dtype, name=name)
    both = compiled(op, options, name)
    first = both(arrays)
    assert_close(first, expected(op, arrays, options), TOLERANCE[dtype])
    for run in range(1, RUNS):
        assert_bitwise_equal(both(arrays), first, f"run {run + 1} of {RUNS}")
    poisoned = workloads(op).poisoned(arrays, options)
    if poisoned is not None:
        assert any(bool(jnp.isnan(x).any()) for x in poisoned.values())
        assert_bitwise_equal(both(poisoned), first, "NaN where nothing is read")


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), cases("DEVICE_MAPPED", "bfloat16"))
def test_vmap_equals_a_loop(op: str, name: str, shape: str, dtype: str) -> None:
    module = workloads(op)
    calls = [inputs(op, module.DEVICE_SHAPES[shape], dtype, name=name, seed=seed) for seed in range(2)]
    options = calls[0][1]
    stacked = {n: jnp.stack([arrays[n] for arrays, _ in calls]) for n in calls[0][0]}
    single = compiled(op, options, name)
    mapped = jax.jit(jax.vmap(single))(stacked)
    for index, (arrays, _) in enumerate(calls):
        # Sums outside of the kernels may round otherwise, and 16-bit results then differ in their last bit.
        assert_close(
            [x[index] for x in mapped], [np.asarray(x, np.float64) for x in single(arrays)], TOLERANCE[dtype]
        )


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), cases("DEVICE_REMATERIALISED", "bfloat16"))
def test_jit_and_remat_change_nothing(op: str, name: str, shape: str, dtype: str) -> None:
    arrays, options = inputs(op, workloads(op).DEVICE_SHAPES[shape], dtype, name=name)
    wanted = [np.asarray(x, np.float64) for x in compiled(op, options, name)(arrays)]
    assert_close(compiled(op, options, name, remat=True)(arrays), wanted, TOLERANCE[dtype])
    assert_close(compiled(op, options, name, jit=False)(arrays), wanted, TOLERANCE[dtype])
