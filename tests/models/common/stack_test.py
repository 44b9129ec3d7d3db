"""Running layers: unrolled and scanned runs read the same off every layer. Contracts test the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.stack import read_layers, run_layers


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_every_layers_output_is_read(scan, jit):
    layers = {str(i): {"w": jnp.asarray(np.random.default_rng(i).normal(size=(3, 3)))} for i in range(4)}
    x, offset = jnp.ones((2, 3)), jnp.arange(3)

    def layer(params, x, context, key):
        return jnp.tanh(x @ params["w"] + context)

    options = {"remat": "none", "scan": scan, "saved": ()}

    def run(layers, x):
        return read_layers(layer, layers, x, offset, read=lambda y: y[:, 1:], **options)

    last, kept = (jax.jit(run) if jit else run)(layers, x)
    expected = []
    for i in range(4):
        x = layer(layers[str(i)], x, offset, None)
        expected.append(x)
    np.testing.assert_allclose(last, expected[-1], atol=1e-6)
    np.testing.assert_allclose(kept, jnp.stack(expected)[:, :, 1:], atol=1e-6)
    np.testing.assert_array_equal(run_layers(layer, layers, jnp.ones((2, 3)), offset, **options), last)
