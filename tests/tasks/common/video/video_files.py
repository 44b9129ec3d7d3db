"""Small videos in their real formats, and the things that go wrong with them."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FINE = {"qmin": "1", "qmax": "2"}  # else differences of 5 grey levels are lost
_COARSE = ("mpeg4", "mpeg2video")
STEP = 5  # grey levels from one frame to the next


def numbered_frames(count: int, height: int = 32, width: int = 48, first: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: frame i is grey 10 + 5 (i mod 48), brighter in the top left quarter."""
    grey = 10 + STEP * ((np.arange(count) + first) % 48)
    frames = np.broadcast_to(grey[:, None, None, None], (count, height, width, 3)).astype(np.uint8).copy()
    frames[:, : height // 2, : width // 2] = np.minimum(frames[:, : height // 2, : width // 2] + 10, 255)
    return frames


def number_of(frame: np.ndarray) -> int:
    """The i of a decoded frame of `numbered_frames` (below 48)."""
    return round((float(frame[-8:, -8:].mean()) - 10) / STEP)


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    fps: int = 10,
    gop: int = 12,
    stamps: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
    faststart: bool = False,
) -> Path:
    """A video of the frames; `stamps` are their times in ticks of 1 / fps (default: 0, 1, ...)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if codec in _COARSE:
        options = {**FINE, **(options or {})}
    flags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", format=format, options=flags) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, fps)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = i if stamps is None else stamps[i]
            picture.time_base = Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path, seconds: float = 0.5) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = np.zeros((1, int(16000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_empty_video(path: Path) -> Path:
    """A video file with a video track and no frames in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()
    return path


_MATRICES = {  # clockwise turn a player makes -> a, b, c, d of the track's matrix, 16.16 fixed point
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def mark_rotated(path: Path, clockwise: int) -> Path:
    """Writes a rotation into the track header of an mp4 file, as phones do."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    matrix = header + 4 + 4 * 5 + 8 + 8  # version and flags; times, track, duration; layer and volume
    a, b, c, d = (value * 65536 for value in _MATRICES[clockwise])
    struct.pack_into(">9i", content, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def jpeg(frame: np.ndarray, quality: int = 95) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return file.getvalue()
