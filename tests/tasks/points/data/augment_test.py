"""Augmentations: pictures and places change together, and visibility is recomputed."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.points.data.augment import (
    AugmentConfig,
    area_window,
    augment,
    crop_resize,
    draw_colours,
    flip_horizontally,
    flip_vertically,
    recolour,
    recompute_visible,
    roll,
    sway,
)
from tasks.points.data.clips import PointClip, check_clip, inside

CENTRE = np.array([[-1, 0], [0, -1], [0, 0], [0, 1], [1, 0]])


def dotted(frames: int = 5, height: int = 48, width: int = 64, seed: int = 0) -> PointClip:
    """Black frames with a 5 x 5 bright square around each point; points stand still."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.arange(8, height - 6, 14), np.arange(8, width - 6, 14), indexing="ij")
    places = np.stack([rows.ravel(), columns.ravel()], axis=-1)
    video = np.zeros((frames, height, width, 3), np.uint8)
    for y, x in places:
        video[:, y - 2 : y + 3, x - 2 : x + 3] = 255
    tracks = np.repeat(places[:, None] + 0.5, frames, axis=1).astype(np.float32)
    return PointClip(
        video, tracks, np.ones(tracks.shape[:2], bool), rng.integers(0, frames, len(places)).astype(np.int32)
    )


def brightness(clip: PointClip) -> np.ndarray:
    """[N, T]: of the pixel in which each visible point is; 255 for others."""
    found = np.full(clip.visible.shape, 255.0)
    for point, t in np.argwhere(clip.visible):
        y, x = np.floor(clip.tracks_yx[point, t]).astype(int)
        found[point, t] = clip.video[t, y, x].mean()
    return found


def assert_follows(clip: PointClip, least: float = 120.0) -> None:
    """Every visible point lies on its square, or at least near the frame's edge."""
    check_clip(clip, "x")
    clear = inside(clip.tracks_yx - 3, clip.video.shape[1] - 6, clip.video.shape[2] - 6)
    dark = (brightness(clip) < least) & clear
    assert dark.mean() == 0


@pytest.mark.parametrize("rotate", [True, False])
def test_roll(rotate: bool) -> None:
    clip = dotted()
    moved = roll(clip, np.random.RandomState(1), 0.4, rotate=rotate)
    assert_follows(moved)
    assert moved.video.shape == clip.video.shape
    assert np.array_equal(moved.tracks_yx[:, 0], clip.tracks_yx[:, 0])  # it starts where it was
    assert np.abs(moved.tracks_yx - clip.tracks_yx).max() > 3
    assert (moved.query_frames == -1).sum() == (
        ~moved.visible[np.arange(len(clip.query_frames)), clip.query_frames]
    ).sum()


def test_what_was_out_of_sight_does_not_roll_into_it() -> None:
    clip = dotted()
    tracks = clip.tracks_yx.copy()
    tracks[0] = (-300.0, 20.0)
    visible = clip.visible.copy()
    visible[0] = False
    query = clip.query_frames.copy()
    query[0] = -1
    moved = roll(
        replace(clip, tracks_yx=tracks, visible=visible, query_frames=query), np.random.RandomState(0)
    )
    assert not inside(moved.tracks_yx[0], 48, 64).any()


@pytest.mark.parametrize("border", ["constant", "replicate"])
def test_sway(border: str) -> None:
    clip = dotted()
    moved = sway(clip, np.random.RandomState(2), 1.5, border)
    assert_follows(moved)
    assert np.allclose(moved.tracks_yx[:, 0], clip.tracks_yx[:, 0], atol=1e-4)
    # Corners move inward only: everything is still in the frame.
    assert moved.visible.all()
    corner = moved.video[:, 0, 0].max()
    assert corner == 0  # black, or the edge of these frames, which is black too
    bright = replace(clip, video=np.maximum(clip.video, 90))
    edge = sway(bright, np.random.RandomState(2), 1.5, border).video[1:, :2, :2]
    assert (edge.min() < 60) == (border == "constant")


def test_flips() -> None:
    clip = dotted()
    for flip, axis in ((flip_vertically, 0), (flip_horizontally, 1)):
        flipped = flip(clip)
        assert_follows(flipped)
        size = clip.video.shape[1 + axis]
        assert np.allclose(flipped.tracks_yx[..., axis], size - clip.tracks_yx[..., axis])
        again = flip(flipped)
        assert np.array_equal(again.video, clip.video)
        assert np.array_equal(again.tracks_yx, clip.tracks_yx)


