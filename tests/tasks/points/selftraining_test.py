"""Self-training by trackers whose answers are known: what counts, what is asked of the student, gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.points.losses import PointLossConfig
from tasks.points.selftraining import (
    PseudoLabels,
    SelfTrainingConfig,
    pseudo_labels,
    self_training_loss,
    student_targets,
    track_both_ways,
    transform_points,
)

FRAMES, SIDE = 6, 16
RNG = np.random.default_rng(0)


class Answer(NamedTuple):
    tracks_yx: jax.Array
    visible_logits: jax.Array
    track_logits: jax.Array | None = None
    layers: None = None


def drift(speed: float = 1.0, hidden: tuple[int, ...] = ()):
    """A causal tracker of a world that moves down by `speed` a frame: the frames say how time runs."""

    def track(video, query_tyx, layers=False):
        del layers
        clock = video[:, :, 0, 0, 0].astype(jnp.float32)  # [B, T]: the frame's own number
        asked = query_tyx[..., 0].astype(jnp.int32)
        start = jnp.take_along_axis(clock, asked, axis=1)
        moved = (clock[:, None, :] - start[..., None]) * speed
        tracks = query_tyx[:, :, None, 1:] + jnp.stack([moved, jnp.zeros_like(moved)], axis=-1)
        causal = jnp.arange(video.shape[1]) >= asked[..., None]
        seen = ~jnp.isin(clock, jnp.array(hidden or (-1,)))[:, None, :] & causal
        return Answer(jnp.where(causal[..., None], tracks, -99.0), jnp.where(seen, 1.0, -1.0))

    return track


def clip() -> jax.Array:
    frames = np.arange(FRAMES, dtype=np.uint8)[:, None, None, None]
    return jnp.asarray(np.broadcast_to(frames, (1, FRAMES, SIDE, SIDE, 3)))


QUERIES = jnp.array([[[2.0, 5.0, 7.0], [0.0, 3.0, 4.0], [5.0, 9.0, 1.0]]])


def test_a_causal_tracker_sees_the_past_backwards() -> None:
    tracks, visible = track_both_ways(drift(), clip(), QUERIES)
    expected_y = QUERIES[..., 1:2] + jnp.arange(FRAMES) - QUERIES[..., :1]
    np.testing.assert_allclose(tracks[..., 0], expected_y)
    np.testing.assert_allclose(tracks[..., 1], jnp.broadcast_to(QUERIES[..., 2:], (1, 3, FRAMES)))
    assert bool(visible.all())


def test_the_second_query_is_a_visible_point_of_the_track_and_not_later() -> None:
    noise = jnp.asarray(RNG.uniform(size=(1, 3, FRAMES)), jnp.float32)
    found = pseudo_labels(drift(hidden=(1,)), clip(), QUERIES, noise, cycle=0.5)
    frame = np.asarray(found.query_tyx[0, :, 0])
    assert (frame <= [2, 0, 5]).all()
    assert 1 not in frame
    expected = [noise[0, q, [t for t in range(FRAMES) if t <= limit and t != 1]].max()
                for q, limit in enumerate((2, 0, 5))]  # fmt: skip
    np.testing.assert_array_equal(noise[0, np.arange(3), frame.astype(int)], expected)
    np.testing.assert_allclose(found.query_tyx[0, :, 1], np.asarray([5, 3, 9]) + frame - [2, 0, 5])
    assert bool(found.consistent.all())


def test_tracks_that_do_not_come_back_do_not_count() -> None:
    """A tracker that runs faster forwards than backwards in time: only a query at its own frame is safe."""

    def unsteady(video, query_tyx, layers=False):
        forward = bool(video[0, 0, 0, 0, 0] < video[0, -1, 0, 0, 0])
        return drift(1.0 if forward else 3.0)(video, query_tyx)

    noise = jnp.linspace(1.0, 0.0, FRAMES)[None, None] * jnp.ones((1, 3, 1))  # the earliest frame wins
    found = pseudo_labels(unsteady, clip(), QUERIES, noise, cycle=0.5)
    assert found.consistent.tolist() == [[False, True, False]]
    wide = pseudo_labels(unsteady, clip(), QUERIES, noise, cycle=5.0)
    assert wide.consistent.tolist() == [[True, True, False]]


def test_a_track_that_is_never_seen_before_its_query_does_not_count() -> None:
    noise = jnp.ones((1, 3, FRAMES))
    found = pseudo_labels(drift(hidden=(0, 1, 2)), clip(), QUERIES, noise, cycle=0.5)
    assert found.consistent.tolist() == [[False, False, True]]


def test_points_are_moved_into_the_students_picture() -> None:
    affine = jnp.tile(jnp.array([[2.0, 0.0, -4.0], [0.0, 0.5, 1.0]]), (1, FRAMES, 1, 1))
    tracks, visible = track_both_ways(drift(), clip(), QUERIES)
    np.testing.assert_allclose(transform_points(affine, tracks)[..., 0], 2 * tracks[..., 0] - 4)
    np.testing.assert_allclose(transform_points(affine, tracks)[..., 1], 0.5 * tracks[..., 1] + 1)
    consistent = jnp.array([[True, True, False]])
    given = student_targets(PseudoLabels(QUERIES, tracks, visible, consistent), affine, (SIDE, SIDE))
    y = 2 * tracks[..., 0] - 4
    np.testing.assert_array_equal(given["visible"], (y >= 0) & (y <= SIDE))
    # The third is not consistent; all three queries are inside.
    assert given["valid"].tolist() == [[True, True, False]]
    np.testing.assert_allclose(given["query_tyx"][0, 0], [2.0, 6.0, 4.5])
    away = affine.at[..., 0, 2].set(-40.0)
    lost = student_targets(PseudoLabels(QUERIES, tracks, visible, consistent), away, (SIDE, SIDE))
    assert not bool(lost["valid"].any())


def test_the_student_learns_and_the_teacher_does_not() -> None:
    def model(params, video, query_tyx, layers=False):
        base = drift()(video, query_tyx)
        logits = jnp.broadcast_to(params["logits"], (*base.tracks_yx.shape[:-1], 2 * SIDE))
        return Answer(base.tracks_yx + params["shift"], base.visible_logits, logits)

    batch = {
        "real_video": clip(),
        "student_video": clip(),
        "student_affine": jnp.tile(jnp.eye(2, 3), (1, FRAMES, 1, 1)),
        "real_query_tyx": QUERIES,
    }

    def loss(student, teacher):
        return self_training_loss(
            lambda *args: model(student, *args),
            lambda *args: model(teacher, *args),
            batch,
            jax.random.key(0),
            SelfTrainingConfig(path="x"),
            PointLossConfig(layers=0.0),
            (SIDE, SIDE),
        )

    params = {"shift": jnp.float32(0.25), "logits": jnp.zeros(2 * SIDE)}
    (value, aux), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, params)
    assert np.isfinite(value)
    total, count = aux["consistent"]
    assert (float(total), float(count)) == (0.0, 3.0)  # a shift of 0.25 each way is more than 4/256 of 16
    steady = params | {"shift": jnp.float32(0.0)}
    (value, aux), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, steady)
    assert float(aux["consistent"][0]) == 3.0
    assert float(jnp.abs(gradients[0]["logits"]).max()) > 1e-3
    assert float(jnp.abs(gradients[1]["logits"]).max()) == 0.0
    assert float(jnp.abs(gradients[1]["shift"])) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom": (0.0, 1.0)}, "zoom"),
        ({"zoom": (0.9, 0.5)}, "zoom"),
        ({"quality": (0, 90)}, "quality"),
        ({"cycle": 0.0}, "cycle"),
        ({"drift": 2.0}, "drift"),
        ({"tracks": 0}, "tracks"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTrainingConfig(path="x", **options)
