"""Forgetting attention (arXiv 2503.02130) with adaptive computation pruning (arXiv 2504.06949)."""

from kernels.forgetting_attention.api import attend_partial, explain, forgetting_attention, merge_partials
from kernels.forgetting_attention.arguments import check_values
from kernels.forgetting_attention.config import RESIDUAL_NAMES, TileConfig
from kernels.forgetting_attention.gates import gate_sums
from kernels.forgetting_attention.pruning import (
    acp_threshold,
    prune_bounds,
    threshold_from_bound,
    visited_fraction,
)

__all__ = [
    "RESIDUAL_NAMES",
    "TileConfig",
    "acp_threshold",
    "attend_partial",
    "check_values",
    "explain",
    "forgetting_attention",
    "gate_sums",
    "merge_partials",
    "prune_bounds",
    "threshold_from_bound",
    "visited_fraction",
]
