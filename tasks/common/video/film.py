"""How films for people look, whatever is drawn on them: the size of the picture, colours, lettering."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.errors import ConfigError
from tasks.common.optional import need

Colour = tuple[int, int, int]

BACKGROUND: Colour = (17, 19, 24)
TEXT: Colour = (206, 211, 220)
FAINT: Colour = (140, 148, 161)

LEAST = (
    360  # pixels of the picture's shorter side: smaller pictures are enlarged, so that text keeps its share
)
_MOST = (1080, 1920)  # larger ones are reduced
_TEXT_SIZES = (15, 36)  # legible, and no larger than need be


def even(size: float) -> int:
    """The nearest even number: codecs want even sizes."""
    return 2 * round(size / 2)


def text_size(size: float) -> int:
    """The height of letters, in pixels, nearest to the wanted one."""
    return round(min(max(size, _TEXT_SIZES[0]), _TEXT_SIZES[1]))


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Even (height, width) at which pictures of a video are shown, in pixels."""
    scale = min(max(1.0, LEAST / min(height, width)), _MOST[0] / height, _MOST[1] / width)
    return max(2, even(height * scale)), max(2, even(width * scale))


def show(frame: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture at the size (height, width) it is shown at; unchanged if that is its own.

    Raises:
      ImportError: Pillow is missing.
    """
    if frame.shape[:2] == size:
        return frame
    images = need("PIL.Image", "drawing")
    # Far enlarged, sharp pixels look better than blurred ones.
    far = size[1] >= 3 * frame.shape[1]
    how = images.Resampling.NEAREST if far else images.Resampling.BICUBIC
    return np.asarray(images.fromarray(np.ascontiguousarray(frame)).resize(size[::-1], how))


class Lettering:
    """Text in two sizes of one font.

    Args:
      size: height of the letters, in pixels.
      font: TrueType file; None: Pillow's own, which has plain Latin letters (others lose their accents, or
        become "?").

    Attributes:
      regular, small: fonts for Pillow.

    Raises:
      ConfigError: the font cannot be read.
      ImportError: Pillow is missing.
    """

    def __init__(self, size: int, font: Path | None = None):
        fonts, self._plain = need("PIL.ImageFont", "drawing"), font is None

        def load(height: int) -> Any:
            return fonts.load_default(size=height) if font is None else fonts.truetype(str(font), height)

        try:
            self.regular, self.small = load(size), load(max(13, round(0.8 * size)))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--font={font}: not a TrueType or OpenType font ({error})") from error

    def known(self, text: str) -> str:
        """The text in letters the font has, on one line."""
        text = " ".join(text.split())
        if not self._plain:
            return text
        letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        return "".join(letters).encode("ascii", "replace").decode()

    def length(self, text: str, small: bool = False) -> float:
        """Width of a text, in pixels."""
        return float((self.small if small else self.regular).getlength(text))

    def shortened(self, text: str, room: float, small: bool = False) -> str:
        """The text, cut so that it fits with an ellipsis into `room` pixels; at least a letter is left."""
        while len(text) > 3 and self.length(text, small) > room:
            text = text.removesuffix("...")[:-1].rstrip() + "..."
        return text
