"""The shift and its own backward pass, against the plain equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.fox.projections import shift
from models.fox.span import make_span


@pytest.mark.parametrize("continued", [False, True])
def test_shift_and_its_gradients(continued: bool) -> None:
    """Of the mixing logits, the projection and, where a document goes on, the projection before the call."""
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 3), (2, 7, 3, 4), (2, 3, 4))[: 2 + continued]
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    cotangent = jnp.asarray(rng.normal(size=shapes[1]), jnp.float32)
    reset = jnp.zeros((2, 7), bool).at[0, 3].set(True).at[1, 0].set(True)
    span = make_span(jnp.zeros((2, 7), jnp.int32), jnp.array([5, 5]) if continued else None, reset, None)

    def ours(*arrays: jax.Array) -> jax.Array:
        return shift(*arrays[:2], span, arrays[2] if continued else None)

    def plain(*arrays: jax.Array) -> jax.Array:
        mix, projected = jax.nn.sigmoid(arrays[0])[..., None], arrays[1]
        first = arrays[2][:, None] if continued else jnp.zeros_like(projected[:, :1])
        earlier = jnp.concatenate([first, projected[:, :-1]], axis=1)
        earlier = jnp.where(reset[..., None, None], 0, earlier)
        return mix * earlier + (1 - mix) * projected

    found, wanted = (jax.vjp(function, *arrays) for function in (ours, plain))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    gradients = zip(found[1](cotangent), wanted[1](cotangent), strict=True)
    for gradient, expected in gradients:
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
