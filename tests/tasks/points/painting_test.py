"""Layers: colours and outlines are blended as they should be, and trails fade over their frames."""

import numpy as np
import pytest

from tasks.points.painting import Painter, Trails, blend
from tasks.points.strokes import Samples, discs, lines

SIZE = (40, 50)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_blending_is_linear_and_exact_at_its_ends() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    before = picture.copy()
    pixel = rng.permutation(SIZE[0] * SIZE[1])[:1000]
    colour, opacity = (
        rng.integers(0, 256, (1000, 3)).astype(np.uint8),
        rng.integers(0, 129, 1000).astype(np.uint8),
    )
    opacity[:2] = 0, 128
    blend(picture, pixel, colour, opacity)
    under = before.reshape(-1, 3)[pixel].astype(float)
    wanted = under + (colour.astype(float) - under) * (opacity / 128)[:, None]
    np.testing.assert_allclose(picture.reshape(-1, 3)[pixel], wanted, atol=0.51)
    np.testing.assert_array_equal(picture.reshape(-1, 3)[pixel[0]], under[0])
    np.testing.assert_array_equal(picture.reshape(-1, 3)[pixel[1]], colour[1])
    untouched = np.setdiff1d(np.arange(SIZE[0] * SIZE[1]), pixel)
    np.testing.assert_array_equal(picture.reshape(-1, 3)[untouched], before.reshape(-1, 3)[untouched])


def test_where_shapes_overlap_the_one_that_covers_most_is_seen() -> None:
    ones = np.ones(5)
    samples = Samples(
        pixel=np.array([7, 7, 8, 8, 9]),
        shape=np.array([0, 1, 0, 1, 0]),
        fill=np.array([0.3, 0.9, 1.0, 1.0, 0.0]),
        edge=np.array([0.3, 1.0, 1.0, 1.0, 1.0]),
        along=ones,
    )
    painter = Painter(SIZE)
    for _ in range(2):  # nothing is left over from an earlier layer
        ink = painter.ink(samples, np.array([RED, BLUE], np.uint8))
        seen = {
            int(p): (tuple(c.tolist()), int(o))
            for p, c, o in zip(ink.pixel, ink.colour, ink.opacity, strict=True)
        }
        assert seen[7] == (BLUE, round(0.9 * 128))
        assert seen[8] == (BLUE, 128)  # of equals the last
        colour, opacity = seen[9]
        assert max(colour) < 40  # only outline: dark,
        assert 40 < opacity < 100  # and half transparent
        assert len(ink.pixel) == 3


def trail_brightness(length: int, frames: int) -> np.ndarray:
    """[frames]: how white a black picture is at the place where a white line was added in frame 1."""
    painter = Painter(SIZE)
    trails, white = Trails(painter, length), np.full((1, 3), 255, np.uint8)
    found = []
    for frame in range(frames):
        if frame == 1:
            line = lines(SIZE, np.array([[10.0, 20.5]]), np.array([[30.0, 20.5]]), 3.0)
        else:  # elsewhere
            line = lines(SIZE, np.array([[10.0, 5.0]]), np.array([[10.0, 9.0]]), 3.0)
        trails.add(frame, line, white)
        picture = np.zeros((*SIZE, 3), np.uint8)
        trails.paint(frame, picture)
        found.append(picture[20, 29, 0])
        assert frame == 1 or picture[8, 9:11].min() > 170  # the newest line
    return np.array(found) / 255


@pytest.mark.parametrize("length", [1, 4, 16])
def test_trails_fade_evenly_and_are_gone_in_time(length: int) -> None:
    found = trail_brightness(length, 20)
    age = np.arange(20) - 1 + (30 - 29.5) / 20
    wanted = np.where(age >= 0, np.clip(1 - age / length, 0, 1), 0)
    np.testing.assert_allclose(found, wanted, atol=0.03 / length + 0.012)


def test_the_older_part_of_a_line_is_paler() -> None:
    painter = Painter(SIZE)
    trails = Trails(painter, 2)
    trails.add(
        5,
        lines(SIZE, np.array([[10.0, 20.5]]), np.array([[40.0, 20.5]]), 3.0),
        np.full((1, 3), 255, np.uint8),
    )
    picture = np.zeros((*SIZE, 3), np.uint8)
    trails.paint(5, picture)
    row = picture[20, 12:39, 0].astype(int)
    assert (np.diff(row) >= 0).all()
    assert row[-1] - row[0] > 100


def test_a_new_trail_covers_an_old_one_and_then_fades_alone() -> None:
    painter = Painter(SIZE)
    trails = Trails(painter, 4)
    across = lines(SIZE, np.array([[10.0, 20.5]]), np.array([[40.0, 20.5]]), 3.0)
    down = lines(SIZE, np.array([[25.5, 5.0]]), np.array([[25.5, 35.0]]), 3.0)
    trails.add(1, across, np.array([RED], np.uint8))
    trails.add(3, down, np.array([BLUE], np.uint8))
    picture = np.zeros((*SIZE, 3), np.uint8)
    trails.paint(3, picture)
    assert picture[20, 25, 2] > picture[20, 25, 0]
    assert picture[20, 15, 0] > 0
    trails.add(6, discs(SIZE, np.zeros((0, 2)), 1.0), np.zeros((0, 3), np.uint8))
    picture = np.zeros((*SIZE, 3), np.uint8)
    trails.paint(6, picture)
    assert picture[..., 0].max() <= 12  # the red one is gone; what is left of it is the outline's grey
    assert picture[20, 25, 2] > 20
    trails.add(9, discs(SIZE, np.zeros((0, 2)), 1.0), np.zeros((0, 3), np.uint8))
    picture = np.zeros((*SIZE, 3), np.uint8)
    trails.paint(9, picture)
    assert not picture.any()
