"""Discs, rings and lines cover the area they should, and lie where they should, to parts of a pixel."""

import numpy as np
import pytest

from tasks.points.strokes import Samples, discs, lines, rings

SIZE = (60, 80)  # height, width


def cover(samples: Samples, what: str = "fill") -> np.ndarray:
    """[H, W]: the share of each pixel that a layer of one shape covers."""
    picture = np.zeros(SIZE[0] * SIZE[1])
    assert len(np.unique(samples.pixel)) == len(samples.pixel)
    picture[samples.pixel] = getattr(samples, what)
    return picture.reshape(SIZE)


def middle(picture: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of mass, in raster coordinates."""
    y, x = np.indices(picture.shape) + 0.5
    return np.array([(x * picture).sum(), (y * picture).sum()]) / picture.sum()


@pytest.mark.parametrize("xy", [(30.0, 20.0), (30.5, 20.5), (31.3, 22.8), (40.05, 30.95)])
def test_discs_and_rings_are_round_and_where_they_should_be(xy: tuple[float, float]) -> None:
    centre = np.array([xy])
    disc = discs(SIZE, centre, 5.0, outline=1.5)
    assert cover(disc).sum() == pytest.approx(np.pi * 25, rel=0.02)
    assert cover(disc, "edge").sum() == pytest.approx(np.pi * 6.5**2, rel=0.02)
    np.testing.assert_allclose(middle(cover(disc)), xy, atol=0.03)
    ring = rings(SIZE, centre, 6.0, 2.0, outline=1.0)
    assert cover(ring).sum() == pytest.approx(np.pi * (49 - 25), rel=0.02)
    np.testing.assert_allclose(middle(cover(ring)), xy, atol=0.03)
    assert cover(ring)[int(xy[1]), int(xy[0])] == 0  # hollow


@pytest.mark.parametrize(
    "end",
    [
        (20.0, 0.0),
        (0.0, 20.0),
        (20.0, 20.0),
        (17.0, -9.5),
        (-6.3, 19.0),
        (0.4, 0.2),
        (0.0, 0.0),
        (-12.0, -3.0),
    ],
)
def test_lines_have_their_length_width_and_direction(end: tuple[float, float]) -> None:
    start, step = np.array([[35.3, 28.6]]), np.array(end)
    line = lines(SIZE, start, start + step, 3.0, outline=1.0)
    length = np.hypot(*end)
    assert cover(line).sum() == pytest.approx(3 * length + np.pi * 1.5**2, rel=0.03)  # with round ends
    assert cover(line, "edge").sum() == pytest.approx(5 * length + np.pi * 2.5**2, rel=0.03)
    np.testing.assert_allclose(middle(cover(line)), start[0] + step / 2, atol=0.05)
    if length > 1:
        y, x = np.divmod(line.pixel, SIZE[1])
        way = ((x + 0.5 - start[0, 0]) * end[0] + (y + 0.5 - start[0, 1]) * end[1]) / length**2
        np.testing.assert_allclose(line.along, np.clip(way, 0, 1), atol=1e-4)


def test_many_shapes_are_those_one_by_one() -> None:
    rng = np.random.default_rng(0)
    # Some lie half or wholly outside of the picture.
    start, end = (rng.uniform(-15, 95, (60, 2)) for _ in range(2))
    for many, one in (
        (lines(SIZE, start, end, 2.0), lambda i: lines(SIZE, start[i], end[i], 2.0)),
        (discs(SIZE, start, 3.7), lambda i: discs(SIZE, start[i], 3.7)),
        (rings(SIZE, start, 4.0, 1.2), lambda i: rings(SIZE, start[i], 4.0, 1.2)),
    ):
        assert many.pixel.min() >= 0
        assert many.pixel.max() < SIZE[0] * SIZE[1]
        for i in range(60):
            own = one(slice(i, i + 1))
            mine = many.shape == i
            np.testing.assert_array_equal(np.sort(many.pixel[mine]), np.sort(own.pixel))
            order = np.argsort(many.pixel[mine]), np.argsort(own.pixel)
            np.testing.assert_allclose(many.fill[mine][order[0]], own.fill[order[1]], atol=1e-5)


def test_what_is_cut_off_is_what_lies_outside() -> None:
    """A picture that is a window of a larger one shows the same."""
    rng = np.random.default_rng(1)
    start, end = (rng.uniform(-15, 95, (20, 2)) for _ in range(2))
    for shape in range(20):
        s, e = start[shape : shape + 1], end[shape : shape + 1]
        small = cover(lines(SIZE, s, e, 2.5))
        large = np.zeros(200 * 240)
        whole = lines((200, 240), s + 70, e + 70, 2.5)
        large[whole.pixel] = whole.fill
        np.testing.assert_allclose(small, large.reshape(200, 240)[70:130, 70:150], atol=2e-4)


def test_there_may_be_no_shapes() -> None:
    none = np.zeros((0, 2), np.float32)
    for samples in (discs(SIZE, none, 3.0), rings(SIZE, none, 3.0, 1.0), lines(SIZE, none, none, 2.0)):
        assert len(samples.pixel) == 0
