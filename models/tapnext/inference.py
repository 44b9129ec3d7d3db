"""Parameters as trackers use them: cast, joined and brought to the device once."""

import jax
from jax.typing import DTypeLike

from kernels.common.dispatch import target
from models.common.joined import is_joined, join_params
from models.common.shapes import Params
from models.tapnext.parameters import cast_params


def prepare_params(params: Params, dtype: DTypeLike) -> Params:
    """The canonical tree in the form that inference is fastest with; results are the same up to rounding.

    What `apply` would cast at every call is cast; on a GPU maps of one input are joined, too. What is joined
    already is returned as it is, so trackers may be given either form.

    Args:
      params: canonical tree, of arrays on the host or on a device.
      dtype: that the products run in (`TAPNextRuntime.compute_dtype`): see `cast_params`.
    """
    if is_joined(params):
        return params
    cast = cast_params(params, dtype)
    return jax.device_put(join_params(cast) if target().platform == "gpu" else cast)
