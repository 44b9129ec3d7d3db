"""Video files to RGB frames: probed by their packets, decoded only from the key frames that are needed.

A video is seen as frames at a constant rate. Where the file's own rate varies (screen recordings, phones),
frame i is the picture that is on the screen at time i / fps, so that equal strides are equal times; the rate
is the file's average. Rotation marks are applied. A file is never trusted: sizes, counts and time are
limited, only files are opened, and only by the demuxers of known containers.
"""

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Int, UInt8

from tasks.common.optional import need
from tasks.common.video.errors import VideoError, VideoTimeout
from tasks.common.video.packets import VideoInfo, read_packets

VIDEO_ENDINGS = (
    ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
# Play lists (hls, concat, ...) name other files and addresses: they are not among these.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,asf,flv,ivf,h264,hevc,gif"
_ATTACHED = "ATTACHED_PIC"
_TRIED = 16  # pictures whose order is compared with their stamps, where these are doubtful


@dataclass(frozen=True)
class Limits:
    """How much of one file is read before it is refused.

    pixels: of a frame.
    frames: of a file.
    decoded: frames decoded for one call, those between a key frame and the wanted ones included.
    seconds: of wall time per call.
    """

    pixels: int = 8192 * 4608
    frames: int = 1_000_000
    decoded: int = 20_000
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("pixels", "frames", "decoded", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"limit on {name} = {getattr(self, name)}: must be above 0")


class VideoFile:
    """One open video file. Close it, or use it as a context manager.

    Args:
        source: a path, or the content of a file.
        name: for messages (default: the path).
        limits: beyond which the file is refused.
        partial: read what is there of a file that ends before its header says, instead of refusing it.

    Attributes:
        info: see `VideoInfo`.
        cut_short: with `partial`, what is missing in the file, in words; "" if nothing is known to be.

    Raises:
        VideoError: not a video, empty, truncated, only sound, too large.
        VideoTimeout: reading it took too long.
        ImportError: PyAV is missing.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        name: str = "",
        limits: Limits | None = None,
        *,
        partial: bool = False,
    ):
        self._av = need("av", "decoding video")
        self.name = name or (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source))
        self._source, self._limits = source, limits or Limits()
        self._partial, self.cut_short = partial, ""
        self._deadline = time.monotonic() + self._limits.seconds
        self._container: Any = None
        self._kept: Any = None  # the first picture, which probing has to decode
        try:
            self._open()
            self._scan()
            self.info = self._probe()
        except (self._av.FFmpegError, OSError, UnicodeDecodeError) as error:
            self.close()
            raise self._named(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def read(self, indices: Sequence[int] | Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames of the given indices, RGB, rotated; equal indices share one array.

        Args:
            indices: in ascending order, 0 <= index < info.frames.

        Raises:
            VideoError: a frame cannot be decoded, or more than the limits allow would have to be.
            VideoTimeout: it took too long.
            ValueError: indices out of order or range.
        """
        wanted = np.asarray(indices, np.int64)
        if np.any(np.diff(wanted) < 0):
            raise ValueError(f"{self.name}: frame indices must ascend")
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < self.info.frames:
            raise ValueError(
                f"{self.name}: frames {wanted[0]}..{wanted[-1]} of {self.info.frames} were asked for"
            )
        self._deadline = time.monotonic() + self._limits.seconds
        pictures = self._pictures(wanted)
        try:
            arrays = self._decode(np.unique(pictures))
        except (self._av.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise self._named(error) from error
        return [arrays[int(picture)] for picture in pictures]

    def stream(self, step: int = 1, start: int = 0) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """All frames in order, one at a time: those that `read` gives, in constant memory.

        The file is decoded once, from its start or the key frame before `start`. The limits on time and on
        decoded frames count from one frame to the next. Do not `read` between two frames.

        Args:
            step: every so many frames only: start, start + step, ...
            start: the first one.

        Yields:
            RGB, rotated. Where a picture stays on the screen it is the same array again.

        Raises:
            VideoError: a frame cannot be decoded; those before it were given.
            VideoTimeout: the next frame took too long.
            ValueError: step below 1.
        """
        if step < 1:
            raise ValueError(f"step = {step}: must be at least 1")
        return self._stream_from(start, step)

    def _stream_from(self, start: int, step: int) -> Iterator[np.ndarray]:
        shown, picture_array = -1, np.zeros((0, 0, 3), np.uint8)
        for index in range(start, self.info.frames, step):
            picture = int(self._pictures(np.asarray([index], np.int64))[0])
            if picture != shown:
                picture_array, shown = self._following(picture, first=index == start), picture
            yield picture_array

    def _following(self, picture: int, first: bool) -> np.ndarray:
        """The RGB array of a later picture than those decoded so far; of the `first`, after seeking."""
        self._deadline = time.monotonic() + self._limits.seconds
        try:
            if first:
                self._seek(picture)
            frame, _ = self._forward_to(picture, self._limits.decoded, again=first)
            return self._array(frame, picture)
        except (self._av.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> VideoError | VideoTimeout:
        """An error of PyAV or of the system as ours."""
        if isinstance(error, self._av.error.ExitError):  # what FFmpeg calls its own limit on time
            return self._late()
        if isinstance(error, FileNotFoundError):
            return VideoError(self.name, "no such file")
        if isinstance(error, self._av.FFmpegError):
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return VideoError(self.name, f"damaged, truncated, or not a video ({reason})")
        return VideoError(self.name, f"cannot be read ({getattr(error, 'strerror', None) or error})")

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise self._late()

    def _late(self) -> VideoTimeout:
        return VideoTimeout(
            f"{self.name}: reading it took more than {self._limits.seconds:g} s: raise data.max_seconds, or "
            "leave the file out"
        )

    def _open(self) -> None:
        source = self._source
        if isinstance(source, bytes):
            opened: Any = io.BytesIO(source)
            empty = not source
        else:
            path = Path(source).absolute()  # so that no name can be taken for an address
            empty = path.stat().st_size == 0
            opened = str(path)
        if empty:
            raise VideoError(self.name, "empty file")
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        seconds = self._limits.seconds
        self._container = self._av.open(opened, options=options, timeout=(seconds, seconds))
        streams = [s for s in self._container.streams.video if _ATTACHED not in str(s.disposition).upper()]
        if not streams:
            kinds = sorted({str(s.type) for s in self._container.streams})
            raise VideoError(self.name, f"no video in it (there is: {', '.join(kinds) or 'nothing'})")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise VideoError(self.name, "its codec is unknown")
        if context.width * context.height > self._limits.pixels:
            raise VideoError(
                self.name,
                f"frames of {context.width} x {context.height} pixels; the limit is {self._limits.pixels}",
            )
        # One thread: loaders run many readers, and tiny clips would spend their time starting threads.
        context.thread_count = 1
        context.options = {"max_pixels": str(self._limits.pixels)}

    def _scan(self) -> None:
        """Times of all pictures and key frames, from the packets."""
        found = read_packets(
            self._container,
            self._stream,
            name=self.name,
            most=self._limits.frames,
            check_time=self._check_time,
            tolerated=self._reason if self._partial else None,
        )
        self._times, self._keys, self._seekable = found.times, found.keys, found.seekable
        self._doubtful, self.cut_short = found.doubtful, found.cut_short
        self._position = len(self._times)  # index of the picture decoded last; packets were read to the end
        self._frames: Iterator[Any] = iter(())

    def _reason(self, error: Exception) -> str:
        """What is wrong with the file, after an error that only ends it."""
        named = self._named(error)
        if isinstance(named, VideoTimeout):
            raise named from error
        return named.reason

    def _probe(self) -> VideoInfo:
        first = self._first()
        if self._seekable and self._doubtful:
            self._seekable = self._stamps_hold()
        rotation = round(float(getattr(first, "rotation", 0) or 0)) % 360
        rotation = round(rotation / 90) * 90 % 360
        height, width = first.height, first.width
        if rotation in (90, 270):
            height, width = width, height
        pictures, times = len(self._times), self._times
        steps = np.diff(times)
        middle = float(np.median(steps)) if len(steps) else 0.0
        span = float(times[-1] - times[0]) * float(self._stream.time_base or 0)
        stated = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        regular = not self._seekable or not len(steps) or bool(np.all(np.abs(steps - middle) <= 0.5 * middle))
        measured = (pictures - 1) / span if self._seekable and span > 0 else 0.0
        fps = (stated or measured if regular else measured or stated) or 25.0
        frames = pictures
        if not regular:
            frames = max(1, round(span * fps) + 1)
        if frames > self._limits.frames:
            raise VideoError(self.name, f"more than {self._limits.frames} frames")
        return VideoInfo(
            frames, pictures, fps, height, width, rotation, regular, self._stream.codec_context.name
        )

    def _pictures(self, indices: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The picture in the file that each frame at the constant rate shows."""
        if self.info.constant_rate:
            return indices
        ticks = indices / self.info.fps / float(self._stream.time_base or 1)
        # A rounded stamp must not make a frame show the picture before its own.
        nearly = self._times - self._times[0] - 1
        return np.clip(np.searchsorted(nearly, ticks, side="right") - 1, 0, len(self._times) - 1)

    def _first(self) -> Any:
        """The first picture, decoded."""
        self._seek(0)
        for frame in self._frames:
            self._check(frame)
            at = self._index_of(frame)
            if at is None:
                continue
            self._position = at
            self._kept = frame if at == 0 else None
            return frame
        raise VideoError(self.name, "no frame in it can be decoded")

    def _stamps_hold(self) -> bool:
        """Whether the first pictures come in the order of their stamps; if not, they can only be counted."""
        self._seek(0)
        stamps = [frame.pts for _, frame in zip(range(_TRIED), self._frames, strict=False)]
        self._position = len(self._times)
        return stamps == self._times[: len(stamps)].tolist()

    def _check(self, frame: Any) -> None:
        self._check_time()
        if frame.width * frame.height > self._limits.pixels:
            raise VideoError(
                self.name, f"a frame of {frame.width} x {frame.height} pixels; the limit is "
                f"{self._limits.pixels}"
            )  # fmt: skip

    def _key_before(self, picture: int) -> int:
        before = int(np.searchsorted(self._keys, picture, side="right"))
        return int(self._keys[before - 1]) if before else 0

    def _seek(self, picture: int) -> None:
        """Makes `_frames` begin at or before a picture: at its key frame, or at the file's start."""
        key = self._key_before(picture) if self._seekable else 0
        if key == 0:
            # Seeking to the first stamp is not exact in every container; opening anew is.
            self._container.close()
            self._open()
        else:
            self._container.seek(int(self._times[key]), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._position = key - 1

    def _decode(self, pictures: Int[np.ndarray, " n"]) -> dict[int, np.ndarray]:
        """RGB arrays of ascending, distinct pictures."""
        found: dict[int, np.ndarray] = {}
        left = self._limits.decoded
        for picture in map(int, pictures):
            if picture == 0 and self._kept is not None:
                found[0] = self._array(self._kept, 0)
                continue
            ahead = self._seekable and self._key_before(picture) > self._position + 1
            if picture <= self._position or ahead:
                self._seek(picture)
            frame, left = self._forward_to(picture, left)
            found[picture] = self._array(frame, picture)
        return found

    def _forward_to(self, picture: int, left: int, again: bool = True) -> tuple[Any, int]:
        """Decodes on until the picture; `left` frames at most. If it is not there, `again` from the start."""
        again = again and self._position >= 0
        for frame in self._frames:
            self._check(frame)
            left -= 1
            if left < 0:
                raise VideoError(self.name, f"more than {self._limits.decoded} frames to decode for one clip")
            at = self._index_of(frame)
            if at is None:
                continue
            self._position = at
            if at == picture:
                return frame, left
            if at > picture:
                break
        if again:  # the container could not seek exactly: from the start, it is exact
            self._container.close()
            self._open()
            self._frames, self._position = self._container.decode(self._stream), -1
            return self._forward_to(picture, left)
        raise VideoError(self.name, f"frame {picture} of {len(self._times)} cannot be decoded: damaged")

    def _index_of(self, frame: Any) -> int | None:
        """Index of a decoded picture; None for one that is before the file's first (cut off by editing)."""
        if not self._seekable or frame.pts is None:
            return self._position + 1
        at = int(np.searchsorted(self._times, frame.pts, side="right")) - 1
        return at if at >= 0 else None

    def _array(self, frame: Any, picture: int) -> UInt8[np.ndarray, "H W 3"]:
        if frame.is_corrupt:
            raise VideoError(self.name, f"frame {picture} of {len(self._times)} is damaged")
        rgb = frame.to_ndarray(format="rgb24")
        turns = self.info.rotation // 90
        return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def probe(path: Path | str, limits: Limits | None = None) -> VideoInfo:
    """`VideoInfo` of a file.

    Raises:
        VideoError, VideoTimeout: as `VideoFile`.
    """
    with VideoFile(path, limits=limits) as video:
        return video.info
