"""The gated MLP: with joined parameters its first half is one op, whose implementation may be named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import ImplementationError, compiling_for
from models.common.gated_gelu import gated_gelu_mlp
from models.common.joined import join_params
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter

D, F = 64, 128


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "up": {"kernel": normal(2, D, F, scale=D**-0.5), "bias": normal(2, F, seed=1)},
    "down": {"kernel": normal(F, D, seed=2, scale=F**-0.5), "bias": normal(D, seed=3)},
}
X = normal(2, 3, 5, D, seed=4)


def by_hand(x, params):
    gate, value = (x @ params["up"]["kernel"][i] + params["up"]["bias"][i] for i in range(2))
    hidden = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * value
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def test_both_forms_are_the_formula():
    wanted = by_hand(*jax.tree.map(lambda x: np.asarray(x, np.float64), (X, PARAMS)))
    for params in (PARAMS, join_params(PARAMS)):
        np.testing.assert_allclose(gated_gelu_mlp(X, params, "float32"), wanted, atol=2e-5)


def test_the_kernel_may_be_named():
    """It rounds once where XLA rounds four times, so it is no further from the formula."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    x, joined = X.astype(jnp.bfloat16), join_params(half)
    wanted = by_hand(*jax.tree.map(lambda x: np.asarray(x, np.float64), (x, half)))
    with compiling_for("gpu", "9.0", cores=1), extended_interpreter(time_limit=300):
        run = jax.jit(lambda x, params: gated_gelu_mlp(x, params, "bfloat16", "pallas_mosaic_gpu"))
        found = np.asarray(run(x, joined), np.float64)
    plain = np.asarray(gated_gelu_mlp(x, joined, "bfloat16"), np.float64)
    assert not np.array_equal(found, plain)
    assert np.abs(found - wanted).max() <= np.abs(plain - wanted).max() <= 0.1


def test_a_kernel_needs_its_device_and_canonical_parameters_have_none():
    with pytest.raises(ImplementationError, match="pallas_mosaic_gpu: needs an NVIDIA Hopper GPU"):
        gated_gelu_mlp(X, join_params(PARAMS), "bfloat16", "pallas_mosaic_gpu")
    expected = gated_gelu_mlp(X, PARAMS, "bfloat16")
    np.testing.assert_array_equal(gated_gelu_mlp(X, PARAMS, "bfloat16", "pallas_mosaic_gpu"), expected)


def test_under_a_mesh_a_kernel_is_refused():
    refused = pytest.raises(ValueError, match="gated_mlp = 'pallas_mosaic_gpu' is of one device")
    with jax.set_mesh(jax.make_mesh((1,), ("data",))), refused:
        gated_gelu_mlp(X, join_params(PARAMS), "bfloat16", "pallas_mosaic_gpu")


def test_under_a_mesh_none_is_chosen():
    """Kernels see one device's arrays."""
    run = jax.jit(lambda x, params: gated_gelu_mlp(x, params, "bfloat16"))
    joined = join_params(PARAMS)
    with compiling_for("gpu", "9.0"):
        alone = run.trace(X, joined).lower(lowering_platforms=("cuda",)).as_text()
        with jax.set_mesh(jax.make_mesh((1,), ("data",))):
            meshed = run.trace(X, joined).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in alone, "mosaic_gpu" in meshed) == (True, False)
