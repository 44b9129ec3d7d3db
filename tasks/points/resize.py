"""The resize of TAP-Vid's evaluation: Lanczos with antialiasing on uint8, the shape not kept.

Another filter, or floats, changes the numbers: published results use this one.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need


def resize_frame(frame: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """One frame at height x width, stretched; unchanged if it has that size.

    Raises:
      ImportError: Pillow is missing.
    """
    if frame.shape[:2] == (height, width):
        return frame
    image_module = need("PIL.Image", "resizing frames")
    image = image_module.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), image_module.Resampling.LANCZOS))


def resize_video(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]], height: int, width: int
) -> UInt8[np.ndarray, "T h w 3"]:
    """Every frame by `resize_frame`. Frames may be read one by one: only the results are kept.

    Raises:
      ValueError: no frames.
      ImportError: Pillow is missing.
    """
    resized = [resize_frame(frame, height, width) for frame in frames]
    if not resized:
        raise ValueError("a video without frames cannot be resized")
    return np.stack(resized)
