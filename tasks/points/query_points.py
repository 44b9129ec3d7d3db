"""The points a user asks for: a CSV file, clicks or a grid, in pixels of the video as it is shown.

x counts to the right and y down; (0, 0) is the outer corner of the top-left pixel, whose centre is at
(0.5, 0.5). t is the frame in which a point is at that place. What the user wrote is checked here against the
video; `model_queries` turns it into what the model takes.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tasks.common.errors import ConfigError

MOST_POINTS = 20_000
_MOST_BYTES = 64 << 20  # of a CSV file
_MOST_LETTERS = 200  # of a name
_COLUMNS = {"x": "x", "y": "y", "t": "t", "time": "time", "id": "name", "name": "name"}
_SLACK = 1e-6  # of a frame: 0.04 s at 25 frames a second is frame 1, whatever the rounding


class QueryPoints(NamedTuple):
    """Points asked for.

    Attributes:
      query_txy: frame (a whole number), x, y, in pixels of the video.
      names: one each, all different.
      named: whether the names are the user's; otherwise they are "0", "1", ...
      origins: where each was written, for messages.
    """

    query_txy: Float[np.ndarray, "Q 3"]
    names: tuple[str, ...]
    named: bool
    origins: tuple[str, ...]


def read_points(path: Path, fps: float) -> QueryPoints:
    """Points of a CSV file with a header: columns x, y, one of t (frame) and time (seconds), and perhaps id
    or name, in any order. A time means the frame on the screen then.

    Args:
      fps: frames of the video a second.

    Raises:
      ConfigError: what cannot be read, with its line; columns that are missing or unknown; no points.
    """
    given = f"--points={path}"
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ConfigError(f"{given} is no file")
        if size > _MOST_BYTES:
            raise ConfigError(f"{given}: {size:,} bytes; the limit is {_MOST_BYTES:,}")
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _from_rows(given, csv.reader(file), fps)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{given}: cannot be read as a CSV file in UTF-8: {reason}") from error


def parse_clicks(clicks: Sequence[str]) -> QueryPoints:
    """Points of --click=x,y,t; without t the first frame.

    Raises:
      ConfigError: not two or three numbers.
    """
    rows, origins = [], [f"--click={text}" for text in clicks]
    for text, origin in zip(clicks, origins, strict=True):
        words = text.split(",")
        if len(words) not in (2, 3):
            raise ConfigError(f"{origin}: must be x,y,t: pixels to the right, pixels down, frame")
        x, y, t = (_number(w, origin, what) for w, what in zip([*words, "0"][:3], "xyt", strict=True))
        rows.append((t, x, y))
    return _points(rows, None, origins)


def grid_points(count: int, height: int, width: int, frame: int = 0) -> QueryPoints:
    """count x count points spread evenly over a frame, row by row.

    Raises:
      ConfigError: count below 1, or too many.
    """
    if not 1 <= count**2 <= MOST_POINTS or count < 1:
        raise ConfigError(f"--grid={count}: must be from 1 to {math.isqrt(MOST_POINTS)} (points in a row)")
    steps = (np.arange(count) + 0.5) / count
    rows = [(float(frame), float(x), float(y)) for y, x in itertools.product(steps * height, steps * width)]
    return _points(rows, None, [f"--grid={count} --grid_frame={frame}"] * len(rows))


def check_points(points: QueryPoints, height: int, width: int, frames: int | None) -> None:
    """Whether all points lie in the video.

    Args:
      height, width: of a frame as it is shown, in pixels.
      frames: of the video; None: it has no end.

    Raises:
      ConfigError: the first that does not, why, and what would be right; if another order of its numbers fits
        all points, that too.
    """
    rows = points.query_txy
    for row, origin in zip(rows, points.origins, strict=True):
        for what, value in zip("txy", row, strict=True):
            if not math.isfinite(value):
                raise ConfigError(f"{origin}: {what} = {value}: must be a finite number")
    outside = _outside(rows, height, width, frames)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ConfigError(_explain(points, first, int(outside.sum()), height, width, frames))
    if len(rows) > 1 and rows[:, 1:].max() <= 1 and len(np.unique(rows[:, 1:], axis=0)) > 1:
        raise ConfigError(
            f"{points.origins[0]}: all {len(rows)} points lie in the first pixel: x and y are in "
            f"pixels of the {width} x {height} picture, not shares of its sides"
        )


def model_queries(
    points: QueryPoints, height: int, width: int, units: tuple[int, int]
) -> Float[np.ndarray, "Q 3"]:
    """The queries as (t, y, x) float32 in pixels of the model's image.

    Args:
      height, width: of the video.
      units: (height, width) of the model's image; the frame is stretched to it, its shape not kept.
    """
    t, x, y = points.query_txy.T
    return np.stack([t, y * units[0] / height, x * units[1] / width], axis=-1).astype(np.float32)


def _from_rows(given: str, rows: Iterator[list[str]], fps: float) -> QueryPoints:
    header = next(rows, None)
    if header is None:
        raise ConfigError(f"{given}: empty; needed: a line 'x,y,t' and a line per point")
    columns = _columns(given, header)
    found, names, origins = [], [], []
    for number, row in enumerate(rows, start=2):
        if not any(map(str.strip, row)):
            continue
        where = f"{given}, line {number}"
        if len(row) != len(header):
            raise ConfigError(f"{where}: {len(row)} values; the header has {len(header)} columns")
        cells = {column: cell.strip() for column, cell in zip(columns, row, strict=True)}
        x, y = _number(cells["x"], where, "x"), _number(cells["y"], where, "y")
        if "t" in cells:
            t = _number(cells["t"], where, "t")
        else:
            seconds = _number(cells["time"], where, "time")
            t = float(math.floor(seconds * fps + _SLACK)) if math.isfinite(seconds) else seconds
        found.append((t, x, y))
        names.append(cells.get("name", ""))
        origins.append(where)
        if len(found) > MOST_POINTS:
            raise ConfigError(f"{given}: more than {MOST_POINTS:,} points")
    if not found:
        raise ConfigError(f"{given}: no points in it, only a header: there is nothing to track")
    return _points(found, names if "name" in columns else None, origins)


def _columns(given: str, header: Sequence[str]) -> list[str]:
    """What each column holds: x, y, t, time or name."""
    needed = "needed: x, y and one of t (frame) and time (seconds); id or name may be there"
    words = [word.strip().lower() for word in header]
    if len(words) == 1 and any(mark in words[0] for mark in ";\t"):
        raise ConfigError(f"{given}: its header is {header[0]!r}: columns must be separated by commas")
    for word in words:
        if word not in _COLUMNS:
            raise ConfigError(f"{given}: unknown column {word!r} in the first line; {needed}")
    columns = [_COLUMNS[word] for word in words]
    twice = len(set(columns)) < len(columns)
    if twice or not {"x", "y"} <= set(columns) or ("t" in columns) == ("time" in columns):
        raise ConfigError(f"{given}: its columns are {', '.join(words)}; {needed}")
    return columns


def _number(text: str, where: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where}: {what} = {text!r}: must be a number") from None


def _points(
    rows: Sequence[tuple[float, float, float]], names: Sequence[str] | None, origins: Sequence[str]
) -> QueryPoints:
    if names is None:
        given = [str(number) for number in range(len(rows))]
    else:
        given = [" ".join(name.split())[:_MOST_LETTERS] for name in names]
        seen: set[str] = set()
        for name, origin in zip(given, origins, strict=True):
            if not name or name in seen:
                what = f"the name {name!r} is there twice" if name else "the name is missing"
                raise ConfigError(f"{origin}: {what}: every point needs a name of its own")
            seen.add(name)
    return QueryPoints(np.asarray(rows, np.float64), tuple(given), names is not None, tuple(origins))


def _outside(txy: np.ndarray, height: int, width: int, frames: int | None) -> np.ndarray:
    """[Q] which are no places in the video, or no frames of it."""
    late = txy[:, 0] >= (math.inf if frames is None else frames)
    between = txy[:, 0] != np.floor(txy[:, 0])
    return (txy < 0).any(axis=1) | (txy[:, 1] > width) | (txy[:, 2] > height) | late | between


# The order in which x, y, t may have been written instead -> (t, x, y) then.
_ORDERS = {"y, x, t": [0, 2, 1], "t, x, y": [1, 2, 0], "t, y, x": [1, 0, 2]}


def _explain(points: QueryPoints, first: int, count: int, height: int, width: int, frames: int | None) -> str:
    rows = points.query_txy
    t, x, y = rows[first]
    last = "" if frames is None else f" to {frames - 1}"
    if t != math.floor(t):
        parts = [f"t = {t:g}: must be a whole number, the frame (seconds go in a column 'time')"]
    else:
        parts = [
            f"x = {x:g}, y = {y:g}, t = {t:g} is outside of the video: x goes from 0 to {width} (to the "
            f"right), y from 0 to {height} (down), t from 0{last} (frames)"
        ]
    if len(rows) > 1:
        parts.append(f"{count} of {len(rows)} points are wrong")
    fits = [
        name for name, order in _ORDERS.items() if not _outside(rows[:, order], height, width, frames).any()
    ]
    if fits:
        parts.append(
            f"read as {' or '.join(fits)} instead of x, y, t all would be inside: is the order right?"
        )
    return f"{points.origins[first]}: {'; '.join(parts)}"
