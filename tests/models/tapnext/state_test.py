"""Streaming: random chunks, starts and late queries give the whole pass; queries can be replaced.

The shared contract (tests/contracts/state_test.py) checks fixed chunkings, reordering and branching.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import NEVER, init_state
from tests.models.tapnext.model_test import logits_of
from tests.models.tapnext.small_tapnext import RUNTIME, queries, random_params, run, small, video

CONFIG = small()
FRAMES = 11


def stream(state, x, sizes, **options):
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        chosen = {name: value[:, part] for name, value in options.items()}
        output, state = run(CONFIG, RUNTIME, random_params(CONFIG), x[:, part], state=state, **chosen)
        outputs.append(logits_of(output))
        start += size
    assert start == x.shape[1]
    return np.concatenate(outputs, axis=2), state


@pytest.mark.slow
def test_random_chunks_and_starts_equal_the_whole_pass():
    draw = np.random.default_rng(7)
    x = video(2, FRAMES)
    for _ in range(3):
        reset = jnp.asarray(draw.random((2, FRAMES)) < 0.25)
        expected, _ = run(CONFIG, RUNTIME, random_params(CONFIG), x, queries(2), reset=reset)
        sizes = draw.permutation([1, 1, 3, 3, 3]).tolist()  # few lengths: each is compiled
        found, state = stream(init_state(CONFIG, queries(2)), x, sizes, reset=reset)
        np.testing.assert_allclose(found, logits_of(expected), atol=2e-5)
        last = FRAMES - np.array([max(np.flatnonzero(row), default=0) for row in np.asarray(reset)])
        np.testing.assert_array_equal(state.step, last)


def test_packed_clips_equal_each_alone():
    """The queries' frames are counted from every start again."""
    x = video(4, 3)
    alone, _ = run(CONFIG, RUNTIME, random_params(CONFIG), x, queries(4))
    starts = jnp.tile(jnp.arange(6) % 3 == 0, (2, 1))
    packed, _ = run(
        CONFIG, RUNTIME, random_params(CONFIG), x.reshape(2, 6, *x.shape[2:]), queries(2), reset=starts
    )
    found = logits_of(packed).reshape(2, 4, 2, 3, -1).swapaxes(1, 2).reshape(4, 4, 3, -1)
    np.testing.assert_allclose(found, logits_of(alone), atol=2e-5)


def test_a_late_query_can_be_given_just_before_its_frame():
    """Until then its place is not looked at: a slot for "never" may be filled later (issue #145 there)."""
    x, points = video(1, 6), queries(1)
    expected, _ = stream(init_state(CONFIG, points), x, [1] * 6)
    late = points.at[0, 2].set(jnp.array([float(NEVER), 0.0, 0.0]))
    first, state = stream(init_state(CONFIG, late), x[:, :4], [1] * 4)
    output, state = run(CONFIG, RUNTIME, random_params(CONFIG), x[:, 4:5], points, state=state)
    np.testing.assert_array_equal(state.queries.frame[0, :, 0], [0, 0, 4, 90])  # kept, unlike the official
    rest, _ = stream(state, x[:, 5:], [1])
    np.testing.assert_array_equal(np.concatenate([first, logits_of(output), rest], axis=2), expected)


def test_state_is_float32_where_it_matters_and_does_not_grow():
    config = small(depth=2)
    state = init_state(config, queries(3), dtype="bfloat16")
    layer = state.layers["1"]
    assert [leaf.shape for leaf in (layer.lru, *layer.conv)] == [(3, 6 + 4, 24)] * 3
    assert (layer.lru.dtype, layer.conv[1].dtype) == (jnp.float32, jnp.bfloat16)
    after = jax.eval_shape(
        lambda x, s: run.__wrapped__(config, RUNTIME, random_params(config), x, state=s)[1],
        video(3, 5),
        state,
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (after, state))
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="frame width = 10"):
        init_state(config, queries(1), image_size=(8, 10))
