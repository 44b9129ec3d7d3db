"""Forgetting Transformer (FoX) and the Transformers it is compared with."""

from models.fox import convert
from models.fox.config import FoxConfig, FoxRuntime
from models.fox.model import Fox, apply
from models.fox.parameters import (
    count_params,
    decay_mask,
    flops_per_token,
    init_params,
    param_axes,
    param_specs,
    trainable_mask,
)
from models.fox.state import FoxState, init_state
from models.fox.statistics import FoxStats

__all__ = [
    "Fox",
    "FoxConfig",
    "FoxRuntime",
    "FoxState",
    "FoxStats",
    "apply",
    "convert",
    "count_params",
    "decay_mask",
    "flops_per_token",
    "init_params",
    "init_state",
    "param_axes",
    "param_specs",
    "trainable_mask",
]
