"""Tracks drawn over frames, a row of frames for every clip: to look at what is trained on, and what comes
out.

A point keeps its colour. It is a disc where it is visible and a ring where it is hidden, with its way over
the frames before; a cross marks the frame it is asked for at.
"""

import colorsys
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tasks.common.optional import need
from tasks.common.video.sheet import write_sheet

Row = tuple[str, UInt8[np.ndarray, "T H W 3"], Float[np.ndarray, "Q T 2"], Bool[np.ndarray, "Q T"]]
_SIDE = 192  # pixels that a small frame's shorter side is enlarged to
_TRAIL = 4  # frames
_JUMP = 0.25  # of the frame: from one side to the other, or out of sight, no line is drawn
_MOST = 48  # points drawn of a clip


def draw_tracks(
    video: UInt8[np.ndarray, "T H W 3"],
    tracks_yx: Float[np.ndarray, "Q T 2"],
    visible: Bool[np.ndarray, "Q T"],
    query_frames: Sequence[int] | None = None,
) -> UInt8[np.ndarray, "T h w 3"]:
    """Every frame, enlarged if it is small, with the points in it.

    Args:
        video: frames.
        tracks_yx: places (y, x), in pixels of the video.
        visible: whether a point is seen.
        query_frames: when each is asked for; None: not marked.
    """
    images: Any = need("PIL.Image", "drawing tracks")
    drawing: Any = need("PIL.ImageDraw", "drawing tracks")
    height, width = video.shape[1:3]
    scale = max(1, -(-_SIDE // min(height, width)))
    shown = np.linspace(0, len(tracks_yx) - 1, min(_MOST, len(tracks_yx))).round().astype(int)
    # Points that start near each other get unlike colours.
    colours = [
        tuple(int(255 * c) for c in colorsys.hsv_to_rgb((0.618034 * i) % 1, 1.0, 1.0))
        for i in range(len(shown))
    ]
    radius = max(2.0, 0.012 * min(height, width) * scale)
    result = []
    for t, frame in enumerate(video):
        image = images.fromarray(np.ascontiguousarray(frame))
        image = image.resize((width * scale, height * scale), images.Resampling.NEAREST)
        draw = drawing.Draw(image)
        for point, colour in zip(shown, colours, strict=True):
            past = tracks_yx[point, max(0, t - _TRAIL) : t + 1, ::-1] * scale
            for start, end in itertools.pairwise(past.tolist()):
                if math.dist(start, end) < _JUMP * min(height, width) * scale:
                    draw.line((*start, *end), fill=colour, width=1)
            x, y = past[-1].tolist()
            box = (x - radius, y - radius, x + radius, y + radius)
            if visible[point, t]:
                draw.ellipse(box, fill=colour, outline="black")
            else:
                draw.ellipse(box, outline=colour)
            if query_frames is not None and query_frames[point] == t:
                draw.line((x - 2 * radius, y, x + 2 * radius, y), fill="white")
                draw.line((x, y - 2 * radius, x, y + 2 * radius), fill="white")
        result.append(np.asarray(image))
    return np.stack(result)


def write_track_sheet(path: Path, rows: Sequence[Row], columns: int = 8) -> None:
    """A PNG of clips with their tracks, a row for each: (title, video, tracks_yx, visible)."""
    drawn = [(title, draw_tracks(video, tracks, visible)) for title, video, tracks, visible in rows]
    write_sheet(path, drawn, columns)


def draw_sheet(batch: Mapping[str, np.ndarray], path: Path, columns: int = 8) -> None:
    """A PNG of a batch of examples, a row for each."""
    rows = []
    for number, video in enumerate(batch["video"]):
        used = batch["valid"][number]
        tracks, visible, query = (batch[name][number][used] for name in ("tracks_yx", "visible", "query_tyx"))
        title = (
            f"{number}: {used.sum()} points, {visible.mean():.0%} visible"
            if used.any()
            else f"{number}: none"
        )
        rows.append((title, draw_tracks(video, tracks, visible, query[:, 0].astype(int).tolist())))
    write_sheet(path, rows, columns)
