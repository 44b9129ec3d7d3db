"""Layers of samples painted on pictures, and trails that fade from frame to frame."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from tasks.points.strokes import Samples, Size

_DARK = 16  # grey of the outlines, which keep colours apart from the picture
_SHADE = 0.55  # how much of the picture an outline hides
_OPAQUE = 128  # opacity is counted in 128ths: its product with the difference of two colours fits 16 bits


class Ink(NamedTuple):
    """Pixels to be painted, each once.

    Attributes:
      pixel: index in the picture.
      colour: with the outline mixed in.
      opacity: in 128ths.
      along: as in `Samples`.
    """

    pixel: Int[np.ndarray, " n"]
    colour: UInt8[np.ndarray, "n 3"]
    opacity: UInt8[np.ndarray, " n"]
    along: Float[np.ndarray, " n"]


class Painter:
    """Turns shapes into ink, for pictures of one size (height, width)."""

    def __init__(self, size: Size):
        self.size = size
        self._claims = np.zeros(size[0] * size[1], np.uint32)  # all zero between two calls

    def ink(self, samples: Samples, colours: UInt8[np.ndarray, "shapes 3"]) -> Ink:
        """One layer of less than 2^24 shapes: where they overlap, that is seen which covers most, and of
        equals the last. So it costs the same in any order, without sorting."""
        cover = np.maximum(samples.fill, _SHADE * samples.edge)
        opacity = (cover * _OPAQUE + 0.5).astype(np.uint8)
        claims = opacity.astype(np.uint32) << 24 | samples.shape.astype(np.uint32)
        np.maximum.at(self._claims, samples.pixel, claims)
        won = np.flatnonzero(self._claims[samples.pixel] == claims)
        pixel = samples.pixel[won]
        self._claims[pixel] = 0
        share = samples.fill[won] / np.maximum(cover[won], 1e-6)  # the rest of what is covered is outline
        own = colours[samples.shape[won]].astype(np.float32)
        colour = (_DARK + (own - _DARK) * share[:, None] + 0.5).astype(np.uint8)
        return Ink(pixel, colour, opacity[won], samples.along[won])


def blend(
    picture: UInt8[np.ndarray, "height width 3"],
    pixel: Int[np.ndarray, " n"],
    colour: UInt8[np.ndarray, "n 3"],
    opacity: UInt8[np.ndarray, " n"],
) -> None:
    """Paints distinct pixels of a C-contiguous picture, in place; opacity in 128ths."""
    flat = _whole_pixels(picture)
    under = _channels(flat[pixel]).astype(np.int16)
    change = (colour.astype(np.int16) - under) * opacity.astype(np.int16)[:, None]
    flat[pixel] = _whole_pixels((under + ((change + _OPAQUE // 2) >> 7)).astype(np.uint8))


def _whole_pixels(channels: np.ndarray) -> np.ndarray:
    """The same memory as one item per pixel: NumPy moves those several times faster than rows of three."""
    return channels.reshape(-1, 3).view("V3")[:, 0]


def _channels(pixels: np.ndarray) -> np.ndarray:
    return pixels.view(np.uint8).reshape(-1, 3)


class Trails:
    """Lines that fade over some frames: what each pixel shows, and since when.

    A frame costs the lines that it adds and the pixels still to be seen, not the lines of all frames.

    Args:
      painter: of the pictures.
      length: frames over which a trail fades, at least 1.
    """

    def __init__(self, painter: Painter, length: int):
        pixels = painter.size[0] * painter.size[1]
        self._painter, self._length = painter, length
        self._colour, self._opacity = np.zeros((pixels, 3), np.uint8), np.zeros(pixels, np.uint8)
        self._born = np.full(pixels, -np.inf, np.float32)  # frame, and part of the way to it
        self._seen = np.zeros(0, np.int64)  # the pixels that are not faded yet, each once

    def add(self, frame: int, samples: Samples, colours: UInt8[np.ndarray, "shapes 3"]) -> None:
        """Adds the lines from the places of the frame before to those of this one."""
        ink, oldest = self._painter.ink(samples, colours), frame - self._length
        self._seen = self._seen[self._born[self._seen] > oldest]
        born, before = frame - 1 + ink.along, self._born[ink.pixel]
        faded = self._faded(frame, before, self._opacity[ink.pixel])
        fresh = np.flatnonzero(self._faded(frame, born, ink.opacity) >= faded)
        pixel = ink.pixel[fresh]
        _whole_pixels(self._colour)[pixel] = _whole_pixels(ink.colour[fresh])
        self._opacity[pixel], self._born[pixel] = ink.opacity[fresh], born[fresh]
        self._seen = np.concatenate([self._seen, pixel[before[fresh] <= oldest]])

    def paint(self, frame: int, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        """Paints what is left at a frame, in place."""
        pixel = self._seen
        opacity = self._faded(frame, self._born[pixel], self._opacity[pixel])
        blend(picture, pixel, _channels(_whole_pixels(self._colour)[pixel]), opacity)

    def _faded(self, frame: int, born: np.ndarray, opacity: np.ndarray) -> np.ndarray:
        left = np.clip(1 - (frame - born) / self._length, 0, 1)
        return (left * opacity + 0.5).astype(np.uint8)
