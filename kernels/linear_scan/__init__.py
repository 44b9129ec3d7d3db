"""Linear recurrences over time, h_t = a_t h_(t-1) + x_t, and that of the RG-LRU (arXiv 2402.19427)."""

from kernels.linear_scan.api import explain, linear_scan, rglru_scan
from kernels.linear_scan.config import DECAY_SCALE, RESIDUAL_NAMES
from kernels.linear_scan.rglru import decay_rate, input_scale, log_decay, rglru_step, sqrt_clip
from kernels.linear_scan.sharded import sharded_linear_scan, sharded_rglru_scan

__all__ = [
    "DECAY_SCALE",
    "RESIDUAL_NAMES",
    "decay_rate",
    "explain",
    "input_scale",
    "linear_scan",
    "log_decay",
    "rglru_scan",
    "rglru_step",
    "sharded_linear_scan",
    "sharded_rglru_scan",
    "sqrt_clip",
]
