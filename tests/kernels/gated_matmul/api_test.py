"""Public function: what it computes, what it refuses, who is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.explain import main
from kernels.gated_matmul import benchmark, explain, gated_matmul
from kernels.gated_matmul.api import IMPLEMENTATIONS, PREFERENCE

X, KERNEL, BIAS = jnp.ones((2, 3, 8)), jnp.ones((8, 10)), jnp.ones(10)


def test_the_first_half_is_the_gate() -> None:
    """By hand: one channel, gate 2 x + 1, value 3 x - 1."""
    x, kernel, bias = jnp.asarray([[0.5], [-2.0]]), jnp.asarray([[2.0, 3.0]]), jnp.asarray([1.0, -1.0])
    gate, value = np.asarray([2.0, -3.0]), np.asarray([0.5, -7.0])
    wanted = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * value
    for name in ("xla", "reference"):
        found = gated_matmul(x, kernel, bias, implementation=name)
        np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-4)  # 1 + tanh in float32


def test_only_the_reference_rounds_once() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((64, 8), (8, 12), (12,))]
    found = {name: gated_matmul(*arrays, implementation=name) for name in ("xla", "reference")}
    exact = gated_matmul(*(y.astype(jnp.float32) for y in arrays), implementation="reference")
    np.testing.assert_array_equal(found["reference"], exact.astype(jnp.bfloat16))
    assert found["xla"].dtype == jnp.bfloat16
    assert (found["xla"] != found["reference"]).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"x": jnp.ones((2, 3, 7))},
            r"kernel must be \[D, 2 F\] = \[7, an even number\]; got shape \(8, 10\)",
        ),
        (
            {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)},
            r"kernel must be .* an even number\]; got shape \(8, 9\)",
        ),
        ({"kernel": jnp.ones((2, 8, 5))}, r"kernel must be"),
        ({"bias": jnp.ones(5)}, r"bias must be \[2 F\] = \(10,\); got shape \(5,\)"),
        ({"x": jnp.ones((0, 8))}, r"x must be \[..., D\] without an empty axis; got shape \(0, 8\)"),
        ({"x": jnp.ones((2, 8), jnp.int32)}, "x has dtype int32; use one of float16"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments_are_named(changed: dict[str, jax.Array], message: str) -> None:
    with pytest.raises(ValueError, match=f"gated_matmul: {message}"):
        gated_matmul(**{"x": X, "kernel": KERNEL, "bias": BIAS} | changed)


def test_the_kernel_is_chosen_on_hopper_alone() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1280, 768), (768, 6144), (6144,))]
    assert set(PREFERENCE) <= set(IMPLEMENTATIONS) - {"reference"}
    with compiling_for("gpu", "9.0", "NVIDIA H100"):
        lines = [line.split() for line in explain(*shapes).splitlines()]
        assert ["pallas_mosaic_gpu", "runs"] in lines
        assert ["xla", "could", "run"] in lines
    with compiling_for("cpu", None), pytest.raises(ImplementationError, match="needs an NVIDIA Hopper GPU"):
        gated_matmul(X, KERNEL, BIAS, implementation="pallas_mosaic_gpu")


def test_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gated_matmul", "--shape=R2048,F512"]) == 0
    assert "gated_matmul: R2048 D768 F512 bfloat16" in capsys.readouterr().out
    for arguments, message in (
        (["--shape=T3"], "has sizes R, D, F; got T"),
        (["--pruning=auto"], "no pruning"),
    ):
        with pytest.raises(SystemExit):
            main(["gated_matmul", *arguments])
        assert message in capsys.readouterr().err


def test_the_benchmark_runs_where_the_kernel_does_not() -> None:
    tiny = (benchmark.shape(16, 64, 128, 2),)
    with compiling_for("cpu", None):
        (row,) = benchmark.rows(calls=1, shapes=tiny, only="R16")
    assert (row["implementation"], row["ratio"]) == ("xla", 1.0)
    assert row["us"] > 0
    assert benchmark.verdict([row]) == ""
    with pytest.raises(ValueError, match="part of no shape"):
        benchmark.rows(only="R17")
