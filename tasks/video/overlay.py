"""Running predictions drawn beside or below a video's pictures: names, bars, percentages, number and time.

Wide pictures get the panel below, others to the right. Small pictures are enlarged, large ones reduced, so
that the text keeps its share of the film. All sizes are even, as codecs want them.
"""

import dataclasses
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tasks.common.errors import ConfigError
from tasks.common.optional import need

Colour = tuple[int, int, int]

_BACKGROUND: Colour = (17, 19, 24)
_TRACK: Colour = (34, 38, 47)
_BAR: Colour = (62, 76, 102)
_BEST_TRACK: Colour = (42, 45, 52)
_BEST_BAR: Colour = (196, 98, 22)
_BEST_EDGE: Colour = (255, 164, 74)
_TEXT: Colour = (206, 211, 220)
_BRIGHT: Colour = (255, 255, 255)
_FAINT: Colour = (140, 148, 161)

# Pixels of the film's picture: smaller ones are enlarged until they reach the least, larger ones reduced.
_LEAST, _MOST = 360, (1080, 1920)
_WIDE = 1.5  # width over height from which the panel lies below
_MOST_TEXT = 36


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
        scale = max(1.0, _LEAST / min(height, width))
        scale = min(scale, _MOST[0] / height, _MOST[1] / width)
        shown = (max(2, _even(height * scale)), max(2, _even(width * scale)))
        if shown[1] >= _WIDE * shown[0]:
            text = _text_size(max(shown[1] / 56, shown[0] / 32))
            panel = _even(_panel_height(text, rows))
            return cls(shown[0] + panel, max(shown[1], 2 * _LEAST), shown, 0, shown[0], text, rows)
        text = _text_size(shown[0] / 22)
        whole = max(shown[0], _even(_panel_height(text, rows)))
        return cls(whole, shown[1] + _even(19 * text), shown, shown[1], 0, text, rows)

    @property
    def gap(self) -> int:
        """Between things."""
        return self.text // 2

    @property
    def row(self) -> int:
        """From one line of the panel to the next."""
        return 2 * self.text + self.gap


def _even(size: float) -> int:
    return 2 * round(size / 2)


def _text_size(size: float) -> int:
    return round(min(max(size, 15), _MOST_TEXT))


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
        fonts = need("PIL.ImageFont", "drawing")
        self.layout, self._plain = Layout.of(height, width, rows), font is None
        try:
            self._font = _font(fonts, font, self.layout.text)
            self._small = _font(fonts, font, max(13, round(0.8 * self.layout.text)))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--font={font}: not a TrueType or OpenType font ({error})") from error
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
        film = self._images.new("RGB", (layout.width, layout.height), _BACKGROUND)
        film.paste(self._picture(frame), self._corner())
        draw = self._draws.Draw(film)
        begin, end = layout.left + layout.text, layout.width - layout.text
        line = layout.top + layout.gap + layout.text
        draw.text((begin, line), self._known(left), fill=_TEXT, font=self._small, anchor="lm")
        draw.text((end, line), self._known(right), fill=_FAINT, font=self._small, anchor="rm")
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

    def _picture(self, frame: np.ndarray) -> Any:
        picture = self._images.fromarray(np.ascontiguousarray(frame))
        size = (self.layout.picture[1], self.layout.picture[0])
        if picture.size == size:
            return picture
        resampling = self._images.Resampling
        # Far enlarged, sharp pixels look better than blurred ones.
        far = size[0] >= 3 * picture.width
        return picture.resize(size, resampling.NEAREST if far else resampling.BICUBIC)

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
        colour, middle = _BRIGHT if best else _TEXT, top + text
        percent = f"{100 * share:.1f} %"
        draw.text((end - self.layout.gap, middle), percent, fill=colour, font=self._font, anchor="rm")
        lines, font = self._lines(
            ranked.name, end - begin - 3 * self.layout.gap - round(self._length("100.0 %"))
        )
        for number, line in enumerate(lines):
            at = top + round(2 * text * (number + 0.5) / len(lines))
            stroke = 0.4 if best else 0
            draw.text(
                (begin + self.layout.gap, at), line, fill=colour, font=font, anchor="lm", stroke_width=stroke
            )

    def _length(self, text: str, small: bool = False) -> float:
        return float((self._small if small else self._font).getlength(text))

    def _known(self, text: str) -> str:
        """The text in letters the font has, on one line."""
        text = " ".join(text.split())
        if not self._plain:
            return text
        letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        return "".join(letters).encode("ascii", "replace").decode()

    def _lines(self, name: str, room: int) -> tuple[tuple[str, ...], Any]:
        """A name on one line, or smaller on two, cut if it is longer still."""
        if name not in self._wrapped:
            known = self._known(name)
            fits = self._length(known) <= room
            self._wrapped[name] = ((known,), self._font) if fits else (self._wrap(known, room), self._small)
        return self._wrapped[name]

    def _wrap(self, name: str, room: int) -> tuple[str, ...]:
        first, rest = "", name
        while rest:
            word, _, after = rest.partition(" ")
            longer = f"{first} {word}".strip()
            if self._length(longer, small=True) > room:
                break
            first, rest = longer, after
        lines = [line for line in (first, rest) if line]
        while len(lines[-1]) > 3 and self._length(lines[-1], small=True) > room:
            lines[-1] = lines[-1].removesuffix("...")[:-1].rstrip() + "..."
        return tuple(lines)


def _font(fonts: Any, path: Path | None, size: int) -> Any:
    return fonts.load_default(size=size) if path is None else fonts.truetype(str(path), size)
