"""What a kernel contract test does with an op package: draws a call, runs it with all gradients, compares.

An op package is a folder with api.py (IMPLEMENTATIONS, with a "reference") and workloads.py:

- SHAPES: calls that every implementation takes, unless DEVICE_IMPLEMENTATIONS names it.
- DEVICE_IMPLEMENTATIONS: implementations that run on one kind of device only -> its marker.
- DEVICE_SHAPES: the calls they are tested with; DEVICE_MAPPED and DEVICE_REMATERIALISED: those of them that
  are also mapped, or run without jit and with remat. `own_tiles` gives calls without tiles the
  implementation's.
- make_call, run, poisoned, DIFFERENTIABLE.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/api.py"))

# Largest error allowed, relative to the largest reference value (at least 1). Inputs and cotangents are
# rounded to the dtype first, so this is the error of the computation: the last bit of the accumulators, or of
# weights cast to 16 bits (2^-9, 2^-12).
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


def workloads(op: str) -> ModuleType:
    return importlib.import_module(f"kernels.{op}.workloads")


def device_implementations(op: str) -> dict[str, str]:
    return getattr(workloads(op), "DEVICE_IMPLEMENTATIONS", {})


def portable_implementations(op: str) -> list[str]:
    names = importlib.import_module(f"kernels.{op}.api").IMPLEMENTATIONS
    return [name for name in names if name != "reference" and name not in device_implementations(op)]


def inputs(
    op: str, work: Any, dtype: str, *, name: str | None = None, seed: int = 0
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays rounded to `dtype`, except those that the op wants wide (it says so by its name: gates).

    With `name`, a call without tiles gets those of that implementation, for `reference` to prune the same.
    """
    module = workloads(op)
    arrays, options = module.make_call(work, seed)
    wide = jnp.promote_types(dtype, jnp.float32)
    rounded = {n: jnp.asarray(x, wide if "gate" in n else dtype) for n, x in arrays.items()}
    return rounded, options if name is None else module.own_tiles(rounded, options, name)


def compiled(
    op: str, options: dict[str, Any], name: str, *, remat: bool = False, jit: bool = True, like: Any = None
) -> Any:
    """A function of the arrays: outputs, and the gradients of their sum against fixed random cotangents.

    `like`: outputs (or their shapes) whose dtypes the cotangents are rounded to; default: the function's own.
    """
    module = workloads(op)

    def outputs(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        return module.run(arrays, options, name)

    def everything(arrays: dict[str, jax.Array]) -> list[jax.Array]:
        out, pullback = jax.vjp(jax.checkpoint(outputs) if remat else outputs, arrays)
        rng = np.random.default_rng(7)
        cotangents = [
            rng.standard_normal(o.shape).astype(r.dtype) for o, r in zip(out, like or out, strict=True)
        ]
        (grads,) = pullback(tuple(jnp.asarray(c, o.dtype) for c, o in zip(cotangents, out, strict=True)))
        return [*out, *(grads[n] for n in module.DIFFERENTIABLE)]

    return jax.jit(everything) if jit else everything


def expected(op: str, arrays: dict[str, jax.Array], options: dict[str, Any]) -> list[np.ndarray]:
    """The same in float64 by the definition, on the CPU whatever device is tested."""
    module = workloads(op)
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        rounded = jax.eval_shape(lambda a: module.run(a, options, "reference"), arrays)
        exact = {n: jnp.asarray(np.asarray(x, np.float64)) for n, x in arrays.items()}
        return [np.asarray(x) for x in compiled(op, options, "reference", like=rounded)(exact)]


def assert_close(actual: list[Any], wanted: list[np.ndarray], tolerance: float) -> None:
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        a = np.asarray(a, np.float64)
        finite = np.isfinite(w)
        np.testing.assert_array_equal(np.isfinite(a), finite, err_msg=f"result {index}: where it is finite")
        np.testing.assert_array_equal(a[~finite], w[~finite], err_msg=f"result {index}: infinities")
        error = np.abs(a[finite] - w[finite]).max(initial=0) / max(1, np.abs(w[finite]).max(initial=0))
        assert error <= tolerance, f"result {index}: error {error:.2e} > {tolerance:.0e}"


def assert_bitwise_equal(actual: list[Any], wanted: list[Any], what: str) -> None:
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(w), err_msg=f"{what}, result {index}")
