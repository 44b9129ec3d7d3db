"""Prepared parameters: the same tracks, whatever is done with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common.dispatch import compiling_for
from models.common.joined import is_joined
from models.tapnext import SlotTracker, init_state, prepare_params, track_clip
from tests.models.tapnext.model_test import logits_of
from tests.models.tapnext.small_tapnext import RUNTIME, queries, random_params, run, small, video

CONFIG = small(depth=2)
PARAMS = random_params(CONFIG)


def prepared(dtype="float32"):
    with compiling_for("gpu", "9.0"):
        return prepare_params(PARAMS, dtype)


def test_the_model_gives_the_same_logits_in_a_clip_and_in_a_stream():
    params, frames, points = prepared(), video(1, 4), queries(1)
    assert is_joined(params)
    expected, _ = run(CONFIG, RUNTIME, PARAMS, frames, points)
    found, _ = run(CONFIG, RUNTIME, params, frames, points)
    np.testing.assert_allclose(logits_of(found), logits_of(expected), atol=2e-5)
    state, parts = init_state(CONFIG, points), []
    for t in range(4):
        output, state = run(CONFIG, RUNTIME, params, frames[:, t : t + 1], state=state)
        parts.append(logits_of(output))
    np.testing.assert_allclose(np.concatenate(parts, axis=2), logits_of(expected), atol=2e-5)


def test_trackers_take_them():
    frames = np.asarray((127.5 * (video(1, 3)[0] + 1)).astype(jnp.uint8))
    points = np.asarray(queries(1)[0, :2])
    found = []
    for params in (PARAMS, prepared()):
        tracker = SlotTracker(CONFIG, params, 3)
        tracker.add(points)
        tracks = [tracker.step(frame[None]).tracks_yx[:2] for frame in frames]
        found.append(np.concatenate(tracks, axis=1))
        np.testing.assert_allclose(
            track_clip(CONFIG, params, frames, points, both_ways=False, chunk=2).tracks_yx,
            found[-1],
            atol=1e-4,
        )
    np.testing.assert_allclose(*found, atol=1e-4)


def test_nothing_is_prepared_twice_and_on_cpus_only_cast():
    params = prepared("bfloat16")
    assert prepare_params(params, "float32") is params
    joined = params["layers"]["0"]["recurrent"]["linear_x+linear_y"]["kernel"]
    assert joined.dtype == jnp.bfloat16
    gates = params["layers"]["0"]["recurrent"]["rglru"]["input_gate+a_gate"]
    assert (gates["kernel"].dtype, gates["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    assert params["coordinate_head"]["dense_0"]["kernel"].dtype == jnp.float32
    here = prepare_params(jax.tree.map(np.asarray, PARAMS), "bfloat16")
    assert not is_joined(here)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(here))


def test_those_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"(?s)not those of this TAPNextConfig.*gate\+value/kernel"):
        run(small(depth=2, mlp_size=20), RUNTIME, prepared(), video(1, 1), queries(1))
