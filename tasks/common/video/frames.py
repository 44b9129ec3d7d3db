"""Clips as frames of one size: what every source gives, whether it holds video files or JPEG frames."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.decoding import Limits, VideoFile
from tasks.common.video.errors import VideoError

Fit = Literal["crop", "stretch"]


@runtime_checkable
class Clip(Protocol):
    """An opened clip. A context manager."""

    @property
    def frames(self) -> int:
        """Frames at a constant rate."""
        ...

    @property
    def fps(self) -> float:
        """Their rate."""
        ...

    def read(self, indices: Sequence[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """RGB frames of ascending indices, in the clip's own size. Raises VideoError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class FileClip:
    """A video file, or the content of one, as a clip."""

    def __init__(self, source: Any, name: str = "", limits: Limits | None = None):
        self._video = VideoFile(source, name, limits)

    @property
    def frames(self) -> int:
        return self._video.info.frames

    @property
    def fps(self) -> float:
        return self._video.info.fps

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        return self._video.read(indices)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._video.close()


class JpegClip:
    """Encoded frames (JPEG, or PNG) in memory as a clip.

    Args:
        encoded: one file's content per frame.
        name: for messages.
        fps: their rate.
        limits: beyond which frames are refused.

    Raises:
        VideoError: no frames, or too many.
    """

    def __init__(self, encoded: Sequence[bytes], name: str, fps: float = 25.0, limits: Limits | None = None):
        self._encoded, self._name, self.fps = encoded, name, fps
        self._limits = limits or Limits()
        if not encoded:
            raise VideoError(name, "no frames in it")
        if len(encoded) > self._limits.frames:
            raise VideoError(name, f"more than {self._limits.frames} frames")

    @property
    def frames(self) -> int:
        return len(self._encoded)

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        decoded = {int(i): self._decode(int(i)) for i in sorted(set(map(int, indices)))}
        return [decoded[int(i)] for i in indices]

    def _decode(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        image_module = need("PIL.Image", "decoding frames")
        try:
            image = image_module.open(io.BytesIO(self._encoded[index]), formats=("JPEG", "PNG"))
            if image.width * image.height > self._limits.pixels:
                raise VideoError(
                    self._name, f"a frame of {image.width} x {image.height} pixels; the limit is "
                    f"{self._limits.pixels}"
                )  # fmt: skip
            return np.asarray(image.convert("RGB"))
        except VideoError:
            raise
        # Pillow raises what its decoders raise, and its own error for a bomb is no OSError.
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise VideoError(self._name, f"frame {index} of {self.frames} is damaged ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


@dataclass(frozen=True)
class Window:
    """The part of every frame that is kept, and the size it is brought to.

    height, width: of the result, in pixels.
    fit: "crop": the largest window of the result's shape, so that one side of the frame is kept whole;
      "stretch": the whole frame, its shape not kept.
    position: where along the other side the window lies: 0 left or top, 0.5 middle, 1 right or bottom.
    """

    height: int
    width: int
    fit: Fit = "crop"
    position: float = 0.5

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the window in a frame of height x width, in pixels."""
        if self.fit == "stretch":
            return (0.0, 0.0, float(width), float(height))
        scale = min(height / self.height, width / self.width)
        box_height, box_width = self.height * scale, self.width * scale
        top, left = (height - box_height) * self.position, (width - box_width) * self.position
        # Rounding must not move the box past the edge.
        return (
            max(left, 0.0),
            max(top, 0.0),
            min(left + box_width, float(width)),
            min(top + box_height, float(height)),
        )

    def apply(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The window of one frame, resized with antialiasing; unchanged where nothing is to be done."""
        height, width = frame.shape[:2]
        if (height, width) == (self.height, self.width):
            return frame
        image_module = need("PIL.Image", "resizing frames")
        box = self.box(height, width)
        left, top = round(box[0]), round(box[1])
        if round(box[2] - box[0], 6) == self.width and round(box[3] - box[1], 6) == self.height:
            return frame[top : top + self.height, left : left + self.width]  # a plain crop: no blurring
        size, bilinear = (self.width, self.height), image_module.Resampling.BILINEAR
        return np.asarray(image_module.fromarray(frame).resize(size, bilinear, box=box))


def read_window(clip: Clip, indices: Sequence[int], window: Window) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of a clip, brought to the window's size.

    Args:
        clip: opened.
        indices: in any order; they may repeat.
        window: which part, which size.

    Raises:
        VideoError: as the clip's `read`.
    """
    distinct = sorted(set(map(int, indices)))
    frames = {i: window.apply(f) for i, f in zip(distinct, clip.read(distinct), strict=True)}
    return np.stack([frames[int(i)] for i in indices])
