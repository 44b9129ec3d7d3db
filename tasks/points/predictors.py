"""What evaluation asks of a tracker: a video and queries in, tracks out. Models and controls alike."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8


class Prediction(NamedTuple):
    """Tracks of the queries of one video, in its pixels.

    Attributes:
      tracks_yx: where each point is in every frame, also where it is hidden.
      visible: whether it is said to be seen.
    """

    tracks_yx: Float[np.ndarray, "Q T 2"]
    visible: Bool[np.ndarray, "Q T"]


@runtime_checkable
class Predictor(Protocol):
    """Tracks points through a video. Any function of this kind can be evaluated."""

    def __call__(
        self, video: UInt8[np.ndarray, "T H W 3"], query_tyx: Float[np.ndarray, "Q 3"]
    ) -> Prediction:
        """Args:
        video: all frames.
        query_tyx: Q >= 1 points: a frame (a whole number below T), y and x in pixels of the video.
        """
        ...