def test_crops_rescale_places_and_hide_what_is_cut_off() -> None:
    clip = dotted()
    cut = crop_resize(clip, (4.0, 8.0, 24.0, 32.0), (48, 64))
    assert_follows(cut)
    assert np.allclose(cut.tracks_yx, (clip.tracks_yx - (4, 8)) * 2)
    assert np.array_equal(cut.visible, inside(cut.tracks_yx, 48, 64))
    assert 0 < cut.visible.mean() < 1
    assert (cut.query_frames[~cut.visible.any(axis=1)] == -1).all()
    assert crop_resize(clip, (0.0, 0.0, 48.0, 64.0), (48, 64)) is clip
    squashed = crop_resize(clip, (0.0, 0.0, 48.0, 64.0), (96, 32))
    assert squashed.video.shape == (5, 96, 32, 3)
    assert np.allclose(squashed.tracks_yx, clip.tracks_yx * (2, 0.5))


def test_windows_have_the_area_and_aspect_asked_for() -> None:
    rng, config = np.random.default_rng(0), AugmentConfig()
    windows = np.array([area_window(rng, 100, 150, config) for _ in range(300)])
    area = windows[:, 2] * windows[:, 3] / 15000
    aspect = windows[:, 3] / windows[:, 2]
    assert np.all((area > 0.29) & (area <= 1))
    assert np.all((aspect > 0.48) & (aspect < 2.05))
    assert np.ptp(area) > 0.5
    assert np.all(windows[:, 0] + windows[:, 2] <= 100)
    assert np.all(windows[:, 1] + windows[:, 3] <= 150)
    thin = AugmentConfig(least_aspect=40.0, most_aspect=50.0)
    assert area_window(rng, 100, 150, thin) == (0, 0, 100, 150)


def test_colours() -> None:
    video = dotted().video
    assert np.array_equal(recolour(video, np.eye(3), np.zeros(3)), video)
    swapped = recolour(
        np.tile(np.array([10, 20, 30], np.uint8), (1, 2, 2, 1)), np.eye(3)[::-1], np.full(3, 5.0)
    )
    assert swapped[0, 0, 0].tolist() == [35, 25, 15]
    matrices = [draw_colours(np.random.default_rng(seed)) for seed in range(40)]
    for matrix, offset in matrices:
        grey = matrix @ np.full(3, 100.0) + offset
        assert np.ptp(grey) < 1e-9  # grey stays grey
        assert 30 < grey[0] < 170
    assert len({m.tobytes() for m, _ in matrices}) == 40


def test_all_together_and_none() -> None:
    clip = dotted()
    same = augment(clip, np.random.default_rng(0), AugmentConfig())
    assert np.array_equal(same.video, clip.video)
    assert np.array_equal(same.tracks_yx, clip.tracks_yx)
    everything = AugmentConfig(
        roll=1.0,
        homography=1.0,
        flip_horizontal=1.0,
        flip_vertical=1.0,
        crop=1.0,
        strength=0.5,
        least_area=0.7,
    )
    for seed in range(6):
        moved = augment(clip, np.random.default_rng(seed), everything, (72, 96))
        assert moved.video.shape == (5, 72, 96, 3)
        assert_follows(moved, 90.0)
        assert moved.tracks_yx.dtype == np.float32
    a, b = (augment(clip, np.random.default_rng(7), everything) for _ in range(2))
    assert np.array_equal(a.video, b.video)


def test_one_option_does_not_change_anothers_draws() -> None:
    """The same shifts, whether frames are mirrored first or not."""
    clip = dotted()
    rolls = AugmentConfig(roll=1.0, rotate=False, strength=4.0)
    plain = augment(clip, np.random.default_rng(3), rolls)
    flipped = augment(clip, np.random.default_rng(3), replace(rolls, flip_horizontal=1.0))
    size = np.array([48, 64])
    shift = np.mod(plain.tracks_yx - clip.tracks_yx, size)
    again = np.mod(flipped.tracks_yx - flip_horizontally(clip).tracks_yx, size)
    assert np.ptp(shift[0], axis=0).min() > 0
    assert np.array_equal(shift, again)


def test_query_frames_that_are_no_longer_visible_are_any() -> None:
    clip = dotted()
    hidden = clip.tracks_yx.copy()
    hidden[0, clip.query_frames[0]] = (-5.0, 3.0)
    again = recompute_visible(replace(clip, tracks_yx=hidden))
    assert again.query_frames[0] == -1
    assert np.array_equal(again.query_frames[1:], clip.query_frames[1:])
    assert again.visible.sum() == clip.visible.sum() - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roll": 1.5}, "augment.roll"),
        ({"border": "mirror"}, "'constant' or 'replicate'"),
        ({"strength": -1.0}, "augment.strength"),
        ({"least_area": 0.0}, "augment.least_area"),
        ({"least_aspect": 3.0}, "augment.least_aspect"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**options)
