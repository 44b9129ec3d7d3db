"""Frames as one kernel, interpreted: what the layers make of them, but for rounding; where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import compiling_for
from models.common.fused_block import fused_block
from models.common.joined import join_params
from models.common.recurrent_state import init_recurrent_state
from models.common.rglru import recurrent_block, residual_block_specs
from tests.kernels.mosaic_gpu_interpreter import extended_interpreter
from tests.models.common.rglru_test import normal, random_tree

B, P, D, E, TAPS, FRAMES = 2, 4, 32, 128, 3, 5
PARAMS = random_tree(residual_block_specs(D, E, 2, TAPS, num_layers=2, min_rad=0.5))["recurrent"]
# Two streams: one begins here, the other had seven frames and begins anew at the fourth.
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 0, 1]])


def memory(tokens=P):
    state = init_recurrent_state(B, E, TAPS, (tokens,), jnp.bfloat16)
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=3).astype(leaf.dtype), state)


def step(x, params, positions, state):
    return recurrent_block(x, params, positions, state, jnp.bfloat16)


def stream(params, jitted):
    found, state = [], memory()
    for t in range(FRAMES):
        x = normal(B, 1, P, D, seed=t).astype(jnp.bfloat16)
        output, state = jitted(x, params, POSITIONS[:, t, None], state)
        found.append(output)
    return jnp.concatenate(found, axis=1), state


def assert_alike(found, wanted):
    (output, after), (expected, state) = found, wanted
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(
        np.asarray(output, np.float32), expected, atol=2.0**-6 * np.abs(expected).max()
    )
    np.testing.assert_allclose(after.lru, state.lru, atol=2.0**-7 * np.abs(state.lru).max())
    assert after.lru.dtype == jnp.float32
    for one, other in zip(after.conv, state.conv, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(
            one.astype("float32"), other.astype("float32"), atol=2.0**-7 * np.abs(other).max()
        )


def test_frames_are_what_the_layers_make_of_them():
    with compiling_for("gpu", "9.0", cores=4), extended_interpreter(time_limit=300):
        jitted = jax.jit(step)
        x = normal(B, 1, P, D).astype(jnp.bfloat16)
        program = jitted.trace(x, join_params(PARAMS), POSITIONS[:, :1], memory()).jaxpr
        assert "recurrent_frame" in str(program)
        found = stream(join_params(PARAMS), jitted)
    assert_alike(found, stream(join_params(PARAMS), jax.jit(step)))


@pytest.mark.parametrize(("frames", "remembers"), [(1, False), (2, True), (5, True)])
def test_clips_are_what_the_layers_make_of_them(frames: int, remembers: bool):
    """Of tokens that are no whole group; shorter than the convolution's memory, too."""
    tokens = 5
    x = normal(B, frames, tokens, D, seed=7).astype(jnp.bfloat16)
    positions, state = POSITIONS[:, :frames], memory(tokens)
    if not remembers:
        positions, state = jnp.broadcast_to(jnp.arange(frames), (B, frames)), None
    with compiling_for("gpu", "9.0", cores=4), extended_interpreter(time_limit=300):
        jitted = jax.jit(step)
        program = jitted.trace(x, join_params(PARAMS), positions, state).jaxpr
        assert "recurrent_clip" in str(program)
        found = jitted(x, join_params(PARAMS), positions, state)
    assert_alike(found, jax.jit(step)(x, join_params(PARAMS), positions, state))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_memory_keeps_its_dtype(frames: int):
    """Whatever dtype the layers compute in: a stream's step is compiled once."""
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), memory(8))
    x = normal(B, frames, 8, D).astype(jnp.bfloat16)
    for target in (("gpu", "9.0"), ("cpu", None)):
        with compiling_for(*target):
            _, after = jax.eval_shape(step, x, join_params(PARAMS), POSITIONS[:, :frames], state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        )


def test_none_where_no_kernel_takes_it():
    joined = join_params(PARAMS)

    def fused(frames, params=joined, dtype=jnp.bfloat16, axes=(B,), state=None):
        return fused_block(normal(*axes, frames, P, D), params, POSITIONS[:, :frames], state, dtype)

    with compiling_for("gpu", "9.0"):
        for frames in (1, 2):
            assert fused(frames, PARAMS, state=memory()) is None, "canonical parameters"
            assert fused(frames, dtype=jnp.float32, state=memory()) is None, "float32"
        no_tubes = fused_block(normal(B, 2, D), joined, POSITIONS[:, :2], None, jnp.bfloat16)
        assert no_tubes is None, "no tokens side by side"
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            assert fused(2) is None, "a mesh"
    with compiling_for("cpu", None):
        assert fused(1, state=memory()) is None
        assert fused(2) is None
