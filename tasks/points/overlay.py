"""Tracks drawn on a video's pictures: a disc where a point is seen, a hollow ring where it is hidden, and a
trail of where it came from; below the picture a line that says what is shown, and the names of a few tracks.

Small pictures are enlarged and large ones reduced, as on all films, so that marks and text keep their share.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tasks.common.video.film import BACKGROUND, LEAST, Lettering, even, show, shown_size, text_size
from tasks.points.caption import Caption
from tasks.points.painting import Painter, Trails, blend
from tasks.points.strokes import discs, lines, rings

MOST_NAMES = 12  # tracks in the legend; more cannot be told apart by colour

_MARK = 1 / 130  # radius of a mark over the picture's shorter side, for
_FEW = 24  # tracks or less; the more there are the smaller it is,
_MARKS = (2.8, 7.0)  # within these pixels


def track_colours(
    start_xy: Float[np.ndarray, "Q 2"], height: float, width: float
) -> UInt8[np.ndarray, "Q 3"]:
    """A colour per track by where it starts: the hue runs around the points' middle, paler near it.

    A few tracks (up to `MOST_NAMES`) get hues that are equally far apart, in that order.
    """
    away = (start_xy - start_xy.mean(axis=0, keepdims=True)) / (width, height)
    angle = np.arctan2(away[:, 1], away[:, 0]) / (2 * np.pi) % 1
    distance = np.hypot(away[:, 0], away[:, 1])
    count = len(start_xy)
    if count <= MOST_NAMES:
        hue = np.empty(count)
        hue[np.argsort(angle, kind="stable")] = np.arange(count) / count
        saturation = np.full(count, 0.85)
    else:
        hue, saturation = angle, 0.45 + 0.5 * distance / max(float(distance.max()), 1e-9)
    colours = [colorsys.hsv_to_rgb(h, s, 1.0) for h, s in zip(hue, saturation, strict=True)]
    return np.round(255 * np.asarray(colours)).astype(np.uint8)


class TrackOverlay:
    """Draws films of tracks frame by frame, in order.

    Args:
      height, width: of the video's pictures, in pixels: what tracks are given in.
      start_xy: where each track is asked for; decides its colour.
      names: of the tracks, for the legend; None: there is none. At most `MOST_NAMES` are shown.
      trail: frames over which trails fade; 0: no trails.
      font: TrueType file for the text; None: Pillow's own (`Lettering`).

    Attributes:
      size: (height, width) of the film, in pixels, even.
      picture: (height, width) of the picture at its top; what is beside a narrow one is empty.
      colours: of the tracks.
      radius: of the marks, in pixels of the film.

    Raises:
      ConfigError: the font cannot be read.
      ImportError: Pillow is missing.
    """

    def __init__(
        self,
        height: int,
        width: int,
        start_xy: Float[np.ndarray, "Q 2"],
        names: Sequence[str] | None = None,
        trail: int = 16,
        font: Path | None = None,
    ):
        self.colours = track_colours(start_xy, height, width)
        self.picture = shown_size(height, width)
        whole = max(self.picture[1], even(LEAST * 4 / 3))  # room for the line of text
        text = text_size(min(whole / 48, self.picture[0] / 24))
        listed = [] if names is None or len(names) > MOST_NAMES else list(names)
        self._caption = Caption(whole, text, listed, self.colours, Lettering(text, font))
        self.size = (self.picture[0] + self._caption.height, whole)
        self._scale = np.array([self.picture[1] / width, self.picture[0] / height], np.float32)
        crowd = min(1.0, (_FEW / max(len(start_xy), 1)) ** 0.25)
        self.radius = float(np.clip(min(self.picture) * _MARK * crowd, *_MARKS))
        self._painter = Painter(self.picture)
        self._trails = Trails(self._painter, trail) if trail else None
        self._last_xy = np.full((len(start_xy), 2), np.nan, np.float32)
        self._frame = 0

    def fit(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The picture at the size it is shown at: all that has to be kept of a frame to draw it later."""
        return show(frame, self.picture)

    def draw(
        self,
        picture: UInt8[np.ndarray, "h w 3"],
        tracks_xy: Float[np.ndarray, "Q 2"],
        visible: Bool[np.ndarray, " Q"],
        left: str,
        right: str = "",
    ) -> UInt8[np.ndarray, "height width 3"]:
        """The next frame of the film.

        Args:
          picture: of any size.
          tracks_xy: (x, y) in pixels of the video; NaN where a track is not known.
          visible: whether each point is seen; ignored where it is not known.
          left, right: below the picture, such as the frame's number and its time.
        """
        size = self.picture
        shown = np.array(self.fit(picture))  # ours to paint on, and contiguous
        xy = tracks_xy.astype(np.float32) * self._scale
        known = np.isfinite(xy).all(axis=1)
        visible = visible & known
        if self._trails is not None:
            # No line leads to or from where a point is hidden: what the model says there is a guess.
            moved = np.flatnonzero(visible & np.isfinite(self._last_xy).all(axis=1))
            trail = lines(size, self._last_xy[moved], xy[moved], max(1.5, 0.55 * self.radius), 0.7)
            self._trails.add(self._frame, trail, self.colours[moved])
            self._trails.paint(self._frame, shown)
        self._last_xy, self._frame = np.where(visible[:, None], xy, np.nan), self._frame + 1
        hidden = np.flatnonzero(known & ~visible)
        seen = np.flatnonzero(visible)
        thickness = max(1.2, 0.35 * self.radius)
        circles = rings(size, xy[hidden], 1.15 * self.radius, thickness, 0.6)
        dots = discs(size, xy[seen], self.radius, 1.0)
        for samples, which in ((circles, hidden), (dots, seen)):
            ink = self._painter.ink(samples, self.colours[which])
            blend(shown, ink.pixel, ink.colour, ink.opacity)
        film = np.empty((*self.size, 3), np.uint8)
        margin = (self.size[1] - size[1]) // 2
        film[: size[0], :margin] = film[: size[0], margin + size[1] :] = BACKGROUND
        film[: size[0], margin : margin + size[1]] = shown
        film[size[0] :] = self._caption.draw(left, right)
        return film
