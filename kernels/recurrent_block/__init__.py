"""Recurrent blocks, from their two branches to what enters their last map: a frame or a clip as one op."""

from kernels.recurrent_block.api import explain, has_kernel, recurrent_clip, recurrent_frame
from kernels.recurrent_block.config import BlockParams, Clip, ClipResult, Frame, FrameResult, Memory

__all__ = [
    "BlockParams",
    "Clip",
    "ClipResult",
    "Frame",
    "FrameResult",
    "Memory",
    "explain",
    "has_kernel",
    "recurrent_clip",
    "recurrent_frame",
]
