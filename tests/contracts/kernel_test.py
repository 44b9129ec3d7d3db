"""What every kernel must do, for every op package under kernels/ and every implementation in it.

An op package is a folder with api.py (IMPLEMENTATIONS, with a "reference") and workloads.py (SHAPES,
make_call, run, poisoned, DIFFERENTIABLE). Its implementations are compared with `reference` in float64 on
the same rounded inputs.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/api.py"))

# Largest error allowed, relative to the largest reference value (at least 1). Inputs are rounded to the
# dtype first, so this is the error of the computation: the last bit of the accumulators, or of weights cast
# to 16 bits (2^-9, 2^-12).
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
# What runs without --slow: a compilation takes seconds, so shapes that only vary what another one covers
# wait, and the other dtypes run on shapes that between them use every option.
EXTRA_DTYPES = ("float64", "bfloat16", "float16")
EXTRA_SHAPES = {"everything", "pruned_heads_together"}
LATER_SHAPES = {
    "square", "buffer", "left_padding_rectangle", "packed_rectangle_grouped", "one_kv_head",
    "pruned_packed_buffer",
    "pruned_auto",
}  # fmt: skip


def workloads(op: str) -> ModuleType:
    return importlib.import_module(f"kernels.{op}.workloads")


def implementations(op: str) -> list[str]:
    names = importlib.import_module(f"kernels.{op}.api").IMPLEMENTATIONS
    return [name for name in names if name != "reference"]


def cases() -> list[Any]:
    found = []
    for op in OPS:
        for name in implementations(op):
            for shape in workloads(op).SHAPES:
                for dtype in ("float32", *EXTRA_DTYPES):
                    quick = shape in EXTRA_SHAPES or (dtype == "float32" and shape not in LATER_SHAPES)
                    marks = () if quick else (pytest.mark.slow,)
                    found.append(pytest.param(op, name, shape, dtype, marks=marks))
    return found


def each(shapes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [
        (op, name, s)
        for op in OPS
        for name in implementations(op)
        for s in workloads(op).SHAPES
        if s in shapes
    ]


def inputs(op: str, shape: str, dtype: str) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays rounded to `dtype`, except those that the op wants wide (it says so by its name: gates)."""
    module = workloads(op)
    arrays, options = module.make_call(module.SHAPES[shape])
    wide = jnp.promote_types(dtype, jnp.float32)
    return {n: jnp.asarray(x, wide if "gate" in n else dtype) for n, x in arrays.items()}, options


def compiled(op: str, options: dict[str, Any], name: str, remat: bool = False, jit: bool = True) -> Any:
    """A function of the arrays: outputs, and the gradients of their sum against fixed random cotangents."""
    module = workloads(op)

    def outputs(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return module.run(arrays, options, name)

    def everything(arrays: dict[str, jax.Array]) -> list[jax.Array]:
        out, pullback = jax.vjp(jax.checkpoint(outputs) if remat else outputs, arrays)
        rng = np.random.default_rng(7)
        (grads,) = pullback(tuple(jnp.asarray(rng.standard_normal(o.shape), o.dtype) for o in out))
        return [*out, *(grads[n] for n in module.DIFFERENTIABLE)]

    return jax.jit(everything) if jit else everything


def expected(op: str, arrays: dict[str, jax.Array], options: dict[str, Any]) -> list[np.ndarray]:
    """The same in float64 by the definition."""
    with jax.enable_x64(True):
        exact = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        return [np.asarray(x) for x in compiled(op, options, "reference")(exact)]


def assert_close(actual: list[Any], wanted: list[np.ndarray], tolerance: float) -> None:
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        a = np.asarray(a, np.float64)
        finite = np.isfinite(w)
        np.testing.assert_array_equal(np.isfinite(a), finite, err_msg=f"result {index}: where it is finite")
        np.testing.assert_array_equal(a[~finite], w[~finite], err_msg=f"result {index}: infinities")
        error = np.abs(a[finite] - w[finite]).max(initial=0) / max(1, np.abs(w[finite]).max(initial=0))
        assert error <= tolerance, f"result {index}: error {error:.2e} > {tolerance:.0e}"


def test_op_packages_are_found() -> None:
    assert "forgetting_attention" in OPS
    for op in OPS:
        assert "reference" in importlib.import_module(f"kernels.{op}.api").IMPLEMENTATIONS
        assert implementations(op), f"{op} has no implementation beside its reference"


@pytest.mark.parametrize(("op", "name", "shape", "dtype"), cases())
def test_equals_reference(op: str, name: str, shape: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        arrays, options = inputs(op, shape, dtype)
        actual = [np.asarray(x, np.float64) for x in compiled(op, options, name)(arrays)]
    assert_close(actual, expected(op, arrays, options), TOLERANCE[dtype])


POISONED = ("buffer_shorter_than_queries", "everything")


@pytest.mark.parametrize(("op", "name", "shape"), each(POISONED))
def test_unused_positions_may_hold_nan(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, shape, "float32")
    poisoned = workloads(op).poisoned(arrays, options)
    assert poisoned is not None
    assert any(bool(jnp.isnan(x).any()) for x in poisoned.values())
    for implementation in (name, "reference"):
        both = compiled(op, options, implementation)
        assert_close(both(poisoned), [np.asarray(x) for x in both(arrays)], 0.0)


@pytest.mark.parametrize(("op", "name", "shape"), each(("everything", "pruned_threshold")))
def test_vmap_equals_a_loop(op: str, name: str, shape: str) -> None:
    module = workloads(op)
    calls = [module.make_call(module.SHAPES[shape], seed)[0] for seed in range(2)]
    options = inputs(op, shape, "float32")[1]
    stacked = {n: jnp.asarray(np.stack([c[n] for c in calls]), jnp.float32) for n in calls[0]}
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


@pytest.mark.parametrize(("op", "name", "shape"), each(("packed_rectangle_grouped",)))
def test_jit_and_remat_change_nothing(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, shape, "float32")
    wanted = [np.asarray(x) for x in compiled(op, options, name)(arrays)]
    assert_close(compiled(op, options, name, remat=True)(arrays), wanted, 1e-6)
    assert_close(compiled(op, options, name, jit=False)(arrays), wanted, 1e-6)


@pytest.mark.parametrize(("op", "name", "shape"), each(("pruned_threshold",)))
def test_two_runs_are_bitwise_equal(op: str, name: str, shape: str) -> None:
    arrays, options = inputs(op, shape, "float32")
    both = compiled(op, options, name)
    first, second = both(arrays), both(arrays)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
