"""The gated product of an MLP: both halves of one map, the GELU of the gate and their product as one op."""

from kernels.gated_matmul.api import explain, gated_matmul

__all__ = ["explain", "gated_matmul"]
