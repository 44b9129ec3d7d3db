"""Films of tracks: marks lie where the points are, in colours that can be told apart, and everything fits."""

import time
from pathlib import Path

import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.points.overlay import MOST_NAMES, TrackOverlay, track_colours

SIZES = [(32, 32), (33, 49), (240, 320), (720, 1280), (640, 360), (2160, 3840), (16, 900), (900, 16)]
NAMES = ("left hand", "Ärger — 動画", "a_name_without_spaces_" * 9, "many words " * 30, "")


def grid(count: int, height: float, width: float) -> np.ndarray:
    steps = (np.arange(count) + 0.5) / count
    return np.stack(np.meshgrid(steps * width, steps * height), -1).reshape(-1, 2).astype(np.float32)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("names", [None, NAMES[:1], (NAMES * 3)[:MOST_NAMES], NAMES * 6])
def test_everything_fits_at_every_size(height: int, width: int, names: tuple[str, ...] | None) -> None:
    count = 4 if names is None else len(names)
    start_xy = grid(6, height, width)[:count]
    overlay = TrackOverlay(height, width, start_xy, names)
    assert overlay.size[0] % 2 == overlay.size[1] % 2 == 0
    assert overlay.picture[0] <= 1080
    assert overlay.picture[1] <= 1920
    frame = np.full((height, width, 3), 200, np.uint8)
    for number in range(3):
        xy = start_xy + np.float32(number * height / 20)
        film = overlay.draw(frame, xy, np.arange(count) % 2 == 0, f"frame {number}" * 9, "0:00:12.34")
        assert film.shape == (*overlay.size, 3)
    shown = film[: overlay.picture[0]]
    margin = (overlay.size[1] - overlay.picture[1]) // 2
    assert (shown[:, margin : margin + overlay.picture[1]] == 200).all(-1).mean() > 0.5
    if margin:
        assert shown[:, : margin - 1].max() < 40


def marked(visible: bool, xy: tuple[float, float], size: tuple[int, int] = (360, 480)) -> np.ndarray:
    """The picture with one mark of the track's colour, on black."""
    point = np.array([xy], np.float32)
    overlay = TrackOverlay(*size, point, trail=4)
    film = overlay.draw(np.zeros((*size, 3), np.uint8), point, np.array([visible]), "")
    return film[: overlay.picture[0], : overlay.picture[1]].astype(float).max(axis=-1)


@pytest.mark.parametrize("xy", [(100.0, 50.0), (100.5, 50.5), (33.25, 201.7), (0.0, 0.0), (480.0, 360.0)])
@pytest.mark.parametrize("visible", [True, False])
def test_marks_lie_where_points_are(xy: tuple[float, float], visible: bool) -> None:
    picture = marked(visible, xy)
    inside = 5 < xy[0] < 475 and 5 < xy[1] < 355
    y, x = np.indices(picture.shape) + 0.5
    weight = np.where(picture > 20, picture, 0)
    assert weight.sum() > 0
    assert np.hypot(x - xy[0], y - xy[1])[weight > 0].max() < 7
    if inside:
        middle = np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()
        np.testing.assert_allclose(middle, xy, atol=0.1)
        centre = picture[int(xy[1]), int(xy[0])]
        assert (centre > 200) if visible else (centre < 60)  # a disc, a ring


def test_points_that_are_not_known_are_not_drawn() -> None:
    point = np.full((1, 2), np.nan, np.float32)
    overlay = TrackOverlay(360, 480, np.zeros((1, 2), np.float32))
    for visible in (True, False):
        film = overlay.draw(np.full((360, 480, 3), 90, np.uint8), point, np.array([visible]), "")
        assert (film[:360, :480] == 90).all()


