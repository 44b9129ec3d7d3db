"""Bad arguments, each with an error that names it; which implementation runs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.explain import main
from kernels.linear_scan import explain, linear_scan, rglru_scan
from kernels.linear_scan.api import IMPLEMENTATIONS, PREFERENCE

pytestmark = pytest.mark.usefixtures("unchecked_types")

SHAPE = (2, 5, 3)
F32 = jnp.zeros(SHAPE)


def linear(**changes: Any) -> dict[str, Any]:
    return {"x": F32, "a": F32, **changes}


def gated(**changes: Any) -> dict[str, Any]:
    return {"x": F32, "gate_x": F32, "gate_a": F32, "a_param": jnp.zeros(3), **changes}


BAD_LINEAR = {
    "x has no batch": ({"x": jnp.zeros((5, 3))}, "x must have 3 axes .batch, time, width.; got shape"),
    "empty": ({"x": jnp.zeros((2, 0, 3))}, "x has an empty axis: shape"),
    "integer x": ({"x": jnp.zeros(SHAPE, int)}, "x has dtype int32; use one of float16, bfloat16"),
    "a unlike x": ({"a": jnp.zeros((2, 5, 1))}, "a must have shape .2, 5, 3.; got .2, 5, 1."),
    "a is a number": ({"a": 0.5}, "a must have shape .2, 5, 3.; got float"),
    "integer a": ({"a": jnp.zeros(SHAPE, int)}, "a has dtype int32; use one of"),
    "complex a": ({"a": F32 + 0j}, "a is complex64 but x is float32.*cast x to complex64"),
    "state of one row": ({"h0": jnp.zeros(3)}, "h0 must have shape .batch, width. = .2, 3.; got .3,."),
    "rounded state": ({"h0": jnp.zeros((2, 3), jnp.bfloat16)}, "h0 must be float32, as h_last is.*bfloat16"),
    "unknown name": ({"implementation": "magic"}, "implementation='magic' does not exist; known ones are"),
    "no name": ({"implementation": []}, "implementation is an empty list"),
}
BAD_GATED = {
    "integer x": ({"x": F32 + 0j}, "x has dtype complex64; use one of float16, bfloat16, float32, float64"),
    "gate_x": ({"gate_x": jnp.zeros((2, 5, 1))}, "gate_x must have shape .2, 5, 3.; got .2, 5, 1."),
    "gate_a": ({"gate_a": jnp.zeros(SHAPE, int)}, "gate_a has dtype int32"),
    "a_param": ({"a_param": jnp.zeros((1, 3))}, "a_param must have shape .3,.; got .1, 3."),
    "h0": ({"h0": jnp.zeros((2, 3), jnp.float16)}, "h0 must be float32"),
    "reset shape": ({"reset": jnp.zeros((5,), bool)}, "reset must have shape .batch, time. = .2, 5."),
    "positions": ({"reset": jnp.zeros((2, 5), int)}, "reset must be bool.*got int32.*reset = position == 0"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_LINEAR.values(), ids=BAD_LINEAR)
def test_linear_scan_names_the_bad_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_scan: {message}"):
        linear_scan(**linear(**changes))


@pytest.mark.parametrize(("changes", "message"), BAD_GATED.values(), ids=BAD_GATED)
def test_rglru_scan_names_the_bad_argument(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rglru_scan: {message}"):
        rglru_scan(**gated(**changes))


def test_every_platform_has_an_implementation() -> None:
    x = jax.ShapeDtypeStruct((8, 4096, 2048), jnp.bfloat16)
    for platform, expected in (("cpu", "xla_scan"), ("tpu", "pallas_mosaic_tpu")):
        with compiling_for(platform):
            lines = explain(x).splitlines()
        assert any(line.split() == [expected, "runs"] for line in lines), lines
    for names in PREFERENCE.values():
        assert set(names) <= set(IMPLEMENTATIONS) - {"reference"}
    with compiling_for("tpu"):
        half = explain(jax.ShapeDtypeStruct(x.shape, jnp.float16))
    assert "takes bfloat16 and float32, but x is float16" in half


def test_a_named_implementation_never_falls_back() -> None:
    with pytest.raises(ImplementationError, match="pallas_mosaic_tpu: needs a TPU"):
        linear_scan(F32, F32, implementation="pallas_mosaic_tpu")
    linear_scan(F32, F32, implementation=["pallas_mosaic_tpu", "associative"])


def test_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["linear_scan", "--shape=B8,T4096,D2048"]) == 0
    printed = capsys.readouterr().out
    for op in ("linear_scan", "rglru_scan"):
        assert f"{op}: B8 T4096 D2048 bfloat16" in printed
    with pytest.raises(SystemExit):
        main(["linear_scan", "--shape=N3"])
    assert "linear_scan has sizes B, T, D; got N." in capsys.readouterr().err
