"""The gated MLP of the recurrent block: its gate goes through a GELU."""

from typing import Literal

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.gated_matmul import gated_matmul
from models.common.joined import HALVES, JOINT, UP
from models.common.layers import linear, recomputed
from models.common.shapes import Params
from models.common.sharding import active_mesh, gathered
from models.common.vit import gelu

GatedMLPImplementation = Literal["xla", "pallas_mosaic_gpu"]


def gated_gelu_mlp(
    x: Float[Array, "*B D"],
    params: Params,
    dtype: DTypeLike,
    implementation: GatedMLPImplementation | None = None,
) -> Float[Array, "*B D"]:
    """(gelu(x W_0 + b_0) * (x W_1 + b_1)) W_down + b_down.

    Args:
      params: "up" {"kernel" [2, D, F], "bias" [2, F]} (or joined, see `models.common.joined`), "down".
      implementation: of what comes before W_down (`kernels.gated_matmul`), where parameters are joined; None
        chooses.

    Raises:
      ValueError: joined parameters, a kernel by name and a mesh: kernels see one device's arrays.
    """
    if UP in params:
        up = params[UP]
        gate, value = (linear(x, {"kernel": up["kernel"][i], "bias": up["bias"][i]}, dtype) for i in range(2))
        hidden = recomputed(lambda gate, value: gelu(gate) * value)(gate, value)
    else:
        if active_mesh() is not None:
            if implementation == "pallas_mosaic_gpu":
                raise ValueError(
                    f"gated_mlp = {implementation!r} is of one device; under a mesh it must be 'xla' or None"
                )
            implementation = "xla"
        both = params[JOINT.join(HALVES)]
        kernel, bias = (gathered(both[leaf].astype(dtype)) for leaf in ("kernel", "bias"))
        hidden = gated_matmul(x.astype(dtype), kernel, bias, implementation=implementation)
    return linear(hidden, params["down"], dtype)
