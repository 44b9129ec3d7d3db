"""What a video file says before it is decoded: its pictures' times, where one can start, what it lacks."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from tasks.common.optional import need
from tasks.common.video.errors import VideoError


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a file without decoding more than one frame.

    frames: at the constant rate `fps`; `pictures` are those in the file.
    height, width: after rotation, in pixels.
    rotation: degrees counter-clockwise the stored pictures are turned by.
    constant_rate: whether frame i simply is picture i.
    codec: name of the decoder.
    """

    frames: int
    pictures: int
    fps: float
    height: int
    width: int
    rotation: int
    constant_rate: bool
    codec: str

    @property
    def seconds(self) -> float:
        """Length."""
        return self.frames / self.fps


class Packets(NamedTuple):
    """The pictures of a file.

    Attributes:
      times: [n], when each is shown, ascending, in ticks of the stream's time base.
      keys: [k], indices of those that can be decoded without others.
      seekable: whether a picture can be found by its time.
      doubtful: pictures are stored in another order than shown, with stamps that do not say so.
      cut_short: what is missing at the file's end, in words; "": nothing is known to be.
    """

    times: Int[np.ndarray, " n"]
    keys: Int[np.ndarray, " k"]
    seekable: bool
    doubtful: bool
    cut_short: str


def read_packets(
    container: Any,
    stream: Any,
    *,
    name: str,
    most: int,
    check_time: Callable[[], None],
    tolerated: Callable[[Exception], str] | None,
) -> Packets:
    """Reads a file to its end.

    Args:
      container, stream: of PyAV.
      name: for messages.
      most: packets, before the file is refused.
      check_time: called now and then; raises when it takes too long.
      tolerated: a file that breaks off is read as far as it goes, and this puts PyAV's error in words (or
        raises it); None: it is refused.

    Raises:
      VideoError: no pictures, too many, or fewer than the header says.
    """
    times, keys = array("q"), bytearray()
    moved, broken = False, ""

    def packets() -> Iterator[Any]:
        nonlocal broken
        try:
            yield from container.demux(stream)
        except need("av", "decoding video").FFmpegError as error:
            if tolerated is None:
                raise
            broken = tolerated(error)

    for packet in packets():
        if packet.size == 0 or packet.is_discard:  # discarded: cut off by an edit list
            continue
        check_time()
        moved = moved or (packet.pts is not None and packet.pts != packet.dts)
        stamp = packet.pts if packet.pts is not None else packet.dts
        # Without time stamps (raw streams, some AVI): pictures are counted as they come.
        times.append(len(times) if stamp is None else int(stamp))
        keys.append(int(bool(packet.is_keyframe) and stamp is not None))
        if len(times) > most:
            raise VideoError(name, f"more than {most} frames")
    if not times:
        raise VideoError(name, "no frames in it")
    order = np.argsort(times, kind="stable")
    ordered = np.array(times, np.int64)[order]
    key_indices = np.flatnonzero(np.frombuffer(keys, np.uint8)[order])
    missing = _missing(stream, ordered)
    if tolerated is None and missing:
        raise VideoError(name, missing)
    if tolerated is not None:
        missing = broken or missing or _shorter_than_stated(container, stream, ordered)
    return Packets(
        ordered,
        key_indices,
        # Equal or missing stamps cannot be searched for.
        seekable=bool(np.all(np.diff(ordered) > 0)) and len(key_indices) > 0,
        doubtful=bool(stream.codec_context.has_b_frames) and not moved,
        cut_short=missing,
    )


def _covered(times: np.ndarray) -> int:
    """Ticks from the first picture to the end of the last."""
    step = int(np.median(np.diff(times))) if len(times) > 1 else 0
    return int(times[-1] - times[0]) + step


def _missing(stream: Any, times: np.ndarray) -> str:
    """In words, that there are fewer pictures than the header counts; "" if there are not."""
    found, announced = len(times), int(stream.frames or 0)
    # AVI also counts pictures that are not stored, as nothing had changed: so time must be missing too.
    fewer = found < announced - max(2, announced // 50)
    if fewer and _covered(times) < 0.95 * float(stream.duration or np.inf):
        return f"truncated: {found} of {announced} frames are there"
    return ""


def _shorter_than_stated(container: Any, stream: Any, times: np.ndarray) -> str:
    """In words, that the pictures end before the header says; "" if not.

    Not every container counts its pictures, and sound may last longer: this is no reason to refuse a file.
    """
    seconds = _covered(times) * float(stream.time_base or 0)
    stated = float(container.duration or 0) / need("av", "decoding video").time_base
    if len(times) > 1 and seconds < 0.95 * stated:
        return f"its pictures end after {seconds:.1f} s, its header says {stated:.1f} s"
    return ""