def test_trails_are_drawn_where_points_were_seen_only() -> None:
    overlay = TrackOverlay(360, 480, np.array([[50.0, 100.0]]), trail=16)
    frame = np.zeros((360, 480, 3), np.uint8)
    seen = [True, True, False, False, True, True]
    for number, visible in enumerate(seen):
        at = np.array([[50 + 60.0 * number, 100]], np.float32)
        film = overlay.draw(frame, at, np.array([visible]), "")
    row = film[100, :480].max(axis=-1)
    assert row[70:90].min() > 60  # from the first place to the second
    assert row[130:145].max() == row[190:205].max() == row[250:265].max() == 0  # from, in and out of hiding
    assert row[310:330].min() > row[70:90].max()  # the newer part is brighter
    without = TrackOverlay(360, 480, np.array([[50.0, 100.0]]), trail=0)
    for number in range(2):
        film = without.draw(frame, np.array([[50 + 60.0 * number, 100]], np.float32), np.array([True]), "")
    assert film[100, 60:100].max() == 0


def test_places_are_scaled_with_the_picture() -> None:
    """Small pictures are enlarged, and a mark stays on what it marks."""
    frame = np.zeros((90, 120, 3), np.uint8)
    frame[40:42, 70:72] = 255
    overlay = TrackOverlay(90, 120, np.array([[71.0, 41.0]]))
    assert overlay.picture == (360, 480)
    plain = overlay.fit(frame).max(axis=-1) > 100
    film = overlay.draw(frame, np.array([[71.0, 41.0]], np.float32), np.array([False]), "")
    y, x = np.indices(plain.shape) + 0.5
    assert (x[plain].mean(), y[plain].mean()) == (284, 164)
    ring = np.abs(film[:360].astype(int) - overlay.fit(frame)).max(axis=-1) > 60
    assert (x[ring].mean(), y[ring].mean()) == pytest.approx((284, 164), abs=0.2)


def test_colours_are_those_of_places_and_differ() -> None:
    few = track_colours(grid(3, 100, 200), 100, 200)
    apart = np.abs(few[:, None].astype(int) - few).sum(-1) + 999 * np.eye(9, dtype=int)
    assert apart.min() > 90
    many = track_colours(grid(16, 100, 200), 100, 200)
    assert many.shape == (256, 3)
    assert (many.max(axis=1) == 255).all()  # bright
    near = np.abs(many[17].astype(int) - many[18]).sum()
    assert near < np.abs(many[17].astype(int) - many[238]).sum()
    assert track_colours(np.array([[5.0, 5.0]]), 10, 10).shape == (1, 3)


def test_the_legend_has_the_colours_of_the_tracks() -> None:
    start_xy = grid(3, 360, 480)[:6]
    plain = TrackOverlay(360, 480, start_xy)
    named = TrackOverlay(360, 480, start_xy, [f"point {n}" for n in range(6)])
    assert named.size[0] > plain.size[0]
    film = named.draw(np.zeros((360, 480, 3), np.uint8), start_xy, np.ones(6, bool), "")
    legend = film[named.picture[0] :].reshape(-1, 3)
    for colour in named.colours:
        assert (np.abs(legend.astype(int) - colour).max(-1) < 4).sum() > 20
    crowded = TrackOverlay(360, 480, grid(6, 360, 480), [f"point {n}" for n in range(36)])
    assert crowded.size == plain.size


def test_other_fonts_are_read(tmp_path: Path) -> None:
    (tmp_path / "no.ttf").write_bytes(b"no font")
    with pytest.raises(ConfigError, match=r"no\.ttf: not a TrueType"):
        TrackOverlay(64, 64, grid(1, 64, 64), font=tmp_path / "no.ttf")


@pytest.mark.timing
def test_many_points_are_drawn_quickly() -> None:
    """256 points that move by some 4 pixels a frame, at 720p: about 10 ms a frame (here with room for a slow
    machine)."""
    start_xy = grid(16, 720, 1280)
    overlay = TrackOverlay(720, 1280, start_xy)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (720, 1280, 3)).astype(np.uint8)
    angle = rng.uniform(0, 2 * np.pi, 256)
    step = 4 * np.stack([np.cos(angle), np.sin(angle)], -1)
    visible = rng.uniform(size=256) > 0.1
    times = []
    for number in range(60):
        xy = (start_xy + step * (number % 30)).astype(np.float32)
        begin = time.process_time()
        overlay.draw(picture, xy, visible, f"frame {number} of 60", "0:01.23")
        times.append(time.process_time() - begin)
    assert np.median(times[20:]) < 0.015
