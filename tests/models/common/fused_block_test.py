"""A frame as one kernel, interpreted: what the layers make of it, up to rounding; and where there is none."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.common.dispatch import compiling_for
from models.common.fused_frame import fused_frame
from models.common.joined import join_params
from models.common.recurrent_state import init_recurrent_state
from models.common.rglru import recurrent_block, residual_block_specs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter
from tests.models.common.rglru_test import normal, random_tree

B, P, D, E, TAPS, FRAMES = 2, 4, 32, 128, 3, 5
PARAMS = random_tree(residual_block_specs(D, E, 2, TAPS, num_layers=2, min_rad=0.5))["recurrent"]
# Two streams: one begins here, the other had seven frames and begins anew at the fourth.
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]])


def stream(params, step):
    state = init_recurrent_state(B, E, TAPS, (P,), jnp.bfloat16)
    state = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=3).astype(leaf.dtype), state)
    found = []
    for t in range(FRAMES):
        x = normal(B, 1, P, D, seed=t).astype(jnp.bfloat16)
        output, state = step(x, params, POSITIONS[:, t, None], state)
        found.append(output)
    return np.asarray(jnp.concatenate(found, axis=1), np.float32), state


def test_frames_are_what_the_layers_make_of_them():
    def step(x, params, positions, state):
        return recurrent_block(x, params, positions, state, jnp.bfloat16)

    with compiling_for("gpu", "9.0", cores=4), extended_interpreter(time_limit=300):
        jitted = jax.jit(step)
        assert "recurrent_frame" in str(
            jitted.trace(
                normal(B, 1, P, D).astype(jnp.bfloat16), join_params(PARAMS), POSITIONS[:, :1],
                init_recurrent_state(B, E, TAPS, (P,), jnp.bfloat16),
            ).jaxpr
        )  # fmt: skip
        found, after = stream(join_params(PARAMS), jitted)
    wanted, state = stream(PARAMS, jax.jit(step))
    np.testing.assert_allclose(found, wanted, atol=2.0**-6 * np.abs(wanted).max())
    np.testing.assert_allclose(after.lru, state.lru, atol=2.0**-7 * np.abs(state.lru).max())
    assert after.lru.dtype == jnp.float32
    for one, other in zip(after.conv, state.conv, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(
            one.astype("float32"), other.astype("float32"), atol=2.0**-7 * np.abs(other).max()
        )


def test_none_where_no_kernel_takes_it():
    state = init_recurrent_state(B, E, TAPS, (P,), jnp.bfloat16)
    x, joined = normal(B, 1, P, D), join_params(PARAMS)
    with compiling_for("gpu", "9.0"):
        assert fused_frame(x, PARAMS, POSITIONS[:, :1], state, jnp.bfloat16) is None, "canonical parameters"
        assert fused_frame(x, joined, POSITIONS[:, :1], state, jnp.float32) is None, "float32"
        several = normal(B, 2, P, D)
        assert fused_frame(several, joined, POSITIONS[:, :2], state, jnp.bfloat16) is None, "two frames"
    with compiling_for("cpu", None):
        assert fused_frame(x, joined, POSITIONS[:, :1], state, jnp.bfloat16) is None
