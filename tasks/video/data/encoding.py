"""Frames to mp4 files whose every frame is coded alone.

Constant quantiser, key frames only: what a frame decodes to depends on that frame and nothing else, so the
codec cannot give away the order in which frames were shown. The encoder is MPEG-4 part 2, which every build
of FFmpeg has.
"""

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need

CODEC = "mpeg4"
_QUANTISER = 3  # of 1..31: errors of some 3 grey levels, mostly in colour
_LAMBDA = 118  # FFmpeg's unit of it


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
