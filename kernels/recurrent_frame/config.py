"""What a call takes and gives, and its static description."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Frame(NamedTuple):
    """A frame and the memory of those before it. R rows: the tokens of all streams, which never mix.

    Attributes:
      branches: x | y, side by side.
      taps: x of the J - 1 frames before, oldest first.
      h: state of the recurrence, at least float32.
      positions: frames since the start of the row's segment; 0: nothing before it counts.
    """

    branches: Float[Array, "R E2"]
    taps: tuple[Float[Array, "R E"], ...]
    h: Float[Array, "R E"]
    positions: Int[Array, " R"]


class FrameParams(NamedTuple):
    """Attributes:
    conv_kernel, conv_bias: of the convolution; the last row multiplies the current frame.
    gate_blocks: of G groups of S channels, maps to the input gate | the recurrence gate.
    gate_bias: of both gates, side by side.
    rate: 8 softplus(Lambda).
    """

    conv_kernel: Float[Array, "J E"]
    conv_bias: Float[Array, " E"]
    gate_blocks: Float[Array, "G S S2"]
    gate_bias: Float[Array, " E2"]
    rate: Float[Array, " E"]


class FrameResult(NamedTuple):
    """Attributes:
    gated: h * gelu(y), in the branches' dtype.
    h: state after the frame, in the state's dtype.
    newest: x, for later frames.
    """

    gated: Float[Array, "R E"]
    h: Float[Array, "R E"]
    newest: Float[Array, "R E"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as dispatch sees it: everything an implementation may refuse.

    Attributes:
      platform, capability, device: what the program is compiled for (`kernels.common.dispatch.Target`).
      dtype: of the branches.
      state_dtype: of h.
      blocks_dtype: of the gates' maps.
      others: dtypes of taps and of all other parameters, each once.
      rows, width, block, taps: R, E, S, J.
    """

    platform: str
    capability: str | None
    device: str
    dtype: str
    state_dtype: str
    blocks_dtype: str
    others: tuple[str, ...]
    rows: int
    width: int
    block: int
    taps: int

    def __str__(self) -> str:
        return f"R{self.rows} E{self.width} S{self.block} J{self.taps} {self.dtype} on {self.device}"
