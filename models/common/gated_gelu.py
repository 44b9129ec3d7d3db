"""The gated MLP of the recurrent block: its gate goes through a GELU."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.common.joined import HALVES, UP, linear_each
from models.common.layers import linear, recomputed
from models.common.shapes import Params
from models.common.vit import gelu


def gated_gelu_mlp(x: Float[Array, "*B D"], params: Params, dtype: DTypeLike) -> Float[Array, "*B D"]:
    """(gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down.

    Args:
      params: "up" {"kernel" [2, D, F], "bias" [2, F]} (or joined, see `models.common.joined`), "down".
    """
    if UP in params:
        up = params[UP]
        gate, value = (linear(x, {"kernel": up["kernel"][i], "bias": up["bias"][i]}, dtype) for i in range(2))
    else:
        gate, value = linear_each(x, params, HALVES, dtype)
    return linear(recomputed(lambda gate, value: gelu(gate) * value)(gate, value), params["down"], dtype)
