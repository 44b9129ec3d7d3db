"""Public function: what it computes, what it refuses, who is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import ImplementationError, compiling_for
from kernels.explain import main
from kernels.split_matmul import benchmark, explain, split_matmul
from kernels.split_matmul.api import IMPLEMENTATIONS, PREFERENCE

X, KERNEL, BIAS = jnp.ones((2, 3, 8)), jnp.ones((8, 15)), jnp.ones(15)


def test_parts_are_side_by_side() -> None:
    """By hand: x has one channel; three maps of two features."""
    x, kernel = jnp.asarray([[0.5], [-2.0]]), jnp.asarray([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    bias = jnp.asarray([0.0, 0.0, 10.0, 0.0, 0.0, -1.0])
    for name in ("xla", "reference"):
        first, second, third = split_matmul(x, kernel, bias, 3, implementation=name)
        np.testing.assert_array_equal(first, [[0.5, 1.0], [-2.0, -4.0]])
        np.testing.assert_array_equal(second, [[11.5, 2.0], [4.0, -8.0]])
        np.testing.assert_array_equal(third, [[2.5, 2.0], [-10.0, -13.0]])


def test_only_the_reference_rounds_once() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((64, 8), (8, 12), (12,))]
    found = {name: split_matmul(*arrays, 2, implementation=name)[1] for name in ("xla", "reference")}
    exact = split_matmul(*(y.astype(jnp.float32) for y in arrays), 2, implementation="reference")[1]
    np.testing.assert_array_equal(found["reference"], exact.astype(jnp.bfloat16))
    assert found["xla"].dtype == jnp.bfloat16
    assert (found["xla"] != found["reference"]).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"x": jnp.ones((2, 3, 7))},
            r"kernel must be \[D, P F\] = \[7, a multiple of 3\]; got shape \(8, 15\)",
        ),
        ({"parts": 4}, r"kernel must be .* a multiple of 4\]; got shape \(8, 15\)"),
        ({"parts": 0}, "parts must be a whole number, at least 1; got 0"),
        ({"parts": 3.0}, "parts must be a whole number, at least 1; got 3.0"),
        ({"kernel": jnp.ones((3, 8, 5))}, r"kernel must be"),
        ({"bias": jnp.ones(5)}, r"bias must be \[P F\] = \(15,\); got shape \(5,\)"),
        ({"x": jnp.ones((0, 8))}, r"x must be \[..., D\] without an empty axis; got shape \(0, 8\)"),
        ({"x": jnp.ones((2, 8), jnp.int32)}, "x has dtype int32; use one of float16"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_arguments_are_named(changed: dict[str, jax.Array], message: str) -> None:
    with pytest.raises(ValueError, match=f"split_matmul: {message}"):
        split_matmul(**{"x": X, "kernel": KERNEL, "bias": BIAS, "parts": 3} | changed)


def test_the_kernel_is_chosen_on_hopper_alone() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1280, 768), (768, 2304), (2304,))]
    assert set(PREFERENCE) <= set(IMPLEMENTATIONS) - {"reference"}
    with compiling_for("gpu", "9.0", "NVIDIA H100"):
        lines = [line.split() for line in explain(*shapes, 3).splitlines()]
        assert ["pallas_mosaic_gpu", "runs"] in lines
        assert ["xla", "could", "run"] in lines
    with compiling_for("cpu", None), pytest.raises(ImplementationError, match="needs an NVIDIA Hopper GPU"):
        split_matmul(X, KERNEL, BIAS, 3, implementation="pallas_mosaic_gpu")


def test_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split_matmul", "--shape=R2048,P2"]) == 0
    assert "split_matmul: R2048 D768 F768 P2 bfloat16" in capsys.readouterr().out
    for arguments, message in (
        (["--shape=T3"], "has sizes R, D, F, P; got T"),
        (["--pruning=auto"], "no pruning"),
    ):
        with pytest.raises(SystemExit):
            main(["split_matmul", *arguments])
        assert message in capsys.readouterr().err


def test_the_benchmark_runs_where_the_kernel_does_not() -> None:
    tiny = (benchmark.shape(16, 64, 64, 3, 2),)
    with compiling_for("cpu", None):
        (row,) = benchmark.rows(calls=1, shapes=tiny, only="R16")
    assert (row["case"], row["implementation"], row["ratio"]) == ("R16 D64 F64 P3 bfloat16", "xla", 1.0)
    assert row["us"] > 0
    assert benchmark.verdict([row]) == ""
    with pytest.raises(ValueError, match="part of no shape"):
        benchmark.rows(only="R17")
