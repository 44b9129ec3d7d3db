"""One frame of a recurrent block, from its two branches to what enters its last map, as one op."""

from kernels.recurrent_frame.api import explain, has_kernel, recurrent_frame
from kernels.recurrent_frame.config import Frame, FrameParams, FrameResult

__all__ = ["Frame", "FrameParams", "FrameResult", "explain", "has_kernel", "recurrent_frame"]
