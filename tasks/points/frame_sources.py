"""Where pictures come from: a video file, which can be read again, or a camera, which cannot."""

import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from tasks.common.errors import ConfigError
from tasks.common.optional import need
from tasks.common.video.decoding import VideoFile
from tasks.common.video.errors import VideoError

_STATED_FPS = 30.0  # of a camera that does not say
_PAUSE = 0.002  # seconds
_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


class Picture(NamedTuple):
    """A frame: uint8 [H, W, 3], RGB, upright; and when it is on the screen, in seconds from the first."""

    frame: UInt8[np.ndarray, "H W 3"]
    seconds: float


@runtime_checkable
class FrameSource(Protocol):
    """Pictures of one size.

    Attributes:
      height, width: in pixels, upright.
      fps: rate, of films made of the pictures.
      frames: how many there are; None: until somebody says stop. Then they cannot be read twice.
    """

    height: int
    width: int
    fps: float
    frames: int | None

    def stream(self, start: int = 0) -> Iterator[Picture]:
        """The pictures from a frame on. Raises VideoDataError where one cannot be had."""
        ...


class VideoSource:
    """An opened video file as a source."""

    def __init__(self, video: VideoFile):
        info = video.info
        self.height, self.width, self.fps = info.height, info.width, info.fps
        self.frames: int | None = info.frames
        self._video = video

    def stream(self, start: int = 0) -> Iterator[Picture]:
        """The pictures from a frame on; see `FrameSource`."""
        for number, frame in enumerate(self._video.stream(1, start), start=start):
            yield Picture(frame, number / self.fps)


class CameraSource:
    """A camera, or whatever else FFmpeg has a device for. A context manager.

    Args:
      name: number of the camera, or its name as the system calls it (such as /dev/video2).
      seconds: stop after so long; None: never.
      format: FFmpeg's name of the kind of device; None: that of this system's cameras.

    Raises:
      ConfigError: there is no such camera, and why.
    """

    frames: int | None = None

    def __init__(self, name: str, seconds: float | None = None, format: str | None = None):
        self._av = need("av", "reading a camera")
        self._name, self._limit = name, seconds
        kind = format or _FORMATS.get(sys.platform, "v4l2")
        if kind not in self._av.formats_available:
            raise ConfigError(f"--camera={name}: this build of PyAV has no devices of kind {kind!r}")
        address = f"/dev/video{name}" if kind == "v4l2" and name.isdecimal() else name
        if kind == "dshow":
            address = f"video={name}"
        self._container: Any = None
        try:
            self._container = self._av.open(address, format=kind)
            self._stream = self._container.streams.video[0]
            self._frames: Iterator[Any] = self._container.decode(self._stream)
            self._first = self._next()
            if self._first is None:
                raise VideoError(name, "it gives no pictures")
        except (self._av.FFmpegError, OSError, IndexError, VideoError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or getattr(error, "reason", "it gives no pictures")
            raise ConfigError(f"--camera={name}: {address}: {reason}") from error
        self.height, self.width = self._first.height, self._first.width
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or _STATED_FPS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the camera. Safe to call twice."""
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def stream(self, start: int = 0) -> Iterator[Picture]:
        """The pictures as they come, the first of them at 0 s; see `FrameSource`. Once only.

        Raises:
          ValueError: start is not 0: what was not kept is gone.
          VideoError: the camera gives no more, or pictures of another size.
        """
        if start:
            raise ValueError(f"start = {start}: a camera has no frames but the next")
        return self._pictures()

    def _pictures(self) -> Iterator[Picture]:
        began, first = time.monotonic(), self._first.time
        frame = self._first
        while frame is not None:
            seconds = time.monotonic() - began
            if frame.time is not None and first is not None:  # when it was taken, not when we came to read it
                seconds = max(0.0, float(frame.time - first))
            if self._limit is not None and seconds > self._limit:
                return
            if (frame.height, frame.width) != (self.height, self.width):
                raise VideoError(
                    f"camera {self._name}", f"it now gives {frame.width} x {frame.height} pixels"
                )
            yield Picture(frame.to_ndarray(format="rgb24"), seconds)
            frame = self._next()

    def _next(self) -> Any:
        """The next picture, once there is one; None if there is no further one."""
        while self._container is not None:
            try:
                return next(self._frames)
            except StopIteration:
                return None
            except BlockingIOError:  # some systems' devices do not wait
                time.sleep(_PAUSE)
                self._frames = self._container.decode(self._stream)  # an iterator ends with its first error
            except (self._av.FFmpegError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise VideoError(f"camera {self._name}", f"it gives no more pictures ({reason})") from error
        return None
