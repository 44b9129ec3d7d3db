"""Frames to mp4 files: data sets whose every frame is coded alone, and films for people to look at.

Data (`encode_mp4`): constant quantiser, key frames only: what a frame decodes to depends on that frame and
nothing else, so the codec cannot give away the order in which frames were shown. The encoder is MPEG-4
part 2, which every build of FFmpeg has. Films (`Mp4Writer`): written frame by frame, in H.264 if possible.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need

CODEC = "mpeg4"
_QUANTISER = 3  # of 1..31: errors of some 3 grey levels, mostly in colour
_LAMBDA = 118  # FFmpeg's unit of it
_FILM_CODEC = "libx264"


def encode_mp4(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]] | UInt8[np.ndarray, "T H W 3"], fps: float = 12.0
) -> bytes:
    """An mp4 file of the frames. The same frames give the same bytes (with the same FFmpeg).

    Args:
        frames: RGB, of one size, even height and width.
        fps: rate.

    Raises:
        ValueError: no frames, or odd sizes, which the codec does not have.
        ImportError: PyAV is missing.
    """
    av = need("av", "encoding video")
    if len(frames) == 0 or frames[0].shape[0] % 2 or frames[0].shape[1] % 2:
        raise ValueError("need at least one frame, of even height and width")
    file = io.BytesIO()
    options = {"flags": "+qscale", "global_quality": str(_LAMBDA * _QUANTISER)}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(CODEC, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


class Mp4Writer:
    """An mp4 file for people to look at, written frame by frame in constant memory. A context manager.

    However it is left, the file is closed properly: it plays up to the last frame written.

    Args:
        path: of the file; one that is there is replaced.
        height, width: of the frames, in pixels; even.
        fps: rate.
        codec: encoder; None: H.264 (libx264) if this FFmpeg has it, else MPEG-4 part 2.

    Attributes:
        codec: the encoder used.
        frames: written so far.

    Raises:
        ValueError: odd or empty sizes, or a rate that is not positive.
        ImportError: PyAV is missing.
    """

    def __init__(self, path: Path | str, height: int, width: int, fps: float, codec: str | None = None):
        if height < 2 or width < 2 or height % 2 or width % 2 or not fps > 0:
            raise ValueError(
                f"frames of {width} x {height} pixels at {fps} a second: need an even width and height, "
                "and a rate above 0"
            )
        self._av = need("av", "encoding video")
        self.codec = codec or (_FILM_CODEC if _FILM_CODEC in self._av.codecs_available else CODEC)
        self.frames, self._size = 0, (height, width)
        # Absolute, so that no name can be taken for an address.
        with self._as_os_error():
            self._container = self._av.open(str(Path(path).absolute()), "w", format="mp4")
        try:
            self._stream = self._add_stream(_film_rate(fps, self.codec))
        except BaseException:
            self._container.close()
            raise

    def _add_stream(self, rate: Fraction) -> Any:
        options = {"flags": "+qscale", "global_quality": str(_LAMBDA * _QUANTISER)}
        if self.codec == _FILM_CODEC:
            options = {"crf": "20", "preset": "veryfast"}
        stream = self._container.add_stream(self.codec, rate=rate, options=options)
        stream.height, stream.width = self._size
        stream.pix_fmt = "yuv420p"
        return stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Adds an RGB frame. Raises ValueError for another size than the file's, and OSError."""
        if frame.shape[:2] != self._size:
            raise ValueError(f"frame of {frame.shape[:2]}, the file's are {self._size} (height, width)")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self._stream.codec_context.framerate
        with self._as_os_error():
            self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Ends the file. Safe to call twice. Raises OSError."""
        container, self._container = self._container, None
        if container is None:
            return
        with self._as_os_error():
            try:
                if self.frames:
                    container.mux(self._stream.encode(None))
            finally:
                container.close()

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """PyAV has errors of its own for what the system refuses."""
        try:
            yield
        except self._av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise OSError(error.errno, error.strerror) from error


def _film_rate(fps: float, codec: str) -> Fraction:
    """A rate as a fraction the codec can state: in MPEG-4 part 2, both its parts have 16 bits."""
    if codec == _FILM_CODEC:
        return Fraction(fps).limit_denominator(1001)
    return Fraction(min(fps, 65535.0)).limit_denominator(max(1, min(1001, int(65535 / fps))))
