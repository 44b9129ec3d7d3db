"""The linear scan and the RG-LRU against results of the official code (tests/golden/trecvit/README.md).

Every case of a file is found by its keys. Block-diagonal gate maps and parameter gradients are the models'
business: here the gates' pre-activations come from the file.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.linear_scan import linear_scan, log_decay, rglru_scan, sqrt_clip
from kernels.linear_scan.rglru import input_scale

IMPLEMENTATIONS = ("reference", "associative", "xla_scan")
RTOL, ATOL = 1e-5, 2e-6
# Decays in [0.99, 0.9999] over hundreds of steps: float32 sums of either side are off by this much.
SLOW_RTOL, SLOW_ATOL, SLOW_ATOL_DA = 2e-5, 5e-5, 5e-4
# Gradients, relative to the largest entry of the array.
GRADIENT = 2e-5
BF16_ATOL = 0.05

Case = dict[str, np.ndarray]


def cases(path: Path) -> dict[str, Case]:
    """The arrays of a file by case and name."""
    found: dict[str, Case] = {}
    with np.load(path) as file:
        for key in file.files:
            case, _, name = key.partition("/")
            found.setdefault(case, {})[name] = file[key]
    return found


def select(path: Path, *names: str) -> dict[str, Case]:
    """The cases that have all these arrays."""
    return {name: case for name, case in cases(path).items() if set(names) <= set(case)}


def dtype_of(case: Case) -> Any:
    return jnp.dtype(str(case.get("compute_dtype", "float32")))


def decays_slowly(case: Case) -> bool:
    return case["a"].shape[1] >= 100 and float(case["a"].min()) > 0.9


def assert_near(actual: Any, wanted: np.ndarray, name: str, rtol: float = RTOL, atol: float = ATOL) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float32), wanted, rtol=rtol, atol=atol, err_msg=name)


def assert_gradient(actual: Any, wanted: np.ndarray, name: str) -> None:
    assert_near(actual, wanted, name, rtol=0, atol=max(GRADIENT * float(np.abs(wanted).max()), ATOL))


def with_gradients(run: Callable[..., Any], case: Case, *arguments: Any) -> tuple[Any, Any]:
    """(h, h_last), and the gradients of sum(h dy) + sum(h_last dh_last); dy is 0 if the case has none."""

    @jax.jit
    def both(*arguments: Any) -> tuple[Any, Any]:
        outputs, pullback = jax.vjp(run, *arguments)
        given = (
            case.get(name, np.zeros(o.shape)) for name, o in zip(("dy", "dh_last"), outputs, strict=True)
        )
        return outputs, pullback(tuple(jnp.asarray(g, o.dtype) for g, o in zip(given, outputs, strict=True)))

    return both(*arguments)


@pytest.mark.golden("linear_scan*.npz", room="trecvit")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linear_scan(golden_file: Path, implementation: str) -> None:
    found = select(golden_file, "x", "a", "y", "h_last", "reverse")
    assert found, f"{golden_file} has no case"
    for name, case in found.items():
        inputs = {n: jnp.asarray(case[n], dtype_of(case)) for n in ("x", "a")}
        if "h0" in case:
            inputs["h0"] = jnp.asarray(case["h0"])

        def run(inputs: dict[str, jax.Array], case: Case = case) -> tuple[jax.Array, ...]:
            return linear_scan(**inputs, reverse=bool(case["reverse"]), implementation=implementation)

        outputs, grads = with_gradients(run, case, inputs)
        assert outputs[0].dtype == dtype_of(case)
        assert outputs[1].dtype == jnp.float32
        slow = decays_slowly(case)
        rtol, atol = (SLOW_RTOL, SLOW_ATOL) if slow else (RTOL, ATOL)
        if dtype_of(case) == jnp.bfloat16:
            rtol, atol = 0, BF16_ATOL
        assert_near(outputs[0], case["y"], f"{name}/y", rtol, atol)
        assert_near(outputs[1], case["h_last"], f"{name}/h_last", rtol, atol)
        if "dy" in case:
            for n, grad in grads[0].items():
                limit = SLOW_ATOL_DA if slow and n == "a" else atol
                assert_near(grad, case[f"d{n}"], f"{name}/d{n}", rtol, limit)


def gated(case: Case, steps: slice = slice(None)) -> dict[str, jax.Array]:
    """Arguments of `rglru_scan` for some steps of a real case."""
    gates = {"gate_x": "input_gate_preact", "gate_a": "a_gate_preact"}
    found = {ours: jnp.asarray(case[theirs])[:, steps] for ours, theirs in gates.items()}
    x = jnp.asarray(case["x"], dtype_of(case))[:, steps]
    reset = jnp.asarray(case["segment_pos"] == 0)[:, steps]
    return {"x": x, **found, "a_param": jnp.asarray(case["params/a_param"]), "reset": reset}


def complex_parts(case: Case) -> tuple[jax.Array, jax.Array]:
    """(u, a) of a complex case: its arrays hold a real and an imaginary half."""
    gate_x, gate_a = (jnp.asarray(case[f"{name}_preact"]) for name in ("input_gate", "a_gate"))
    log_a = log_decay(gate_a, jnp.asarray(case["params/a_param"]))
    turn = jax.nn.sigmoid(gate_a) * jnp.asarray(case["params/a_imag_param"])
    reset = jnp.asarray(case["segment_pos"] == 0)[..., None]
    a = jnp.where(reset, 0, jnp.exp(log_a) * jnp.exp(1j * turn))
    scale = jnp.where(reset, 1, input_scale(log_a)) * jax.nn.sigmoid(gate_x)
    real, imaginary = jnp.split(jnp.asarray(case["x"]), 2, axis=-1)
    return (real + 1j * imaginary) * scale, a


def halves(z: jax.Array) -> jax.Array:
    return jnp.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.golden("rglru*.npz", room="trecvit")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rglru(golden_file: Path, implementation: str) -> None:
    found = select(golden_file, "x", "segment_pos", "input_gate_preact", "y", "h_last")
    assert found, f"{golden_file} has no case"
    for name, case in found.items():
        h0 = jnp.asarray(case["h0"]) if "h0" in case else None
        if bool(case["only_real"]):
            scan = jax.jit(functools.partial(rglru_scan, implementation=implementation))
            h, h_last = scan(**gated(case), h0=h0)
            assert h.dtype == dtype_of(case)
        else:
            state = None if h0 is None else jax.lax.complex(*jnp.split(h0, 2, axis=-1))
            both = jax.jit(functools.partial(linear_scan, implementation=implementation))
            h, h_last = map(halves, both(*complex_parts(case), state))
        bf16 = dtype_of(case) == jnp.bfloat16
        rtol, atol = (0, BF16_ATOL) if bf16 else (RTOL, ATOL)
        assert_near(h, case["y"], f"{name}/y", rtol, atol)
        assert_near(h_last, case["h_last"], f"{name}/h_last", rtol, atol)


@pytest.mark.golden("rglru*.npz", room="trecvit")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rglru_gradients(golden_file: Path, implementation: str) -> None:
    """dh0, and dx through the gate maps of the file: x enters directly and by both pre-activations."""
    found = select(golden_file, "x", "segment_pos", "input_gate_preact", "dy", "params/a_gate/w")
    assert found, f"{golden_file} has no case"
    for name, case in found.items():
        if not bool(case["only_real"]):
            continue
        h0 = jnp.asarray(case["h0"]) if "h0" in case else None

        def run(
            x: jax.Array, a_param: jax.Array, h0: jax.Array | None, case: Case = case
        ) -> tuple[jax.Array, ...]:
            gates = {
                f"gate_{ours}": block_map(x, case[f"params/{theirs}/w"], case[f"params/{theirs}/b"])
                for ours, theirs in (("x", "input_gate"), ("a", "a_gate"))
            }
            arguments = gated(case) | {"x": x, "a_param": a_param} | gates
            return rglru_scan(**arguments, h0=h0, implementation=implementation)

        x, a_param = jnp.asarray(case["x"]), jnp.asarray(case["params/a_param"])
        _, (dx, da_param, dh0) = with_gradients(run, case, x, a_param, h0)
        assert_gradient(dx, case["dx"], f"{name}/dx")
        assert_gradient(da_param, case["dparams/a_param"], f"{name}/dparams/a_param")
        if "dh0" in case:
            assert_gradient(dh0, case["dh0"], f"{name}/dh0")


def block_map(x: jax.Array, weight: np.ndarray, bias: np.ndarray) -> jax.Array:
    """A block-diagonal affine map; contiguous blocks of channels."""
    blocks = x.reshape(*x.shape[:2], weight.shape[0], -1)
    product = jnp.einsum("bthi,hij->bthj", blocks, weight, precision="highest")
    return (product + bias).reshape(*x.shape[:2], -1)


@pytest.mark.golden("rglru*.npz", room="trecvit")
def test_rglru_step_by_step(golden_file: Path) -> None:
    """One call per step, each from the state that the one before returned."""
    step = jax.jit(rglru_scan)
    for name, case in select(golden_file, "y_decode", "h_decode").items():
        state = jnp.asarray(case.get("h0", np.zeros(case["h_last"].shape)), jnp.float32)
        for t in range(case["x"].shape[1]):
            y, state = step(**gated(case, slice(t, t + 1)), h0=state)
            assert_near(y[:, 0], case["y_decode"][:, t], f"{name}/y_decode at {t}")
            assert_near(state, case["h_decode"][:, t], f"{name}/h_decode at {t}")


@pytest.mark.golden("rglru*.npz", room="trecvit")
def test_decay_of_initial_parameters(golden_file: Path) -> None:
    """With the gate at 1/8 (c = 8), a is the radius that the parameters were drawn for."""
    for name, case in select(golden_file, "a_param", "radius").items():
        a_param = jnp.asarray(case["a_param"])
        gate_a = jnp.full(a_param.shape, -np.log(7.0), jnp.float32)
        assert_near(jnp.exp(log_decay(gate_a, a_param)), case["radius"], f"{name}/radius")


@pytest.mark.golden("rglru*.npz", room="trecvit")
def test_derivative_of_the_square_root_is_clipped(golden_file: Path) -> None:
    for name, case in select(golden_file, "max_gradient").items():
        assert float(case["max_gradient"]) == 1000
        y, pullback = jax.vjp(sqrt_clip, jnp.asarray(case["x"]))
        assert_near(y, case["y"], f"{name}/y")
        assert_near(pullback(jnp.asarray(case["dy"]))[0], case["dx"], f"{name}/dx")
