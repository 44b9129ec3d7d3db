"""What tracking a video leaves behind: a film, a table of rows frame by frame, arrays by track."""

import csv
import io
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from jaxtyping import UInt8

from tasks.common.progress import clock
from tasks.common.video.command import with_ending
from tasks.common.video.encoding import Mp4Writer
from tasks.points.frame_sources import FrameSource
from tasks.points.overlay import TrackOverlay
from tasks.points.query_points import QueryPoints
from tasks.points.track_spool import HIDDEN, UNKNOWN, VISIBLE, Rows, TrackSpool, write_npz

COLUMNS = ("track", "frame", "time", "x", "y", "visible", "certainty")
FILM, TABLE, ARRAYS, SUMMARY = ENDINGS = (".mp4", ".csv", ".npz", ".json")
_LONGEST_STILL = 10.0  # seconds a film shows one picture for, where a camera gave none in between


class TrackFiles:
    """The files of one video, opened with the first frame. A context manager.

    However it is left, the film plays and the table is whole, up to the last frame that was added.

    Args:
      base: path without endings. Files of an earlier call are removed.
      source: of the pictures; the film has its rate.
      points: what is tracked.
      overlay: draws the film; None: there is none.

    Attributes:
      frames: added to the table so far.
      drawn: pictures shown in the film so far.
      visible, known: how often a point was seen, and had a track, in all frames.
      spool: all tracks, once a frame was added.
    """

    def __init__(self, base: Path, source: FrameSource, points: QueryPoints, overlay: TrackOverlay | None):
        self.frames = self.drawn = self.visible = self.known = 0
        self._base, self._source, self._points, self._overlay = base, source, points, overlay
        self._names = [_as_cell(name) for name in points.names]
        self._times = array("d")
        self._shown: np.ndarray | None = None  # the film's last picture
        self._left_out = 0  # pictures that the film does not show again while nothing came
        self._spool: TrackSpool | None = None
        self._table: TextIO | None = None
        self._film: Mp4Writer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._table is not None:
                self._table.close()
        finally:
            try:
                if self._film is not None:
                    self._film.close()
            finally:
                if self._spool is not None:
                    self._spool.__exit__(kind, error, trace)

    @property
    def spool(self) -> TrackSpool:
        """The tracks on disk. Raises OSError when it cannot be made."""
        if self._spool is None:
            self._base.parent.mkdir(parents=True, exist_ok=True)
            for ending in ENDINGS:
                with_ending(self._base, ending).unlink(missing_ok=True)
            self._spool = TrackSpool(self._base.parent, len(self._points.names))
        return self._spool

    def path(self, ending: str) -> Path:
        """Of one of the files."""
        return with_ending(self._base, ending)

    def add(self, rows: Rows, seconds: float) -> None:
        """Adds the next frame's rows to the table, and notes its time. Raises OSError."""
        table = self._table or self._open_table()
        frame, lines = self.frames, []
        when = f"{frame},{seconds:.6f}"
        known = rows["state"] >= HIDDEN
        for track in np.flatnonzero(known).tolist():
            (x, y), certainty, state = rows[track].tolist()
            seen = int(state == VISIBLE)
            lines.append(f"{self._names[track]},{when},{x:.3f},{y:.3f},{seen},{certainty:.4f}\n")
        table.write("".join(lines))
        table.flush()
        self._times.append(seconds)
        self.frames += 1
        self.known += int(known.sum())
        self.visible += int((rows["state"] == VISIBLE).sum())

    def fit(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"] | None:
        """All that has to be kept of a frame to draw it later."""
        return None if self._overlay is None else self._overlay.fit(frame)

    def draw(self, picture: UInt8[np.ndarray, "h w 3"] | None, rows: Rows, seconds: float) -> None:
        """Adds a picture to the film, if there is one, for as long as it is to be seen.

        Args:
          picture: what `fit` gave.
          rows: its tracks.
          seconds: when it is on the screen; a film's rate is constant, that of a camera's pictures is not.

        Raises:
          OSError: the film cannot be written.
        """
        if self._overlay is None or picture is None:
            return
        film = self._film or self._open_film(self._overlay)
        count, known = int((rows["state"] == VISIBLE).sum()), int((rows["state"] != UNKNOWN).sum())
        of = "" if self._source.frames is None else f" of {self._source.frames}"
        left = f"frame {self.drawn}{of}, {count} of {known} visible"
        right = f"{clock(seconds)}.{int(seconds * 100) % 100:02d}"
        shown = self._overlay.draw(picture, rows["xy"], rows["state"] == VISIBLE, left, right)
        missing = round(seconds * self._source.fps) + 1 - film.frames - self._left_out
        most = max(1, round(_LONGEST_STILL * self._source.fps))
        self._left_out += max(0, missing - most)
        for _ in range(min(missing, most) - 1):
            film.write(shown if self._shown is None else self._shown)
        if missing > 0:
            film.write(shown)
        self._shown = shown
        self.drawn += 1

    def write_arrays(self) -> None:
        """Writes the .npz, of all frames in the table. Raises OSError."""
        points, source = self._points, self._source
        write_npz(
            self.path(ARRAYS),
            self.spool,
            {
                "query_txy": points.query_txy,
                "names": np.array(points.names),
                "time": np.frombuffer(self._times, np.float64) if self._times else np.zeros(0),
                "fps": np.float64(source.fps),
                "size_wh": np.array([source.width, source.height], np.int64),
            },
        )

    def written(self) -> list[Path]:
        """The files that are there, summary aside."""
        return [path for path in map(self.path, (FILM, TABLE, ARRAYS)) if path.exists()]

    def _open_table(self) -> TextIO:
        _ = self.spool  # removes what an earlier call left
        self._table = self.path(TABLE).open("w", encoding="utf-8", newline="")
        self._table.write(",".join(COLUMNS) + "\n")
        return self._table

    def _open_film(self, overlay: TrackOverlay) -> Mp4Writer:
        _ = self.spool
        self._film = Mp4Writer(self.path(FILM), *overlay.size, self._source.fps)
        return self._film


def _as_cell(text: str) -> str:
    """A text as CSV has it: quoted where it must be."""
    line: Any = io.StringIO()
    csv.writer(line, lineterminator="").writerow([text])
    return str(line.getvalue())
