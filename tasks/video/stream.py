"""A video file through a streaming classifier, frame by frame in constant memory, into a film and lines.

`StreamClassifier` is the model with its carried state, `Files` what is written, `Classification` the loop.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from rich.console import Console

from models import trecvit
from models.common.recurrent_state import handed_over, taken_over
from models.common.shapes import Params
from tasks.common.errors import RunError
from tasks.common.guard import StopSignal
from tasks.common.progress import clock
from tasks.common.video.command import with_ending
from tasks.common.video.decoding import VideoFile
from tasks.common.video.encoding import Mp4Writer
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import Window
from tasks.common.video.packets import VideoInfo
from tasks.common.video.progress import frames_bar
from tasks.video.augment import AugmentConfig, prepare_eval
from tasks.video.overlay import Overlay, Ranked


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a video is classified.

    Attributes:
      base: path of the written files, without their endings.
      stride: the model sees every so many frames.
      restart: a new clip begins after so many frames that the model saw; 0: never.
      chunk: frames given to the model at a time.
      top: classes shown and written.
    """

    base: Path
    stride: int
    restart: int
    chunk: int
    top: int


class StreamClassifier:
    """Running class probabilities of one stream of frames, in constant memory.

    Args:
      config, runtime, params: the model and how it is run.
      window: what is taken of every frame, at which size; of it the middle, of the model's size, is seen.
      chunk: most frames of a call.
      restart: a new clip begins after so many frames; 0: never.

    Attributes:
      frames: seen so far.
      seconds: spent in the model, transfers included, cutting and compiling not.
      compile_seconds: spent compiling.
    """

    def __init__(
        self,
        config: trecvit.TRecViTConfig,
        runtime: trecvit.TRecViTRuntime,
        params: Params,
        window: Window,
        *,
        chunk: int = 1,
        restart: int = 0,
    ):
        self.window, self.chunk, self.restart = window, chunk, restart
        self.frames, self.seconds = 0, 0.0
        self._params = trecvit.prepare_params(params, runtime.compute_dtype)
        self._step = functools.partial(_step, config, runtime, AugmentConfig(size=config.image_size))
        begin = time.perf_counter()
        black = np.zeros((1, chunk, window.height, window.width, 3), np.uint8)
        state = trecvit.init_state(config, 1, runtime.compute_dtype)
        jax.block_until_ready(self._step(self._params, black, np.zeros((1, chunk), bool), state))
        self.compile_seconds = time.perf_counter() - begin
        self._state = trecvit.init_state(config, 1, runtime.compute_dtype)

    def __call__(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n C"]:
        """Probabilities after each of the next 1..chunk frames, which are of the window's size.

        Raises:
          RunError: they are not finite.
        """
        count = len(frames)
        # What fills up the last chunk comes after all that counts, and the model is causal.
        rows = np.stack([*frames, *[frames[-1]] * (self.chunk - count)])[None]
        numbers = self.frames + np.arange(self.chunk)
        reset = (numbers % self.restart == 0)[None] if self.restart else np.zeros((1, self.chunk), bool)
        begin = time.perf_counter()
        probs, self._state = self._step(self._params, rows, reset, handed_over(self._state))
        found = np.asarray(probs)[:count]
        self.seconds += time.perf_counter() - begin
        if not np.isfinite(found).all():
            raise RunError(
                f"the model's output is not finite from frame {self.frames} on: are its weights good?"
            )
        self.frames += count
        return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _step(
    config: trecvit.TRecViTConfig,
    runtime: trecvit.TRecViTRuntime,
    augment: AugmentConfig,
    params: Params,
    frames: UInt8[Array, "1 T height width 3"],
    reset: Bool[Array, "1 T"],
    state: trecvit.TRecViTState,
) -> tuple[Float[Array, "T C"], trecvit.TRecViTState | None]:
    """Probabilities, and the memory after the frames; `state` is handed over."""
    video = prepare_eval(augment, frames)
    logits, state_after = trecvit.apply(config, runtime, params, video, taken_over(state), reset)
    return jax.nn.softmax(logits[0], axis=-1), state_after


class Files:
    """The film and the lines of one video, opened with the first frame. A context manager.

    However it is left, the film plays and the lines are whole, up to the last frame that was added.

    Args:
      base: path without endings: base.mp4, base.jsonl. A summary (base.json) of an earlier call is removed.
      info: of the video; the film has its rate.
      overlay: draws the film; None: there is none.

    Attributes:
      frames: of the video, added so far.
      film: path of the film; None: there is none.
      lines, summary: paths of the lines, and of a summary that others write.
    """

    def __init__(self, base: Path, info: VideoInfo, overlay: Overlay | None):
        self.frames, self.lines = 0, with_ending(base, ".jsonl")
        self.summary = with_ending(base, ".json")
        self.film = None if overlay is None else with_ending(base, ".mp4")
        self._info, self._overlay = info, overlay
        self._text: TextIO | None = None
        self._writer: Mp4Writer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._text is not None:
                self._text.close()
        finally:
            if self._writer is not None:
                self._writer.close()

    def add_line(self, record: dict[str, Any]) -> None:
        """Writes what the model said of a frame. Raises OSError."""
        text = self._text or self._open()
        text.write(json.dumps(record, ensure_ascii=False) + "\n")
        text.flush()

    def add_frame(self, picture: np.ndarray, ranked: Sequence[Ranked], clip: int | None) -> None:
        """Draws the video's next frame.

        Args:
          picture: uint8 [H, W, 3].
          ranked: the last prediction.
          clip: its number, to be shown; None: not shown.

        Raises:
          OSError: the film cannot be written.
        """
        if self._overlay is not None and self._writer is not None:
            seconds = self.frames / self._info.fps
            when = f"{clock(seconds)}.{int(seconds * 100) % 100:02d}"
            right = when if clip is None else f"{when}, clip {clip}"
            left = f"frame {self.frames} of {self._info.frames}"
            self._writer.write(self._overlay.draw(picture, ranked, left, right))
        self.frames += 1

    def _open(self) -> TextIO:
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        self.summary.unlink(missing_ok=True)
        self._text = self.lines.open("w", encoding="utf-8")
        if self._overlay is not None and self.film is not None:
            layout = self._overlay.layout
            self._writer = Mp4Writer(self.film, layout.height, layout.width, self._info.fps)
        return self._text


class Classification:
    """One video's way through the model. `run` it once, then ask for its `report`.

    Args:
      video: opened.
      classifier: fresh.
      names: of the classes.
      settings: how.
      files: get what is found.
      console: shows progress, if it is a terminal.

    Attributes:
      stopped: why it ended before the video did; "" if it did not.
      interrupted: whether that was a signal.
    """

    def __init__(
        self,
        video: VideoFile,
        classifier: StreamClassifier,
        names: Sequence[str],
        settings: Settings,
        files: Files,
        console: Console,
    ):
        self.stopped, self.interrupted = "", False
        self._video, self._classifier, self._names = video, classifier, names
        self._settings, self._files, self._console = settings, files, console
        self._seconds = 0.0
        self._cut: list[np.ndarray] = []  # frames for the model, and
        self._pictures: list[np.ndarray] = []  # those to be drawn, that wait for its next call
        self._said = 0  # frames of which there are lines
        self._last: np.ndarray = np.zeros(0)
        self._ranked: list[Ranked] = []
        self._ends, self._clips = np.zeros(len(names)), 0  # sum of what was said at the ends of whole clips

    def run(self) -> None:
        """Classifies the video up to its end, to where it is damaged, or to a signal (SIGINT, SIGTERM).

        Raises:
          RunError: the model's output is not finite.
          OSError: the files cannot be written.
        """
        begin = time.perf_counter()
        with StopSignal().listening() as signal, frames_bar(self._console) as progress:
            # What lies between the frames that the model sees is decoded for the film only.
            step = self._settings.stride if self._files.film is None else 1
            total = len(range(0, self._video.info.frames, step))
            task = progress.add_task("classifying", total=total, note="")
            frames = self._video.stream(step)
            for index in range(0, self._video.info.frames, step):
                try:
                    picture = next(frames)
                except VideoDataError as error:
                    reason = error.reason if isinstance(error, VideoError) else str(error)
                    self.stopped = f"frame {index} cannot be decoded: {reason}"
                    break
                self._add(index, picture)
                progress.update(task, advance=1, note=self._best())
                if signal.name is not None:
                    self.stopped, self.interrupted = f"interrupted by {signal.name}", True
                    break
            self._flush()
        self._seconds = time.perf_counter() - begin

    def report(self) -> dict[str, Any]:
        """How far it came, the prediction, and the speed: the part of the summary that is known here."""
        seen, probs = self._classifier.frames, self._last
        if self._clips:
            probs = self._ends / self._clips
        return {
            "complete": not self.stopped,
            "stopped": self.stopped or None,
            "frames": {"read": self._files.frames, "classified": seen},
            "prediction": {
                "mean_over_clips": self._clips or None,
                "top": self._top(probs) if len(probs) else [],
            },
            "speed": {
                "seconds": self._seconds,
                "frames_per_second": self._files.frames / max(self._seconds, 1e-9),
                "model_seconds": self._classifier.seconds,
                "model_frames_per_second": seen / max(self._classifier.seconds, 1e-9),
                "compile_seconds": self._classifier.compile_seconds,
                "device": jax.devices()[0].device_kind,
            },
        }

    def _add(self, index: int, picture: np.ndarray) -> None:
        if index % self._settings.stride == 0:
            self._cut.append(self._classifier.window.apply(picture))
        self._pictures.append(picture)
        # A frame in between is drawn at once, unless those before it still wait.
        if len(self._cut) in (0, self._settings.chunk):
            self._flush()

    def _flush(self) -> None:
        """Runs the model on the frames that wait, and draws the pictures that do."""
        probs = iter(self._classifier(self._cut) if self._cut else ())
        for picture in self._pictures:
            seen = self._files.film is None or self._files.frames % self._settings.stride == 0
            if seen:
                self._say(next(probs))
            restart = self._settings.restart
            clip = (self._said - 1) // restart if restart else None
            self._files.add_frame(picture, self._ranked, clip)
        self._cut.clear()
        self._pictures.clear()

    def _say(self, probs: np.ndarray) -> None:
        """Notes what the model said of its next frame."""
        restart, index = self._settings.restart, self._said * self._settings.stride
        top = self._top(probs)
        self._files.add_line(
            {
                "frame": index,
                "time": round(index / self._video.info.fps, 6),
                "clip": self._said // restart if restart else 0,
                "top": top,
            }
        )
        self._last = probs
        self._ranked = [Ranked(each["name"], each["probability"]) for each in top]
        self._said += 1
        if restart and self._said % restart == 0:
            self._ends, self._clips = self._ends + probs, self._clips + 1

    def _top(self, probs: np.ndarray) -> list[dict[str, Any]]:
        order = np.argsort(-probs, kind="stable")[: self._settings.top]
        return [
            {"index": int(c), "name": self._names[c], "probability": round(float(probs[c]), 7)} for c in order
        ]

    def _best(self) -> str:
        return f"{100 * self._ranked[0].probability:.0f} % {self._ranked[0].name}" if self._ranked else ""
