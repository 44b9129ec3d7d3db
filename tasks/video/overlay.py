"""Running predictions drawn beside or below a video's pictures: names, bars, percentages, number and time.

Wide pictures get the panel below, others to the right. Small pictures are enlarged, large ones reduced, so
that the text keeps its share of the film. All sizes are even, as codecs want them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.film import (
    BACKGROUND,
    FAINT,
    LEAST,
    TEXT,
    Colour,
    Lettering,
    even,
    show,
    shown_size,
    text_size,
)

_TRACK: Colour = (34, 38, 47)
_BAR: Colour = (62, 76, 102)
_BEST_TRACK: Colour = (42, 45, 52)
_BEST_BAR: Colour = (196, 98, 22)
_BEST_EDGE: Colour = (255, 164, 74)
_BRIGHT: Colour = (255, 255, 255)

_WIDE = 1.5  # width over height from which the panel lies below


class Ranked(NamedTuple):
    """One line of the panel.

    name: of the class.
    probability: in [0, 1].
    """

    name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things lie on the film, in pixels.

    height, width: of the whole film, even.
    picture: (height, width) the pictures are brought to; they lie in the top left corner, or in the middle of
      a taller film.
    left, top: of the panel.
    text: height of the letters.
    rows: lines of the panel.
    """

    height: int
    width: int
    picture: tuple[int, int]
    left: int
    top: int
    text: int
    rows: int

    @classmethod
    def of(cls, height: int, width: int, rows: int) -> "Layout":
        """The layout for pictures of height x width pixels and so many lines."""
        shown = shown_size(height, width)
        if shown[1] >= _WIDE * shown[0]:
            text = text_size(max(shown[1] / 56, shown[0] / 32))
            panel = even(_panel_height(text, rows))
            return cls(shown[0] + panel, max(shown[1], 2 * LEAST), shown, 0, shown[0], text, rows)
        text = text_size(shown[0] / 22)
        whole = max(shown[0], even(_panel_height(text, rows)))
        return cls(whole, shown[1] + even(19 * text), shown, shown[1], 0, text, rows)

    @property
    def gap(self) -> int:
        """Between things."""
        return self.text // 2

    @property
    def row(self) -> int:
        """From one line of the panel to the next."""
        return 2 * self.text + self.gap


def _panel_height(text: int, rows: int) -> int:
    return 3 * text + rows * (2 * text + text // 2) + text // 2


class Overlay:
    """Draws films frame by frame.

    Args:
      height, width: of the video's pictures, in pixels.
      rows: most lines of the panel.
      font: TrueType file for the text; None: Pillow's own, which has plain Latin letters (others lose their
        accents, or become "?").

    Attributes:
      layout: where things lie.

    Raises:
      ConfigError: the font cannot be read.
      ImportError: Pillow is missing.
    """

    def __init__(self, height: int, width: int, rows: int, font: Path | None = None):
        self._images, self._draws = need("PIL.Image", "drawing"), need("PIL.ImageDraw", "drawing")
        self.layout = Layout.of(height, width, rows)
        self._letters = Lettering(self.layout.text, font)
        self._wrapped: dict[str, tuple[tuple[str, ...], Any]] = {}

    def draw(
        self, frame: UInt8[np.ndarray, "H W 3"], ranked: Sequence[Ranked], left: str, right: str = ""
    ) -> UInt8[np.ndarray, "height width 3"]:
        """One frame of the film.

        Args:
          frame: the picture, RGB; of any size.
          ranked: the most likely classes, the best first.
          left, right: at the head of the panel, such as the frame's number and its time.
        """
        layout = self.layout
        film = self._images.new("RGB", (layout.width, layout.height), BACKGROUND)
        film.paste(self._images.fromarray(show(frame, self.layout.picture)), self._corner())
        draw = self._draws.Draw(film)
        begin, end = layout.left + layout.text, layout.width - layout.text
        line = layout.top + layout.gap + layout.text
        draw.text((begin, line), self._letters.known(left), fill=TEXT, font=self._letters.small, anchor="lm")
        draw.text((end, line), self._letters.known(right), fill=FAINT, font=self._letters.small, anchor="rm")
        top = layout.top + 2 * layout.text + layout.gap
        for number, each in enumerate(ranked[: layout.rows]):
            self._row(draw, (begin, top + number * layout.row, end), each, best=number == 0)
        return np.asarray(film)

    def _corner(self) -> tuple[int, int]:
        """Left and top of the picture."""
        layout = self.layout
        below = layout.top > 0
        spare = layout.width - layout.picture[1] if below else layout.height - layout.picture[0]
        return (spare // 2, 0) if below else (0, spare // 2)

    def _row(self, draw: Any, place: tuple[int, int, int], ranked: Ranked, best: bool) -> None:
        begin, top, end = place
        text, bottom = self.layout.text, place[1] + 2 * self.layout.text
        share = min(max(ranked.probability, 0.0), 1.0)
        draw.rectangle((begin, top, end, bottom), fill=_BEST_TRACK if best else _TRACK)
        filled = begin + round(share * (end - begin))
        if filled > begin:
            draw.rectangle((begin, top, filled, bottom), fill=_BEST_BAR if best else _BAR)
        if best:
            draw.rectangle((begin, top, end, bottom), outline=_BEST_EDGE, width=max(2, text // 8))
        colour, middle = _BRIGHT if best else TEXT, top + text
        percent = f"{100 * share:.1f} %"
        draw.text(
            (end - self.layout.gap, middle), percent, fill=colour, font=self._letters.regular, anchor="rm"
        )
        lines, font = self._lines(
            ranked.name, end - begin - 3 * self.layout.gap - round(self._letters.length("100.0 %"))
        )
        for number, line in enumerate(lines):
            at = top + round(2 * text * (number + 0.5) / len(lines))
            stroke = 0.4 if best else 0
            draw.text(
                (begin + self.layout.gap, at), line, fill=colour, font=font, anchor="lm", stroke_width=stroke
            )

    def _lines(self, name: str, room: int) -> tuple[tuple[str, ...], Any]:
        """A name on one line, or smaller on two, cut if it is longer still."""
        if name not in self._wrapped:
            known = self._letters.known(name)
            fits = self._letters.length(known) <= room
            self._wrapped[name] = (
                ((known,), self._letters.regular) if fits else (self._wrap(known, room), self._letters.small)
            )
        return self._wrapped[name]

    def _wrap(self, name: str, room: int) -> tuple[str, ...]:
        first, rest = "", name
        while rest:
            word, _, after = rest.partition(" ")
            longer = f"{first} {word}".strip()
            if self._letters.length(longer, small=True) > room:
                break
            first, rest = longer, after
        lines = [line for line in (first, rest) if line]
        lines[-1] = self._letters.shortened(lines[-1], room, small=True)
        return tuple(lines)
