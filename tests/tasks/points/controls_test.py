"""The controls: points that stay, and Lucas-Kanade on exact warps, occlusion, and nothing to hold on to."""

import numpy as np
import pytest

from tasks.points.controls import LucasKanade, lucas_kanade, static

SIZE = 96


def texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture that is known at any place, so that it can be warped exactly."""
    rng = np.random.default_rng(5)
    waves, phases, colours = (
        rng.uniform(-0.7, 0.7, (40, 2)),
        rng.uniform(0, 6.3, 40),
        rng.uniform(0, 1, (40, 3)),
    )
    picture = np.sin(x[..., None] * waves[:, 0] + y[..., None] * waves[:, 1] + phases) @ colours
    return np.clip(128 + 18 * picture, 0, 255).astype(np.uint8)


def warped_video(matrices: np.ndarray) -> np.ndarray:
    """Frames whose pixel at raster (x, y) shows the texture at matrix^-1 (x, y, 1)."""
    y, x = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    places = np.stack([x, y, np.ones_like(x)], axis=-1)
    frames = []
    for inverse in np.linalg.inv(matrices):
        moved = places @ inverse.T
        frames.append(texture(moved[..., 0] / moved[..., 2], moved[..., 1] / moved[..., 2]))
    return np.stack(frames)


def turning(frames: int, drift: float = 1.0) -> np.ndarray:
    """Homographies [T, 3, 3]: rotation about the middle, zoom, drift, a little perspective."""
    t = np.arange(frames)
    angle, zoom = 0.01 * t, 1.0 + 0.004 * t
    matrices = np.zeros((frames, 3, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom * np.cos(angle)
    matrices[:, 0, 1], matrices[:, 1, 0] = -zoom * np.sin(angle), zoom * np.sin(angle)
    matrices[:, 2, 0] = 1e-5 * t
    matrices[:, 2, 2] = 1
    middle = np.array([[1, 0, SIZE / 2], [0, 1, SIZE / 2], [0, 0, 1]])
    matrices = middle @ matrices @ np.linalg.inv(middle)
    matrices[:, 0, 2] += drift * t
    return matrices


def true_tracks(matrices: np.ndarray, query_tyx: np.ndarray) -> np.ndarray:
    at = np.linalg.inv(matrices)[query_tyx[:, 0].astype(int)]
    start = np.stack([query_tyx[:, 2], query_tyx[:, 1], np.ones(len(query_tyx))], axis=-1)
    on_texture = np.einsum("qij,qj->qi", at, start)
    moved = np.einsum("tij,qj->qti", matrices, on_texture)
    return (moved[..., :2] / moved[..., 2:])[..., ::-1]


def test_static_points_stay_and_are_seen():
    query = np.array([[1.0, 3.0, 7.5], [0.0, 2.0, 2.0]])
    found = static(np.zeros((4, 8, 8, 3), np.uint8), query)
    assert found.tracks_yx.tolist() == [[[3.0, 7.5]] * 4, [[2.0, 2.0]] * 4]
    assert found.visible.all()


def test_lucas_kanade_follows_an_exact_warp_both_ways():
    frames = 12
    matrices = turning(frames)
    rng = np.random.default_rng(0)
    query = np.concatenate([rng.integers(0, frames, (20, 1)), rng.uniform(30, 66, (20, 2))], axis=1).astype(
        float
    )
    found, truth = lucas_kanade(warped_video(matrices), query), true_tracks(matrices, query)
    inside = ((truth > 10) & (truth < SIZE - 10)).all(axis=-1)
    assert inside.mean() > 0.9
    assert found.visible[inside].mean() > 0.97
    error = np.linalg.norm(found.tracks_yx - truth, axis=-1)[found.visible & inside]
    assert error.mean() < 0.15
    assert error.max() < 1.0


def test_forward_only_leaves_what_is_before_the_query():
    matrices = turning(6)
    query = np.array([[3.0, 48.0, 48.0]])
    found = LucasKanade(backward=False)(warped_video(matrices), query)
    assert found.visible[0].tolist() == [False] * 3 + [True] * 3
    assert found.tracks_yx[0, :4].tolist() == [[48.0, 48.0]] * 4
    assert np.abs(found.tracks_yx - true_tracks(matrices, query))[0, 3:].max() < 0.3


def test_a_covered_point_is_lost_and_stays_so():
    video = warped_video(turning(8, drift=0.0))
    video[4, 28:68, 28:68] = 255 - video[4, 68:28:-1, 68:28:-1]  # something passes in front
    found = lucas_kanade(video, np.array([[0.0, 48.0, 48.0], [0.0, 16.0, 70.0]]))
    assert found.visible[0].tolist() == [True] * 4 + [False] * 4
    assert found.visible[1].all()


def test_points_that_leave_the_frame_are_lost():
    matrices = turning(16, drift=4.0)
    query = np.array([[0.0, 48.0, 60.0]])
    found, truth = lucas_kanade(warped_video(matrices), query), true_tracks(matrices, query)
    gone = truth[0, :, 1] > SIZE
    assert gone.any()
    assert not found.visible[0, gone].any()
    assert found.visible[0, truth[0, :, 1] < SIZE - 12].all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 40), (1, 9, 5), (3, 64, 64)])
def test_a_blank_or_tiny_video_gives_finite_tracks(shape):
    video = np.full((*shape, 3), 90, np.uint8)
    query = np.array([[0.0, shape[1] / 2, shape[2] / 2], [0.0, 0.0, 0.0]])
    found = lucas_kanade(video, query)
    assert np.isfinite(found.tracks_yx).all()
    assert found.visible.shape == (2, shape[0])
