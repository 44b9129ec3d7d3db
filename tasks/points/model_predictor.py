"""A TAPNext behind the call that evaluation makes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from models import tapnext
from models.common.shapes import Params
from models.tapnext.clips import track_clip
from tasks.points.predictors import Prediction

_POINTS = 64  # numbers of points are rounded up to multiples of this: each number is compiled once


class ModelPredictor:
    """Tracks points by a model; see `Predictor`.

    All queries of a video are tracked together, as in the official evaluation: points see each other.

    Args:
      config, runtime, params: the model and how it is run.
      backward: also track from each query to the start, in a pass over the reversed video. If not, points
        stay where they are asked for, hidden.
      chunk: frames on the device at a time.
      certainty_radius: visible only if the point is likely to be within so many pixels of the native image of
        where it is said to be; None: not looked at.

    Raises:
      ValueError: chunk below 1, or a radius that is not positive.
    """

    def __init__(
        self,
        config: tapnext.TAPNextConfig,
        runtime: tapnext.TAPNextRuntime,
        params: Params,
        *,
        backward: bool = True,
        chunk: int = 16,
        certainty_radius: float | None = None,
    ):
        if chunk < 1:
            raise ValueError(f"chunk = {chunk}: must be at least 1 frame")
        if certainty_radius is not None and not certainty_radius > 0:
            raise ValueError(f"certainty_radius = {certainty_radius}: must be positive")
        self._config, self._runtime = config, runtime
        self._params = tapnext.prepare_params(params, runtime.compute_dtype)
        self._backward, self._chunk, self._radius = backward, chunk, certainty_radius

    def __call__(
        self, video: UInt8[np.ndarray, "T H W 3"], query_tyx: Float[np.ndarray, "Q 3"]
    ) -> Prediction:
        """Tracks points; see `Predictor`. The video's size is a multiple of the patch size."""
        # The model's queries are in pixels of its native image, whatever the video's size.
        scale = np.asarray(self._config.image_size) / video.shape[1:3]
        found = track_clip(
            self._config,
            self._params,
            video,
            query_tyx * np.asarray([1.0, *scale]),
            runtime=self._runtime,
            both_ways=self._backward,
            chunk=self._chunk,
            radius=self._radius or 8.0,
            fill=_POINTS,
            anywhere=True,
        )
        visible = found.visible
        if self._radius is not None:
            known = np.isfinite(found.visible_logits)
            gated = tapnext.is_visible(jnp.asarray(found.visible_logits), jnp.asarray(found.certainty))
            visible = np.asarray(gated) & known
        tracks = found.tracks_yx / scale.astype(np.float32)
        tracks = np.where(np.isnan(tracks), query_tyx[:, None, 1:].astype(np.float32), tracks)
        return Prediction(tracks.astype(np.float32), visible)
