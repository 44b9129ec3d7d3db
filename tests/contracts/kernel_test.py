"""What every kernel must do, for every op package under kernels/ and every implementation that runs anywhere.

Implementations are compared with `reference` in float64 on the same rounded inputs; `kernel_contract.py` says
what an op package offers for that, `device_kernel_test.py` does it for implementations of one kind of device.
"""

import importlib
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
    portable_implementations,
    workloads,
)

# What runs without --slow: a compilation takes seconds, so shapes that only vary what another one covers
# wait, and float64 and bfloat16 run on shapes that between them use every option.
EXTRA_DTYPES, LATER_DTYPES = ("float64", "bfloat16"), ("float16",)
EXTRA_SHAPES = {"everything", "pruned_heads_together", "leading_axes"}
LATER_SHAPES = {
    "square", "buffer", "left_padding_rectangle", "packed_rectangle_grouped", "one_kv_head",
    "pruned_packed_buffer",
    "pruned_auto",
}  # fmt: skip


def cases() -> list[Any]:
    found = []
    for op in OPS:
        for name in portable_implementations(op):
            for shape in workloads(op).SHAPES:
                for dtype in ("float32", *EXTRA_DTYPES, *LATER_DTYPES):
                    quick = dtype not in LATER_DTYPES and (
                        shape in EXTRA_SHAPES or (dtype == "float32" and shape not in LATER_SHAPES)
                    )
                    marks = () if quick else (pytest.mark.slow,)
                    found.append(pytest.param(op, name, shape, dtype, marks=marks))
    return found


def each(shapes: tuple[str, ...], later: tuple[str, ...] = ()) -> list[Any]:
    """(op, name, shape) of these shapes; those of `later`, and of `associative`, wait for --slow."""
    return [
        pytest.param(op, name, s, marks=(pytest.mark.slow,) if s in later or name == "associative" else ())
        for op in OPS
        for name in portable_implementations(op)
        for s in workloads(op).SHAPES
        if s in (*shapes, *later)
    ]


def test_op_packages_are_found() -> None:
    assert "forgetting_attention" in OPS
    for op in OPS:
        known = importlib.import_module(f"kernels.{op}.api").IMPLEMENTATIONS
        assert "reference" in known
        assert portable_implementations(op), f"{op} has no implementation beside its reference"
        assert set(device_implementations(op)) <= set(known), f"{op}: DEVICE_IMPLEMENTATIONS names others"


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), cases())
def test_equals_reference(op: str, name: str, shape: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        arrays, options = inputs(op, workloads(op).SHAPES[shape], dtype)
        actual = [np.asarray(x, np.float64) for x in compiled(op, options, name)(arrays)]
    assert_close(actual, expected(op, arrays, options), TOLERANCE[dtype])


POISONED = ("buffer_shorter_than_queries", "everything")


@pytest.mark.parametrize(("op", "name", "shape"), each(POISONED))
def test_unused_positions_may_hold_nan(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, workloads(op).SHAPES[shape], "float32")
    poisoned = workloads(op).poisoned(arrays, options)
    assert poisoned is not None
    assert any(bool(jnp.isnan(x).any()) for x in poisoned.values())
    for implementation in (name, "reference"):
        both = compiled(op, options, implementation)
        assert_close(both(poisoned), [np.asarray(x) for x in both(arrays)], 0.0)


@pytest.mark.parametrize(
    ("op", "name", "shape"), each(("everything", "leading_axes"), later=("pruned_threshold",))
)
def test_vmap_equals_a_loop(op: str, name: str, shape: str) -> None:
    module = workloads(op)
    calls = [inputs(op, module.SHAPES[shape], "float32", seed=seed) for seed in range(2)]
    options = calls[0][1]
    stacked = {n: jnp.stack([arrays[n] for arrays, _ in calls]) for n in calls[0][0]}
    single = compiled(op, options, name)
    mapped = jax.vmap(single)(stacked)
    # One operand without the mapped axis: the rule has to broadcast it.
    shared = module.DIFFERENTIABLE[0]
    axes = {n: None if n == shared else 0 for n in stacked}
    one = {n: x[0] if n == shared else x for n, x in stacked.items()}
    partly = jax.vmap(lambda arrays: module.run(arrays, options, name), in_axes=(axes,))(one)
    for index in range(2):
        arrays = {n: x[index] for n, x in stacked.items()}
        assert_close([x[index] for x in mapped], [np.asarray(x) for x in single(arrays)], 1e-6)
        out = module.run({**arrays, shared: stacked[shared][0]}, options, name)
        assert_close([x[index] for x in partly], [np.asarray(x) for x in out], 1e-6)


@pytest.mark.parametrize(("op", "name", "shape"), each((), later=("packed_rectangle_grouped",)))
def test_jit_and_remat_change_nothing(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, workloads(op).SHAPES[shape], "float32")
    wanted = [np.asarray(x) for x in compiled(op, options, name)(arrays)]
    assert_close(compiled(op, options, name, remat=True)(arrays), wanted, 1e-6)
    assert_close(compiled(op, options, name, jit=False)(arrays), wanted, 1e-6)


@pytest.mark.parametrize(("op", "name", "shape"), each(("pruned_threshold",)))
def test_two_runs_are_bitwise_equal(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, workloads(op).SHAPES[shape], "float32")
    both = compiled(op, options, name)
    assert_bitwise_equal(both(arrays), both(arrays), "second run")
