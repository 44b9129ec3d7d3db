"""Parameters as inference uses them: cast, joined and brought to the device once."""

from jax.typing import DTypeLike

from models.common import joined
from models.common.params import cast_params
from models.common.shapes import Params


def prepare_params(params: Params, dtype: DTypeLike) -> Params:
    """The canonical tree in the form that inference is fastest with, see `models.common.joined.prepared`.

    Args:
      params: canonical tree, of arrays on the host or on a device.
      dtype: that the products run in (`TRecViTRuntime.compute_dtype`).
    """
    return joined.prepared(params, dtype, cast_params)
