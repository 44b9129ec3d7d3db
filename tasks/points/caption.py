"""The strip below the pictures of a film of tracks: a line of text, what marks mean, names of the tracks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.film import BACKGROUND, FAINT, TEXT, Lettering, even
from tasks.points.painting import Painter, blend
from tasks.points.strokes import discs, rings

_VISIBLE, _HIDDEN = "visible", "hidden"
_LONGEST = "0:00:00.00"  # room for the text on the right, so that the key beside it does not move


class _Chip(NamedTuple):
    """A name with its colour: where its text begins, and the middle of its line, in pixels of the strip."""

    x: float
    y: float
    name: str


class Caption:
    """Draws the strip.

    Args:
      width: of the film, in pixels.
      text: height of the letters, in pixels.
      names: of the tracks; none: there is no legend.
      colours: of the tracks with names.
      letters: the font.

    Attributes:
      height: of the strip, even.
    """

    def __init__(
        self,
        width: int,
        text: int,
        names: Sequence[str],
        colours: UInt8[np.ndarray, "names 3"],
        letters: Lettering,
    ):
        self._images, self._draws = need("PIL.Image", "drawing"), need("PIL.ImageDraw", "drawing")
        self._width, self._text, self._letters = width, text, letters
        chips = self._laid_out([letters.known(name) for name in names])
        rows = 1 + round((chips[-1].y - self._line(0)) / self._row) if chips else 0
        self.height = even(2 * text + (rows * self._row if rows else 0))
        self._key = width - 2.5 * text - letters.length(_LONGEST, small=True) - self._key_width()
        if self._key < 0.6 * width:  # no room for it beside the text
            self._key = float(width)
        self._empty = self._drawn(chips, colours)

    def draw(self, left: str, right: str) -> UInt8[np.ndarray, "height width 3"]:
        """The strip with two texts at its ends; that on the left is cut where it has no room."""
        strip = self._images.fromarray(self._empty)
        draw, middle, small = self._draws.Draw(strip), self._text, self._letters.small
        right = self._letters.known(right)
        end = float(self._width - self._text)
        draw.text((end, middle), right, fill=FAINT, font=small, anchor="rm")
        end = min(end - self._letters.length(right, small=True), self._key) - self._text
        left = self._letters.shortened(self._letters.known(left), end - self._text, small=True)
        draw.text((self._text, middle), left, fill=TEXT, font=small, anchor="lm")
        return np.asarray(strip)

    @property
    def _row(self) -> float:
        return 1.6 * self._text

    def _line(self, row: int) -> float:
        """Middle of a row of names."""
        return 2 * self._text + (row + 0.4) * self._row

    def _laid_out(self, names: Sequence[str]) -> list[_Chip]:
        chips: list[_Chip] = []
        begin, end, row = float(self._text), float(self._width - self._text), 0
        x = float(begin)
        for name in names:
            room = end - begin - 1.5 * self._text
            name = self._letters.shortened(name, min(room, self._width / 3), small=True)
            wide = self._letters.length(name, small=True)
            if x > begin and x + 1.2 * self._text + wide > end:
                x, row = begin, row + 1
            chips.append(_Chip(x + 1.2 * self._text, self._line(row), name))
            x += 1.2 * self._text + wide + 1.4 * self._text
        return chips

    def _key_width(self) -> float:
        words = self._letters.length(_VISIBLE, small=True) + self._letters.length(_HIDDEN, small=True)
        return words + 3.4 * self._text

    def _drawn(self, chips: Sequence[_Chip], colours: np.ndarray) -> np.ndarray:
        """The strip without what changes: names with their colours, and what the marks mean."""
        text, small = self._text, self._letters.small
        strip = np.empty((self.height, self._width, 3), np.uint8)
        strip[:] = BACKGROUND
        words = [(chip.x, chip.y, chip.name, TEXT) for chip in chips]
        dots = [(chip.x - 0.75 * text, chip.y) for chip in chips]
        colours, circles = colours[: len(chips)], []
        if self._key < self._width:
            x = float(self._key)
            dots.append((x + 0.45 * text, text))
            words.append((x + 1.2 * text, text, _VISIBLE, FAINT))
            x += 2.2 * text + self._letters.length(_VISIBLE, small=True)
            circles.append((x + 0.45 * text, text))
            words.append((x + 1.2 * text, text, _HIDDEN, FAINT))
            colours = np.concatenate([colours, np.array([FAINT], np.uint8)])
        painter, radius = Painter((self.height, self._width)), 0.34 * text
        filled, hollow = (np.array(centres).reshape(-1, 2) for centres in (dots, circles))
        for samples, own in (
            (discs(painter.size, filled, radius, 0.0), colours),
            (rings(painter.size, hollow, 0.8 * radius, 0.4 * radius, 0.0), colours[-1:]),
        ):
            ink = painter.ink(samples, own)
            blend(strip, ink.pixel, ink.colour, ink.opacity)
        picture = self._images.fromarray(strip)
        draw = self._draws.Draw(picture)
        for x, y, word, colour in words:
            draw.text((x, y), word, fill=colour, font=small, anchor="lm")
        return np.asarray(picture)
