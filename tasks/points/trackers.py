"""What follows points through a stream of frames: the protocol, and TAPNext behind it."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from models import tapnext
from models.common.shapes import Params
from tasks.points.strokes import Size


@runtime_checkable
class Found(Protocol):
    """What a tracker says of its S slots in T frames; NaN in slots that are free or wait for their frame."""

    @property
    def tracks_yx(self) -> np.ndarray:
        """[S, T, 2] float32, (y, x) in pixels of the tracker's `units`."""
        ...

    @property
    def visible_logits(self) -> np.ndarray:
        """[S, T] float32, of the point being visible."""
        ...

    @property
    def certainty(self) -> np.ndarray:
        """[S, T] float32, probability of being near the track."""
        ...


@runtime_checkable
class PointTracker(Protocol):
    """One stream, before its first frame or after any."""

    def add(self, query_tyx: Float[np.ndarray, "n 3"]) -> np.ndarray:
        """Fills the lowest free slots: frame (the next or a later one), y, x in `units`."""
        ...

    def step(self, video: UInt8[np.ndarray, "T h w 3"]) -> Found:
        """The next frames."""
        ...


@runtime_checkable
class TrackerModel(Protocol):
    """A model that trackers are made of.

    Attributes:
      frame_size: (height, width) of the frames it takes.
      units: (height, width) of the image in whose pixels it takes queries and gives tracks.
    """

    frame_size: Size
    units: Size

    def tracker(self, slots: int) -> PointTracker:
        """One with free slots only, before its first frame."""
        ...


class TAPNextModel:
    """A TAPNext as a `TrackerModel`.

    Args:
      config, runtime, params: the model and how it is run.
      frame_size: (height, width) of the frames; None: the native size.
      radius: of certainty, pixels of the native image.

    Raises:
      ValueError: a size that the patches do not divide, or a radius that is not positive.
    """

    def __init__(
        self,
        config: tapnext.TAPNextConfig,
        runtime: tapnext.TAPNextRuntime,
        params: Params,
        frame_size: Size | None = None,
        radius: float = 8.0,
    ):
        self.units, self.frame_size = config.image_size, frame_size or config.image_size
        if not radius > 0:
            raise ValueError(f"radius of certainty = {radius:g}: must be positive (pixels)")
        if any(side % patch for side, patch in zip(self.frame_size, config.patch_size, strict=True)):
            raise ValueError(
                f"frames of {self.frame_size} (height, width): must be multiples of the patch size "
                f"{config.patch_size}"
            )
        self._config, self._runtime, self._radius = config, runtime, radius
        self._params = tapnext.prepare_params(params, runtime.compute_dtype)

    def tracker(self, slots: int) -> PointTracker:
        """See `TrackerModel`."""
        return tapnext.SlotTracker(
            self._config,
            self._params,
            slots,
            runtime=self._runtime,
            image_size=self.frame_size,
            radius=self._radius,
        )
