"""What a call takes and gives, and its static description."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int

FRAME, CLIP = "recurrent_frame", "recurrent_clip"


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


class Memory(NamedTuple):
    """What a block remembers of the frames before a clip, of B streams with P tokens each.

    Attributes:
      taps: x of the J - 1 frames before, oldest first.
      h: state of the recurrence, at least float32.
    """

    taps: tuple[Float[Array, "B P E"], ...]
    h: Float[Array, "B P E"]


class Clip(NamedTuple):
    """Frames of B streams with P tokens each.

    Attributes:
      branches: x | y, side by side.
      positions: frames since the start of the segment; 0: nothing before it counts.
      memory: of the frames before; None: there were none.
    """

    branches: Float[Array, "B T P E2"]
    positions: Int[Array, "B T"]
    memory: Memory | None


class BlockParams(NamedTuple):
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


class ClipResult(NamedTuple):
    """Attributes:
    gated: h * gelu(y), in the branches' dtype.
    h: state after the last frame, at least float32.
    """

    gated: Float[Array, "B T P E"]
    h: Float[Array, "B P E"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A call as dispatch sees it: everything an implementation may refuse.

    Attributes:
      op: "recurrent_frame" or "recurrent_clip".
      platform, capability, device: what the program is compiled for (`kernels.common.dispatch.Target`).
      dtype: of the branches.
      state_dtype: of h.
      blocks_dtype: of the gates' maps.
      others: dtypes of taps and of all other parameters, each once.
      rows: R; of a clip the P that are neighbours in memory.
      width, block, taps: E, S, J.
      batch, frames: B, T; 1 for one frame.
    """

    op: str
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
    batch: int
    frames: int

    def __str__(self) -> str:
        clip = f"B{self.batch} T{self.frames} " if self.op == CLIP else ""
        return f"{clip}R{self.rows} E{self.width} S{self.block} J{self.taps} {self.dtype} on {self.device}"
