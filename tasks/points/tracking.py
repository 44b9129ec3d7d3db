"""A video's way through a point tracker, in constant memory, whatever its length and the number of points.

One group of points, forwards: the video is read once, and files grow frame by frame, as a camera needs. More
groups, or backwards too: every group makes passes of its own over the video, whose results lie on disk, and
a last pass draws the film.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

from tasks.common.guard import StopSignal
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.progress import frames_bar
from tasks.points.following import Follower, chunks, reversed_frames
from tasks.points.frame_sources import FrameSource
from tasks.points.query_points import QueryPoints, model_queries
from tasks.points.resize import resize_frame
from tasks.points.track_files import TrackFiles
from tasks.points.track_spool import HIDDEN, VISIBLE, Rows
from tasks.points.trackers import TrackerModel


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a video is tracked.

    Attributes:
      group: most points followed at a time.
      chunk: frames given to the model at a time.
      backward: also before the points' frames.
      gate: a point counts as visible only where the model is certain of its place, too.
      draw: whether there is a film.
    """

    group: int = 256
    chunk: int = 8
    backward: bool = False
    gate: bool = False
    draw: bool = True


class Tracking:
    """One video's way through the model. `run` it once, then ask for its `report`.

    Args:
      source: of the pictures.
      model: follows the points.
      points: inside the video.
      settings: how.
      files: get what is found.
      console: shows progress, if it is a terminal.
      stop: asked between frames whether to end (a key, for a camera).

    Attributes:
      stopped: why it ended before the video did; "" if it did not.
      interrupted: whether that was a signal.
    """

    def __init__(
        self,
        source: FrameSource,
        model: TrackerModel,
        points: QueryPoints,
        settings: Settings,
        files: TrackFiles,
        console: Console,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.stopped, self.interrupted = "", False
        self._source, self._model, self._settings = source, model, settings
        self._files, self._console, self._stop = files, console, stop
        self._signal, self._bar = StopSignal(), frames_bar(console)
        self._queries = model_queries(points, source.height, source.width, model.units)
        self._first = self._queries[:, 0].astype(np.int64)
        count = len(self._queries)
        self._slots = min(count, settings.group)
        self._groups = [slice(i, min(i + self._slots, count)) for i in range(0, count, self._slots)]
        self._chunk = settings.chunk if source.frames is None else min(settings.chunk, source.frames)
        self._seconds = self._model_seconds = self._compile_seconds = 0.0
        self._steps = 0  # frames that went through the model, in all passes
        self._note = ""

    def run(self) -> None:
        """Tracks up to the video's end, to where it is damaged, or to a signal (SIGINT, SIGTERM).

        Raises:
          RunError: the model's output is not finite.
          OSError: the files cannot be written.
        """
        self._compile()
        begin = time.perf_counter()
        with self._signal.listening(), self._bar:
            if len(self._groups) == 1 and not (self._settings.backward and self._first.any()):
                self._in_one_pass()
            else:
                self._in_passes()
        self._seconds = time.perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """How far it came, what was seen, and the speed: the part of the summary that is known here."""
        files = self._files
        late = int((self._first >= files.frames).sum())
        return {
            "complete": not self.stopped,
            "stopped": self.stopped or None,
            "frames": {"tracked": files.frames, "drawn": files.drawn},
            "points": {
                "count": len(self._queries),
                "groups": len(self._groups),
                "not_reached": late,
                "visible_share": files.visible / files.known if files.known else None,
            },
            "speed": {
                "seconds": self._seconds,
                "frames_per_second": files.frames / max(self._seconds, 1e-9),
                "model_seconds": self._model_seconds,
                "model_frames_per_second": self._steps / max(self._model_seconds, 1e-9),
                "compile_seconds": self._compile_seconds,
                "device": jax.devices()[0].device_kind,
            },
        }

    def _compile(self) -> None:
        """Runs the model once, on nothing, so that its speed is not that of the compiler."""
        begin = time.perf_counter()
        query = self._queries[:1] * np.array([0, 1, 1], np.float32)
        self._follower(query)(np.zeros((self._chunk, *self._model.frame_size, 3), np.uint8))
        self._compile_seconds = time.perf_counter() - begin

    def _follower(self, query_tyx: np.ndarray) -> Follower:
        return Follower(
            self._model,
            self._slots,
            query_tyx,
            self._source.height,
            self._source.width,
            gate=self._settings.gate,
            chunk=self._chunk,
        )

    def _follow[T](
        self, follower: Follower, frames: Iterable[tuple[np.ndarray, T]]
    ) -> Iterator[tuple[Rows, T]]:
        """Rows of each frame (of the model's size), and what goes with it."""
        for chunk in chunks(frames, self._chunk):
            before = follower.seconds
            rows = follower(chunk.frames)
            self._model_seconds += follower.seconds - before
            self._steps += len(rows)
            seen, known = (int((rows[-1]["state"] == s).sum()) for s in (VISIBLE, HIDDEN))
            self._note = f"{seen} of {seen + known} visible"
            yield from zip(rows, chunk.kept, strict=True)

    def _in_one_pass(self) -> None:
        files, size = self._files, self._model.frame_size

        def prepared() -> Iterator[tuple[np.ndarray, tuple[np.ndarray | None, float]]]:
            # Only what is drawn of a picture is kept until the model has seen its chunk.
            for frame, seconds in self._watched(self._source.stream(), "tracking", self._source.frames):
                yield resize_frame(frame, *size), (files.fit(frame), seconds)

        for rows, (picture, seconds) in self._follow(self._follower(self._queries), prepared()):
            files.spool.write(files.frames, rows)
            files.add(rows, seconds)
            files.draw(picture, rows, seconds)
        if files.frames:
            files.write_arrays()

    def _in_passes(self) -> None:
        files, frames = self._files, self._source.frames
        for number, group in enumerate(self._groups, start=1):
            which = f", group {number} of {len(self._groups)}" if len(self._groups) > 1 else ""
            frames = self._forward(group, f"tracking{which}", frames)
            if self._settings.backward and not self.interrupted:
                self._backward(group, f"tracking backward{which}", frames)
            if self.interrupted or not frames:
                break
        for frame in range(files.spool.frames):
            files.add(files.spool.read(frame), frame / self._source.fps)
        if files.frames:
            files.write_arrays()
        if self.interrupted or not self._settings.draw:
            return
        for picture in self._watched(self._source.stream(), "drawing", files.frames):
            files.draw(files.fit(picture.frame), files.spool.read(files.drawn), picture.seconds)

    def _forward(self, group: slice, what: str, frames: int | None) -> int:
        """Tracks a group through the first `frames`; how many of them could be read."""
        size, done = self._model.frame_size, 0
        pictures = self._watched(self._source.stream(), what, frames)
        small = ((resize_frame(picture.frame, *size), None) for picture in pictures)
        for rows, _ in self._follow(self._follower(self._queries[group]), small):
            self._files.spool.write(done, rows, group.start)
            done += 1
        return done

    def _backward(self, group: slice, what: str, frames: int) -> None:
        """Tracks a group from the last of `frames` to the first; what lies before each query is kept."""
        first = self._first[group]
        reached = np.flatnonzero(first < frames)
        if not first[reached].any():
            return
        turned = self._queries[group][reached]
        turned[:, 0] = frames - 1 - first[reached]
        images = reversed_frames(self._source, frames, self._model.frame_size)
        frame = frames
        for rows, _ in self._follow(
            self._follower(turned), ((image, None) for image in self._watched(images, what, frames))
        ):
            frame -= 1
            kept = self._files.spool.read(frame)[group]
            earlier = first[reached] > frame
            kept[reached[earlier]] = rows[earlier]
            self._files.spool.write(frame, kept, group.start)

    def _watched[T](self, items: Iterator[T], what: str, total: int | None) -> Iterator[T]:
        """The items, with a bar, until they end, cannot be read, or somebody wants to stop."""
        task = self._bar.add_task(what, total=total, note="")
        for number in itertools.count():
            if number == total or self._asked_to_stop():
                break
            try:
                item = next(items)
            except StopIteration:
                break
            except VideoDataError as error:
                reason = error.reason if isinstance(error, VideoError) else str(error)
                self.stopped = f"{what}: frame {number} cannot be decoded: {reason}"
                break
            yield item
            self._bar.update(task, advance=1, note=self._note)
        self._bar.remove_task(task)

    def _asked_to_stop(self) -> bool:
        if self._signal.name is not None and self._source.frames is not None:
            self.stopped, self.interrupted = f"interrupted by {self._signal.name}", True
        # There is no other way to end what has no end.
        return self._signal.name is not None or self._stop()
