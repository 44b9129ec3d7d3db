"""Streaming: random chunkings and clip starts give the whole pass, for every head; memory stays what it is.

The shared contract (tests/contracts/state_test.py) checks fixed chunkings, reordering and branching.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.trecvit import TRecViTRuntime, init_mae_state, init_state
from tests.models.trecvit.small_trecvit import (
    kept_tubes,
    random_params,
    run,
    run_mae,
    small,
    small_mae,
    video,
)

RUNTIME = TRecViTRuntime()
FRAMES = 11
MAE = small_mae()
CONFIGS = {
    "classes": small(depth=2),
    "classes, mean over patches": small(pool="gap", state_multiplier=2, conv_width=1),
    "readout": small(head="readout"),
    "dense": small(head="dense", pool="gap", positions="sincos2d"),
    "mae": MAE,
}


def stepper(config):
    """(call for a stretch of frames, empty state)."""
    params = random_params(config)
    if config is MAE:
        kept = kept_tubes(MAE, 2)
        step = functools.partial(run_mae, config, RUNTIME, params)
        return lambda x, state, reset: step(x, kept, state, reset), init_mae_state(config, 2)
    return functools.partial(run, config, RUNTIME, params), init_state(config, 2)


# The shared contract runs every head; here the others are for the long runs.
LONG_RUNS = ("readout", "dense", "mae")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_RUNS)) for name in CONFIGS]
)
def test_random_chunks_and_starts_equal_the_whole_pass(name):
    draw = np.random.default_rng(len(name))
    step, empty = stepper(CONFIGS[name])
    x = video(2, FRAMES)
    for _ in range(3):
        reset = jnp.asarray(draw.random((2, FRAMES)) < 0.25)
        expected, _ = step(x, None, reset)
        state, outputs, start = empty, [], 0
        for size in draw.permutation([1, 1, 3, 3, 3]).tolist():  # few lengths: each is compiled
            part = slice(start, start + size)
            y, state = step(x[:, part], state, reset[:, part])
            outputs.append(y)
            start += size
        assert start == FRAMES
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=2e-5)


def test_logits_of_a_frame_are_those_of_the_clip_up_to_it():
    """Of the model run on frames 0..t alone. (For "classes": the official prefix_logits, in golden/.)"""
    config = CONFIGS["readout"]
    params, x = random_params(config), video(2, 4)
    logits, _ = run(config, RUNTIME, params, x)
    output, _ = run(config, RUNTIME, params, x[:, :3], output="clip")
    np.testing.assert_allclose(logits[:, 2], output.logits, atol=5e-6)
    np.testing.assert_allclose(output.probs, jax.nn.softmax(output.logits), atol=1e-6)


def test_encoding_keeps_the_head_up_to_date():
    config = CONFIGS["classes"]
    params, x, reset = random_params(config), video(2, 3), jnp.zeros((2, 3), bool)
    _, expected = run(config, RUNTIME, params, x, init_state(config, 2), reset)
    _, state = run(config, RUNTIME, params, x, init_state(config, 2), reset, output="encoded")
    assert float(jnp.abs(state.head).max()) > 0.01
    for found, value in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, value, atol=5e-6)


def test_state_is_small_float32_where_it_matters_and_does_not_grow():
    config = small(depth=2, state_multiplier=2)
    state = init_state(config, 3, "bfloat16")
    assert state.layers["1"].lru.shape == (3, 7, 32)
    assert [tap.shape for tap in state.layers["1"].conv] == [(3, 7, 32)] * 2
    dtypes = (state.layers["0"].lru.dtype, state.layers["0"].conv[0].dtype, state.head.dtype)
    assert dtypes == (jnp.float32, jnp.bfloat16, jnp.float32)
    half = TRecViTRuntime(compute_dtype="bfloat16")
    after = jax.eval_shape(
        lambda x, s: run.__wrapped__(config, half, random_params(config), x, s)[1], video(3, 5), state
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    for make in (lambda: init_state(config, 0), lambda: init_mae_state(MAE, 0)):
        with pytest.raises(ValueError, match="batch = 0; it must be at least 1"):
            make()
