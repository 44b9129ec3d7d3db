"""The panel beside or below a picture: it fits, it shows what it is told, and any name can be drawn."""

from pathlib import Path

import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.video.overlay import Layout, Overlay, Ranked

NAMES = ("moves right", "Ärger — 動画", "a_name_without_spaces_" * 9, "many words " * 30, "")
SIZES = [(32, 32), (33, 49), (240, 320), (720, 1280), (640, 360), (2160, 3840), (16, 900), (4000, 90)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_everything_fits_at_every_size(height: int, width: int, rows: int) -> None:
    overlay = Overlay(height, width, rows)
    layout = overlay.layout
    assert layout.height % 2 == layout.width % 2 == 0
    assert layout.text >= 15  # legible
    assert layout.picture[0] <= 1080
    assert layout.picture[1] <= 1920
    # The picture keeps its shape, up to the pixel that even sizes cost.
    scale = layout.picture[0] / height
    assert abs(layout.picture[1] - scale * width) <= 2 + 2 * width / height
    assert layout.top + 2 * layout.text + layout.gap + rows * layout.row <= layout.height
    ranked = [Ranked(NAMES[i % len(NAMES)], 1 / (i + 1)) for i in range(rows)]
    film = overlay.draw(np.full((height, width, 3), 200, np.uint8), ranked, "frame 3 of 10", "0:00.12")
    assert film.shape == (layout.height, layout.width, 3)
    assert (film == 200).all(axis=-1).sum() >= 0.98 * layout.picture[0] * layout.picture[1]


def test_bars_are_as_long_as_the_probabilities() -> None:
    overlay = Overlay(360, 360, 3)
    layout = overlay.layout
    ranked = [Ranked("", p) for p in (0.75, 0.25, 0.0)]
    film = overlay.draw(np.zeros((360, 360, 3), np.uint8), ranked, "")
    begin, end = layout.left + layout.text, layout.width - layout.text
    for number, each in enumerate(ranked):
        # A line near the lower edge of the row, where there are no letters.
        line = film[layout.top + 2 * layout.text + layout.gap + number * layout.row + 2 * layout.text - 4]
        colour = line[begin + 3] if each.probability else None
        filled = 0 if colour is None else int((line[begin:end] == colour).all(axis=-1).sum())
        assert abs(filled - each.probability * (end - begin)) <= 6
    best, second = (
        film[layout.top + 2 * layout.text + layout.gap + i * layout.row + 8, begin + 4] for i in (0, 1)
    )
    assert int(best[0]) - int(best[2]) > 100  # the first is orange, the others are not
    assert int(second[0]) - int(second[2]) < 0


def test_pictures_of_another_size_are_brought_to_the_films() -> None:
    overlay = Overlay(240, 320, 5)
    shape = overlay.draw(np.zeros((240, 320, 3), np.uint8), [], "").shape
    assert overlay.draw(np.zeros((100, 50, 3), np.uint8), [], "").shape == shape


def test_wide_pictures_have_the_panel_below() -> None:
    assert Layout.of(720, 1280, 5).top > 0
    assert Layout.of(480, 640, 5).top == 0
    assert Layout.of(1280, 720, 5).left > 0


def test_other_fonts_are_read(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    frame, cyrillic = np.zeros((64, 64, 3), np.uint8), [Ranked("движется", 0.5)]
    assert not np.array_equal(
        Overlay(64, 64, 1, font).draw(frame, cyrillic, ""),
        Overlay(64, 64, 1, font).draw(frame, [cyrillic[0]._replace(name="????????")], ""),
    )
    (tmp_path / "no.ttf").write_bytes(b"no font")
    with pytest.raises(ConfigError, match=r"no\.ttf: not a TrueType"):
        Overlay(64, 64, 1, tmp_path / "no.ttf")
