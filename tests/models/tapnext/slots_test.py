"""Slots: what is in use is seen, what is free is not, and a filled slot is a late query, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import NEVER, advance, edit_slots, init_slots
from models.tapnext.slots import slot_mask
from tests.models.tapnext.model_test import logits_of
from tests.models.tapnext.small_tapnext import QUICK_COMPILE, RUNTIME, random_params, run, small, video

CONFIG = small(depth=2)  # what the second layer remembers depends on who saw whom in the first
SLOTS = 6  # of all trackers here: each number is compiled
PARAMS = random_params(CONFIG)
POINTS = {0: (0, 2.3, 7.1), 1: (0, 6.6, 1.2)}
step = jax.jit(advance, static_argnums=(0, 1), compiler_options=QUICK_COMPILE)
edit = jax.jit(edit_slots, compiler_options=QUICK_COMPILE)


def change(state, fill=None, move=None, free=()):
    """`edit_slots` for one stream, from {slot: (t, y, x)}, {slot: (y, x)} and slots."""
    slots = state.in_use.shape[1]
    frame, yx = np.zeros((1, slots), np.int32), np.zeros((1, slots, 2), np.float32)
    flags = np.zeros((3, 1, slots), bool)
    for slot, (t, *place) in (fill or {}).items():
        frame[0, slot], yx[0, slot], flags[0, 0, slot] = t, place, True
    for slot, place in (move or {}).items():
        yx[0, slot], flags[1, 0, slot] = place, True
    flags[2, 0, list(free)] = True
    return edit(state, jnp.asarray(frame), jnp.asarray(yx), *map(jnp.asarray, flags))


def roll(state, frames, edits=None):
    """Frame by frame, with edits {frame: keywords of `change`} before it: (logits [S, T, .], state)."""
    outputs = []
    for t in range(frames.shape[1]):
        if t in (edits or {}):
            state = change(state, **edits[t])
        readout, _, state = step(CONFIG, RUNTIME, PARAMS, frames[:, t : t + 1], state)
        outputs.append(logits_of(readout)[0])
    return np.concatenate(outputs, axis=1), state


def rows_of(state, index):
    """Memory of one slot; -1 is the virgin."""
    index = index % (state.in_use.shape[1] + 1) - state.model.queries.frame.shape[1]
    return [np.asarray(leaf[0])[index] for leaf in jax.tree.leaves(state.model.layers)]


def test_slots_are_the_model_without_slots():
    """Queries given before the first frame, one of them late, one never: as `apply` tracks them."""
    frames = video(1, 6)
    late = POINTS | {3: (2, 3.4, 10.9), 4: (NEVER, 0, 0)}
    found, state = roll(init_slots(CONFIG, SLOTS), frames, {0: {"fill": late}})
    tyx = jnp.array([list(map(float, late[slot])) for slot in (0, 1, 3, 4)])[None]
    expected, _ = run(CONFIG, RUNTIME, PARAMS, frames, tyx)
    np.testing.assert_allclose(found[[0, 1, 3, 4]], logits_of(expected)[0], atol=2e-5)
    assert int(state.model.step[0]) == 6


def test_tracks_do_not_depend_on_how_many_slots_are_free():
    """2 in use of 6 and of 64 give the same; what the free ones hold changes no bit."""
    frames = video(1, 5)
    few, _ = roll(init_slots(CONFIG, SLOTS), frames, {0: {"fill": POINTS}})
    many, _ = roll(init_slots(CONFIG, 64), frames, {0: {"fill": POINTS}})
    np.testing.assert_allclose(many[:2], few[:2], atol=2e-5)
    garbage = {slot: (0, 1.0 + slot / 2, 11.0 - slot) for slot in range(3, SLOTS)}
    edits = {0: {"fill": POINTS | garbage, "free": list(garbage)}, 2: {"fill": {5: (2, 1, 1)}, "free": [5]}}
    dirty, state = roll(init_slots(CONFIG, SLOTS), frames, edits)
    assert np.abs(dirty[3:] - few[3:]).max() > 1e-3
    np.testing.assert_array_equal(dirty[:2], few[:2])
    np.testing.assert_array_equal(state.in_use[0], [True, True] + [False] * (SLOTS - 2))


def test_a_filled_slot_takes_the_virgins_memory_bit_for_bit():
    frames = video(1, 5)
    _, state = roll(init_slots(CONFIG, SLOTS), frames, {0: {"fill": POINTS | {2: (0, 4.4, 4.4)}}})
    virgin = rows_of(state, -1)
    assert any(np.abs(row).max() > 0.01 for row in virgin)
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(rows_of(state, 2), virgin, strict=True))
    others = rows_of(state, 1)
    filled = change(state, fill={2: (5, 1.5, 2.5), 3: (9, 3.0, 3.0)})
    for slot, expected in ((2, virgin), (3, virgin), (-1, virgin), (1, others)):
        for found, row in zip(rows_of(filled, slot), expected, strict=True):
            np.testing.assert_array_equal(found, row)
    np.testing.assert_array_equal(filled.model.queries.frame[0, :, 0], [0, 0, 5, 9, *[NEVER] * 6])
    np.testing.assert_array_equal(filled.in_use[0], [True] * 4 + [False] * 2)


def test_a_slot_filled_at_its_frame_is_the_late_query_bit_for_bit():
    """Slot 2 waits for frame 3 from the start; slot 4, which tracked another point, is filled then."""
    frames, point = video(1, 7), (3, 3.4, 9.9)
    edits = {0: {"fill": POINTS | {2: point, 4: (0, 7.0, 3.0)}}, 3: {"fill": {4: point}}}
    found, state = roll(init_slots(CONFIG, SLOTS), frames, edits)
    np.testing.assert_array_equal(found[4, 3:], found[2, 3:])
    assert np.abs(found[4, :3] - found[2, :3]).max() > 1e-3
    for one, other in zip(rows_of(state, 4), rows_of(state, 2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_virgin_is_what_a_late_query_would_be():
    """Its memory equals that of waiting slots while any waits. With none it attends to itself instead: after
    one frame, when the others are still as if it were not there, it equals the waiting slot of another run.
    """
    frames = video(1, 5)
    late = POINTS | {2: (9, 1, 1), 3: (7, 2, 2)}
    _, waiting = roll(init_slots(CONFIG, SLOTS), frames, {0: {"fill": late}})
    for slot in (2, 3):
        for found, row in zip(rows_of(waiting, slot), rows_of(waiting, -1), strict=True):
            np.testing.assert_array_equal(found, row)
    _, alone = roll(init_slots(CONFIG, SLOTS), frames[:, :1], {0: {"fill": POINTS}})
    _, with_late = roll(init_slots(CONFIG, SLOTS), frames[:, :1], {0: {"fill": POINTS | {2: (9, 1, 1)}}})
    for found, row in zip(rows_of(alone, -1), rows_of(with_late, 2), strict=True):
        np.testing.assert_allclose(found, row, atol=1e-6)


def test_who_sees_whom():
    state = change(init_slots(CONFIG, SLOTS), fill={0: (0, 1, 1), 1: (2, 2, 2), 2: (9, 3, 3)}, free=[2])
    mask = np.asarray(slot_mask(state, 3, jnp.array([[1, 2]])))[0]
    # The image, the slots, the virgin, three that fill up.
    seen = np.array([True] * 3 + [True, True, False, False, False, False] + [False] * 4)
    expected = np.tile(seen, (13, 1))
    np.testing.assert_array_equal(mask[0], expected)  # slot 1 waits
    expected[9, 9] = True  # nothing waits: the virgin sees itself
    np.testing.assert_array_equal(mask[1], expected)


def test_tokens_of_a_frame_fill_up_what_gpus_read_at_once():
    """6 patches of the native image, 24 of a larger one; S + 1 tracks at least."""
    for slots, image_size, tokens in ((1, None, 8), (2, None, 16), (7, (16, 24), 32), (8, (16, 24), 40)):
        state = init_slots(CONFIG, slots, image_size=image_size)
        assert state.model.layers["0"].lru.shape[1] == tokens, (slots, image_size)
        assert state.in_use.shape == (1, slots)


def test_moving_a_slot_gives_it_a_place_and_keeps_its_memory():
    """The same as a second hint of the track in one call."""
    frames = video(1, 6)
    found, _ = roll(init_slots(CONFIG, SLOTS), frames, {0: {"fill": POINTS}, 3: {"move": {1: (1.5, 9.5)}}})
    hints = jnp.array([[[POINTS[0], (-1, 0, 0)], [POINTS[1], (3, 1.5, 9.5)]]], jnp.float32)
    expected, _ = run(CONFIG, RUNTIME, PARAMS, frames, hints)
    np.testing.assert_allclose(found[:2], logits_of(expected)[0], atol=2e-5)


def test_tracked_frames_are_those_from_the_query_on():
    """In chunks too, whose outputs are those of single frames."""
    frames = video(1, 4)
    state = change(init_slots(CONFIG, SLOTS), fill={0: (0, 1, 1), 1: (2, 2, 2)})
    readout, tracked, _ = step(CONFIG, RUNTIME, PARAMS, frames, state)
    expected = [[True] * 4, [False] * 2 + [True] * 2, *[[False] * 4] * 4]
    np.testing.assert_array_equal(tracked[0], expected)
    found, _ = roll(state, frames)
    np.testing.assert_allclose(logits_of(readout)[0], found, atol=2e-5)


@pytest.mark.slow
def test_streams_of_a_batch_are_their_own():
    """Edits and masks of one row leave the other as it was."""
    frames = video(2, 2)
    state = init_slots(CONFIG, SLOTS, batch=2)
    frame, yx = jnp.zeros((2, SLOTS), jnp.int32), jnp.array([[[1.0, 1.0]] * SLOTS, [[5.0, 7.0]] * SLOTS])
    fill = jnp.array([[True] + [False] * (SLOTS - 1), [True] * SLOTS])
    state = edit(state, frame, yx, fill, jnp.zeros_like(fill), jnp.zeros_like(fill))
    found, _, _ = step(CONFIG, RUNTIME, PARAMS, frames, state)
    alone, _, _ = step(
        CONFIG, RUNTIME, PARAMS, frames[:1], change(init_slots(CONFIG, SLOTS), fill={0: (0, 1, 1)})
    )
    np.testing.assert_allclose(logits_of(found)[0, 0], logits_of(alone)[0, 0], atol=1e-5)


def test_shapes_do_not_change_and_errors_are_clear(unchecked_types):
    half = dataclasses.replace(RUNTIME, compute_dtype="bfloat16")
    state = init_slots(CONFIG, 3, dtype="bfloat16", image_size=(16, 24))
    after = jax.eval_shape(lambda x, s: advance(CONFIG, half, PARAMS, x, s)[2], video(1, 2, (16, 24)), state)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (after, state))
    assert shapes[0] == shapes[1]
    for options, name in (({"slots": 0}, "slots"), ({"slots": 2, "batch": 0}, "batch")):
        with pytest.raises(ValueError, match=f"{name} = 0; it must be at least 1"):
            init_slots(CONFIG, **options)
